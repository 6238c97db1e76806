"""Training a denoiser: the step, what is measured, and what must survive a kill."""

import math
import signal
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

import checkpoint
from checkpoint import TrainedModel
from config import Config
from datasets import Batches
from evaluation.samples.trajectories import Trajectory
from model.denoiser import Denoiser
from model.models import build_denoiser
from sampling import SamplerSettings, sample, sampler_settings
from support import distributed
from support.errors import UserError
from training.augmentation import augment
from training.held_out_loss import held_out_loss
from training.loss_sums import Window
from training.pictures import draw_pictures
from training.run_log import RunLog
from utils import (
    amp_dtype,
    autocast,
    generator,
    log,
    peak_memory_bytes,
    progress,
    redirect_to_bar,
    seed_everything,
)

LOG_EVERY = 50  # steps between reads of the device's counters
SAVE_SECONDS = 600  # at most so long between two latest.pth
TRAJECTORIES = 4  # of the samples drawn while training, whose way out of the noise is shown
MAX_BAD_IN_A_ROW = 10  # losses that are not finite, before the run ends


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


def build_optimizer(config: Config, parameters) -> torch.optim.Optimizer:
    """The config's optimizer, fused: one kernel, and it can skip a step without asking the host."""
    try:
        kind = getattr(torch.optim, config.optim)
        return kind(parameters, lr=config.lrate, fused=True, **config.optim_args)
    except (TypeError, ValueError) as error:
        raise UserError(f"optim_args: {error}") from None


