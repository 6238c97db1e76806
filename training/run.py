"""A training run: steps, and between them its log, what is measured, pictures and checkpoints."""

import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

import checkpoint
from checkpoint import TrainedModel
from datasets import Dataset
from evaluation.samples.trajectories import Trajectory
from sampling import SamplerSettings, sample, sampler_settings
from support import distributed
from support.errors import UserError
from support.resumable import Resumable, all_finite
from training.held_out_loss import held_out_loss
from training.pictures import draw_pictures
from training.run_log import RunLog
from training.trainer import Trainer
from utils import log, peak_memory_bytes, progress, redirect_to_bar

LOG_EVERY = 50  # steps between reads of the device's counters
SAVE_SECONDS = 600  # at most so long between two latest.pth
EPOCH_SECONDS = 30  # and so long at least, where an epoch ends that leaves nothing else behind
TRAJECTORIES = 4  # of the samples drawn while training, whose way out of the noise is shown
DIVERGED = 3  # times the lowest loss so far: one that rises so far seldom comes back
MAX_BAD_IN_A_ROW = 10  # losses that are not finite, before the run ends
CHECKED = 64  # test images that the network has to denoise before its weights are saved


def folders_of(save_dir: str | Path) -> list[Path]:
    """Those that a run writes in."""
    return [Path(save_dir, name) for name in ("ckpts", "tensorboard", "visual")]


def kept_in(save_dir: str | Path) -> Resumable:
    """The ckpts/latest.pth of the run in this folder."""
    path = Path(save_dir, "ckpts", "latest.pth")
    return Resumable(path, checkpoint.save, SAVE_SECONDS, lock=Path(save_dir, ".lock"))


