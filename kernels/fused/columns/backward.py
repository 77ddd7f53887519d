"""Triton kernel of the selective scan's backward pass.

Walks the tiles in the opposite order of the forward pass. In each it recomputes the states from the one that the
forward pass kept, and solves the adjoint recurrence g_l = C_l * grad_y_l + exp(step_{l+1} * A) * g_{l+1}.
"""

import triton
import triton.language as tl

from ..elementwise import sigmoid
from .tiles import LN2, load_delta, load_steps, recur, recur_back, store_steps


@triton.jit
def _accumulate(pointer, value, mask, earlier):
    """Adds `value` to what is there already where a thread came by `earlier`."""
    tl.store(pointer, value + tl.load(pointer, mask=earlier, other=0.0), mask=mask)


@triton.jit(do_not_specialize_on_alignment=['B', 'C'])
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
    grad_D,
    grad_bias,
    length,
    padded,
    dim,
    dstate,
    group_dim,
    splits,
    split_blocks,
    share,
    B_share,
    C_share,
    slots,
    chunk_tiles,
    sums_kind,
    kind_stride,
    grad_y_batch,
    grad_y_dim,
    u_batch,
    u_dim,
    delta_batch,
    delta_dim,
    z_batch,
    z_dim,
    B_batch,
    B_group,
    B_state,
    C_batch,
    C_group,
    C_state,
    grad_batch,
    grad_dim,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LAST: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
    NVIDIA: tl.constexpr,
    T: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program walks one chunk of L for `split_blocks` blocks of channels of one group, one after the other.

    states [batch, slots, N, dim] holds the state before each tile, carries [batch, chunks, N, dim] the adjoint state
    from tile to tile, sums [kinds, batch, chunks, N, dim] the gradients of A and, where they are constant, of B and C.
    The gradients of other B and C are [splits, batch, groups, N, padded].
    """
    program = tl.program_id(0)
    chunk = tl.program_id(1)
    groups = dim // group_dim
    split = program % splits
    group = (program // splits) % groups
    batch = (program // splits // groups).to(tl.int64)
    batches = tl.num_programs(0) // splits // groups

    grad_y += batch * grad_y_batch
    u += batch * u_batch
    delta += batch * delta_batch
    z += batch * z_batch
    grad_u += batch * grad_batch
    grad_delta += batch * grad_batch
    grad_z += batch * grad_batch
    if not CONSTANT_B:
        B += batch * B_batch
    if not CONSTANT_C:
        C += batch * C_batch
    coefficients = ((split * batches + batch) * groups + group) * dstate * tl.cast(padded, tl.int64)
    grad_BC += coefficients
    operand = tl.bfloat16 if u.dtype.element_ty == tl.bfloat16 else tl.float32
    kind = tl.arange(0, 16)[:, None]
    ones_B = tl.broadcast_to(tl.where(kind == 0, 1.0, 0.0), [16, COLUMNS]).to(operand)
    ones_C = tl.broadcast_to(tl.where(kind == 1, 1.0, 0.0), [16, COLUMNS]).to(operand)
    tiles = tl.cdiv(length, T)
    begin = chunk * chunk_tiles
    row = tl.arange(0, T)[:, None]
    walked = tl.arange(0, T)
    if REVERSE:
        row = T - 1 - row
        walked = T - 1 - walked
    in_pair = tl.broadcast_to(kind < 2, [16, T])
    pair_steps = kind * tl.cast(kind_stride, tl.int64) + walked[None, :]
    states += batch * slots * (dstate * dim)

    for block in range(0, split_blocks):
        local = (split * split_blocks + block) * COLUMNS + tl.arange(0, COLUMNS)
        in_rows = local < group_dim
        index = group * group_dim + tl.minimum(local, group_dim - 1)
        channel = index.to(tl.int64)
        grad_y_rows = channel * grad_y_dim
        u_rows = channel * u_dim
        delta_rows = (index // share).to(tl.int64) * delta_dim
        z_rows = channel * z_dim
        # The same for all channels of a group, which the compiler must not know.
        B_rows = B + ((index // group_dim // B_share).to(tl.int64) * B_group)[None, :]
        C_rows = C + ((index // group_dim // C_share).to(tl.int64) * C_group)[None, :]
        grad_rows = channel * grad_dim
        bias = tl.zeros([COLUMNS], tl.float32)
        skip = tl.zeros([COLUMNS], tl.float32)
        if HAS_BIAS:
            bias = tl.load(delta_bias + channel).to(tl.float32)
        if HAS_D:
            skip = tl.load(D + channel).to(tl.float32)
        sum_D = tl.zeros([COLUMNS], tl.float32)
        sum_bias = tl.zeros([COLUMNS], tl.float32)
        partial = (batch * tl.num_programs(1) + chunk) * (dstate * dim) + channel
        if chunk == 0:
            for n in range(dstate):
                start = tl.zeros([COLUMNS], tl.float32)
                if HAS_LAST:
                    start = tl.load(grad_last + (batch * dim + channel) * dstate + n)
                tl.store(carries + partial + n * dim, start, mask=in_rows)

        for k in range(0, tl.minimum(chunk_tiles, tiles - begin)):
            tile = tiles - 1 - begin - k
            first = (tiles - 1 - tile if REVERSE else tile) * T
            x = load_steps(u, u_rows, first, length, T, COLUMNS, REVERSE)
            raw, step = load_delta(delta, delta_rows, bias, first, length, T, COLUMNS, REVERSE, SOFTPLUS, EXACT, NVIDIA)
            grad_out = load_steps(grad_y, grad_y_rows, first, length, T, COLUMNS, REVERSE)
            if HAS_Z:
                gate = load_steps(z, z_rows, first, length, T, COLUMNS, REVERSE)
                grad_out = grad_out * gate * sigmoid(gate)
            # Rows beyond the group's are copies of its last one.
            grad_out = tl.where(in_rows[None, :], grad_out, 0.0)
            out = tl.zeros([T, COLUMNS], tl.float32)
            step = tl.where(in_rows[None, :], step, 0.0)
            drive = step * LN2 * x
            grad_drive = tl.zeros([T, COLUMNS], tl.float32)
            grad_step = tl.zeros([T, COLUMNS], tl.float32)
            earlier = tl.where(k > 0, in_rows, False)
            earlier_pair = tl.where(block > 0, in_pair, False)
            here = states + tl.cast(tile, tl.int64) * (dstate * dim) + channel
            tl.debug_barrier()
            B_tile = B_rows + first
            C_tile = C_rows + first
            for n in range(dstate):
                rate = tl.load(A + n * dim + channel)
                if CONSTANT_B:
                    b = tl.load(B + channel * dstate + n)[None, :]
                else:
                    b = tl.load(tl.max_contiguous(B_tile + row, (1, COLUMNS)))
                    B_tile += B_state
                if CONSTANT_C:
                    c = tl.load(C + channel * dstate + n)[None, :]
                else:
                    c = tl.load(tl.max_contiguous(C_tile + row, (1, COLUMNS)))
                    C_tile += C_state
                start = tl.load(here + n * dim)
                carry = tl.load(carries + partial + n * dim, mask=in_rows, other=0.0)
                decay = tl.exp2(step * rate[None, :])
                h, before, end = recur(decay, drive * b, start, T, COLUMNS)
                adjoint, carry = recur_back(decay, grad_out * c, carry, T, COLUMNS)
                tl.store(carries + partial + n * dim, carry, mask=in_rows)
                if HAS_Z:
                    out += h * c
                grad_drive += adjoint * b
                grad_exponent = adjoint * decay * before
                grad_step += grad_exponent * rate[None, :]
                sum_A = tl.sum(grad_exponent * step, axis=0) * LN2
                _accumulate(sums + partial + n * dim, sum_A, in_rows, earlier)
                if CONSTANT_B:
                    sum_B = tl.sum(adjoint * drive, axis=0)
                    _accumulate(sums + tl.cast(sums_kind, tl.int64) + partial + n * dim, sum_B, in_rows, earlier)
                if CONSTANT_C:
                    sum_C = tl.sum(h * grad_out, axis=0)
                    _accumulate(sums + 2 * tl.cast(sums_kind, tl.int64) + partial + n * dim, sum_C, in_rows, earlier)
                if not CONSTANT_B or not CONSTANT_C:
                    # Sums over channels, by products with rows of ones.
                    pair = tl.zeros([16, T], tl.float32)
                    if not CONSTANT_B:
                        pair = tl.dot(ones_B, tl.trans((adjoint * drive).to(operand)), pair, input_precision=PRECISION)
                    if not CONSTANT_C:
                        pair = tl.dot(ones_C, tl.trans((h * grad_out).to(operand)), pair, input_precision=PRECISION)
                    target = grad_BC + (first + n * tl.cast(padded, tl.int64)) + pair_steps
                    pair += tl.load(target, mask=earlier_pair, other=0.0)
                    tl.store(target, pair, mask=in_pair)

            # The sums over states are of the gradients by step / ln 2 over ln 2, and by step * u.
            grad_x = grad_drive * step * LN2 + grad_out * skip[None, :]
            grad_raw = grad_step + grad_drive * x
            if SOFTPLUS:
                # step is log2(1 + 2**raw), whose derivative is 2**(raw - step).
                grad_raw = grad_raw * tl.exp2(tl.minimum(raw - step, 0.0))
            store_steps(grad_u, grad_rows, in_rows, first, length, grad_x, T, COLUMNS, REVERSE)
            store_steps(grad_delta, grad_rows, in_rows, first, length, grad_raw, T, COLUMNS, REVERSE)
            if HAS_Z:
                gate = load_steps(z, z_rows, first, length, T, COLUMNS, REVERSE)
                grad_gated = load_steps(grad_y, grad_y_rows, first, length, T, COLUMNS, REVERSE)
                opened = sigmoid(gate)
                out = (out + x * skip[None, :]) * grad_gated * opened * (1.0 + gate * (1.0 - opened))
                store_steps(grad_z, grad_rows, in_rows, first, length, out, T, COLUMNS, REVERSE)
            if HAS_D:
                sum_D += tl.sum(grad_out * x, axis=0)
            if HAS_BIAS:
                sum_bias += tl.sum(tl.where(first + row < length, grad_raw, 0.0), axis=0)
        totals = (chunk * batches + batch) * dim + channel
        if HAS_D:
            tl.store(grad_D + totals, sum_D, mask=in_rows)
        if HAS_BIAS:
            tl.store(grad_bias + totals, sum_bias, mask=in_rows)
