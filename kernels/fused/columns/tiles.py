"""Building blocks of the selective scan's kernels: tiles of sequences, whose steps lie in the registers of a thread.

A tile [T, C] holds T steps of C channels in walking order. In the layout that Triton gives such tiles a thread owns
all steps of a channel, so that recurrences stay inside threads (see `routes`).
"""

import triton
import triton.language as tl

from ..elementwise import LOG2_E, softplus_log2

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_steps(pointer, rows, first, length, T: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr):
    """Positions first ... first + T of the sequences at `pointer + rows` as a tile in fp32, zero outside of them.

    Lanes lie along the sequences while it is loaded; the tile then passes through shared memory.
    """
    position = first + tl.arange(0, T)
    x = tl.load(pointer + rows[:, None] + position[None, :], mask=(position < length)[None, :], other=0.0)
    x = tl.associative_scan(tl.trans(x.to(tl.float32)), 0, _second)
    return tl.flip(x, 0) if REVERSE else x


@triton.jit
def store_steps(pointer, rows, in_rows, first, length, x, T: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr):
    if REVERSE:
        x = tl.flip(x, 0)
    x = tl.trans(x.to(pointer.dtype.element_ty))
    position = first + tl.arange(0, T)
    mask = in_rows[:, None] & (position < length)[None, :]
    tl.store(pointer + rows[:, None] + position[None, :], x, mask=mask)


@triton.jit
def load_delta(
    delta,
    rows,
    bias,
    first,
    length,
    T: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    EXACT: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """(delta + bias) / ln 2, and the step / ln 2: its softplus where wanted, zero where the sequence has no step."""
    raw = (load_steps(delta, rows, first, length, T, C, REVERSE) + bias[None, :]) * LOG2_E
    step = softplus_log2(raw, EXACT, NVIDIA) if SOFTPLUS else raw
    row = tl.arange(0, T)[:, None]
    position = first + ((T - 1 - row) if REVERSE else row)
    return raw, tl.where(position < length, step, 0.0)


@triton.jit
def _second(first, second):
    return second


@triton.jit
def _step_after(decay0, value0, decay1, value1):
    """Composes two steps h -> decay * h + value, the first one first."""
    return decay0 * decay1, decay1 * value0 + value1


@triton.jit
def _next(last0, before0, alone0, last1, before1, alone1):
    """Composes two runs of rows, of which only the last two count."""
    return last1, tl.where(alone1 != 0, last0, before1), alone0 & 0


@triton.jit
def _shift(x, start, T: tl.constexpr, C: tl.constexpr):
    """The row before each row of x; before the first, `start` [C]. The compiler renames registers."""
    alone = tl.full([T, C], 1, tl.int32)
    last, before, alone = tl.associative_scan((x, x, alone), 0, _next)
    return tl.where(tl.arange(0, T)[:, None] == 0, start[None, :], before)


@triton.jit
def _last(x, T: tl.constexpr):
    """x[T - 1] in fp32; as integers, since the compiler removes integer additions of 0."""
    bits = tl.where(tl.arange(0, T)[:, None] == T - 1, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def recur(decay, value, carry, T: tl.constexpr, C: tl.constexpr):
    """h = decay * (h of the step before) + value along a tile, from `carry` [C] before it.

    Returns:
        States, states before each step, both [T, C], and the state after the tile [C].
    """
    value = tl.where(tl.arange(0, T)[:, None] == 0, decay * carry[None, :] + value, value)
    decays, h = tl.associative_scan((decay, value), 0, _step_after)
    return h, _shift(h, carry, T, C), _last(h, T)


@triton.jit
def recur_back(decay, value, carry, T: tl.constexpr, C: tl.constexpr):
    """g = value + (decay * g of the step after) against the order of `recur`; `carry` [C] is decay * g after the tile.

    Returns:
        g [T, C], and decay * g of the first step [C].
    """
    # Free, since threads own whole columns: the compiler renames registers.
    decay, value = tl.flip(decay, 0), tl.flip(value, 0)
    value = tl.where(tl.arange(0, T)[:, None] == 0, value + carry[None, :], value)
    decays, g = tl.associative_scan((_shift(decay, carry, T, C), value), 0, _step_after)
    return tl.flip(g, 0), _last(decay, T) * _last(g, T)