class Run:
    """All that `trainer` does until its last step, in the config's save_dir.

    test: what losses are measured on. `kept` is its ckpts/latest.pth.
    """

    def __init__(self, trainer: Trainer, test: Dataset):
        self.trainer, self.test, self.config = trainer, test, trainer.config
        self.save_dir = Path(self.config.save_dir)
        self.ckpts = self.save_dir / "ckpts"
        self.kept = kept_in(self.save_dir)
        self.goes_on_from = (-1, 0)  # epoch and step of a checkpoint
        self.lowest_loss: float | None = math.inf  # since this process began; None: it was said

    def resume(self, state: dict) -> None:
        """Goes on from what latest.pth holds, bit for bit."""
        self.trainer.resume(state)
        self.kept.saved_step = self.trainer.step
        self.goes_on_from = (state["epoch"], state["step"])

    def begin_after_epoch(self, state: dict) -> None:
        """Begins with the weights that a model_<epoch>.pth holds and the first step of the next
        epoch, whatever a step takes now and took before; the best epoch is one of the new run."""
        step = (state["epoch"] + 1) * self.trainer.batches.steps_per_epoch
        metrics = {**state["metrics"], "best_loss": None, "best_epoch": None}
        self.trainer.take_over({**state, "step": step, "metrics": metrics})
        self.goes_on_from = (state["epoch"], state["step"])

    def run(self) -> None:
        """Trains to the last step. Raises Stopped after a signal, and UserError if the losses
        stop being finite: what is saved is then from before."""
        run_log = RunLog(self.save_dir, *self.goes_on_from)
        try:
            with self.kept, redirect_to_bar():
                self._steps(run_log)
        finally:
            run_log.close()

    def _steps(self, run_log: RunLog) -> None:
        trainer, kept, last = self.trainer, self.kept, self.trainer.total_steps
        trainer.denoiser.train()
        start, since = time.monotonic(), trainer.step
        with progress(total=last, initial=since, unit="step", smoothing=0.05) as bar:
            while trainer.step < last:
                trainer.train_step()
                bar.update()
                if trainer.ends_epoch or trainer.step % LOG_EVERY == 0:
                    values = self.read_window()
                    images = (trainer.step - since) * trainer.images_per_step
                    values["images_per_s"] = images / max(time.monotonic() - start, 1e-9)
                    run_log.write("train", trainer.step, values)
                    self._warn_of_divergence(values["loss"])
                    loss = values["loss_average"] or 0
                    bar.set_description(f"epoch {trainer.epoch} loss {loss:.4f}")
                    start, since = time.monotonic(), trainer.step
                if kept.is_due(trainer.ends_epoch and self._keeps_epoch()):
                    pause = time.monotonic()
                    self._refuse_ruined_weights()
                    if trainer.ends_epoch:
                        self._end_epoch(run_log)
                    kept.save(trainer.step, trainer.full_state())
                    start += time.monotonic() - pause
                kept.stop_if_told(trainer.step, last)

    def read_window(self) -> dict:
        """What the log gets of the steps since the last call. Raises UserError if the last
        MAX_BAD_IN_A_ROW losses were not finite."""
        trainer, metrics = self.trainer, self.trainer.metrics
        sums = trainer.window.read_and_reset()
        steps, norms = sums["steps"], sums["norms"]
        if sums["worst_in_a_row"] >= MAX_BAD_IN_A_ROW:
            raise self._no_longer_finite(f"{MAX_BAD_IN_A_ROW} losses in a row were not finite")
        loss = sums["loss"] / steps if steps else None
        average = metrics["loss_average"]
        if loss is not None:
            weight = 0.99**steps
            average = loss if average is None else weight * average + (1 - weight) * loss
        metrics["loss_average"] = average
        metrics["skipped"] += int(sums["skipped"])
        distill = {"distill_loss": trainer.distill.read_and_reset()} if trainer.distill else {}
        buckets = zip(sums["bucket_loss"], sums["bucket_images"], strict=True)
        return {
            "epoch": trainer.epoch,
            "loss": loss,
            "loss_average": average,
            **distill,
            "loss_by_t": [total / n if n else None for total, n in buckets],
            "grad_norm": sums["grad_norm"] / norms if norms else None,
            "param_norm": float(get_total_norm(trainer.denoiser.parameters())),
            "lr": float(trainer.optimizer.param_groups[0]["lr"]),
            "skipped": metrics["skipped"],
            "peak_memory_mb": peak_memory_bytes(trainer.device) / 1e6,
        }

    def _warn_of_divergence(self, loss: float | None) -> None:
        """Says so, once, where the loss has risen far, and is finite all the same."""
        if loss is None or self.lowest_loss is None:
            return
        if loss <= DIVERGED * self.lowest_loss:
            self.lowest_loss = min(loss, self.lowest_loss)
        else:
            advice = "lrate or distill.weight" if self.trainer.distill else "lrate"
            log.warning(
                "step %d: the loss is %.3g and has been %.3g: it may have diverged; if it stays "
                "so, stop, lower %s, and start anew with --restart",
                self.trainer.step, loss, self.lowest_loss, advice,
            )  # fmt: skip
            self.lowest_loss = None

    def _refuse_ruined_weights(self) -> None:
        """Raises UserError where the weights would replace better ones on the disk.

        Weights too large to compute with can be finite, and the step that made them had a finite
        loss: only a forward tells.
        """
        trainer = self.trainer
        states = (trainer.denoiser.net.state_dict(), trainer.ema.ema_model.state_dict())
        finite = all(all_finite(state.values()) for state in states)
        trainer.denoiser.eval()
        few = self.test.take(slice(CHECKED))
        loss = held_out_loss(trainer.denoiser, few, trainer.images_per_forward, trainer.use_amp)
        trainer.denoiser.train()
        if not finite or not math.isfinite(loss):
            raise self._no_longer_finite("the network's loss is no longer finite")

    def _no_longer_finite(self, what: str) -> UserError:
        advice = "lower lrate or grad_clip" + (
            ", or leave out --use_amp" if self.trainer.use_amp else ""
        )
        return UserError(
            f"stopped at step {self.trainer.step}: {what}. {self.kept.what_is_saved()}; {advice}, "
            "and start anew with --restart"
        )

    def _is_time(self, every: int) -> bool:
        """Whether what happens at the end of so many epochs is due; at the last step it always is.

        Asked where an epoch ends.
        """
        last = self.trainer.step == self.trainer.total_steps
        return last or (self.trainer.epoch + 1) % every == 0

    def _keeps_epoch(self) -> bool:
        """Whether to save where an epoch ends: on a GPU it can take less time than to save it."""
        config = self.config
        leaves_more = self._is_time(config.sample_every) or self._is_time(config.save_every)
        return leaves_more or self.kept.seconds_since_save() >= EPOCH_SECONDS

    def _end_epoch(self, run_log: RunLog) -> None:
        """Measures and saves. latest.pth comes after it: killed before, the epoch's end is
        redone."""
        config, epoch = self.config, self.trainer.epoch
        if self._is_time(config.sample_every):
            self._measure(run_log, epoch)
        if config.save_model and self._is_time(config.save_every):
            self._save(f"model_{epoch}.pth")
        if self.trainer.step == self.trainer.total_steps:
            run_log.write_csv()

    def _save(self, name: str) -> None:
        if distributed.is_main():
            checkpoint.save(self.ckpts / name, self.trainer.state())

    def _measure(self, run_log: RunLog, epoch: int) -> None:
        """The test loss and samples, both of the EMA weights, and the pictures of the run."""
        started = time.monotonic()
        trainer, metrics = self.trainer, self.trainer.metrics
        loss = held_out_loss(
            trainer.ema_denoiser, self.test, trainer.images_per_forward, trainer.use_amp
        )
        best = metrics["best_loss"]
        if math.isfinite(loss) and (best is None or loss < best):
            metrics.update(best_loss=loss, best_epoch=epoch)
            self._save("best.pth")
        run_log.write("test", trainer.step, {"epoch": epoch, "loss": loss})
        settings, trajectory = sampler_settings(trainer.ema_denoiser), Trajectory(TRAJECTORIES)
        samples = self._draw_samples(settings, trajectory)
        if not distributed.is_main():
            return
        model = TrainedModel(trainer.ema_denoiser, self.config, epoch, self.kept.path)
        folder = self.save_dir / "visual"
        lines = run_log.lines()
        grid = draw_pictures(folder, model, lines, samples, settings, trajectory, self.test)
        run_log.image("samples", trainer.step, grid)
        seconds = time.monotonic() - started
        log.info("epoch %d: test loss %.5f, samples in %s (%.0f s)", epoch, loss, folder, seconds)

    def _draw_samples(self, settings: SamplerSettings, trajectory: Trajectory) -> Tensor:
        """(n_sample, C, H, W) uint8 on the CPU, drawn by all ranks together, as many at a time as
        are trained on. `trajectory` sees the first of them."""
        config = self.config
        mine = distributed.share(config.n_sample)
        indices, size = list(distributed.at_least_one(mine)), self.trainer.images_per_forward
        samples = torch.cat([
            sample(
                self.trainer.ema_denoiser, settings, indices[i : i + size], config.seed,
                config.network.image_shape, self.trainer.use_amp,
                trajectory.watch if i == 0 else None,
            )
            for i in range(0, len(indices), size)
        ])  # fmt: skip
        return distributed.gather_shares(samples[: len(mine)], config.n_sample).cpu()