class Loss(nn.Module):
    """The denoiser's loss as a `forward`, of which DistributedDataParallel averages gradients."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, *args: Tensor, **conditions: Tensor) -> Tensor:
        return self.denoiser.loss(*args, **conditions)


class Trainer:
    """Everything that a run holds: `step` counts optimizer steps done, across epochs."""

    def __init__(self, config: Config, train, test, device: torch.device, use_amp: bool):
        self.config, self.device, self.use_amp = config, device, use_amp
        self.save_dir = Path(config.save_dir)
        seed_everything(config.seed, "init")
        self.denoiser = build_denoiser(config).to(device)
        from ema_pytorch import EMA  # slow to import

        self.ema = EMA(
            self.denoiser.net,
            beta=config.ema,
            update_after_step=0,
            update_every=1,
            use_foreach=True,
            include_online_model=False,
        )  # its counters stay on the host, so that an update reads nothing back from the device
        self.ema_denoiser = build_denoiser(config, self.ema.ema_model).to(device).eval()
        self.optimizer = build_optimizer(config, self.denoiser.parameters())
        needs_scaler = use_amp and amp_dtype(device) == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=needs_scaler)
        self.loss = distributed.replicated(Loss(self.denoiser))
        self.window = Window(device)
        self.images_per_step = config.batch_size * config.accumulate
        mine = distributed.share_of_batch(config.batch_size)
        self.part = slice(mine.start * config.accumulate, mine.stop * config.accumulate)
        self.batches = Batches(
            train.images, train.labels, self.images_per_step, device, config.seed,
            shuffle=True, flip=config.flip, drop_last=True, part=self.part,
        )  # fmt: skip
        if not self.batches.steps_per_epoch:
            raise UserError(
                f"batch_size {config.batch_size} times accumulate {config.accumulate} is more than "
                f"the {len(train)} training images"
            )
        self.test = test
        self.step = 0
        self.metrics = {"loss_average": None, "skipped": 0, "best_loss": None, "best_epoch": None}
        self.own_signal = self.stop_signal = 0  # what this rank was sent, and what all agree on

    @property
    def total_steps(self) -> int:
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
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x0, u, noise, conditions = self._draw_images()
        sigma = self.denoiser.training_sigma(u[self.part])
        self.optimizer.zero_grad(set_to_none=True)
        per_image = self._backward(x0, sigma, noise, conditions)
        self.scaler.unscale_(self.optimizer)
        per_image = distributed.gather_shares(per_image, self.images_per_step)
        grad_norm = clip_grad_norm_(self.denoiser.parameters(), config.grad_clip)
        if self.scaler.is_enabled():  # an overflow of the scaled gradients is no bad loss
            skipped = ~per_image.isfinite().all()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:  # the fused optimizers skip a step whose `found_inf` is 1, as they do for a scaler
            skipped = ~grad_norm.isfinite()
            self.optimizer.found_inf = skipped.float()
            self.optimizer.step()
        self.ema.update()
        self.window.add(per_image, grad_norm, u, skipped)
        self.step += 1

    def _backward(self, x0: Tensor, sigma: Tensor, noise: Tensor, conditions: dict) -> Tensor:
        """Leaves the gradient of the mean loss of all ranks' images, computed in `accumulate`
        batches. Returns the losses of this rank's images, (N,)."""
        n = len(x0) // self.config.accumulate
        losses = []
        for start in range(0, len(x0), n):
            batch = slice(start, start + n)
            given = {name: value[batch] for name, value in conditions.items()}
            with autocast(self.device, self.use_amp):
                per_image = self.loss(x0[batch], sigma[batch], noise[batch], **given)
            self.scaler.scale(per_image.mean() / self.config.accumulate).backward()
            losses.append(per_image.detach())
        return torch.cat(losses)

    def _draw_images(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
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
        return x0, u, noise[self.part], conditions

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
        }

    def save_latest(self) -> None:
        self.last_saved = time.monotonic()
        resume = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema_step": int(self.ema.step),
            "window": self.window.sums,
            "use_amp": self.use_amp,
        }
        self._save("latest.pth", resume=resume)

    def _save(self, name: str, **more: dict) -> None:
        if distributed.is_main():
            checkpoint.save(self.latest_path.with_name(name), {**self.state(), **more})

    @property
    def latest_path(self) -> Path:
        return self.save_dir / "ckpts" / "latest.pth"

    def resume(self, state: dict) -> None:
        """Goes on from the dict of a latest.pth, bit for bit."""
        self.start_from(state)
        resume = state["resume"]
        self.optimizer.load_state_dict(resume["optimizer"])
        self.scaler.load_state_dict(resume["scaler"])
        self.ema.step.fill_(resume["ema_step"])
        self.window.sums = {k: v.to(self.device) for k, v in resume["window"].items()}
        if resume["use_amp"] != self.use_amp:
            log.info(
                "note: so far this run was %s --use_amp", "without" if self.use_amp else "with"
            )

    def start_from(self, state: dict) -> None:
        """Goes on from the weights and the position of a model_<epoch>.pth, with a new optimizer
        (Adam's moments are only in latest.pth)."""
        self.denoiser.net.load_state_dict(state["net"])
        self.ema.ema_model.load_state_dict(state["ema"])
        self.ema.initted.fill_(True)
        self.step = state["step"]
        self.ema.step.fill_(self.step)
        self.metrics = dict(state["metrics"])

    # the run

    def run(self) -> None:
        """Trains to the last step, or until a signal. Raises UserError if the losses stop being
        finite."""
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        run_log = RunLog(self.save_dir, self.step)
        self.last_saved = time.monotonic()
        try:
            with redirect_to_bar():
                self._run(run_log)
            run_log.write_csv()
        finally:
            run_log.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number, frame) -> None:
        self.own_signal = number
        log.info("%s: finishing this step, then saving", signal.Signals(number).name)

    def _told_to_stop(self) -> bool:
        """Whether any rank has had a signal: it does not come to all of them at the same step."""
        self.stop_signal = distributed.max_over_ranks(self.own_signal)
        return bool(self.stop_signal)

    def _run(self, run_log: RunLog) -> None:
        bar = progress(total=self.total_steps, initial=self.step, unit="step", smoothing=0.05)
        self.denoiser.train()
        start, since = time.monotonic(), self.step
        while self.step < self.total_steps and not self._told_to_stop():
            self.train_step()
            bar.update()
            if self.ends_epoch or self.step % LOG_EVERY == 0:
                values = self._read_window()
                seconds = max(time.monotonic() - start, 1e-9)
                values["images_per_s"] = (self.step - since) * self.images_per_step / seconds
                run_log.write("train", self.step, values)
                bar.set_description(f"epoch {self.epoch} loss {values['loss_average'] or 0:.4f}")
                start, since = time.monotonic(), self.step
            if self.ends_epoch:
                self._end_epoch(run_log)
                start = time.monotonic()
            elif time.monotonic() - self.last_saved > SAVE_SECONDS:
                self.save_latest()
        if not self.ends_epoch:
            self.save_latest()
        bar.close()

    def _read_window(self) -> dict:
        sums = self.window.read_and_reset()
        steps = sums["steps"]
        if sums["worst_in_a_row"] >= MAX_BAD_IN_A_ROW:
            raise UserError(
                f"stopped at step {self.step}: {MAX_BAD_IN_A_ROW} losses in a row were not finite. "
                f"{self.latest_path} is from before; lower lrate or grad_clip"
                + (", or train without --use_amp" if self.use_amp else "")
            )
        loss = sums["loss"] / steps if steps else None
        average = self.metrics["loss_average"]
        if loss is not None:
            weight = 0.99**steps
            average = loss if average is None else weight * average + (1 - weight) * loss
        self.metrics["loss_average"] = average
        self.metrics["skipped"] += int(sums["skipped"])
        buckets = zip(sums["bucket_loss"], sums["bucket_images"], strict=True)
        return {
            "epoch": self.epoch,
            "loss": loss,
            "loss_average": average,
            "loss_by_t": [total / n if n else None for total, n in buckets],
            "grad_norm": sums["grad_norm"] / steps if steps else None,
            "param_norm": float(get_total_norm(self.denoiser.parameters())),
            "lr": self.optimizer.param_groups[0]["lr"],
            "skipped": self.metrics["skipped"],
            "peak_memory_mb": peak_memory_bytes(self.device) / 1e6,
        }

    def _end_epoch(self, run_log: RunLog) -> None:
        """Measures and saves. latest.pth comes last: killed before, the epoch's end is redone."""
        epoch, last = self.epoch, self.step == self.total_steps
        if last or (epoch + 1) % self.config.sample_every == 0:
            self._measure(run_log, epoch)
        if self.config.save_model and (last or (epoch + 1) % self.config.save_every == 0):
            self._save(f"model_{epoch}.pth")
        self.save_latest()

    def _measure(self, run_log: RunLog, epoch: int) -> None:
        """The test loss and samples, both of the EMA weights, and the pictures of the run."""
        started = time.monotonic()
        loss = held_out_loss(self.ema_denoiser, self.test, self.device, self.use_amp)
        if self.metrics["best_loss"] is None or loss < self.metrics["best_loss"]:
            self.metrics.update(best_loss=loss, best_epoch=epoch)
            self._save("best.pth")
        run_log.write("test", self.step, {"epoch": epoch, "loss": loss})
        settings, trajectory = sampler_settings(self.ema_denoiser), Trajectory(TRAJECTORIES)
        samples = self._draw_samples(settings, trajectory)
        if not distributed.is_main():
            return
        model = TrainedModel(self.ema_denoiser, self.config, epoch, self.latest_path)
        folder = self.save_dir / "visual"
        lines = run_log.lines()
        grid = draw_pictures(folder, model, lines, samples, settings, trajectory, self.test)
        run_log.image("samples", self.step, grid)
        seconds = time.monotonic() - started
        log.info("epoch %d: test loss %.5f, samples in %s (%.0f s)", epoch, loss, folder, seconds)

    def _draw_samples(self, settings: SamplerSettings, trajectory: Trajectory) -> Tensor:
        """(n_sample, C, H, W) uint8 on the CPU, drawn by all ranks together."""
        config = self.config
        mine = distributed.share(config.n_sample)
        samples = sample(
            self.ema_denoiser, settings, list(distributed.at_least_one(mine)), config.seed,
            config.network.image_shape, self.use_amp, trajectory.watch,
        )  # fmt: skip
        return distributed.gather_shares(samples[: len(mine)], config.n_sample).cpu()
