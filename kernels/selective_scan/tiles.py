"""Device functions of the selective scan's kernels: tiles of steps by states by channels.

A tile [BLOCK_L, BLOCK_N, BLOCK_D] holds BLOCK_L steps, in walking order, of one state of each of BLOCK_N warps for
BLOCK_D channels. In the layout that Triton gives such tiles a thread owns all steps of its state and channel, so that
recurrences stay inside threads, and warps share states and channels; a warp takes `states` states, one after the other.
Sequences are tiles [BLOCK_D, BLOCK_L] while they are loaded, stored and computed on by themselves.

A sequence stands for (pointer, offsets of its channels [BLOCK_D], distance of its steps); `tile` and `flags` are the
constants of `launch.py`.
"""

from .._device import LN2, LOG2_E, flip_first, keep_second, last_of_axis, softplus_log2
from .._launch import tl, triton

PACKED = tl.constexpr(16)  # steps of a state that B and C are packed by, and after which states are saved


@triton.jit
def channels_of_program(dim, DIRECTIONS: tl.constexpr, BLOCK_D: tl.constexpr):
    """What a program walks, where programs of the first axis are blocks of BLOCK_D channels of entries.

    Returns:
        Entry (a direction of an element of the batch), element, direction, channels, and which of them exist; the
        others are copies of the last one.
    """
    blocks = tl.cdiv(dim, BLOCK_D)
    entry = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    return entry, entry // DIRECTIONS, entry % DIRECTIONS, tl.minimum(channel, dim - 1), channel < dim


@triton.jit
def sequence_of(pointer, strides, batch, direction, channel):
    """A sequence from its pointer and its strides of batch, direction, channel and step."""
    return pointer + (batch * strides[0] + direction * strides[1]), channel * strides[2], strides[3]


