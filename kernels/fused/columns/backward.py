"""Triton kernel of the selective scan's backward pass.

Walks the tiles in the opposite order of the forward pass. In each it recomputes the states from the one that the
forward pass kept, and solves the adjoint recurrence g_l = C_l * grad_y_l + exp(step_{l+1} * A) * g_{l+1}.
"""

import triton
import triton.language as tl

from ..elementwise import LN2, sigmoid
from .tiles import (
    PACKED,
    by_channel,
    coefficients_of,
    load_coefficients,
    load_starts,
    load_starts_of_half,
    load_states,
    load_steps,
    no_states,
    positions_of,
    recur,
    recur_back,
    steps_of,
    store_states,
    store_steps,
    sum_channels,
    sum_warps,
)


@triton.jit
def _places(pointer, T: tl.constexpr, W: tl.constexpr):
    """Pointers [W, 2, 2 * T] to gradients of B and C of W states, each there twice, and where they are first."""
    copy = tl.arange(0, 2)[None, :, None]
    step = tl.arange(0, 2 * T)[None, None, :]
    place = tl.arange(0, W)[:, None, None] * (2 * PACKED) + step // T * PACKED + step % T
    # The hint makes the compiler load and store in the layout of the sums.
    places = tl.max_contiguous(tl.broadcast_to(pointer + place, [W, 2, 2 * T]), (1, 2, T))
    return places, tl.broadcast_to(copy == 0, [W, 2, 2 * T])


@triton.jit
def _walk_states(
    step,
    drive,
    grad_out,
    out,
    grad_drive,
    grad_step,
    rates,
    starts,
    carries,
    sums_A,
    sums_B,
    sums_C,
    B,
    C,
    grad_BC,
    earlier,
    state,
    dstate,
    HAS_Z: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
    STATES: tl.constexpr,
):
    """Walks a tile back through STATES states of each warp.

    Adds to `out` (the output, where needed), grad_drive and grad_step [T, W, C], to the sums over steps and channels
    at grad_BC where somebody came by `earlier`, and to the sums over steps. `carries` become those of the tile before.
    """
    # Early, since nothing is loaded ahead of a barrier.
    so_far = ()
    for k in tl.static_range(STATES if not (CONSTANT_B and CONSTANT_C) else 0):
        place, first = _places(grad_BC + k * (W * PACKED * 2), T, W)
        so_far = so_far + (tl.load(place, mask=tl.where(earlier, first, False), other=0.0),)
    ends, of_A, of_B, of_C = (), (), (), ()
    for k in tl.static_range(STATES):
        rate = rates[k][None, :, :]
        c = load_coefficients(C, state, k, dstate, CONSTANT_C, T)
        b = load_coefficients(B, state, k, dstate, CONSTANT_B, T)
        decay = tl.exp2(step * rate)
        adjoint, end = recur_back(decay, grad_out * c, carries[k])
        grad_drive += adjoint * b
        h, before, unused = recur(decay, drive * b, starts[k])
        if HAS_Z:
            out += h * c
        grad_exponent = adjoint * decay * before
        grad_step += grad_exponent * rate
        grad_b = adjoint * drive
        grad_c = h * grad_out
        if not (CONSTANT_B and CONSTANT_C):
            place, first = _places(grad_BC + k * (W * PACKED * 2), T, W)
            # Those of constants are not read.
            tl.store(place, so_far[k] + sum_channels(grad_b, grad_c), mask=first)
        ends = ends + (end,)
        of_A = of_A + (sums_A[k] + tl.sum(grad_exponent * step, axis=0) * LN2,)
        of_B = of_B + (sums_B[k] + tl.sum(grad_b, axis=0) if CONSTANT_B else sums_B[k],)
        of_C = of_C + (sums_C[k] + tl.sum(grad_c, axis=0) if CONSTANT_C else sums_C[k],)
    return out, grad_drive, grad_step, ends, of_A, of_B, of_C


