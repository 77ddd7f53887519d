"""How the kernels of depthwise 2-D convolutions cut their work."""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from .arithmetic import parts

# Triton keeps lists of tiles from version 3.3 on.
KERNELS = (1, 3, 5) if hasattr(tl, 'tuple') else ()
CHANNELS = 32
# Programs of the backward pass for each streaming multiprocessor: a few at a time, and several rounds of them.
_PROGRAMS = 16


class Strip(NamedTuple):
    """What a program holds: rows that it walks down, of which it loads some ahead, and pixels of each."""

    rows: int
    ahead: int
    pixels: int


def strip_of(x: Tensor, kernel: int, ahead: int) -> Strip:
    """For x [B, H, W, D].

    Rows are written out in the kernel, so that there are few of them, fewer if a row has many taps; they are all alike,
    to leave little at the end. Eight pixels are taken where an eighth of sixteen or more would stay empty.
    """
    _, height, width, _ = x.shape
    rows = parts(height, parts(height, 8 if kernel <= 3 else 4)) if height else 1
    pixels = 8 if 8 * 16 * parts(width, 16) >= 9 * width else 16
    return Strip(rows, min(ahead, rows), pixels)


def split(x: Tensor, strip: Strip, processors: int) -> tuple[int, int]:
    """Parts of a map's channels that programs of the backward pass walk, and the strips of each part."""
    batch, height, width, dim = x.shape
    strips = batch * parts(height, strip.rows) * parts(width, strip.pixels)
    if not strips or not dim:
        return 0, 0
    strips_of_part = parts(strips, min(parts(_PROGRAMS * processors, parts(dim, CHANNELS)), strips))
    return parts(strips, strips_of_part), strips_of_part


def is_wide(strip: Strip, x: Tensor, *others: Tensor) -> bool:
    """Whether offsets within an entry of the batch, of strips that overhang too, may leave 32 bits."""
    height, width, dim = x.shape[1] + 2 * strip.rows, x.shape[2] + 2 * strip.pixels, x.shape[3] + CHANNELS
    contiguous = width * dim, dim, 1
    strides = contiguous, *(tensor.stride()[1:] for tensor in (x, *others))
    return any(height * row + width * pixel + dim * channel >= 2**31 for row, pixel, channel in strides)
