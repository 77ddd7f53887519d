"""Triton kernel of the selective scan's backward pass.

Walks the tiles in the opposite order of the forward pass. In each it recomputes the states from the saved one before
it, and solves the adjoint recurrence g_l = C_l * grad_y_l + exp(dt_{l+1} * A) * g_{l+1}. It holds five values of each
step while it walks the states, so that its tiles are halves of what lies between two saved states.
"""

from .._device import LN2, sigmoid
from .._launch import tl, triton
from .tiles import (
    PACKED,
    by_channel,
    coefficients_of,
    dt_of,
    load_coefficients,
    load_starts,
    load_starts_of_half,
    load_states,
    load_steps,
    positions_of,
    recur,
    recur_back,
    sequence_of,
    store_states,
    store_steps,
    sum_channels,
    sum_states,
    zero_states,
)


@triton.jit
def _gradient_places(pointer, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers [BLOCK_N, 2, 2 * BLOCK_L] to gradients of B and C of BLOCK_N states, each there twice, and where they
    are first."""
    copy = tl.arange(0, 2)[None, :, None]
    step = tl.arange(0, 2 * BLOCK_L)[None, None, :]
    place = tl.arange(0, BLOCK_N)[:, None, None] * (2 * PACKED) + step // BLOCK_L * PACKED + step % BLOCK_L
    # The hint makes the compiler load and store in the layout of the sums.
    places = tl.max_contiguous(tl.broadcast_to(pointer + place, [BLOCK_N, 2, 2 * BLOCK_L]), (1, 2, BLOCK_L))
    return places, tl.broadcast_to(copy == 0, [BLOCK_N, 2, 2 * BLOCK_L])


@triton.jit
def _walk_states(
    dt,
    drive,
    grad_out,
    out,
    grad_drive,
    grad_dt,
    rates,
    starts,
    carries,
    sums_A,
    B,
    C,
    grad_BC,
    adds,
    state,
    GATED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STATES: tl.constexpr,
):
    """Walks a tile back through the states of each warp.

    Adds to `out` (the output, where GATED), grad_drive and grad_dt, to the sums over channels at grad_BC (where it
    `adds`; otherwise these are written), and to the sums over steps. `carries` become those of the tile before.
    """
    BLOCK_N: tl.constexpr = state.shape[0]
    # Early, since nothing is loaded ahead of a barrier.
    so_far = ()
    for k in tl.static_range(STATES):
        place, first = _gradient_places(grad_BC + k * (BLOCK_N * PACKED * 2), BLOCK_L, BLOCK_N)
        so_far = so_far + (tl.load(place, mask=tl.where(adds, first, False), other=0.0),)
    ends, of_A = (), ()
    for k in tl.static_range(STATES):
        rate = rates[k][None, :, :]
        c = load_coefficients(C, state, k, BLOCK_L)
        b = load_coefficients(B, state, k, BLOCK_L)
        decay = tl.exp2(dt * rate)
        adjoint, end = recur_back(decay, grad_out * c, carries[k])
        grad_drive += adjoint * b
        h, before, unused = recur(decay, drive * b, starts[k])
        if GATED:
            out += h * c
        grad_exponent = adjoint * decay * before
        grad_dt += grad_exponent * rate
        place, first = _gradient_places(grad_BC + k * (BLOCK_N * PACKED * 2), BLOCK_L, BLOCK_N)
        tl.store(place, so_far[k] + sum_channels(adjoint * drive, h * grad_out), mask=first)
        ends = ends + (end,)
        of_A = of_A + (sums_A[k] + tl.sum(grad_exponent * dt, axis=0) * LN2,)
    return out, grad_drive, grad_dt, ends, of_A


@triton.jit(do_not_specialize_on_alignment=['grad_y', 'u', 'delta', 'z', 'grad_u', 'grad_delta', 'grad_z', 'grad_BC'])
def scan_backward_kernel(
    grad_y,  # [batch, directions, dim, L], by its strides
    grad_last,  # [batch, directions, dim, N], or None
    u,  # as grad_y
    delta,  # as grad_y
    A,  # [directions, dim, N]
    B,  # [batch, directions * groups, tiles, padded N, PACKED]
    C,  # the same
    D,  # [directions, dim], or None
    z,  # as grad_y, or None
    delta_bias,  # [directions, dim], or None
    states,  # [batch, directions, num_states, N, dim]: the state before each PACKED steps
    carries,  # [batch, directions, chunks, N, dim]: adjoint states; see below
    sums,  # [batch * chunks, directions * dim * (2 + N)]: written, parts of the gradients of D, the bias and A
    grad_u,  # as grad_y: written; grad_delta and grad_z have the same strides
    grad_delta,  # written
    grad_z,  # written, or None
    grad_BC,  # [splits, batch, directions * groups, tiles, padded N, 2, PACKED]: written, B's before C's
    length,
    dim,
    dstate,
    group_dim,
    splits,
    split_blocks,
    num_states,
    chunk_tiles,
    strides,  # of grad_y, u, delta, z and the gradients, of batch, direction, channel and step each
    CHUNKED: tl.constexpr,
    LOG_A: tl.constexpr,
    tile,  # `Tile` of constants
    flags,  # `Flags` of constants
):
    """One program walks one chunk of L for `split_blocks` blocks of channels of one group, one after the other.

    `carries` gets the adjoint state before each chunk, from the one after it, which for all but the first is there
    already. With LOG_A the gradient of A is replaced by that of log(-A).
    """
    BLOCK_L: tl.constexpr = tile.block_l
    BLOCK_N: tl.constexpr = tile.block_n
    BLOCK_D: tl.constexpr = tile.block_d
    STATES: tl.constexpr = tile.states
    CHANNELS_LAST: tl.constexpr = flags.channels_last
    PADDED: tl.constexpr = STATES * BLOCK_N
    program = tl.program_id(0)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    groups = dim // group_dim
    split = program % splits
    group = (program // splits) % groups
    entry = (program // splits // groups).to(tl.int64)
    entries = tl.num_programs(0) // splits // groups
    batch = entry // flags.directions
    direction = entry % flags.directions
    reverse = direction if flags.directions == 2 else flags.reverse
    tiles = tl.cdiv(length, PACKED)
    state = tl.arange(0, BLOCK_N)[:, None]
    grad_BC += ((split * entries + entry) * groups + group) * tiles * (PADDED * PACKED * 2)
    states += entry * num_states * (dstate * dim)
    begin = chunk * chunk_tiles
    count = tl.minimum(chunk_tiles, tiles - begin)
    halves = tiles * (PACKED // BLOCK_L)

    for block in range(0, split_blocks):
        local = (split * split_blocks + block) * BLOCK_D + tl.arange(0, BLOCK_D)
        has_channel = local < group_dim
        index = group * group_dim + tl.minimum(local, group_dim - 1)
        channel = index.to(tl.int64)
        parameter = direction * dim + channel
        grad_y_block = sequence_of(grad_y, strides[0:4], batch, direction, channel)
        u_block = sequence_of(u, strides[4:8], batch, direction, channel)
        delta_block = sequence_of(delta, strides[8:12], batch, direction, channel)
        grad_u_block = sequence_of(grad_u, strides[16:20], batch, direction, channel)
        grad_delta_block = sequence_of(grad_delta, strides[16:20], batch, direction, channel)
        if z is not None:
            z_block = sequence_of(z, strides[12:16], batch, direction, channel)
            grad_z_block = sequence_of(grad_z, strides[16:20], batch, direction, channel)
        B_block, B_tile_size = coefficients_of(B, entry, index, dim, group_dim, tiles, PADDED)
        C_block, C_tile_size = coefficients_of(C, entry, index, dim, group_dim, tiles, PADDED)
        bias = tl.zeros([BLOCK_D], tl.float32)
        skip = tl.zeros([BLOCK_D], tl.float32)
        if delta_bias is not None:
            bias = tl.load(delta_bias + parameter).to(tl.float32)  # [BLOCK_D]
        if D is not None:
            skip = tl.load(D + parameter).to(tl.float32)  # [BLOCK_D]
        sum_D = tl.zeros([BLOCK_D, BLOCK_L], tl.float32)
        sum_bias = tl.zeros([BLOCK_D, BLOCK_L], tl.float32)
        last = grad_last
        if grad_last is not None:
            last += (entry * dim + channel) * dstate
        adjoints = carries + (entry * chunks + chunk) * (dstate * dim) + channel
        directions_dim = flags.directions * dim
        sums_block = sums + (batch * chunks + chunk) * ((2 + dstate) * directions_dim)
        rates = load_states(A + parameter * dstate, 1, state, dstate, has_channel, STATES)
        carry = load_starts(last, adjoints, dim, chunk, state, dstate, has_channel, CHUNKED, STATES)
        of_A = zero_states(BLOCK_N, BLOCK_D, STATES)

        for k in range(0, count * 2):
            half = (tiles - begin) * 2 - 1 - k
            position = positions_of(half, halves, reverse, BLOCK_L)
            x = load_steps(u_block, position, length, CHANNELS_LAST)
            raw = load_steps(delta_block, position, length, CHANNELS_LAST)
            grad_gated = load_steps(grad_y_block, position, length, CHANNELS_LAST)
            if z is not None:
                gate = load_steps(z_block, position, length, CHANNELS_LAST)
            number = tl.cast(half // 2, tl.int64)
            ahead = half % 2 * BLOCK_L
            saved = states + number * (dstate * dim) + channel
            B_tile = B_block + number * B_tile_size
            C_tile = C_block + (number * C_tile_size + ahead)
            grad_tile = grad_BC + (number * (PADDED * PACKED * 2) + ahead)
            starts = load_starts_of_half(
                saved,
                dim,
                u_block,
                delta_block,
                bias,
                rates,
                B_tile,
                half,
                halves,
                length,
                state,
                dstate,
                has_channel,
                reverse,
                tile,
                flags,
            )
            raw, dt = dt_of(raw, bias, position, length, flags)
            grad_out = grad_gated
            if z is not None:
                opened = sigmoid(gate)
                grad_out = grad_out * gate * opened
            # Channels beyond the group's are copies of its last one.
            grad_out = tl.where(has_channel[:, None], grad_out, 0.0)
            dt = tl.where(has_channel[:, None], dt, 0.0)
            dts, drives, grads_out = by_channel(dt, dt * LN2 * x, grad_out, BLOCK_N)
            out = tl.zeros([BLOCK_L, BLOCK_N, BLOCK_D], tl.float32)
            grad_drive = tl.zeros([BLOCK_L, BLOCK_N, BLOCK_D], tl.float32)
            grad_dt = tl.zeros([BLOCK_L, BLOCK_N, BLOCK_D], tl.float32)
            out, grad_drive, grad_dt, carry, of_A = _walk_states(
                dts,
                drives,
                grads_out,
                out,
                grad_drive,
                grad_dt,
                rates,
                starts,
                carry,
                of_A,
                B_tile + ahead,
                C_tile,
                grad_tile,
                block > 0,
                state,
                z is not None,
                BLOCK_L,
                STATES,
            )

            # The sums over states are of the gradients by dt / ln 2 over ln 2, and by dt * u.
            by_drive = sum_states(grad_drive)
            grad_x = by_drive * dt * LN2 + grad_out * skip[:, None]
            grad_raw = sum_states(grad_dt) + by_drive * x
            if flags.softplus:
                # dt is log2(1 + 2**raw), whose derivative is 2**(raw - dt).
                grad_raw = grad_raw * tl.exp2(tl.minimum(raw - dt, 0.0))
            store_steps(grad_u_block, has_channel, position, length, grad_x, CHANNELS_LAST)
            store_steps(grad_delta_block, has_channel, position, length, grad_raw, CHANNELS_LAST)
            if z is not None:
                y = sum_states(out) + x * skip[:, None]
                grad_gate = y * grad_gated * opened * (1.0 + gate * (1.0 - opened))
                store_steps(grad_z_block, has_channel, position, length, grad_gate, CHANNELS_LAST)
            if D is not None:
                sum_D += grad_out * x
            if delta_bias is not None:
                sum_bias += tl.where((position < length)[None, :], grad_raw, 0.0)
        store_states(adjoints, dim, carry, state, dstate, has_channel, STATES)
        if LOG_A:
            of_A = _multiply_states(of_A, rates, STATES)
        of_rates = sums_block + 2 * directions_dim + parameter * dstate
        store_states(of_rates, 1, of_A, state, dstate, has_channel, STATES)
        # What is absent is stored too, so that the sums over parts need no mask.
        tl.store(sums_block + parameter, tl.sum(sum_D, axis=1), mask=has_channel)
        tl.store(sums_block + directions_dim + parameter, tl.sum(sum_bias, axis=1), mask=has_channel)


@triton.jit
def _multiply_states(x, y, STATES: tl.constexpr):
    product = ()
    for k in tl.static_range(STATES):
        product = product + (x[k] * y[k],)
    return product
