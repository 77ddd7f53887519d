"""Triton kernels of the selective scan's forward pass, and of the states that pass between the chunks of L.

Sequences are walked tile by tile (see `tiles`), all states of a tile one after the other; what a tile hands to the next
stays in registers. Known alignment of the sequences would make the compiler load vectors, in a layout whose conversion
costs more.
"""

from .._device import LN2, MAX_DECAY, sigmoid
from .._launch import tl, triton
from .tiles import (
    by_channel,
    channels_of_program,
    coefficients_of,
    dt_of,
    end_states,
    load_coefficients,
    load_starts,
    load_states,
    load_steps,
    positions_of,
    recur,
    sequence_of,
    store_states,
    store_steps,
    sum_states,
    zero_states,
)


@triton.jit
def _walk_states(dt, drive, out, rates, carries, B, C, state, BLOCK_L: tl.constexpr, STATES: tl.constexpr):
    """Adds what the states of each warp do in a tile to `out`; returns it and the states after."""
    ends = ()
    for k in tl.static_range(STATES):
        b = load_coefficients(B, state, k, BLOCK_L)
        c = load_coefficients(C, state, k, BLOCK_L)
        h, before, end = recur(tl.exp2(dt * rates[k][None, :, :]), drive * b, carries[k])
        out += h * c
        ends = ends + (end,)
    return out, ends


@triton.jit(do_not_specialize_on_alignment=['u', 'delta', 'z', 'y'])
def scan_kernel(
    u,  # [batch, directions, dim, L], by its strides
    delta,  # the same
    A,  # [directions, dim, N]
    B,  # [batch, directions * groups, tiles, padded N, PACKED]
    C,  # the same
    D,  # [directions, dim], or None
    z,  # as u, or None
    delta_bias,  # [directions, dim], or None
    initial,  # [batch, directions, dim, N], or None
    y,  # as u: written
    last,  # [batch, directions, dim, N]: written, the state after the last step
    states,  # [batch, directions, num_states, N, dim]: written; see below
    length,
    dim,
    dstate,
    group_dim,
    chunk_tiles,
    chunk_states,
    num_states,
    u_strides,
    delta_strides,
    z_strides,
    y_strides,
    CHUNKED: tl.constexpr,
    SAVE: tl.constexpr,
    tile,  # `Tile` of constants
    flags,  # `Flags` of constants
):
    """One program walks one chunk of L for BLOCK_D channels.

    In `states` the state before each chunk but the first is there already, at the place chunk * chunk_states. With SAVE
    the state after tile i of a chunk goes i + 1 places further.
    """
    BLOCK_L: tl.constexpr = tile.block_l
    BLOCK_N: tl.constexpr = tile.block_n
    STATES: tl.constexpr = tile.states
    CHANNELS_LAST: tl.constexpr = flags.channels_last
    tiles = tl.cdiv(length, BLOCK_L)
    entry, batch, direction, index, has_channel = channels_of_program(dim, flags.directions, tile.block_d)
    channel = index.to(tl.int64)
    parameter = direction * dim + channel
    reverse = direction if flags.directions == 2 else flags.reverse
    state = tl.arange(0, BLOCK_N)[:, None]
    u = sequence_of(u, u_strides, batch, direction, channel)
    delta = sequence_of(delta, delta_strides, batch, direction, channel)
    y = sequence_of(y, y_strides, batch, direction, channel)
    if z is not None:
        z = sequence_of(z, z_strides, batch, direction, channel)
    B, B_tile_size = coefficients_of(B, entry, index, dim, group_dim, tiles, STATES * BLOCK_N)
    C, C_tile_size = coefficients_of(C, entry, index, dim, group_dim, tiles, STATES * BLOCK_N)
    last += (entry * dim + channel) * dstate
    if initial is not None:
        initial += (entry * dim + channel) * dstate
    states += entry * num_states * (dstate * dim) + channel
    bias = tl.zeros([tile.block_d], tl.float32)
    skip = tl.zeros([tile.block_d], tl.float32)
    if delta_bias is not None:
        bias = tl.load(delta_bias + parameter).to(tl.float32)  # [BLOCK_D]
    if D is not None:
        skip = tl.load(D + parameter).to(tl.float32)  # [BLOCK_D]
    chunk = tl.program_id(1)
    begin = chunk * chunk_tiles
    count = tl.minimum(chunk_tiles, tiles - begin)
    here = states + tl.cast(chunk * chunk_states, tl.int64) * (dstate * dim)
    rates = load_states(A + parameter * dstate, 1, state, dstate, has_channel, STATES)
    carries = load_starts(initial, here, dim, chunk, state, dstate, has_channel, CHUNKED, STATES)
    if SAVE:
        store_states(here, dim, carries, state, dstate, tl.where(chunk == 0, has_channel, False), STATES)
    position = positions_of(begin, tiles, reverse, BLOCK_L)
    next_u = load_steps(u, position, length, CHANNELS_LAST)
    next_delta = load_steps(delta, position, length, CHANNELS_LAST)
    for i in range(count):
        number = begin + i
        position = positions_of(number, tiles, reverse, BLOCK_L)
        x = next_u
        raw, dt = dt_of(next_delta, bias, position, length, flags)
        # A tile ahead, since few other warps may be there to work meanwhile.
        ahead = positions_of(tl.minimum(number + 1, tiles - 1), tiles, reverse, BLOCK_L)
        next_u = load_steps(u, ahead, length, CHANNELS_LAST)
        next_delta = load_steps(delta, ahead, length, CHANNELS_LAST)
        dt, drive, unused = by_channel(dt, dt * LN2 * x, dt, BLOCK_N)
        out = tl.zeros([BLOCK_L, BLOCK_N, tile.block_d], tl.float32)
        B_tile = B + tl.cast(number, tl.int64) * B_tile_size
        C_tile = C + tl.cast(number, tl.int64) * C_tile_size
        out, carries = _walk_states(dt, drive, out, rates, carries, B_tile, C_tile, state, BLOCK_L, STATES)
        if SAVE:
            here += dstate * dim
            # The state before the next chunk is there already.
            saved = tl.where((i + 1 < count) | (number + 1 == tiles), has_channel, False)
            store_states(here, dim, carries, state, dstate, saved, STATES)
        out = sum_states(out) + x * skip[:, None]
        if z is not None:
            gate = load_steps(z, position, length, CHANNELS_LAST)
            out = out * gate * sigmoid(gate)
        store_steps(y, has_channel, position, length, out, CHANNELS_LAST)
    store_states(last, 1, carries, state, dstate, tl.where(begin + count == tiles, has_channel, False), STATES)


