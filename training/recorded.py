"""A training step as one CUDA graph: its thousands of kernels are recorded once, then replayed.

On a fast GPU a small network's kernels can end sooner than Python launches the next; a replay
launches all of them in one call.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # calls before the recording: what is compiled or allocated once is then behind


class Recorded:
    """`update`, called with tensors by name, which are copied to where the recording reads them.

    It may change tensors in place, but nothing on the host, and it may not wait for the device.
    Its first calls, and those after a shape has changed, run as they are. What it returns is valid
    until the next call. The optimizer reads its learning rate from a tensor, set by `call`.
    """

    def __init__(
        self,
        update: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ):
        self.update, self.optimizer = update, optimizer
        self.lr = torch.zeros((), device=device)
        self.stream = torch.cuda.Stream(device)
        self.shapes: dict[str, torch.Size] = {}
        self.graph: torch.cuda.CUDAGraph | None = None

    def call(self, lr: float, tensors: dict[str, Tensor]) -> Tensor:
        """update(**tensors), at this learning rate."""
        self.lr.fill_(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes != self.shapes:
            self.shapes, self.calls, self.graph = shapes, 0, None
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._run(tensors)
        if self.graph is None:
            self._record(tensors)
        torch._foreach_copy_(list(self.inputs.values()), list(tensors.values()))
        self.graph.replay()
        return self.output

    def _run(self, tensors: dict[str, Tensor]) -> Tensor:
        """On a stream of its own, as PyTorch wants it before a recording."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = self.update(**tensors)
        torch.cuda.current_stream().wait_stream(self.stream)
        return output

    def _record(self, tensors: dict[str, Tensor]) -> None:
        """Records a call; nothing is computed yet."""
        self.inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        groups = [group for group in self.optimizer.param_groups if "capturable" in group]
        for group in groups:
            group["capturable"] = True  # all that it reads is on the device
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.output = self.update(**self.inputs)
        for group in groups:
            group["capturable"] = False
