"""Triton kernels of the selective scan's forward pass, and of the carries between the chunks of L.

Sequences are walked tile by tile (see `tiles`), all states of a tile one after the other. What a tile hands to the next
stays in registers if a thread has few states (ONE_PASS); otherwise it waits in memory, where each thread finds its own.

Known alignment of the sequences would make the compiler load vectors, in a layout whose conversion costs more.
"""

import triton
import triton.language as tl

from ..elementwise import LN2, MAX_DECAY, sigmoid
from .tiles import (
    by_channel,
    coefficients_of,
    columns_of,
    end_states,
    load_coefficients,
    load_starts,
    load_states,
    load_steps,
    no_states,
    positions_of,
    recur,
    steps_of,
    store_states,
    store_steps,
    sum_warps,
)


@triton.jit
def _walk_states(
    step,
    drive,
    out,
    rates,
    carries,
    B,
    C,
    state,
    dstate,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
    STATES: tl.constexpr,
):
    """Adds what STATES states of each warp do in a tile to `out` [T, W, C]; returns it and the states after."""
    ends = ()
    for k in tl.static_range(STATES):
        b = load_coefficients(B, state, k, dstate, CONSTANT_B, T)
        c = load_coefficients(C, state, k, dstate, CONSTANT_C, T)
        h, before, end = recur(tl.exp2(step * rates[k][None, :, :]), drive * b, carries[k])
        out += h * c
        ends = ends + (end,)
    return out, ends