@triton.jit(do_not_specialize_on_alignment=['x', 'z', 'delta'])
def summary_kernel(
    x,  # [batch, directions, dim, L], by its strides: u, or with ADJOINT the gradient of y
    z,  # the same, or None
    delta,  # the same
    A,  # [directions, dim, N]
    B,  # [batch, directions * groups, tiles, padded N, PACKED]: B, or with ADJOINT C
    delta_bias,  # [directions, dim], or None
    ends,  # [batch, directions, subchunks, N, dim]: written, the state after a subchunk from zero before it
    totals,  # [batch, directions, subchunks, dim]: written, the sum of dt / ln 2 over a subchunk
    length,
    dim,
    dstate,
    group_dim,
    subchunk_tiles,
    x_strides,
    z_strides,
    delta_strides,
    ADJOINT: tl.constexpr,
    tile,  # `Tile` of constants
    flags,  # `Flags` of constants
):
    """One program walks one of the subchunks of all chunks but the last, for BLOCK_D channels.

    ADJOINT walks g_l = decay_l * (C_l * x_l + g_{l+1}) from the last chunk to the first; `flags.reverse` is always that
    of the forward pass.
    """
    BLOCK_L: tl.constexpr = tile.block_l
    BLOCK_N: tl.constexpr = tile.block_n
    STATES: tl.constexpr = tile.states
    CHANNELS_LAST: tl.constexpr = flags.channels_last
    tiles = tl.cdiv(length, BLOCK_L)
    entry, batch, direction, index, has_channel = channels_of_program(dim, flags.directions, tile.block_d)
    channel = index.to(tl.int64)
    parameter = direction * dim + channel
    reverse = direction if flags.directions == 2 else flags.reverse
    state = tl.arange(0, BLOCK_N)[:, None]
    x = sequence_of(x, x_strides, batch, direction, channel)
    delta = sequence_of(delta, delta_strides, batch, direction, channel)
    if z is not None:
        z = sequence_of(z, z_strides, batch, direction, channel)
    B, B_tile_size = coefficients_of(B, entry, index, dim, group_dim, tiles, STATES * BLOCK_N)
    bias = tl.zeros([tile.block_d], tl.float32)
    if delta_bias is not None:
        bias = tl.load(delta_bias + parameter).to(tl.float32)  # [BLOCK_D]
    slot = entry * tl.num_programs(1) + tl.program_id(1)
    ends += slot * (dstate * dim) + channel
    totals += slot * dim + channel
    total = tl.zeros([BLOCK_L, BLOCK_N, tile.block_d], tl.float32)
    carries = zero_states(BLOCK_N, tile.block_d, STATES)
    rates = load_states(A + parameter * dstate, 1, state, dstate, has_channel, STATES)
    begin = tl.program_id(1) * subchunk_tiles
    position = positions_of(tiles - 1 - begin if ADJOINT else begin, tiles, reverse, BLOCK_L)
    next_x = load_steps(x, position, length, CHANNELS_LAST)
    next_delta = load_steps(delta, position, length, CHANNELS_LAST)
    for i in range(subchunk_tiles):
        # No chunk but the last, which is not walked here, reaches the end.
        number = tiles - 1 - begin - i if ADJOINT else begin + i
        position = positions_of(number, tiles, reverse, BLOCK_L)
        push = next_x
        raw, dt = dt_of(next_delta, bias, position, length, flags)
        # A tile ahead, as in the forward pass.
        ahead = positions_of(number - 1 if ADJOINT else number + 1, tiles, reverse, BLOCK_L)
        next_x = load_steps(x, ahead, length, CHANNELS_LAST)
        next_delta = load_steps(delta, ahead, length, CHANNELS_LAST)
        if z is not None:
            gate = load_steps(z, position, length, CHANNELS_LAST)
            push = push * gate * sigmoid(gate)
        if not ADJOINT:
            push = push * dt * LN2
        dt, push, unused = by_channel(dt, push, push, BLOCK_N)
        total += dt
        B_tile = B + tl.cast(number, tl.int64) * B_tile_size
        carries = end_states(dt, push, rates, carries, B_tile, state, ADJOINT, BLOCK_L, STATES)
    store_states(ends, dim, carries, state, dstate, has_channel, STATES)
    # All warps have the same total.
    targets = tl.broadcast_to(totals[None, :], [BLOCK_N, tile.block_d])
    tl.store(targets, tl.sum(total, axis=0), mask=tl.where(state == 0, has_channel[None, :], False))


