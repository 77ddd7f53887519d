"""Building blocks of the selective scan's kernels: tiles of steps by states by channels.

A tile [T, W, C] holds T steps, in walking order, of one state of each of W warps for C channels. In the layout that
Triton gives such tiles a thread owns all steps of its state and channel, so that recurrences stay inside threads, and
warps share states and channels. Sequences are tiles [C, T] while they are loaded, stored and computed on by themselves.
"""

import triton
import triton.language as tl

from ..elementwise import LN2, LOG2_E, softplus_log2
from ..rows import pick_last, second

PACKED = tl.constexpr(16)  # steps of a state that B and C are packed by, and after which states are saved


@triton.jit
def columns_of(dim, DIRECTIONS: tl.constexpr, COLUMNS: tl.constexpr):
    """What a program walks, where programs of the first axis are blocks of COLUMNS channels of entries.

    Returns:
        Entry (a direction of an element of the batch), element, direction, channels, and which of them are there; the
        others are copies of the last one.
    """
    blocks = tl.cdiv(dim, COLUMNS)
    entry = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    return entry, entry // DIRECTIONS, entry % DIRECTIONS, tl.minimum(channel, dim - 1), channel < dim


@triton.jit
def coefficients_of(pointer, entry, channel, dim, group_dim, share, tiles, padded, dstate, CONSTANT: tl.constexpr):
    """Where B or C of channels is, pointers [C], and how far apart those of two tiles are."""
    if CONSTANT:
        return pointer + channel.to(tl.int64) * dstate, 0
    else:
        size = padded * PACKED
        # The same for all channels of a group, which the compiler must not know.
        row = entry * (dim // group_dim // share) + channel // group_dim // share
        return pointer + row * tiles * size, size


@triton.jit
def positions_of(tile, tiles, reverse, T: tl.constexpr):
    """Positions [T] of a tile's steps in the sequence."""
    first = reverse * ((tiles - tile) * T - 1) + (1 - reverse) * (tile * T)
    return first + (1 - 2 * reverse) * tl.arange(0, T)


@triton.jit
def _places(rows, position, stride, CHANNELS_LAST: tl.constexpr):
    """Offsets [C, T] of steps `stride` apart of sequences that start at `rows`."""
    places = rows[:, None] + (position.to(tl.int64) * stride)[None, :]
    # The hint makes lanes share the channels of a step: their clamp hides from the compiler that they are neighbours.
    return tl.max_contiguous(places, (rows.shape[0], 1)) if CHANNELS_LAST else places


@triton.jit
def load_steps(pointer, rows, position, stride, length, CHANNELS_LAST: tl.constexpr):
    """Steps of the sequences at `pointer + rows` as a tile [C, T] in fp32, zero outside of them."""
    places = _places(rows, position, stride, CHANNELS_LAST)
    return tl.load(pointer + places, mask=(position < length)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_steps(pointer, rows, in_rows, position, stride, length, x, CHANNELS_LAST: tl.constexpr):
    mask = in_rows[:, None] & (position < length)[None, :]
    places = _places(rows, position, stride, CHANNELS_LAST)
    tl.store(pointer + places, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def steps_of(delta, bias, position, length, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, NVIDIA: tl.constexpr):
    """(delta + bias) / ln 2, and the step / ln 2: its softplus where wanted, zero where the sequence has no step."""
    raw = (delta + bias[:, None]) * LOG2_E
    step = softplus_log2(raw, EXACT, NVIDIA) if SOFTPLUS else raw
    return raw, tl.where((position < length)[None, :], step, 0.0)


@triton.jit
def _seconds(first0, first1, first2, second0, second1, second2):
    return second0, second1, second2


@triton.jit
def by_channel(x, y, z, W: tl.constexpr):
    """Three tiles [C, T] of sequences as [T, W, C], where threads own the steps of a channel.

    The scans have no effect but that what the tiles are computed from stays in the layout it was loaded in, and that
    the compiler takes each tile to one other layout, not to one for each use.
    """
    x, y, z = tl.associative_scan((x[:, :, None], y[:, :, None], z[:, :, None]), 2, _seconds)
    return _for_warps(x, W), _for_warps(y, W), _for_warps(z, W)


@triton.jit
def _for_warps(x, W: tl.constexpr):
    x = tl.permute(x, (1, 2, 0))
    return tl.associative_scan(tl.broadcast_to(x, [x.shape[0], W, x.shape[2]]), 0, second)


@triton.jit
def _of_states(pointer, state, stride):
    """Pointers [W, C] from those of channels [C], of states [W, 1] that lie `stride` apart.

    The hint makes the compiler load and store in the layout that threads compute in.
    """
    return tl.max_contiguous(pointer[None, :] + state * stride, (1, pointer.shape[0]))


@triton.jit
def _four_words(pointer, WORD: tl.constexpr):
    """Words of 32 bits from WORD on as a tile [4, W, C]."""
    pointer += (WORD + tl.arange(0, 4))[:, None, None]
    # Vectors of four words, then lanes along the channels, which get the same.
    return tl.load(tl.max_contiguous(tl.multiple_of(pointer, (16, 1, 1)), (4, 1, 2)))


@triton.jit
def _one_after_the_other(x, y):
    return tl.reshape(tl.permute(tl.join(x, y), (3, 0, 1, 2)), [2 * x.shape[0], x.shape[1], x.shape[2]])


@triton.jit
def _eight_steps(pointer, STEP: tl.constexpr):
    """Steps from STEP on as a tile [8, W, C] in fp32."""
    if pointer.dtype.element_ty == tl.bfloat16:
        # Words of steps i and i + 4; the compiler's own conversion of neighbours would take more instructions.
        pair = _four_words(pointer.to(tl.pointer_type(tl.int32), bitcast=True), STEP // 2)
        first = (pair << 16).to(tl.float32, bitcast=True)
        second = (pair & -65536).to(tl.float32, bitcast=True)
        return _one_after_the_other(first, second)
    else:
        return _one_after_the_other(_four_words(pointer, STEP), _four_words(pointer, STEP + 4))


@triton.jit
def load_coefficients(pointer, state, k, dstate, CONSTANT: tl.constexpr, T: tl.constexpr):
    """B or C of the W states k * W after `state` [W, 1] as a tile [T, W, C], or [1, W, C] where they are constant.

    Args:
        pointer: [C], of PACKED steps for each state, as `pack_kernel` lays them out, one state after the other; of
            constants, one for each.
    """
    W: tl.constexpr = state.shape[0]
    if CONSTANT:
        state += k * W
        present = tl.broadcast_to(state < dstate, [W, pointer.shape[0]])
        return tl.load(_of_states(pointer, state, 1), mask=present, other=0.0)[None, :, :]
    else:
        tl.static_assert(T == 8 or T == PACKED)
        pointer = pointer[None, None, :] + (state * PACKED)[None, :, :] + k * (W * PACKED)
        x = _eight_steps(pointer, 0)
        return x if T == 8 else _one_after_the_other(x, _eight_steps(pointer, 8))


@triton.jit
def load_states(pointer, stride, state, dstate, wanted, STATES: tl.constexpr):
    """Numbers of STATES times W states as that many tensors [W, C], zero where none are wanted.

    Args:
        pointer: [C], of the first of all states.
        stride: Between states.
        state: The first W states [W, 1].
        wanted: [C].
    """
    W: tl.constexpr = state.shape[0]
    loaded = ()
    for k in tl.static_range(STATES):
        mask = (state + k * W < dstate) & wanted[None, :]
        loaded = loaded + (tl.load(_of_states(pointer, state + k * W, stride), mask=mask, other=0.0).to(tl.float32),)
    return loaded


@triton.jit
def store_states(pointer, stride, values, state, dstate, wanted, STATES: tl.constexpr):
    """Stores what `load_states` loads."""
    W: tl.constexpr = state.shape[0]
    for k in tl.static_range(STATES):
        mask = (state + k * W < dstate) & wanted[None, :]
        tl.store(_of_states(pointer, state + k * W, stride), values[k], mask=mask)


@triton.jit
def load_starts(
    first,
    pointer,
    stride,
    chunk,
    state,
    dstate,
    in_rows,
    HAS_FIRST: tl.constexpr,
    CHUNKED: tl.constexpr,
    STATES: tl.constexpr,
):
    """As `load_states` what a chunk starts from: at `first` for the first chunk, where given, else at `pointer`."""
    W: tl.constexpr = state.shape[0]
    starts = no_states(W, in_rows.shape[0], STATES)
    if HAS_FIRST:
        starts = load_states(first, 1, state, dstate, tl.where(chunk == 0, in_rows, False), STATES)
    if CHUNKED:
        later = load_states(pointer, stride, state, dstate, tl.where(chunk > 0, in_rows, False), STATES)
        starts = _add_states(starts, later, STATES)
    return starts


@triton.jit
def _add_states(x, y, STATES: tl.constexpr):
    total = ()
    for k in tl.static_range(STATES):
        total = total + (x[k] + y[k],)
    return total


@triton.jit
def no_states(W: tl.constexpr, C: tl.constexpr, STATES: tl.constexpr):
    nothing = ()
    for _ in tl.static_range(STATES):
        nothing = nothing + (tl.zeros([W, C], tl.float32),)
    return nothing


@triton.jit
def _add(x, y):
    return x + y


@triton.jit
def sum_warps(x):
    """The sum of a tile [T, W, C] over W, as a tile [C, T] of sequences.

    It is taken in the layout that Triton gives to tiles [W, C, T], where threads own all of W.
    """
    return pick_last(tl.associative_scan(tl.permute(x, (1, 2, 0)), 0, _add))


@triton.jit
def sum_channels(x, y):
    """The sums of two tiles [T, W, C] over C, twice, as [W, 2, 2 * T], first those of x.

    They are taken in the layout that Triton gives to tiles [C / 2, W, 2, 2 * T], where threads own half of C.
    """
    T: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    HALF: tl.constexpr = x.shape[2] // 2
    pair = tl.permute(tl.reshape(tl.join(x, y), [T, W, HALF, 2, 2]), (2, 1, 3, 4, 0))
    pair = tl.reshape(pair, [HALF, W, 2, 2 * T])
    total = tl.sum(pick_last(tl.associative_scan(pair, 0, _add)), axis=1)
    return tl.broadcast_to(total[:, None, :], [W, 2, 2 * T])


@triton.jit
def _step_after(decay0, value0, decay1, value1):
    """Composes two steps h -> decay * h + value, the first one first."""
    return decay0 * decay1, decay1 * value0 + value1


@triton.jit
def _next(last0, before0, alone0, last1, before1, alone1):
    """Composes two runs of rows, of which only the last two count."""
    return last1, tl.where(alone1 != 0, last0, before1), alone0 & 0


@triton.jit
def _shift(x, start):
    """The row before each row of x; before the first, `start`. The compiler renames registers."""
    alone = tl.full(x.shape, 1, tl.int32)
    last, before, alone = tl.associative_scan((x, x, alone), 0, _next)
    return tl.where(tl.arange(0, x.shape[0])[:, None, None] == 0, start[None, :, :], before)


@triton.jit
def recur(decay, value, carry):
    """h = decay * (h of the step before) + value along a tile, from `carry` [W, C] before it.

    Returns:
        States, states before each step, both [T, W, C], and the state after the tile [W, C].
    """
    value = tl.where(tl.arange(0, value.shape[0])[:, None, None] == 0, decay * carry[None, :, :] + value, value)
    decays, h = tl.associative_scan((decay, value), 0, _step_after)
    return h, _shift(h, carry), pick_last(h)


@triton.jit
def recur_back(decay, value, carry):
    """g = value + (decay * g of the step after) against the order of `recur`; `carry` is decay * g after the tile.

    Returns:
        g [T, W, C], and decay * g of the first step [W, C].
    """
    # Free, since threads own all steps: the compiler renames registers.
    decay, value = tl.flip(decay, 0), tl.flip(value, 0)
    value = tl.where(tl.arange(0, value.shape[0])[:, None, None] == 0, value + carry[None, :, :], value)
    decays, g = tl.associative_scan((_shift(decay, carry), value), 0, _step_after)
    return tl.flip(g, 0), pick_last(decay) * pick_last(g)


@triton.jit
def end_states(
    step,
    push,
    rates,
    carries,
    B,
    state,
    dstate,
    CONSTANT_B: tl.constexpr,
    ADJOINT: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
    STATES: tl.constexpr,
):
    """The states after a tile, or with ADJOINT what the tile hands to the one before it."""
    ends = ()
    for k in tl.static_range(STATES):
        value = push * load_coefficients(B, state, k, dstate, CONSTANT_B, T)
        decay = tl.exp2(step * rates[k][None, :, :])
        if ADJOINT:
            g, end = recur_back(decay, value, carries[k])
        else:
            h, before, end = recur(decay, value, carries[k])
        ends = ends + (end,)
    return ends


@triton.jit
def load_starts_of_half(
    saved,
    dim,
    u,
    u_rows,
    u_step,
    delta,
    delta_rows,
    delta_step,
    bias,
    rates,
    B,
    half,
    halves,
    length,
    state,
    dstate,
    in_rows,
    reverse,
    SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EXACT: tl.constexpr,
    NVIDIA: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
    STATES: tl.constexpr,
):
    """The states before a half of what lies between saved states; B is that of the first half."""
    starts = load_states(saved, dim, state, dstate, in_rows, STATES)
    if half % 2 == 1:
        position = positions_of(half - 1, halves, reverse, T)
        x = load_steps(u, u_rows, position, u_step, length, CHANNELS_LAST)
        raw = load_steps(delta, delta_rows, position, delta_step, length, CHANNELS_LAST)
        raw, step = steps_of(raw, bias, position, length, SOFTPLUS, EXACT, NVIDIA)
        step, drive, unused = by_channel(step, step * LN2 * x, step, W)
        starts = end_states(step, drive, rates, starts, B, state, dstate, CONSTANT_B, False, T, W, STATES)
    return starts
