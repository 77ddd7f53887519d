"""Scratch memory that a thread keeps between calls."""

import math
import threading

import torch
from torch import Tensor

_KEPT_BYTES = 2**25

_kept = threading.local()


def scratch(slot: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised memory of `like`'s dtype and device, valid until the thread's next call for the same slot.

    On a CPU up to 32 MiB per slot and dtype are kept: pages fresh from the operating system cost more than the
    arithmetic of a small scan. More than that, and memory of other devices, is allocated as usual.
    """
    size = math.prod(shape)
    if like.device.type != 'cpu' or size * like.element_size() > _KEPT_BYTES:
        return like.new_empty(shape)
    buffers = _kept.__dict__
    key = f'{slot} {like.dtype}'
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # memory made in inference mode could not be written outside of it
            buffer = buffers[key] = torch.empty(size, dtype=like.dtype)
    return buffer[:size].view(shape)
