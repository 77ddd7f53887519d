"""Device functions of the SSD's kernels: chunks of steps by the channels or states of a head.

A chunk is BLOCK_L steps in walking order. Rows beyond the sequence are zero, and so are their step sizes: they leave
the state alone. `tile` and `flags` are the constants of `launch.py`.
"""

from .._device import LN2, LOG2_E, softplus_log2
from .._launch import tl, triton


@triton.jit
def chunk_of(chunk, length, flags, BLOCK_L: tl.constexpr):
    """The position of a chunk's first step in 64 bits, distances [BLOCK_L] of its steps from there, and which exist."""
    first = chunk * BLOCK_L
    offset = tl.arange(0, BLOCK_L)
    exists = offset < length - first
    if flags.wide:
        offset = offset.to(tl.int64)
    if flags.reverse:
        return tl.cast(length - 1 - first, tl.int64), -offset, exists
    else:
        return tl.cast(first, tl.int64), offset, exists


@triton.jit
def program_of(heads, share, split_heads):
    """The entry of the batch in 64 bits, the group, and the split of a program that has `split_heads` of the `share`
    heads of a group."""
    splits, groups = tl.cdiv(share, split_heads), heads // share
    entry = tl.program_id(0) // splits
    return (entry // groups).to(tl.int64), entry % groups, tl.program_id(0) % splits


@triton.jit
def places_of(pointer, strides, batch, head, steps, column):
    """Pointers [BLOCK_L, columns] to steps of a head (or group), from strides of batch, step, head and column."""
    first, offset, _ = steps
    pointer += batch * strides[0] + first * strides[1] + tl.cast(head, tl.int64) * strides[2]
    return pointer + (offset[:, None] * strides[1] + column.to(offset.dtype)[None, :] * strides[3])


@triton.jit
def mask_of(steps, column, SIZE: tl.constexpr):
    """Which elements of a chunk with SIZE columns exist, [BLOCK_L, columns or 1]."""
    _, _, exists = steps
    return exists[:, None] if SIZE % column.shape[0] == 0 else exists[:, None] & (column < SIZE)[None, :]


@triton.jit
def load_rows(pointer, strides, batch, head, steps, column, SIZE: tl.constexpr):
    """Steps of a head (or group) [BLOCK_L, columns], of which SIZE columns exist."""
    places = places_of(pointer, strides, batch, head, steps, column)
    return tl.load(places, mask=mask_of(steps, column, SIZE), other=0.0)


@triton.jit
def store_rows(pointer, strides, batch, head, steps, column, SIZE: tl.constexpr, rows):
    places = places_of(pointer, strides, batch, head, steps, column)
    tl.store(places, rows.to(pointer.dtype.element_ty), mask=mask_of(steps, column, SIZE))


@triton.jit
def state_places(row, p, n, tile):
    """Offsets [BLOCK_P, BLOCK_N] of a row's state [P, N], the first in 64 bits, and which exist."""
    place = p[:, None] * tile.dstate + n[None, :]
    return (
        tl.cast(row, tl.int64) * (tile.dim * tile.dstate),
        place,
        (p < tile.dim)[:, None] & (n < tile.dstate)[None, :],
    )


@triton.jit
def load_skip(D, head, p, P, D_STRIDE: tl.constexpr):
    """D of a head [BLOCK_P], of which there are D_STRIDE numbers, one or P."""
    place = D + head * D_STRIDE + (p if D_STRIDE > 1 else tl.zeros_like(p))
    return tl.load(place, mask=p < P, other=0.0).to(tl.float32)


@triton.jit
def unlimited(raw, flags):
    """The step size of dt + dt_bias before its limits."""
    return softplus_log2(raw * LOG2_E, True, flags.nvidia) * LN2 if flags.softplus else raw


@triton.jit
def limited(size, flags):
    return tl.minimum(tl.maximum(size, flags.dt_min), flags.dt_max)


@triton.jit
def load_sums(steps, row, chunk, chunks, BLOCK_L: tl.constexpr):
    """Step sizes of a chunk, sums of the exponents of their decays up to each, [BLOCK_L], and the last sum."""
    steps += (tl.cast(row, tl.int64) * chunks + chunk) * (2 * BLOCK_L)
    offset = tl.arange(0, BLOCK_L)
    return tl.load(steps + offset), tl.load(steps + BLOCK_L + offset), tl.load(steps + 2 * BLOCK_L - 1)


@triton.jit
def sequences_of(sequence, batch, chunk, length, BLOCK_L: tl.constexpr):
    """The sequences of a chunk's steps [BLOCK_L], of the step before it (0 if there is none), and of its last one."""
    sequence += batch * length
    first = chunk * BLOCK_L
    here = tl.load(sequence + tl.minimum(first + tl.arange(0, BLOCK_L), length - 1))
    before = tl.load(sequence + first - 1, mask=chunk > 0, other=0)
    return here, before, tl.load(sequence + tl.minimum(first + BLOCK_L, length) - 1)


@triton.jit
def operand(x, flags):
    """A tile as tensor cores take it: fp16 would overflow where bf16 does not, and fp32 as tf32 has its precision."""
    return x.to(tl.bfloat16) if flags.half else x.to(tl.float32)


@triton.jit
def dot(a, b, flags):
    return tl.dot(operand(a, flags), operand(b, flags), input_precision=flags.precision)


@triton.jit
def add_dot(total, a, b, flags):
    return tl.dot(operand(a, flags), operand(b, flags), total, input_precision=flags.precision)
