"""Triton kernel of the SSD's backward pass, beside the adjoint walk of `state_kernel`."""

from .._device import LOG2_E, sigmoid
from .._launch import tl, triton
from .tiles import add_dot, dot, load_dt, load_rows, load_skip, operand, rows_of, sequences_of, store_rows, sums_of


@triton.jit
def gradient_kernel(
    grad_y,  # [batch, L, H, P], by its strides
    x,  # the same
    dt,  # [batch, L, H], by its strides
    A,  # [H]
    B,  # [batch, L, G, N], by its strides
    C,  # the same
    D,  # [H], or [H, P], or None
    z,  # as x, or None
    dt_bias,  # [H], or None
    sequence,  # [batch, L], or None
    states,  # [batch, chunks, H, P, N], the state before each chunk
    adjoints,  # the same, the gradient of the state after each chunk
    grad_x,  # as x: written
    grad_dt,  # [batch, L, H]: written
    grad_B,  # [splits, batch, L, G, N]: written
    grad_C,  # the same
    grad_z,  # as x, or None: written
    parts,  # [batch, chunks, H, 2 + D_STRIDE]: written, parts of the gradients of A, dt_bias and D
    length,
    heads,
    share,
    split_heads,
    grad_y_strides,
    x_strides,
    dt_strides,
    B_strides,
    C_strides,
    z_strides,
    grad_x_strides,
    grad_z_strides,
    D_STRIDE: tl.constexpr,
    tile,  # `Tile` of constants
    flags,  # `Flags` of constants
):
    """One program computes all gradients of a chunk for `split_heads` of the heads of a group.

    A step's decay is part of the decay between every two steps around it: the gradient of its exponent is a sum over
    these pairs, among which are the state before the chunk and the gradient of the state after it.
    """
    BLOCK_L: tl.constexpr = tile.block_l
    P: tl.constexpr = tile.dim
    N: tl.constexpr = tile.dstate
    p = tl.arange(0, tile.block_p)
    n = tl.arange(0, tile.block_n)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    splits = tl.cdiv(share, split_heads)
    split = tl.program_id(0) % splits
    row = tl.program_id(0) // splits
    groups = heads // share
    batch, group = (row // groups).to(tl.int64), row % groups
    batches = tl.num_programs(0) // (splits * groups)
    offset = tl.arange(0, BLOCK_L)
    step = chunk * BLOCK_L + offset
    position, exists = rows_of(step, length, flags.reverse)
    sees = offset[:, None] >= offset[None, :]
    if sequence is not None:
        here, first, final = sequences_of(sequence, batch, chunk, step, length, BLOCK_L)
        sees = sees & (here[:, None] == here[None, :])
    b = load_rows(B, B_strides, batch, group, position, exists, n, N)  # [BLOCK_L, BLOCK_N]
    c = load_rows(C, C_strides, batch, group, position, exists, n, N)  # [BLOCK_L, BLOCK_N]
    scores = dot(c, tl.trans(b), flags)  # [BLOCK_L, BLOCK_L]
    total_b = tl.zeros([BLOCK_L, tile.block_n], tl.float32)
    total_c = tl.zeros([BLOCK_L, tile.block_n], tl.float32)
    begin = split * split_heads
    for k in range(begin, tl.minimum(begin + split_heads, share)):
        head = group * share + k
        rate = tl.load(A + head).to(tl.float32)
        raw, unlimited, size = load_dt(dt, dt_strides, dt_bias, batch, head, position, exists, flags)
        sums, to_end, total = sums_of(size * (rate * LOG2_E))
        decay = tl.exp2(tl.where(sees, sums[:, None] - sums[None, :], -float('inf')))  # [BLOCK_L, BLOCK_L]
        from_begin, to_end, across = tl.exp2(sums), tl.exp2(to_end), tl.exp2(total)
        if sequence is not None:
            from_begin = tl.where(here == first, from_begin, 0.0)
            to_end = tl.where(here == final, to_end, 0.0)
            across = tl.where(first == final, across, 0.0)
        place = ((batch * chunks + chunk) * heads + head) * (P * N) + p[:, None] * N + n[None, :]
        mask = (p < P)[:, None] & (n < N)[None, :]
        state = tl.load(states + place, mask=mask, other=0.0)  # [BLOCK_P, BLOCK_N]
        adjoint = tl.load(adjoints + place, mask=mask, other=0.0)  # [BLOCK_P, BLOCK_N]
        rows = load_rows(x, x_strides, batch, head, position, exists, p, P)  # [BLOCK_L, BLOCK_P]
        grad = load_rows(grad_y, grad_y_strides, batch, head, position, exists, p, P)  # [BLOCK_L, BLOCK_P]
        weights = scores * decay
        skip = tl.zeros([tile.block_p], tl.float32)
        if D is not None:
            skip = load_skip(D, head, p, P, D_STRIDE)
        if z is not None:
            out = dot(c, tl.trans(state), flags) * from_begin[:, None]
            out = add_dot(out, weights * size[None, :], rows, flags) + skip[None, :] * rows.to(tl.float32)
            gate = load_rows(z, z_strides, batch, head, position, exists, p, P).to(tl.float32)
            open_part = sigmoid(gate)
            of_gate = grad.to(tl.float32) * out * open_part * (1.0 + gate * (1.0 - open_part))
            store_rows(grad_z, grad_z_strides, batch, head, position, exists, p, P, of_gate)
            grad = operand(grad.to(tl.float32) * gate * open_part, flags)

        of_input = dot(b, tl.trans(adjoint), flags) * to_end[:, None]  # of dt * x, [BLOCK_L, BLOCK_P]
        wide_rows = rows.to(tl.float32)
        ends = size * tl.sum(of_input * wide_rows, axis=1)
        of_input = add_dot(of_input, tl.trans(weights), grad, flags)
        of_size = tl.sum(of_input * wide_rows, axis=1)
        of_rows = of_input * size[:, None] + skip[None, :] * grad.to(tl.float32)
        store_rows(grad_x, grad_x_strides, batch, head, position, exists, p, P, of_rows)

        products = dot(grad, tl.trans(rows), flags) * decay * size[None, :]  # of scores, [BLOCK_L, BLOCK_L]
        before = dot(grad, state, flags) * from_begin[:, None]  # [BLOCK_L, BLOCK_N]
        begins = tl.sum(before * c.to(tl.float32), axis=1)
        total_c = add_dot(total_c + before, products, b, flags)
        total_b = add_dot(total_b, tl.trans(products), c, flags)
        total_b += dot(rows, adjoint, flags) * (size * to_end)[:, None]

        pairs = tl.where(offset[:, None] > offset[None, :], products * scores, 0.0)
        begins += tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0)
        of_exponent = tl.cumsum(begins, axis=0, reverse=True) + (tl.cumsum(ends, axis=0) - ends)
        of_exponent += across * tl.sum(state.to(tl.float32) * adjoint.to(tl.float32))
        of_raw = rate * of_exponent + of_size
        of_raw = tl.where((unlimited >= flags.dt_min) & (unlimited <= flags.dt_max) & exists, of_raw, 0.0)
        if flags.softplus:
            of_raw *= sigmoid(raw)
        target = (batch * length + position) * heads + head
        tl.store(grad_dt + target, of_raw.to(grad_dt.dtype.element_ty), mask=exists)
        part = parts + ((batch * chunks + chunk) * heads + head) * (2 + D_STRIDE)
        tl.store(part, tl.sum(of_exponent * size, axis=0))
        tl.store(part + 1, tl.sum(of_raw, axis=0))
        if D is not None:
            of_skip = tl.sum(wide_rows * grad.to(tl.float32), axis=0)  # [BLOCK_P]
            if D_STRIDE > 1:
                tl.store(part + 2 + p, of_skip, mask=p < P)
            else:
                tl.store(part + 2, tl.sum(of_skip, axis=0))
    strides = groups * N * tl.cast(length, tl.int64), groups * N, N, 1
    store_rows(grad_B, strides, split * batches + batch, group, position, exists, n, N, total_b)
    store_rows(grad_C, strides, split * batches + batch, group, position, exists, n, N, total_c)