@triton.jit(do_not_specialize_on_alignment=['u', 'delta', 'z', 'y'])
def scan_forward_kernel(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    initial,
    y,
    last,
    states,
    length,
    dim,
    dstate,
    group_dim,
    share,
    B_share,
    C_share,
    passes,
    chunk_tiles,
    chunk_slots,
    slot_step,
    slots,
    u_batch,
    u_direction,
    u_dim,
    u_step,
    delta_batch,
    delta_direction,
    delta_dim,
    delta_step,
    z_batch,
    z_direction,
    z_dim,
    z_step,
    y_batch,
    y_direction,
    y_dim,
    y_step,
    HAS_D: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    CHUNKED: tl.constexpr,
    SAVE: tl.constexpr,
    HAS_Z: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ONE_PASS: tl.constexpr,
    EXACT: tl.constexpr,
    NVIDIA: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATES: tl.constexpr,
):
    """One program walks one chunk of L for COLUMNS channels.

    states [entries, slots, N, dim] gets the state after tile i of chunk c in slot c * chunk_slots + (i + 1) *
    slot_step, the state before each chunk but the first is there already. last is [entries, dim, N].
    """
    tiles = tl.cdiv(length, T)
    padded = passes * (STATES * W)
    entry, batch, direction, index, in_rows = columns_of(dim, DIRECTIONS, COLUMNS)
    channel = index.to(tl.int64)
    parameter = direction * dim + channel
    reverse = direction if DIRECTIONS == 2 else REVERSE
    state = tl.arange(0, W)[:, None]
    u += batch * u_batch + direction * u_direction
    delta += batch * delta_batch + direction * delta_direction
    z += batch * z_batch + direction * z_direction
    y += batch * y_batch + direction * y_direction
    u_rows = channel * u_dim
    delta_rows = (index // share).to(tl.int64) * delta_dim
    z_rows = channel * z_dim
    y_rows = channel * y_dim
    A += parameter * dstate
    B, B_tile_size = coefficients_of(B, entry, index, dim, group_dim, B_share, tiles, padded, dstate, CONSTANT_B)
    C, C_tile_size = coefficients_of(C, entry, index, dim, group_dim, C_share, tiles, padded, dstate, CONSTANT_C)
    last += (entry * dim + channel) * dstate
    if HAS_INITIAL:
        initial += (entry * dim + channel) * dstate
    states += entry * slots * (dstate * dim) + channel
    bias = tl.zeros([COLUMNS], tl.float32)
    skip = tl.zeros([COLUMNS], tl.float32)
    if HAS_BIAS:
        bias = tl.load(delta_bias + parameter).to(tl.float32)
    if HAS_D:
        skip = tl.load(D + parameter).to(tl.float32)
    chunk = tl.program_id(1)
    begin = chunk * chunk_tiles
    count = tl.minimum(chunk_tiles, tiles - begin)
    here = states + tl.cast(chunk * chunk_slots, tl.int64) * (dstate * dim)
    if ONE_PASS:
        rates = load_states(A, 1, state, dstate, in_rows, STATES)
        carries = load_starts(initial, here, dim, chunk, state, dstate, in_rows, HAS_INITIAL, CHUNKED, STATES)
    if SAVE or not ONE_PASS:
        for p in range(passes):
            n = p * (STATES * W)
            start = load_starts(initial, here, dim, chunk, state + n, dstate, in_rows, HAS_INITIAL, CHUNKED, STATES)
            store_states(here, dim, start, state + n, dstate, tl.where(chunk == 0, in_rows, False), STATES)
    position = positions_of(begin, tiles, reverse, T)
    next_x = load_steps(u, u_rows, position, u_step, length, CHANNELS_LAST)
    next_delta = load_steps(delta, delta_rows, position, delta_step, length, CHANNELS_LAST)
    for i in range(count):
        tile = begin + i
        position = positions_of(tile, tiles, reverse, T)
        x = next_x
        raw, step = steps_of(next_delta, bias, position, length, SOFTPLUS, EXACT, NVIDIA)
        # A tile ahead, since few other warps may be there to work meanwhile.
        ahead = positions_of(tl.minimum(tile + 1, tiles - 1), tiles, reverse, T)
        next_x = load_steps(u, u_rows, ahead, u_step, length, CHANNELS_LAST)
        next_delta = load_steps(delta, delta_rows, ahead, delta_step, length, CHANNELS_LAST)
        step, drive, unused = by_channel(step, step * LN2 * x, step, W)
        out = tl.zeros([T, W, COLUMNS], tl.float32)
        B_tile = B + tl.cast(tile, tl.int64) * B_tile_size
        C_tile = C + tl.cast(tile, tl.int64) * C_tile_size
        # The state before the next chunk is there already.
        kept = tl.where((i + 1 < count) | (tile + 1 == tiles), in_rows, False)
        after = here + slot_step * (dstate * dim)
        if ONE_PASS:
            out, carries = _walk_states(
                step, drive, out, rates, carries, B_tile, C_tile, state, dstate, CONSTANT_B, CONSTANT_C, T, W, STATES
            )
            if SAVE:
                store_states(after, dim, carries, state, dstate, kept, STATES)
        else:
            for p in range(passes):
                n = p * (STATES * W)
                rates = load_states(A, 1, state + n, dstate, in_rows, STATES)
                ends = load_states(here, dim, state + n, dstate, in_rows, STATES)
                out, ends = _walk_states(
                    step,
                    drive,
                    out,
                    rates,
                    ends,
                    B_tile,
                    C_tile,
                    state + n,
                    dstate,
                    CONSTANT_B,
                    CONSTANT_C,
                    T,
                    W,
                    STATES,
                )
                store_states(after, dim, ends, state + n, dstate, kept, STATES)
                store_states(last, 1, ends, state + n, dstate, tl.where(tile + 1 == tiles, in_rows, False), STATES)
        here = after
        out = sum_warps(out) + x * skip[:, None]
        if HAS_Z:
            gate = load_steps(z, z_rows, position, z_step, length, CHANNELS_LAST)
            out = out * gate * sigmoid(gate)
        store_steps(y, y_rows, in_rows, position, y_step, length, out, CHANNELS_LAST)
    if ONE_PASS:
        store_states(last, 1, carries, state, dstate, tl.where(begin + count == tiles, in_rows, False), STATES)


@triton.jit(do_not_specialize_on_alignment=['x', 'z', 'delta'])
def scan_summary_kernel(
    x,
    z,
    delta,
    A,
    B,
    delta_bias,
    ends,
    totals,
    length,
    dim,
    dstate,
    group_dim,
    share,
    B_share,
    passes,
    piece_tiles,
    x_batch,
    x_direction,
    x_dim,
    x_step,
    z_batch,
    z_direction,
    z_dim,
    z_step,
    delta_batch,
    delta_direction,
    delta_dim,
    delta_step,
    ADJOINT: tl.constexpr,
    HAS_Z: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ONE_PASS: tl.constexpr,
    EXACT: tl.constexpr,
    NVIDIA: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATES: tl.constexpr,
):
    """The state after each of the pieces of all chunks but the last, from zero before it, ends [entries, pieces, N,
    dim], and the sum of its steps / ln 2, totals [entries, pieces, dim].

    ADJOINT walks g_l = decay_l * (C_l * x_l + g_{l+1}) from the last chunk to the first, where x is the gradient of y
    and B is C; REVERSE is always that of the forward pass.
    """
    tiles = tl.cdiv(length, T)
    padded = passes * (STATES * W)
    entry, batch, direction, index, in_rows = columns_of(dim, DIRECTIONS, COLUMNS)
    channel = index.to(tl.int64)
    parameter = direction * dim + channel
    reverse = direction if DIRECTIONS == 2 else REVERSE
    state = tl.arange(0, W)[:, None]
    x += batch * x_batch + direction * x_direction
    z += batch * z_batch + direction * z_direction
    delta += batch * delta_batch + direction * delta_direction
    x_rows = channel * x_dim
    z_rows = channel * z_dim
    delta_rows = (index // share).to(tl.int64) * delta_dim
    A += parameter * dstate
    B, B_tile_size = coefficients_of(B, entry, index, dim, group_dim, B_share, tiles, padded, dstate, CONSTANT_B)
    bias = tl.zeros([COLUMNS], tl.float32)
    if HAS_BIAS:
        bias = tl.load(delta_bias + parameter).to(tl.float32)
    slot = entry * tl.num_programs(1) + tl.program_id(1)
    ends += slot * (dstate * dim) + channel
    totals += slot * dim + channel
    total = tl.zeros([T, W, COLUMNS], tl.float32)
    carries = no_states(W, COLUMNS, STATES)
    if ONE_PASS:
        rates = load_states(A, 1, state, dstate, in_rows, STATES)
    else:
        for p in range(passes):
            n = p * (STATES * W)
            store_states(ends, dim, carries, state + n, dstate, in_rows, STATES)
    begin = tl.program_id(1) * piece_tiles
    position = positions_of(tiles - 1 - begin if ADJOINT else begin, tiles, reverse, T)
    next_x = load_steps(x, x_rows, position, x_step, length, CHANNELS_LAST)
    next_delta = load_steps(delta, delta_rows, position, delta_step, length, CHANNELS_LAST)
    for i in range(piece_tiles):
        # No chunk but the last, which is not walked here, reaches the end.
        tile = tiles - 1 - begin - i if ADJOINT else begin + i
        position = positions_of(tile, tiles, reverse, T)
        push = next_x
        raw, step = steps_of(next_delta, bias, position, length, SOFTPLUS, EXACT, NVIDIA)
        # A tile ahead, as in the forward pass.
        ahead = positions_of(tile - 1 if ADJOINT else tile + 1, tiles, reverse, T)
        next_x = load_steps(x, x_rows, ahead, x_step, length, CHANNELS_LAST)
        next_delta = load_steps(delta, delta_rows, ahead, delta_step, length, CHANNELS_LAST)
        if HAS_Z:
            gate = load_steps(z, z_rows, position, z_step, length, CHANNELS_LAST)
            push = push * gate * sigmoid(gate)
        if not ADJOINT:
            push = push * step * LN2
        step, push, unused = by_channel(step, push, push, W)
        total += step
        B_tile = B + tl.cast(tile, tl.int64) * B_tile_size
        if ONE_PASS:
            carries = end_states(step, push, rates, carries, B_tile, state, dstate, CONSTANT_B, ADJOINT, T, W, STATES)
        else:
            for p in range(passes):
                n = p * (STATES * W)
                rates = load_states(A, 1, state + n, dstate, in_rows, STATES)
                walked = load_states(ends, dim, state + n, dstate, in_rows, STATES)
                walked = end_states(
                    step, push, rates, walked, B_tile, state + n, dstate, CONSTANT_B, ADJOINT, T, W, STATES
                )
                store_states(ends, dim, walked, state + n, dstate, in_rows, STATES)
    if ONE_PASS:
        store_states(ends, dim, carries, state, dstate, in_rows, STATES)
    # All warps have the same total.
    targets = tl.broadcast_to(totals[None, :], [W, COLUMNS])
    tl.store(targets, tl.sum(total, axis=0), mask=tl.where(state == 0, in_rows[None, :], False))


@triton.jit
def _piece_after(decay0, value0, decay1, value1):
    # An infinite product of decays that grow would make a NaN of a state that is zero.
    return tl.minimum(decay0 * decay1, MAX_DECAY), decay1 * value0 + value1


@triton.jit
def scan_combine_kernel(
    A,
    initial,
    ends,
    totals,
    states,
    dim,
    dstate,
    pieces,
    chunk_pieces,
    slots,
    chunk_slots,
    HAS_INITIAL: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the state before each chunk but the first, which have `chunk_pieces` of all `pieces` each, to the chunk's
    first slot in states [entries, slots, N, dim]."""
    entry = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dstate * dim
    channel = column % dim
    rate = tl.load(A + ((entry % DIRECTIONS) * dim + channel) * dstate + column // dim, mask=inside, other=0.0)
    carry = tl.zeros([COLUMNS], tl.float32)
    if HAS_INITIAL:
        start = initial + (entry * dim + channel) * dstate + column // dim
        carry = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    for begin in range(0, pieces, PIECES):
        piece = begin + tl.arange(0, PIECES)
        mask = inside[None, :] & (piece < pieces)[:, None]
        source = (entry * pieces + piece)[:, None]
        total = tl.load(totals + source * dim + channel[None, :], mask=mask, other=0.0)
        end = tl.load(ends + source * (dstate * dim) + column[None, :], mask=mask, other=0.0)
        decay = tl.minimum(tl.exp2(total * rate[None, :]), MAX_DECAY)
        end = tl.where((tl.arange(0, PIECES) == 0)[:, None], decay * carry[None, :] + end, end)
        decays, state = tl.associative_scan((decay, end), 0, _piece_after)
        chunk = (piece + 1) // chunk_pieces
        target = (entry * slots + chunk.to(tl.int64) * chunk_slots)[:, None] * (dstate * dim)
        ends_chunk = (chunk * chunk_pieces == piece + 1)[:, None]
        tl.store(states + target + column[None, :], state, mask=mask & ends_chunk)
        carry = tl.sum(tl.where((tl.arange(0, PIECES) == PIECES - 1)[:, None], state, 0.0), axis=0)