@triton.jit(do_not_specialize_on_alignment=['grad_y', 'u', 'delta', 'z', 'grad_u', 'grad_delta', 'grad_z', 'grad_BC'])
def scan_backward_kernel(
    grad_y,
    grad_last,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    states,
    carries,
    sums,
    grad_u,
    grad_delta,
    grad_z,
    grad_BC,
    length,
    dim,
    dstate,
    sum_rows,
    group_dim,
    splits,
    split_blocks,
    share,
    B_share,
    C_share,
    passes,
    slots,
    chunk_tiles,
    grad_y_batch,
    grad_y_direction,
    grad_y_dim,
    grad_y_step,
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
    grads_batch,
    grads_direction,
    grads_dim,
    grads_step,
    HAS_D: tl.constexpr,
    HAS_LAST: tl.constexpr,
    CHUNKED: tl.constexpr,
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
    """One program walks one chunk of L for `split_blocks` blocks of channels of one group, one after the other.

    states [entries, slots, N, dim] holds the state before each tile, carries [entries, chunks, N, dim] gets the adjoint
    state before each chunk, from the one after it, which for all but the first is there already. sums [entries, chunks,
    sum_rows, dim] get the gradients of D, of the bias, of the N rows of A and, where they are constant, of B and C. The
    gradients of other B and C are [splits, entries, groups, tiles, padded N, 2, PACKED], B's before C's.
    """
    program = tl.program_id(0)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    groups = dim // group_dim
    split = program % splits
    group = (program // splits) % groups
    entry = (program // splits // groups).to(tl.int64)
    entries = tl.num_programs(0) // splits // groups
    batch = entry // DIRECTIONS
    direction = entry % DIRECTIONS
    reverse = direction if DIRECTIONS == 2 else REVERSE
    tiles = tl.cdiv(length, PACKED)
    padded = passes * (STATES * W)

    grad_y += batch * grad_y_batch + direction * grad_y_direction
    u += batch * u_batch + direction * u_direction
    delta += batch * delta_batch + direction * delta_direction
    z += batch * z_batch + direction * z_direction
    grad_u += batch * grads_batch + direction * grads_direction
    grad_delta += batch * grads_batch + direction * grads_direction
    grad_z += batch * grads_batch + direction * grads_direction
    state = tl.arange(0, W)[:, None]
    grad_BC += ((split * entries + entry) * groups + group) * tiles * (padded * PACKED * 2)
    states += entry * slots * (dstate * dim)
    begin = chunk * chunk_tiles
    count = tl.minimum(chunk_tiles, tiles - begin)
    halves = tiles * (PACKED // T)

    for block in range(0, split_blocks):
        local = (split * split_blocks + block) * COLUMNS + tl.arange(0, COLUMNS)
        in_rows = local < group_dim
        index = group * group_dim + tl.minimum(local, group_dim - 1)
        channel = index.to(tl.int64)
        parameter = direction * dim + channel
        grad_y_rows = channel * grad_y_dim
        u_rows = channel * u_dim
        delta_rows = (index // share).to(tl.int64) * delta_dim
        z_rows = channel * z_dim
        grad_rows = channel * grads_dim
        A_block = A + parameter * dstate
        B_block, B_tile_size = coefficients_of(
            B, entry, index, dim, group_dim, B_share, tiles, padded, dstate, CONSTANT_B
        )
        C_block, C_tile_size = coefficients_of(
            C, entry, index, dim, group_dim, C_share, tiles, padded, dstate, CONSTANT_C
        )
        bias = tl.zeros([COLUMNS], tl.float32)
        skip = tl.zeros([COLUMNS], tl.float32)
        if HAS_BIAS:
            bias = tl.load(delta_bias + parameter).to(tl.float32)
        if HAS_D:
            skip = tl.load(D + parameter).to(tl.float32)
        sum_D = tl.zeros([COLUMNS, T], tl.float32)
        sum_bias = tl.zeros([COLUMNS, T], tl.float32)
        last = grad_last
        if HAS_LAST:
            last += (entry * dim + channel) * dstate
        adjoints = carries + (entry * chunks + chunk) * (dstate * dim) + channel
        sums_D = sums + (entry * chunks + chunk) * (sum_rows * dim) + channel
        sums_bias = sums_D + dim
        sums_A = sums_bias + dim
        sums_B = sums_A + dstate * dim
        sums_C = sums_B + dstate * dim
        carry = no_states(W, COLUMNS, STATES)
        of_A, of_B, of_C = carry, carry, carry
        if ONE_PASS:
            rates = load_states(A_block, 1, state, dstate, in_rows, STATES)
            carry = load_starts(last, adjoints, dim, chunk, state, dstate, in_rows, HAS_LAST, CHUNKED, STATES)
        else:
            for p in range(passes):
                n = p * (STATES * W)
                store_states(sums_A, dim, of_A, state + n, dstate, in_rows, STATES)
                if CONSTANT_B:
                    store_states(sums_B, dim, of_B, state + n, dstate, in_rows, STATES)
                if CONSTANT_C:
                    store_states(sums_C, dim, of_C, state + n, dstate, in_rows, STATES)
                start = load_starts(last, adjoints, dim, chunk, state + n, dstate, in_rows, HAS_LAST, CHUNKED, STATES)
                store_states(adjoints, dim, start, state + n, dstate, in_rows, STATES)

        for k in range(0, count * 2):
            half = (tiles - begin) * 2 - 1 - k
            position = positions_of(half, halves, reverse, T)
            x = load_steps(u, u_rows, position, u_step, length, CHANNELS_LAST)
            raw = load_steps(delta, delta_rows, position, delta_step, length, CHANNELS_LAST)
            grad_gated = load_steps(grad_y, grad_y_rows, position, grad_y_step, length, CHANNELS_LAST)
            if HAS_Z:
                gate = load_steps(z, z_rows, position, z_step, length, CHANNELS_LAST)
            tile = tl.cast(half // 2, tl.int64)
            ahead = half % 2 * T
            here = states + tile * (dstate * dim) + channel
            B_tile = B_block + tile * B_tile_size
            C_tile = C_block + (tile * C_tile_size + (0 if CONSTANT_C else ahead))
            grad_tile = grad_BC + (tile * (padded * PACKED * 2) + ahead)
            if ONE_PASS:
                starts = load_starts_of_half(
                    here,
                    dim,
                    u,
                    u_rows,
                    u_step,
                    delta,
                    delta_rows,
                    delta_step,
                    bias,
                    rates,
                    B_tile,
                    half,
                    halves,
                    length,
                    state,
                    dstate,
                    in_rows,
                    reverse,
                    SOFTPLUS,
                    CONSTANT_B,
                    CHANNELS_LAST,
                    EXACT,
                    NVIDIA,
                    T,
                    W,
                    STATES,
                )
            raw, step = steps_of(raw, bias, position, length, SOFTPLUS, EXACT, NVIDIA)
            grad_out = grad_gated
            if HAS_Z:
                opened = sigmoid(gate)
                grad_out = grad_out * gate * opened
            # Rows beyond the group's are copies of its last one.
            grad_out = tl.where(in_rows[:, None], grad_out, 0.0)
            step = tl.where(in_rows[:, None], step, 0.0)
            steps, drives, grads_out = by_channel(step, step * LN2 * x, grad_out, W)
            out = tl.zeros([T, W, COLUMNS], tl.float32)
            grad_drive = tl.zeros([T, W, COLUMNS], tl.float32)
            grad_step = tl.zeros([T, W, COLUMNS], tl.float32)
            if ONE_PASS:
                out, grad_drive, grad_step, carry, of_A, of_B, of_C = _walk_states(
                    steps,
                    drives,
                    grads_out,
                    out,
                    grad_drive,
                    grad_step,
                    rates,
                    starts,
                    carry,
                    of_A,
                    of_B,
                    of_C,
                    B_tile + (0 if CONSTANT_B else ahead),
                    C_tile,
                    grad_tile,
                    block > 0,
                    state,
                    dstate,
                    HAS_Z,
                    CONSTANT_B,
                    CONSTANT_C,
                    T,
                    W,
                    STATES,
                )
            else:
                for p in range(passes):
                    n = p * (STATES * W)
                    rates = load_states(A_block, 1, state + n, dstate, in_rows, STATES)
                    starts = load_starts_of_half(
                        here,
                        dim,
                        u,
                        u_rows,
                        u_step,
                        delta,
                        delta_rows,
                        delta_step,
                        bias,
                        rates,
                        B_tile,
                        half,
                        halves,
                        length,
                        state + n,
                        dstate,
                        in_rows,
                        reverse,
                        SOFTPLUS,
                        CONSTANT_B,
                        CHANNELS_LAST,
                        EXACT,
                        NVIDIA,
                        T,
                        W,
                        STATES,
                    )
                    out, grad_drive, grad_step, end, end_A, end_B, end_C = _walk_states(
                        steps,
                        drives,
                        grads_out,
                        out,
                        grad_drive,
                        grad_step,
                        rates,
                        starts,
                        load_states(adjoints, dim, state + n, dstate, in_rows, STATES),
                        load_states(sums_A, dim, state + n, dstate, in_rows, STATES),
                        load_states(sums_B, dim, state + n, dstate, in_rows, STATES) if CONSTANT_B else of_B,
                        load_states(sums_C, dim, state + n, dstate, in_rows, STATES) if CONSTANT_C else of_C,
                        B_tile + (0 if CONSTANT_B else ahead),
                        C_tile,
                        grad_tile + n * (PACKED * 2),
                        block > 0,
                        state + n,
                        dstate,
                        HAS_Z,
                        CONSTANT_B,
                        CONSTANT_C,
                        T,
                        W,
                        STATES,
                    )
                    store_states(adjoints, dim, end, state + n, dstate, in_rows, STATES)
                    store_states(sums_A, dim, end_A, state + n, dstate, in_rows, STATES)
                    if CONSTANT_B:
                        store_states(sums_B, dim, end_B, state + n, dstate, in_rows, STATES)
                    if CONSTANT_C:
                        store_states(sums_C, dim, end_C, state + n, dstate, in_rows, STATES)

            # The sums over states are of the gradients by step / ln 2 over ln 2, and by step * u.
            by_drive = sum_warps(grad_drive)
            grad_x = by_drive * step * LN2 + grad_out * skip[:, None]
            grad_raw = sum_warps(grad_step) + by_drive * x
            if SOFTPLUS:
                # step is log2(1 + 2**raw), whose derivative is 2**(raw - step).
                grad_raw = grad_raw * tl.exp2(tl.minimum(raw - step, 0.0))
            store_steps(grad_u, grad_rows, in_rows, position, grads_step, length, grad_x, CHANNELS_LAST)
            store_steps(grad_delta, grad_rows, in_rows, position, grads_step, length, grad_raw, CHANNELS_LAST)
            if HAS_Z:
                y = sum_warps(out) + x * skip[:, None]
                grad_gate = y * grad_gated * opened * (1.0 + gate * (1.0 - opened))
                store_steps(grad_z, grad_rows, in_rows, position, grads_step, length, grad_gate, CHANNELS_LAST)
            if HAS_D:
                sum_D += grad_out * x
            if HAS_BIAS:
                sum_bias += tl.where((position < length)[None, :], grad_raw, 0.0)
        if ONE_PASS:
            store_states(adjoints, dim, carry, state, dstate, in_rows, STATES)
            store_states(sums_A, dim, of_A, state, dstate, in_rows, STATES)
            if CONSTANT_B:
                store_states(sums_B, dim, of_B, state, dstate, in_rows, STATES)
            if CONSTANT_C:
                store_states(sums_C, dim, of_C, state, dstate, in_rows, STATES)
        if HAS_D:
            tl.store(sums_D, tl.sum(sum_D, axis=1), mask=in_rows)
        if HAS_BIAS:
            tl.store(sums_bias, tl.sum(sum_bias, axis=1), mask=in_rows)
