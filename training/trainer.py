"""Training a denoiser: the step, and all that it leaves changed."""

import math
from collections.abc import Iterable
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import checkpoint
from config import Config
from datasets import Batches, Batching, Dataset
from evaluation.data_record import data_record
from model.denoiser import Denoiser
from model.models import build_denoiser
from support import distributed
from support.errors import UserError
from support.files import has_form
from training.augmentation import augment
from training.distill import Distillation, batches_of, checked_timesteps
from training.loss_sums import Window
from training.recorded import Recorded
from utils import autocast, compiled, generator, grad_scaler, log, seed_everything

METRICS = {  # of a run, and their types
    "loss_average": int | float | None, "skipped": int, "best_loss": int | float | None,
    "best_epoch": int | None,
}  # fmt: skip
LR_DECAYS = {  # the factor of lrate when `done` (0 to 1) of the decay is behind
    "none": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


def learning_rate(config: Config, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The rate of optimizer step number `step`, counted from 0.

    It rises over the first `warm_epoch` epochs, epoch by epoch as in the reference, and over the
    first `warm_step` steps; after `decay_from` of the run it falls to 0 as `lr_decay` says.
    """
    warm = min((step // steps_per_epoch + 1) / max(config.warm_epoch, 1), 1)
    warm *= min((step + 1) / max(config.warm_step, 1), 1)
    start = config.decay_from * total_steps
    done = max(step - start, 0) / (total_steps - start)
    return config.lrate * warm * LR_DECAYS[config.lr_decay](done)


def build_optimizer(config: Config, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The config's optimizer, fused: one kernel, and it can skip a step without asking the host."""
    try:
        kind = getattr(torch.optim, config.optim)
        optimizer = kind(parameters, lr=config.lrate, fused=True, **config.optim_args)
        usual = signature(kind).parameters
        for name, value in config.optim_args.items():  # of yes and no, checked at the first step
            if isinstance(usual[name].default, bool) != isinstance(value, bool):
                raise TypeError(f"{name}: found {value!r}")
        return optimizer
    except (TypeError, ValueError, RuntimeError, IndexError) as error:  # it checks as it goes
        raise UserError(f"optim_args: {error}") from None


def check_settings(config: Config) -> None:
    """Raises UserError for what a Trainer refuses of a config, whatever the data."""
    distributed.share_of_batch(config.batch_size)
    build_optimizer(config, [nn.Parameter(torch.zeros(1))])
    with torch.device("meta"):  # without its memory
        denoiser = build_denoiser(config)
    if config.distill.loss:
        checked_timesteps(config.distill, denoiser)


class Loss(nn.Module):
    """The denoiser's loss as a `forward`, of which DistributedDataParallel averages gradients.

    With `distill`, beside it the projected features that `distill.loss` is about.
    """

    def __init__(self, denoiser: Denoiser, distill: Distillation | None):
        super().__init__()
        self.denoiser = denoiser
        self.block = distill and distill.settings.block
        self.projector = distill and distill.projector

    def forward(self, *args: Tensor, **conditions: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of each image, (N,): see `Denoiser.loss`; with `distill`, also z, (N, C)."""
        if self.block is None:
            return self.denoiser.loss(*args, **conditions)
        loss, features = self.denoiser.loss(*args, **conditions, blocks=[self.block])
        return loss, self.projector(features[self.block])


class Trainer:
    """The state of a training and the step that changes it.

    `step` counts optimizer steps done, across epochs; `metrics` is what the run has found so far.
    compiles: the loss goes through torch.compile; what is saved is the same with and without.
    Raises UserError if a step takes more images than `train` has.
    """

    def __init__(
        self,
        config: Config,
        train: Dataset,
        device: torch.device,
        use_amp: bool,
        compiles: bool = False,
    ):
        self.config, self.device, self.use_amp = config, device, use_amp
        seed_everything(config.seed, "init")
        self.denoiser = build_denoiser(config).to(device)
        from training.average import Average  # slow to import

        self.ema = Average(
            self.denoiser.net,
            beta=config.ema,
            update_after_step=0,
            update_every=1,
            use_foreach=True,
            include_online_model=False,
        )  # its counters stay on the host, so that an update reads nothing back from the device
        self.ema_denoiser = build_denoiser(config, self.ema.ema_model).to(device).eval()
        self.scaler = grad_scaler(device, use_amp)
        self.window = Window(device)
        self.images_per_step = config.images_per_step
        mine = distributed.share_of_batch(config.batch_size)
        self.images_per_forward = mine.stop - mine.start
        self.part = slice(mine.start * config.accumulate, mine.stop * config.accumulate)
        how = Batching(config.seed, shuffle=True, flip=config.flip, drop_last=True)
        self.batches = Batches(
            train.images, train.labels, self.images_per_step, device, how, self.part
        )
        if not self.batches.steps_per_epoch:
            raise UserError(
                f"batch_size {config.batch_size} times accumulate {config.accumulate} is more than "
                f"the {len(train)} training images"
            )
        self.distill = None
        if config.distill.loss:
            self.distill = Distillation(
                config, self.ema_denoiser, train, self.part, use_amp, compiles
            )
        loss = Loss(self.denoiser, self.distill)
        self.parameters = list(loss.parameters())  # the network's, and a projector's
        if compiles:
            loss.forward = compiled(loss.forward, device)
        self.loss = distributed.replicated(loss)
        self.optimizer = build_optimizer(config, self.parameters)
        self.recorded = None
        alone = distributed.world_size() == 1 and not self.scaler.is_enabled()
        if compiles and device.type == "cuda" and alone:
            self.recorded = Recorded(self._update, self.optimizer, device)
        self.data = data_record(train)
        self.step = 0
        self.metrics = {"loss_average": None, "skipped": 0, "best_loss": None, "best_epoch": None}

    @property
    def total_steps(self) -> int:
        """The step that ends the run."""
        return self.config.n_step or self.config.n_epoch * self.batches.steps_per_epoch

    @property
    def epoch(self) -> int:
        """That of the last step done, counted from 0."""
        return (self.step - 1) // self.batches.steps_per_epoch

    @property
    def ends_epoch(self) -> bool:
        """Whether the last step done ended its epoch; that of the run always does."""
        return self.step % self.batches.steps_per_epoch == 0 or self.step == self.total_steps

    # one step

    def train_step(self) -> None:
        """Optimizer step number `self.step`; nothing is read back to the host."""
        config = self.config
        lr = learning_rate(config, self.step, self.batches.steps_per_epoch, self.total_steps)
        tensors = self._draw_images()
        if self.distill:
            sigma = self.denoiser.training_sigma(tensors["u"][self.part])
            tensors |= self.distill.look(self.step, sigma)
        if self.recorded:
            skipped = self.recorded.call(lr, tensors)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            skipped = self._update(**tensors)
        self.ema.update()
        if self.distill:
            self.distill.keep(skipped, self.ema.get_current_decay())
        self.step += 1

    def _update(
        self, x0: Tensor, u: Tensor, noise: Tensor, keys: Tensor | None = None, **conditions: Tensor
    ) -> Tensor:
        """The optimizer's step for what was drawn: all that happens on the device alone.

        Returns whether it was skipped, (): a loss that is not finite changes no weight.
        """
        sigma = self.denoiser.training_sigma(u[self.part])
        self.optimizer.zero_grad(set_to_none=True)
        per_image = self._backward(x0, sigma, noise, conditions, keys)
        self.scaler.unscale_(self.optimizer)
        per_image = distributed.gather_shares(per_image, self.images_per_step)
        grad_norm = clip_grad_norm_(self.parameters, self.config.grad_clip)
        if self.scaler.is_enabled():  # an overflow of the scaled gradients is no bad loss
            skipped = ~per_image.isfinite().all()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:  # the fused optimizers skip a step whose `found_inf` is 1, as they do for a scaler
            skipped = ~grad_norm.isfinite()
            self.optimizer.found_inf = skipped.float()
            self.optimizer.step()
        self.window.add(per_image, grad_norm, u, skipped)
        return skipped

    def _backward(
        self, x0: Tensor, sigma: Tensor, noise: Tensor, conditions: dict, keys: Tensor | None
    ) -> Tensor:
        """Leaves the gradient of the mean loss of all ranks' images, computed in `accumulate`
        batches. Returns the denoising losses of this rank's images, (N,)."""
        losses = []
        for batch in batches_of(len(x0), self.config.accumulate):
            given = {name: value[batch] for name, value in conditions.items()}
            with autocast(self.device, self.use_amp):
                found = self.loss(x0[batch], sigma[batch], noise[batch], **given)
            per_image, z = found if self.distill else (found, None)
            loss = per_image.mean()
            if self.distill:
                loss = loss + self.distill.loss(z, batch, keys)
            self.scaler.scale(loss / self.config.accumulate).backward()
            loss = loss.detach()  # that of the features is not finite where those of images may be
            losses.append(torch.where(loss.isfinite(), per_image.detach(), loss))
        return torch.cat(losses)

    def _draw_images(self) -> dict[str, Tensor]:
        """x0, noise and conditions of this rank's part of a step's images, and u, (N,), of all.

        Everything is drawn for the whole step and then cut, so that neither `accumulate` nor the
        number of processes changes it; but dropout is drawn batch by batch, and each rank has its
        own, rank 0 that of a single process.
        """
        config, n, rank = self.config, self.images_per_step, distributed.rank()
        seed = config.seed
        x0, y = self.batches[self.step]
        draw = generator(self.device, seed, "noise", self.step)
        u = torch.rand(n, generator=draw, device=self.device)
        noise = torch.randn((n, *x0.shape[1:]), generator=draw, device=self.device)
        conditions = {}
        if prob := config.diffusion.augment_prob:
            draw = generator(self.device, seed, "transforms", self.step)
            x0, conditions["augment"] = augment(x0, prob, draw, n, self.part)
        if config.cond_drop_prob:
            draw = generator(self.device, seed, "label dropout", self.step)
            dropped = torch.rand(n, generator=draw, device=self.device) < config.cond_drop_prob
            conditions["y"] = torch.where(dropped[self.part], -1, y)
        seed_everything(seed, "dropout", self.step, *([rank] if rank else []))
        return {"x0": x0, "u": u, "noise": noise[self.part], **conditions}

    # what survives

    def state(self) -> dict:
        """What evaluation needs: see `checkpoint`."""
        return {
            "config": self.config.model_dump(mode="json"),
            "net": self.denoiser.net.state_dict(),
            "ema": self.ema.ema_model.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "metrics": dict(self.metrics),
            "versions": checkpoint.versions(),
            "data": self.data,
        }

    def full_state(self) -> dict:
        """`state`, and under `resume` what training needs beside it to go on bit for bit."""
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])  # not a tensor, which `recorded` makes of it
        resume = {
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "window": self.window.sums,
            "use_amp": self.use_amp,
        }
        if self.distill:
            resume["distill"] = self.distill.state_dict()
        return {**self.state(), "resume": resume}

    def resume(self, state: dict) -> None:
        """Goes on from a `full_state`, bit for bit. The config keeps the `load_epoch` that the run
        began with, where it names none."""
        self.take_over(state)
        if self.config.load_epoch < 0:
            began = {"load_epoch": state["config"]["load_epoch"]}
            self.config = self.config.model_copy(update=began)
        resume = state["resume"]
        self.optimizer.load_state_dict(resume["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            for name, moment in moments.items():
                if torch.is_tensor(moment) and moment.ndim and moment.shape != parameter.shape:
                    raise ValueError(f"the optimizer's {name} is {list(moment.shape)}")
        if resume["scaler"]:  # empty: so far without one, which begins now
            self.scaler.load_state_dict(resume["scaler"])
        self.window.load(resume["window"])
        if self.distill:
            self.distill.load_state_dict(resume["distill"])
        if resume["use_amp"] != self.use_amp:
            log.info(
                "note: so far this run was %s --use_amp", "without" if self.use_amp else "with"
            )

    def begin_with_weights(self, weights: dict[str, Tensor]) -> None:
        """Replaces the random weights by these; those that it lacks stay as they are."""
        for net in (self.denoiser.net, self.ema.ema_model):
            net.load_state_dict({**net.state_dict(), **weights})

    def take_over(self, state: dict) -> None:
        """Goes on from the weights and the position of a `state`, with a new optimizer (Adam's
        moments are only in a `full_state`)."""
        self.denoiser.net.load_state_dict(state["net"])
        self.ema.ema_model.load_state_dict(state["ema"])
        self.ema.initted.fill_(True)
        if not has_form(state["metrics"], METRICS) or state["step"] < 0:
            raise ValueError("its step or its metrics")
        self.step = state["step"]
        self.ema.step.fill_(self.step)
        self.metrics = dict(state["metrics"])
