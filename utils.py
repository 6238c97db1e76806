"""Seeding, device and precision, logging and progress."""

import contextlib
import functools
import hashlib
import logging
import sys
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from support import distributed
from support.errors import UserError, reason_of

log = logging.getLogger("tiny-ddae")

# --- seeding: randomness is a function of the seed and the position, never of a stored state


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of `key`, such as (seed, "noise", step)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator on `device`, seeded by `derive_seed(*key)`."""
    return torch.Generator(device=device).manual_seed(derive_seed(*key))


def permutation(n: int, *key: int | str) -> np.ndarray:
    """(n,): 0 .. n - 1 in an order drawn by `key`."""
    return torch.randperm(n, generator=generator("cpu", *key)).numpy()


def seed_everything(*key: int | str) -> None:
    """Seeds PyTorch's global generators (all devices): initialisation and dropout read them."""
    torch.manual_seed(derive_seed(*key))


class ImageNoise:
    """Standard normal noise that depends on the seed and each image's index alone.

    Successive draws for one index form one stream, whatever batch the image is in.
    """

    def __init__(
        self, seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device | str
    ):
        self.generators = [generator("cpu", seed, "image", i) for i in indices]
        self.shape, self.device = tuple(shape), device

    def draw(self) -> Tensor:
        """(N, *shape), float32, on the device."""
        noise = [torch.randn(self.shape, generator=g) for g in self.generators]
        return torch.stack(noise).to(self.device)


# --- device and precision


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory is what an error is about, of a GPU or not: for a CPU's, PyTorch has no
    exception of its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def pick_device(name: str | None = None) -> torch.device:
    """`name`, or CUDA, else MPS, else the CPU. Raises UserError if that device is not there.

    Of several processes each has a GPU of its own, cuda:<local rank>.
    """
    several = distributed.world_size() > 1
    if name is None:
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() and not several else "cpu"
    if several and name not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: several processes take cuda, one GPU each, or cpu")
    if several and name == "cuda":
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu") or (device.type != "cuda" and device.index):
            raise UserError(f"--device {name}: give cuda, cuda:1 (the second GPU), mps or cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        advice = "start one process per GPU, or try" if several else "try"
        raise UserError(
            f"--device {name}: not usable here ({reason_of(error)}); {advice} --device cpu"
        ) from None
    if several and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def float64_device(device: torch.device) -> torch.device:
    """Where to compute in float64: a CUDA device itself, else the CPU, as MPS has none."""
    return device if device.type == "cuda" else torch.device("cpu")


def grad_scaler(device: torch.device, use_amp: bool) -> torch.amp.GradScaler:
    """Scales a loss where mixed precision is float16; elsewhere it does nothing."""
    needed = use_amp and amp_dtype(device) == torch.float16
    return torch.amp.GradScaler(device.type, enabled=needed)


def amp_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of --use_amp: bfloat16 where the device truly has it, else float16 on GPUs.

    None on a CPU without bfloat16 instructions, where lower precision would only be slower.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
    return torch.float16


def autocast(device: torch.device, use_amp: bool) -> contextlib.AbstractContextManager:
    """A context for the forward pass: mixed precision if `use_amp` and the device has it."""
    dtype = amp_dtype(device) if use_amp else None
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def compiled(forward: Callable, device: torch.device) -> Callable:
    """`forward`, a function or bound method, through torch.compile: elementwise work is fused.

    The first call compiles; so does one with another shape. Raises UserError where there is no
    compiler.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except RuntimeError as error:  # of it, all that torch.compile raises is a subclass
        needs = "Triton" if device.type == "cuda" else "a C++ compiler"
        raise UserError(
            f"--compile: torch.compile does not work here ({reason_of(error)}): install {needs}, "
            "or leave --compile out"
        ) from None
    return torch.compile(forward)


def compile_network(net: nn.Module, device: torch.device) -> None:
    """What --compile does to a network that is evaluated, in place; its weights keep their names.

    Raises UserError where there is no compiler.
    """
    net.forward = compiled(net.forward, device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a CUDA device, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, where only the CUDA figure exists

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- logging and progress


def setup_logging() -> None:
    """Messages of `log` go to standard error, one line each, without breaking a progress bar.

    Of several processes rank 0 speaks for all.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO if distributed.is_main() else logging.ERROR)
    log.propagate = False


@functools.cache
def note_once(text: str) -> None:
    """Logs `text`, at its first call alone."""
    log.info(text)


def redirect_to_bar() -> contextlib.AbstractContextManager:
    """A context in which messages of `log` are printed above a running tqdm bar."""
    return logging_redirect_tqdm(loggers=[log])


def progress(
    iterable: Iterable | None = None, desc: str | None = None, *, shared: bool = False, **options
) -> tqdm:
    """A tqdm bar; `options` are tqdm's, but whether and how often it is shown is decided here.

    Of several processes rank 0 shows it. On a terminal it moves; in a file, where nothing
    overwrites the last state, a line is written twice a minute.
    `shared`: what it counts is this rank's share, and it is shown times the number of ranks.
    """
    if not sys.stderr.isatty():
        options["mininterval"] = 30
    options["disable"] = not distributed.is_main()
    if shared and distributed.world_size() > 1:
        options["unit_scale"] = distributed.world_size()
    return tqdm(iterable, desc, **options)