@triton.jit
def _subchunk_after(decay0, value0, decay1, value1):
    # An infinite product of decays that grow would make a NaN of a state that is zero.
    return tl.minimum(decay0 * decay1, MAX_DECAY), decay1 * value0 + value1


@triton.jit
def combine_kernel(
    A,  # [directions, dim, N]
    initial,  # [batch, directions, dim, N], or None
    ends,  # [batch, directions, subchunks, N, dim]
    totals,  # [batch, directions, subchunks, dim]
    states,  # [batch, directions, num_states, N, dim]: written at chunk * chunk_states, the state before the chunk
    dim,
    dstate,
    subchunks,
    subchunks_per_chunk,
    num_states,
    chunk_states,
    DIRECTIONS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Composes the subchunks to the state before each chunk but the first, for BLOCK_D pairs of a state and channel."""
    entry = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < dstate * dim
    channel = column % dim
    rate = tl.load(A + ((entry % DIRECTIONS) * dim + channel) * dstate + column // dim, mask=inside, other=0.0)
    carry = tl.zeros([BLOCK_D], tl.float32)
    if initial is not None:
        start = initial + (entry * dim + channel) * dstate + column // dim
        carry = tl.load(start, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_D]
    for begin in range(0, subchunks, BLOCK_L):
        subchunk = begin + tl.arange(0, BLOCK_L)
        mask = inside[None, :] & (subchunk < subchunks)[:, None]
        source = (entry * subchunks + subchunk)[:, None]
        total = tl.load(totals + source * dim + channel[None, :], mask=mask, other=0.0)  # [BLOCK_L, BLOCK_D]
        end = tl.load(ends + source * (dstate * dim) + column[None, :], mask=mask, other=0.0)  # [BLOCK_L, BLOCK_D]
        decay = tl.minimum(tl.exp2(total * rate[None, :]), MAX_DECAY)
        end = tl.where((tl.arange(0, BLOCK_L) == 0)[:, None], decay * carry[None, :] + end, end)
        decays, state = tl.associative_scan((decay, end), 0, _subchunk_after)
        chunk = (subchunk + 1) // subchunks_per_chunk
        target = (entry * num_states + chunk.to(tl.int64) * chunk_states)[:, None] * (dstate * dim)
        ends_chunk = (chunk * subchunks_per_chunk == subchunk + 1)[:, None]
        tl.store(states + target + column[None, :], state, mask=mask & ends_chunk)
        carry = tl.sum(tl.where((tl.arange(0, BLOCK_L) == BLOCK_L - 1)[:, None], state, 0.0), axis=0)
