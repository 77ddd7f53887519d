"""Device functions of the SSD's kernels: chunks of steps by the channels or states of a head.

A chunk is BLOCK_L steps in walking order. Rows beyond the sequence are zero, and so are their step sizes: they leave
the state alone. `tile` and `flags` are the constants of `launch.py`.
"""

from .._device import LN2, LOG2_E, softplus_log2
from .._launch import tl, triton


@triton.jit
def rows_of(step, length, REVERSE: tl.constexpr):
    """Positions [BLOCK_L] of steps, in 64 bits, and which of them exist."""
    position = length - 1 - step if REVERSE else step
    return position.to(tl.int64), step < length


@triton.jit
def places_of(pointer, strides, batch, head, position, column):
    """Pointers [BLOCK_L, columns] to rows of a head (or group), from strides of batch, step, head and column."""
    pointer += batch * strides[0] + head.to(tl.int64) * strides[2]
    return pointer + (position * strides[1])[:, None] + column.to(tl.int64)[None, :] * strides[3]


@triton.jit
def load_rows(pointer, strides, batch, head, position, exists, column, size):
    """Rows [BLOCK_L, columns] of a head (or group), of which `size` columns exist."""
    places = places_of(pointer, strides, batch, head, position, column)
    return tl.load(places, mask=exists[:, None] & (column < size)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, strides, batch, head, position, exists, column, size, rows):
    places = places_of(pointer, strides, batch, head, position, column)
    tl.store(places, rows.to(pointer.dtype.element_ty), mask=exists[:, None] & (column < size)[None, :])


@triton.jit
def load_skip(D, head, p, P, D_STRIDE: tl.constexpr):
    """D of a head [BLOCK_P], of which there are D_STRIDE numbers, one or P."""
    place = D + head * D_STRIDE + (p if D_STRIDE > 1 else tl.zeros_like(p))
    return tl.load(place, mask=p < P, other=0.0).to(tl.float32)


@triton.jit
def load_dt(dt, strides, dt_bias, batch, head, position, exists, flags):
    """dt + dt_bias and the step size, [BLOCK_L], before its limits and after them."""
    place = batch * strides[0] + position * strides[1] + head.to(tl.int64) * strides[2]
    raw = tl.load(dt + place, mask=exists, other=0.0).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + head).to(tl.float32)
    size = softplus_log2(raw * LOG2_E, True, flags.nvidia) * LN2 if flags.softplus else raw
    limited = tl.minimum(tl.maximum(size, flags.dt_min), flags.dt_max)
    return raw, size, tl.where(exists, limited, 0.0)


@triton.jit
def sums_of(exponent):
    """Sums [BLOCK_L] of the exponents of decays from before the chunk to each step, and from each step to the end; and
    over the chunk."""
    to_end = tl.cumsum(exponent, axis=0, reverse=True) - exponent
    return tl.cumsum(exponent, axis=0), to_end, tl.sum(exponent, axis=0)


@triton.jit
def sequences_of(sequence, batch, chunk, step, length, BLOCK_L: tl.constexpr):
    """The sequences of a chunk's steps [BLOCK_L], of the step before it (0 if there is none), and of its last one."""
    sequence += batch * length
    here = tl.load(sequence + tl.minimum(step, length - 1))
    before = tl.load(sequence + chunk * BLOCK_L - 1, mask=chunk > 0, other=0)
    last = tl.load(sequence + tl.minimum(chunk * BLOCK_L + BLOCK_L, length) - 1)
    return here, before, last


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
