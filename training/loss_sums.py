"""What training measures between two log lines, without waiting for the device."""

import torch
from torch import Tensor

BUCKETS = 10  # equal parts of the training distribution of the noise level


class Window:
    """Sums since the last log line, kept on the device; read once per LOG_EVERY steps."""

    def __init__(self, device: torch.device):
        zeros = torch.zeros
        self.sums = {
            "steps": zeros((), device=device),
            "loss": zeros((), device=device),
            "grad_norm": zeros((), device=device),
            "norms": zeros((), device=device),  # steps whose gradients have a finite norm
            "skipped": zeros((), device=device),
            "bad_in_a_row": zeros((), device=device),
            "worst_in_a_row": zeros((), device=device),
            "bucket_loss": zeros(BUCKETS, device=device),
            "bucket_images": zeros(BUCKETS, device=device),
        }

    def add(self, per_image: Tensor, grad_norm: Tensor, u: Tensor, skipped: Tensor) -> None:
        """per_image, u: (N,); a skipped step is counted, and left out of the other sums.

        The norm of scaled gradients that overflowed is left out too, and not among the `norms`.
        """
        sums = self.sums
        finite = ~skipped
        bad = skipped.float()
        sums["steps"] += finite
        sums["loss"] += torch.where(finite, per_image.mean(), 0)
        has_norm = finite & grad_norm.isfinite()
        sums["grad_norm"] += torch.where(has_norm, grad_norm, 0)
        sums["norms"] += has_norm
        sums["skipped"] += bad
        sums["bad_in_a_row"] += 1
        sums["bad_in_a_row"] *= bad
        torch.maximum(sums["worst_in_a_row"], sums["bad_in_a_row"], out=sums["worst_in_a_row"])
        bucket = (u * BUCKETS).long()
        per_image = torch.where(finite, per_image, 0)
        sums["bucket_loss"].index_add_(0, bucket, per_image)
        sums["bucket_images"].index_add_(0, bucket, finite.float().expand_as(per_image))

    def load(self, sums: dict[str, Tensor]) -> None:
        """Takes over the `sums` of another window; old ones took every step for one with a norm."""
        sums = {"norms": sums["steps"], **sums}
        for name, total in self.sums.items():
            total.copy_(sums[name])

    def read_and_reset(self) -> dict:
        """{name: a number, or a list of BUCKETS}, of all steps since the last call."""
        values = {name: total.tolist() for name, total in self.sums.items()}
        for name, total in self.sums.items():
            if name != "bad_in_a_row":  # a row of bad losses may cross the border of two windows
                total.zero_()
        return values
