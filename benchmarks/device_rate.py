"""What a device reaches on large matrix products and 3x3 convolutions, in TFLOP/s."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.record import seconds_of

SIZES = {"cuda": (8192, 256), "mps": (4096, 64)}  # of a matrix; images of a convolution
SMALL = (1024, 16)
CHANNELS, SIDE = 128, 32  # of the convolution: the width of the main network's heavy blocks
TIMED_S = 1.0  # at least


def device_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of a matrix product, and of a convolution whose images lie as ours do (NCHW) and
    channels last. Convolutions in float32 may be TF32: see `record.machine_of`."""
    n, images = SIZES.get(device.type, SMALL)
    options = {"device": device, "dtype": dtype}
    a, b = torch.randn(n, n, **options), torch.randn(n, n, **options)
    rates = {"matmul": 2 * n**3 / _seconds(lambda: a @ b, device) / 1e12}
    x = torch.randn(images, CHANNELS, SIDE, SIDE, **options)
    weight = torch.randn(CHANNELS, CHANNELS, 3, 3, **options)
    flops = 2 * images * SIDE**2 * 9 * CHANNELS**2
    for name, form in (
        ("conv", torch.contiguous_format), ("conv_channels_last", torch.channels_last)
    ):  # fmt: skip
        pair = x.to(memory_format=form), weight.to(memory_format=form)
        rates[name] = flops / _seconds(lambda pair=pair: F.conv2d(*pair, padding=1), device) / 1e12
    return rates


@torch.no_grad()
def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, warm: the fastest of three rows of calls."""
    seconds_of(call, device, 3)
    times = max(int(TIMED_S / 3 / seconds_of(call, device)), 1)
    return min(seconds_of(call, device, times) for _ in range(3)) / times
