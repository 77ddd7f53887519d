"""Triton kernels of the SSD's backward pass, beside the adjoint walk of `state_kernel`."""

from .._device import sigmoid
from .._launch import tl, triton
from .tiles import (
    add_dot,
    chunk_of,
    dot,
    limited,
    load_rows,
    load_skip,
    load_sums,
    operand,
    program_of,
    sequences_of,
    state_places,
    store_rows,
    unlimited,
)


@triton.jit(do_not_specialize=['share'])  # see `Run`
def input_gradient_kernel(
    grad_y,  # [batch, L, H, P], by its strides
    x,  # the same
    dt,  # [batch, L, H], by its strides
    A,  # [H]
    B,  # [batch, L, G, N], by its strides
    C,  # the same
    D,  # [H], or [H, P], or None
    z,  # as x, or None
    dt_bias,  # [H], or None
    steps,  # [batch, H, chunks, 2, BLOCK_L], of `step_kernel`
    sequence,  # [batch, L], or None
    states,  # [batch, chunks, H, P, N], the state before each chunk
    adjoints,  # the same, the gradient of the state after each chunk
    grad_x,  # as x: written
    grad_dt,  # [batch, L, H]: written
    grad_z,  # as x, or None: written
    parts,  # [batch, chunks, H, 2 + D_STRIDE]: written, parts of the gradients of A, dt_bias and D
    share,
    sizes,  # length, heads, split_heads
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
    """One program computes all gradients but those of B and C for a chunk of `split_heads` of the heads of a group.

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
    length, heads, split_heads = sizes
    batch, group, split = program_of(heads, share, split_heads)
    offset = tl.arange(0, BLOCK_L)
    positions = chunk_of(chunk, length, flags, BLOCK_L)
    seen = offset[:, None] <= offset[None, :]  # step j, the first axis, by step i
    if sequence is not None:
        here, start, final = sequences_of(sequence, batch, chunk, length, BLOCK_L)
        seen = seen & (here[:, None] == here[None, :])
    b = load_rows(B, B_strides, batch, group, positions, n, N)  # [BLOCK_L, BLOCK_N]
    c = load_rows(C, C_strides, batch, group, positions, n, N)  # [BLOCK_L, BLOCK_N]
    scores = dot(b, tl.trans(c), flags)  # [BLOCK_L, BLOCK_L]
    begin = split * split_heads
    for k in range(begin, tl.minimum(begin + split_heads, share)):
        head = group * share + k
        rate = tl.load(A + head).to(tl.float32)
        size, sums, total = load_sums(steps, batch * heads + head, chunk, chunks, BLOCK_L)
        from_begin, to_end, across = tl.exp2(sums), tl.exp2(total - sums), tl.exp2(total)
        if sequence is not None:
            from_begin = tl.where(here == start, from_begin, 0.0)
            to_end = tl.where(here == final, to_end, 0.0)
            across = tl.where(start == final, across, 0.0)
        row = (batch * chunks + chunk) * heads + head
        source, place, inside = state_places(row, p, n, tile)
        state = tl.load(states + source + place, mask=inside, other=0.0)  # [BLOCK_P, BLOCK_N]
        adjoint = tl.load(adjoints + source + place, mask=inside, other=0.0)  # [BLOCK_P, BLOCK_N]
        rows = load_rows(x, x_strides, batch, head, positions, p, P)  # [BLOCK_L, BLOCK_P]
        grad = load_rows(grad_y, grad_y_strides, batch, head, positions, p, P)  # [BLOCK_L, BLOCK_P]
        across *= tl.sum(state.to(tl.float32) * adjoint.to(tl.float32))
        before = dot(c, tl.trans(state), flags) * from_begin[:, None]  # [BLOCK_L, BLOCK_P]
        weights = scores * tl.exp2(tl.where(seen, sums[None, :] - sums[:, None], -float('inf')))  # of step j in step i
        if z is not None:
            out = add_dot(before, tl.trans(weights * size[:, None]), rows, flags)
            if D is not None:
                out += load_skip(D, head, p, P, D_STRIDE)[None, :] * rows.to(tl.float32)
            gate = load_rows(z, z_strides, batch, head, positions, p, P).to(tl.float32)
            open_part = sigmoid(gate)
            of_gate = grad.to(tl.float32) * out * open_part * (1.0 + gate * (1.0 - open_part))
            store_rows(grad_z, grad_z_strides, batch, head, positions, p, P, of_gate)
            grad = operand(grad.to(tl.float32) * gate * open_part, flags)
        begins = tl.sum(before * grad.to(tl.float32), axis=1)
        part = parts + row * (2 + D_STRIDE)
        if D is not None:
            of_skip = tl.sum(rows.to(tl.float32) * grad.to(tl.float32), axis=0)  # [BLOCK_P]
            if D_STRIDE > 1:
                tl.store(part + 2 + p, of_skip, mask=p < P)
            else:
                tl.store(part + 2, tl.sum(of_skip, axis=0))

        weight = size * to_end
        of_rows = dot(b, tl.trans(adjoint), flags)  # [BLOCK_L, BLOCK_P]
        ends = tl.sum(of_rows * rows.to(tl.float32), axis=1)
        of_rows = add_dot(of_rows * weight[:, None], weights * size[:, None], grad, flags)
        if D is not None:
            of_rows += load_skip(D, head, p, P, D_STRIDE)[None, :] * grad.to(tl.float32)
        store_rows(grad_x, grad_x_strides, batch, head, positions, p, P, of_rows)

        pairs = weights * dot(rows, tl.trans(grad), flags)  # [BLOCK_L, BLOCK_L]
        of_size = tl.sum(pairs, axis=1) + ends * to_end
        pairs = tl.where(offset[:, None] < offset[None, :], pairs * size[:, None], 0.0)
        begins += tl.sum(pairs, axis=0) - tl.sum(pairs, axis=1)
        ends *= weight
        of_exponent = across + tl.cumsum(begins, axis=0, reverse=True) + (tl.cumsum(ends, axis=0) - ends)
        of_raw = rate * of_exponent + of_size
        first, distance, exists = positions
        source = dt + batch * dt_strides[0] + first * dt_strides[1] + tl.cast(head, tl.int64) * dt_strides[2]
        raw = tl.load(source + distance * dt_strides[1], mask=exists, other=0.0).to(tl.float32)
        if dt_bias is not None:
            raw += tl.load(dt_bias + head).to(tl.float32)
        whole = unlimited(raw, flags)
        of_raw = tl.where((whole == limited(whole, flags)) & exists, of_raw, 0.0)
        if flags.softplus:
            of_raw *= sigmoid(raw)
        target = grad_dt + ((batch * length + first) * heads + head)
        tl.store(target + distance * heads, of_raw.to(grad_dt.dtype.element_ty), mask=exists)
        tl.store(part, tl.sum(of_exponent * size, axis=0))
        tl.store(part + 1, tl.sum(of_raw, axis=0))


@triton.jit(do_not_specialize=['share'])  # see `Run`
def projection_gradient_kernel(
    grad_y,  # [batch, L, H, P], by its strides
    x,  # the same
    B,  # [batch, L, G, N], by its strides
    C,  # the same
    z,  # as x, or None
    steps,  # [batch, H, chunks, 2, BLOCK_L], of `step_kernel`
    sequence,  # [batch, L], or None
    states,  # [batch, chunks, H, P, N], the state before each chunk
    adjoints,  # the same, the gradient of the state after each chunk
    grad_B,  # [splits, batch, L, G, N]: written
    grad_C,  # the same
    share,
    sizes,  # length, heads, split_heads
    grad_y_strides,
    x_strides,
    B_strides,
    C_strides,
    z_strides,
    tile,  # `Tile` of constants
    flags,  # `Flags` of constants
):
    """One program sums the gradients of B and C of a chunk over `split_heads` of the heads of a group."""
    BLOCK_L: tl.constexpr = tile.block_l
    P: tl.constexpr = tile.dim
    N: tl.constexpr = tile.dstate
    p = tl.arange(0, tile.block_p)
    n = tl.arange(0, tile.block_n)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    length, heads, split_heads = sizes
    batch, group, split = program_of(heads, share, split_heads)
    groups = heads // share
    batches = tl.num_programs(0) // (tl.cdiv(share, split_heads) * groups)
    offset = tl.arange(0, BLOCK_L)
    positions = chunk_of(chunk, length, flags, BLOCK_L)
    seen = offset[:, None] <= offset[None, :]  # step j, the first axis, by step i
    if sequence is not None:
        here, start, final = sequences_of(sequence, batch, chunk, length, BLOCK_L)
        seen = seen & (here[:, None] == here[None, :])
    of_scores = tl.zeros([BLOCK_L, BLOCK_L], tl.float32)
    of_b = tl.zeros([BLOCK_L, tile.block_n], tl.float32)
    of_c = tl.zeros([BLOCK_L, tile.block_n], tl.float32)
    begin = split * split_heads
    for k in range(begin, tl.minimum(begin + split_heads, share)):
        head = group * share + k
        size, sums, total = load_sums(steps, batch * heads + head, chunk, chunks, BLOCK_L)
        from_begin, weight = tl.exp2(sums), size * tl.exp2(total - sums)
        if sequence is not None:
            from_begin = tl.where(here == start, from_begin, 0.0)
            weight = tl.where(here == final, weight, 0.0)
        source, place, inside = state_places((batch * chunks + chunk) * heads + head, p, n, tile)
        state = tl.load(states + source + place, mask=inside, other=0.0)  # [BLOCK_P, BLOCK_N]
        adjoint = tl.load(adjoints + source + place, mask=inside, other=0.0)  # [BLOCK_P, BLOCK_N]
        rows = load_rows(x, x_strides, batch, head, positions, p, P)  # [BLOCK_L, BLOCK_P]
        grad = load_rows(grad_y, grad_y_strides, batch, head, positions, p, P)  # [BLOCK_L, BLOCK_P]
        if z is not None:
            gate = load_rows(z, z_strides, batch, head, positions, p, P).to(tl.float32)
            grad = operand(grad.to(tl.float32) * gate * sigmoid(gate), flags)
        decay = tl.exp2(tl.where(seen, sums[None, :] - sums[:, None], -float('inf')))  # from j to i
        of_scores += dot(rows, tl.trans(grad), flags) * decay * size[:, None]
        of_b = add_dot(of_b, rows.to(tl.float32) * weight[:, None], adjoint, flags)
        of_c = add_dot(of_c, grad.to(tl.float32) * from_begin[:, None], state, flags)
    products = operand(of_scores, flags)
    b = load_rows(B, B_strides, batch, group, positions, n, N)  # [BLOCK_L, BLOCK_N]
    c = load_rows(C, C_strides, batch, group, positions, n, N)  # [BLOCK_L, BLOCK_N]
    of_b = add_dot(of_b, products, c, flags)
    of_c = add_dot(of_c, tl.trans(products), b, flags)
    strides = groups * N * tl.cast(length, tl.int64), groups * N, N, 1
    store_rows(grad_B, strides, split * batches + batch, group, positions, n, N, of_b)
    store_rows(grad_C, strides, split * batches + batch, group, positions, n, N, of_c)
