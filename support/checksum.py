"""A checksum of nested tensors and plain values: a bit that flips on the disk is noticed."""

import zlib

import torch
from torch import Tensor


def checksum(value: object, before: int = 0) -> int:
    """The CRC-32 of every tensor, key and number in nested dicts and lists, in their order.

    Types and shapes count, the device of a tensor does not. `before` is the checksum of what
    comes before. A CRC finds damage, not intent: for that there is SHA-256, at twice the time.
    """
    if isinstance(value, Tensor):
        before = checksum(f"{value.dtype} {tuple(value.shape)}", before)
        flat = value.detach().cpu().contiguous().reshape(-1)
        return zlib.crc32(flat.view(torch.uint8).numpy(), before)
    if isinstance(value, dict):
        parts = [part for item in value.items() for part in item]
    elif isinstance(value, list | tuple):
        parts = value
    else:
        return zlib.crc32(repr(value).encode(), before)
    before = checksum(f"{len(parts)} parts", before)
    for part in parts:
        before = checksum(part, before)
    return before