@triton.jit
def coefficients_of(packed, entry, channel, dim, group_dim, tiles, padded):
    """Where packed B or C of channels are, pointers [BLOCK_D], and the distance between those of two tiles."""
    size = padded * PACKED
    # The same for all channels of a group, which the compiler must not know.
    row = entry * (dim // group_dim) + channel // group_dim
    return packed + row * tiles * size, size


@triton.jit
def positions_of(tile, tiles, reverse, BLOCK_L: tl.constexpr):
    """Positions [BLOCK_L] of a tile's steps in the sequence."""
    first = reverse * ((tiles - tile) * BLOCK_L - 1) + (1 - reverse) * (tile * BLOCK_L)
    return first + (1 - 2 * reverse) * tl.arange(0, BLOCK_L)


@triton.jit
def _places(rows, position, stride, CHANNELS_LAST: tl.constexpr):
    """Offsets [BLOCK_D, BLOCK_L] of steps `stride` apart of sequences that start at `rows`."""
    places = rows[:, None] + (position.to(tl.int64) * stride)[None, :]
    # The hint makes lanes share the channels of a step: their clamp hides from the compiler that they are neighbours.
    return tl.max_contiguous(places, (rows.shape[0], 1)) if CHANNELS_LAST else places


@triton.jit
def load_steps(sequence, position, length, CHANNELS_LAST: tl.constexpr):
    """Steps of a sequence as a tile [BLOCK_D, BLOCK_L] in fp32, zero outside of it."""
    pointer, rows, stride = sequence
    places = _places(rows, position, stride, CHANNELS_LAST)
    return tl.load(pointer + places, mask=(position < length)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_steps(sequence, has_channel, position, length, x, CHANNELS_LAST: tl.constexpr):
    pointer, rows, stride = sequence
    mask = has_channel[:, None] & (position < length)[None, :]
    places = _places(rows, position, stride, CHANNELS_LAST)
    tl.store(pointer + places, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def dt_of(delta, bias, position, length, flags):
    """(delta + bias) / ln 2, and dt / ln 2: its softplus where wanted, zero where the sequence has no step."""
    raw = (delta + bias[:, None]) * LOG2_E
    dt = softplus_log2(raw, flags.exact, flags.nvidia) if flags.softplus else raw
    return raw, tl.where((position < length)[None, :], dt, 0.0)


@triton.jit
def _seconds(first0, first1, first2, second0, second1, second2):
    return second0, second1, second2


@triton.jit
def by_channel(x, y, z, BLOCK_N: tl.constexpr):
    """Three tiles [BLOCK_D, BLOCK_L] of sequences as [BLOCK_L, BLOCK_N, BLOCK_D], where threads own a channel's steps.

    The scans have no effect but that what the tiles are computed from stays in the layout it was loaded in, and that
    the compiler takes each tile to one other layout, not to one for each use.
    """
    x, y, z = tl.associative_scan((x[:, :, None], y[:, :, None], z[:, :, None]), 2, _seconds)
    return _for_warps(x, BLOCK_N), _for_warps(y, BLOCK_N), _for_warps(z, BLOCK_N)


@triton.jit
def _for_warps(x, BLOCK_N: tl.constexpr):
    x = tl.permute(x, (1, 2, 0))
    return tl.associative_scan(tl.broadcast_to(x, [x.shape[0], BLOCK_N, x.shape[2]]), 0, keep_second)


@triton.jit
def _of_states(pointer, state, stride):
    """Pointers [BLOCK_N, BLOCK_D] from those of channels [BLOCK_D], of states [BLOCK_N, 1] that lie `stride` apart.

    The hint makes the compiler load and store in the layout that threads compute in.
    """
    return tl.max_contiguous(pointer[None, :] + state * stride, (1, pointer.shape[0]))


@triton.jit
def _four_words(pointer, WORD: tl.constexpr):
    """Words of 32 bits from WORD on as a tile [4, BLOCK_N, BLOCK_D]."""
    pointer += (WORD + tl.arange(0, 4))[:, None, None]
    # Vectors of four words, then lanes along the channels, which get the same.
    return tl.load(tl.max_contiguous(tl.multiple_of(pointer, (16, 1, 1)), (4, 1, 2)))


@triton.jit
def _concatenate(x, y):
    return tl.reshape(tl.permute(tl.join(x, y), (3, 0, 1, 2)), [2 * x.shape[0], x.shape[1], x.shape[2]])


@triton.jit
def _eight_steps(pointer, STEP: tl.constexpr):
    """Steps from STEP on as a tile [8, BLOCK_N, BLOCK_D] in fp32."""
    if pointer.dtype.element_ty == tl.bfloat16:
        # Words of steps i and i + 4; the compiler's own conversion of neighbours would take more instructions.
        pair = _four_words(pointer.to(tl.pointer_type(tl.int32), bitcast=True), STEP // 2)
        first = (pair << 16).to(tl.float32, bitcast=True)
        second = (pair & -65536).to(tl.float32, bitcast=True)
        return _concatenate(first, second)
    else:
        return _concatenate(_four_words(pointer, STEP), _four_words(pointer, STEP + 4))


@triton.jit
def load_coefficients(pointer, state, k, BLOCK_L: tl.constexpr):
    """B or C of the states k * BLOCK_N after `state` [BLOCK_N, 1] as a tile [BLOCK_L, BLOCK_N, BLOCK_D].

    Args:
        pointer: [BLOCK_D], of PACKED steps for each state, as `pack_kernel` lays them out, one state after the other.
    """
    BLOCK_N: tl.constexpr = state.shape[0]
    tl.static_assert(BLOCK_L == 8 or BLOCK_L == PACKED)
    pointer = pointer[None, None, :] + (state * PACKED)[None, :, :] + k * (BLOCK_N * PACKED)
    x = _eight_steps(pointer, 0)
    return x if BLOCK_L == 8 else _concatenate(x, _eight_steps(pointer, 8))


@triton.jit
def load_states(pointer, stride, state, dstate, wanted, STATES: tl.constexpr):
    """Numbers of STATES * BLOCK_N states as STATES tensors [BLOCK_N, BLOCK_D], zero where none are wanted.

    Args:
        pointer: [BLOCK_D], of the first of all states.
        stride: Between states.
        state: The first BLOCK_N states [BLOCK_N, 1].
        wanted: [BLOCK_D].
    """
    BLOCK_N: tl.constexpr = state.shape[0]
    loaded = ()
    for k in tl.static_range(STATES):
        n = state + k * BLOCK_N
        mask = (n < dstate) & wanted[None, :]
        loaded = loaded + (tl.load(_of_states(pointer, n, stride), mask=mask, other=0.0).to(tl.float32),)
    return loaded


@triton.jit
def store_states(pointer, stride, values, state, dstate, wanted, STATES: tl.constexpr):
    """Stores what `load_states` loads."""
    BLOCK_N: tl.constexpr = state.shape[0]
    for k in tl.static_range(STATES):
        n = state + k * BLOCK_N
        tl.store(_of_states(pointer, n, stride), values[k], mask=(n < dstate) & wanted[None, :])


@triton.jit
def load_starts(first, pointer, stride, chunk, state, dstate, has_channel, CHUNKED: tl.constexpr, STATES: tl.constexpr):
    """As `load_states` what a chunk starts from: for the first chunk `first`, or zero if it is None, else `pointer`."""
    starts = zero_states(state.shape[0], has_channel.shape[0], STATES)
    if first is not None:
        starts = load_states(first, 1, state, dstate, tl.where(chunk == 0, has_channel, False), STATES)
    if CHUNKED:
        later = load_states(pointer, stride, state, dstate, tl.where(chunk > 0, has_channel, False), STATES)
        starts = _add_states(starts, later, STATES)
    return starts


@triton.jit
def _add_states(x, y, STATES: tl.constexpr):
    total = ()
    for k in tl.static_range(STATES):
        total = total + (x[k] + y[k],)
    return total


@triton.jit
def zero_states(BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STATES: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(STATES):
        zeros = zeros + (tl.zeros([BLOCK_N, BLOCK_D], tl.float32),)
    return zeros


@triton.jit
def _add(x, y):
    return x + y


@triton.jit
def sum_states(x):
    """The sum of a tile [BLOCK_L, BLOCK_N, BLOCK_D] over BLOCK_N, as a tile [BLOCK_D, BLOCK_L] of sequences.

    It is taken in the layout that Triton gives to tiles [BLOCK_N, BLOCK_D, BLOCK_L], where threads own all of BLOCK_N.
    """
    return last_of_axis(tl.associative_scan(tl.permute(x, (1, 2, 0)), 0, _add))


@triton.jit
def sum_channels(x, y):
    """The sums of two tiles [BLOCK_L, BLOCK_N, BLOCK_D] over BLOCK_D, twice, as [BLOCK_N, 2, 2 * BLOCK_L], first x's.

    They are taken in the layout that Triton gives to tiles [BLOCK_D / 2, BLOCK_N, 2, 2 * BLOCK_L], where threads own
    half of BLOCK_D.
    """
    BLOCK_L: tl.constexpr = x.shape[0]
    BLOCK_N: tl.constexpr = x.shape[1]
    HALF: tl.constexpr = x.shape[2] // 2
    pair = tl.permute(tl.reshape(tl.join(x, y), [BLOCK_L, BLOCK_N, HALF, 2, 2]), (2, 1, 3, 4, 0))
    pair = tl.reshape(pair, [HALF, BLOCK_N, 2, 2 * BLOCK_L])
    total = tl.sum(last_of_axis(tl.associative_scan(pair, 0, _add)), axis=1)
    return tl.broadcast_to(total[:, None, :], [BLOCK_N, 2, 2 * BLOCK_L])


@triton.jit
def _step_after(decay0, value0, decay1, value1):
    """Composes two steps h -> decay * h + value, the first one first."""
    return decay0 * decay1, decay1 * value0 + value1


@triton.jit
def _next(last0, before0, alone0, last1, before1, alone1):
    """Composes two runs of steps, of which only the last two count."""
    return last1, tl.where(alone1 != 0, last0, before1), alone0 & 0


@triton.jit
def _shift(x, start):
    """The step before each step of x; before the first, `start`. The compiler renames registers."""
    alone = tl.full(x.shape, 1, tl.int32)
    last, before, alone = tl.associative_scan((x, x, alone), 0, _next)
    return tl.where(tl.arange(0, x.shape[0])[:, None, None] == 0, start[None, :, :], before)


@triton.jit
def recur(decay, value, carry):
    """h = decay * (h of the step before) + value along a tile, from `carry` [BLOCK_N, BLOCK_D] before it.

    Returns:
        States, states before each step, both like the tile, and the state after the tile [BLOCK_N, BLOCK_D].
    """
    value = tl.where(tl.arange(0, value.shape[0])[:, None, None] == 0, decay * carry[None, :, :] + value, value)
    decays, h = tl.associative_scan((decay, value), 0, _step_after)
    return h, _shift(h, carry), last_of_axis(h)


@triton.jit
def recur_back(decay, value, carry):
    """g = value + (decay * g of the step after) against the order of `recur`; `carry` is decay * g after the tile.

    Returns:
        g, like the tile, and decay * g of the first step [BLOCK_N, BLOCK_D].
    """
    decay, value = flip_first(decay), flip_first(value)
    value = tl.where(tl.arange(0, value.shape[0])[:, None, None] == 0, value + carry[None, :, :], value)
    decays, g = tl.associative_scan((_shift(decay, carry), value), 0, _step_after)
    return flip_first(g), last_of_axis(decay) * last_of_axis(g)


@triton.jit
def end_states(dt, push, rates, carries, B, state, ADJOINT: tl.constexpr, BLOCK_L: tl.constexpr, STATES: tl.constexpr):
    """The states after a tile, or with ADJOINT what the tile hands to the one before it."""
    ends = ()
    for k in tl.static_range(STATES):
        value = push * load_coefficients(B, state, k, BLOCK_L)
        decay = tl.exp2(dt * rates[k][None, :, :])
        if ADJOINT:
            g, end = recur_back(decay, value, carries[k])
        else:
            h, before, end = recur(decay, value, carries[k])
        ends = ends + (end,)
    return ends


@triton.jit
def load_starts_of_half(
    saved, dim, u, delta, bias, rates, B, half, halves, length, state, dstate, has_channel, reverse, tile, flags
):
    """The states before a half of what lies between saved states; B is that of the first half."""
    starts = load_states(saved, dim, state, dstate, has_channel, tile.states)
    if half % 2 == 1:
        position = positions_of(half - 1, halves, reverse, tile.block_l)
        x = load_steps(u, position, length, flags.channels_last)
        raw = load_steps(delta, position, length, flags.channels_last)
        raw, dt = dt_of(raw, bias, position, length, flags)
        dt, drive, unused = by_channel(dt, dt * LN2 * x, dt, tile.block_n)
        starts = end_states(dt, drive, rates, starts, B, state, False, tile.block_l, tile.states)
    return starts
