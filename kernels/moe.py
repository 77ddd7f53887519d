"""Feed-forward networks ("experts") of which a router chooses one for each token.

Switch Transformers, https://arxiv.org/abs/2101.03961

Tokens are sorted by expert, so that each product is a grouped one: consecutive rows times the matrix of their group.
Nothing waits for a GPU. On Triton, kernels do the rest: the router, the permutations, and the gradients of both.
"""

from functools import lru_cache
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check, check_that
from ._launch import (
    MAX_PLANS,
    Launch,
    cdiv,
    dot_precision,
    next_power_of_2,
    num_processors,
    product_block,
    runs_on_triton,
    share_rows,
    tl,
    triton,
)
from ._operator import Operator

_MAX_EXPERTS = 128  # of the Triton kernels, whose programs hold all logits of their tokens
_FEW_EXPERTS = 64
_STAGES = 2  # of the router's loops, so that their tiles fit into shared memory
_BLOCK_PLACES = 512  # tokens that a program places
_ROW_ELEMENTS = 4096  # numbers of the rows that a program permutes
_PROGRAMS_PER_PROCESSOR = 4  # of the gradient of the router's weight, each of which leaves a partial sum


class SwitchOutput(NamedTuple):
    """Results of `switch_mlp` for T tokens and E experts.

    Attributes:
        out: [T, d].
        mean_p: Mean probability of each expert [E], in at least fp32.
        z: Mean square of the logsumexp of the router's logits [], in at least fp32.
        counts: Tokens that chose each expert, int32 [E].
    """

    out: Tensor
    mean_p: Tensor
    z: Tensor
    counts: Tensor


def switch_mlp(
    x: Tensor,
    router_weight: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    capacity: Optional[int] = None,
    dtype: Optional[torch.dtype] = None,
) -> SwitchOutput:
    """Each token through the network of the expert that the router chooses.

        p_t = softmax(router_weight x_t),  e = argmax(p_t),  out_t = p_te * relu(x_t fc1[e]) fc2[e]

    Probabilities are computed in at least fp32, without rounding x or the weight. The products of the experts are
    grouped ones of PyTorch from torch 2.10 on, in bf16, if d and h are multiples of 8; otherwise they run expert by
    expert, after waiting for a GPU. Differentiable in reverse mode in every tensor.

    Args:
        x: Tokens [T, d], in any floating dtype.
        router_weight: [E, d].
        fc1: [E, d, h].
        fc2: [E, h, d].
        capacity: Tokens that an expert takes, the first ones; the output of further ones is 0. None for no limit.
        dtype: Of the experts' products and of out; x's by default.

    Returns:
        The output, and what auxiliary losses are made of.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    function, experts = 'switch_mlp', dict(fc1=(fc1, 'E d h'), fc2=(fc2, 'E h d'))
    sizes = check(function, None, x=(x, 'T d'), router_weight=(router_weight, 'E d'), **experts)
    found = f'capacity must be at least 1, or None, got {capacity}'
    check_that(capacity is None or capacity > 0, f'{function}: {found}')
    dtype = x.dtype if dtype is None else dtype
    aligned = sizes['d'] % 8 == sizes['h'] % 8 == 0
    grouped = hasattr(F, 'grouped_mm') and dtype == torch.bfloat16 and aligned
    fused = runs_on_triton(x) and sizes['E'] <= _MAX_EXPERTS
    limit = -1 if capacity is None else capacity
    out, means, counts = _operator(x, router_weight, fc1.to(dtype), fc2.to(dtype), limit, grouped, fused)
    return SwitchOutput(out, means[:-1], means[-1], counts)


def _forward(
    x: Tensor,
    router_weight: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    capacity: int,
    grouped: bool,
    fused: bool,
    save: bool,
) -> Tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # three results, and what is saved
    x = x.contiguous()
    with _without_autocast(x):
        p, logsumexp, gate, expert, means = (_route_fused if fused else _route)(x, router_weight)
        ascending, order = torch.sort(expert, stable=True)
        following = torch.arange(1, p.shape[1] + 1, device=x.device, dtype=expert.dtype)
        ends = torch.searchsorted(ascending, following, out_int32=True)
        gate, inverse, counts = (_place_fused if fused else _place)(gate, ascending, order, ends, capacity)
        product = _Products(ends, grouped)
        hidden = product.rows(_permute(x, order, fc1.dtype, fused), fc1).relu_()
        y = product.rows(hidden, fc2)
        out = _permute(y, inverse, y.dtype, fused, gate)
    if not save:
        return out, means, counts, *_nothing(x)
    return out, means, counts, p, logsumexp, ends, gate, expert, order, inverse, hidden, y


def _backward(grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Optional[Tensor]]:
    grad, grad_means, _ = grads
    x, router_weight, fc1, fc2, _, grouped, fused = inputs
    p, logsumexp, ends, gate, expert, order, inverse, hidden, y = saved
    x = x.contiguous()
    with _without_autocast(x):
        product = _Products(ends, grouped)
        grad = torch.zeros_like(y) if grad is None else grad.contiguous()
        grad, grad_gate = (_gate_gradient_fused if fused else _gate_gradient)(grad, y, gate, order)
        grad_fc2 = product.weights(hidden, grad)
        grad_hidden = torch.ops.aten.threshold_backward(product.rows(grad, fc2.mT), hidden, 0)
        grad_fc1 = product.weights(_permute(x, order, fc1.dtype, fused), grad_hidden)
        grad_x = product.rows(grad_hidden, fc1.mT)
        arguments = p, logsumexp, expert, grad_gate, grad_means, x, router_weight, grad_x, inverse
        grad_x, grad_router = (_router_gradient_fused if fused else _router_gradient)(*arguments)
    return grad_x, grad_router.to(router_weight.dtype), grad_fc1, grad_fc2


def _like(
    x: Tensor,
    router_weight: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    capacity: int,
    grouped: bool,
    fused: bool,
    save: bool,
) -> Tuple[Tensor, ...]:
    (tokens, dim), experts, hidden = x.shape, fc1.shape[0], fc1.shape[2]
    wide = torch.promote_types(x.dtype, torch.float32)
    results = (
        fc1.new_empty(tokens, dim),
        x.new_empty(experts + 1, dtype=wide),
        x.new_empty(experts, dtype=torch.int32),
    )
    if not save:
        return *results, *_nothing(x)
    routes = x.new_empty(tokens, experts, dtype=wide), x.new_empty(tokens, dtype=wide)
    dtypes = wide, _key_dtype(experts), torch.long, torch.long
    tokenwise = [x.new_empty(tokens, dtype=dtype) for dtype in dtypes]
    maps = fc1.new_empty(tokens, hidden), fc1.new_empty(tokens, dim)
    return *results, *routes, x.new_empty(experts, dtype=torch.int32), *tokenwise, *maps


def _nothing(x: Tensor) -> List[Tensor]:
    return [x.new_empty(0) for _ in range(9)]


class _Products:
    """Matrix products of groups of consecutive rows."""

    def __init__(self, ends: Tensor, grouped: bool) -> None:
        self.ends = ends if grouped else None
        self.sizes: List[int] = [] if grouped else torch.diff(ends, prepend=ends.new_zeros(1)).tolist()

    def rows(self, x: Tensor, weight: Tensor) -> Tensor:
        """Each row times the matrix of its group: [T, m], [E, m, n] -> [T, n]"""
        if self.ends is not None:
            return F.grouped_mm(x, weight, offs=self.ends)
        return torch.cat([part @ matrix for part, matrix in zip(x.split(self.sizes), weight)])

    def weights(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the matrices: [T, m], [T, n] -> [E, m, n]"""
        if self.ends is not None:
            return F.grouped_mm(x.mT, grad, offs=self.ends)
        return torch.stack([a.mT @ b for a, b in zip(x.split(self.sizes), grad.split(self.sizes))])


def _without_autocast(x: Tensor) -> Any:
    return torch.autocast(x.device.type, enabled=False)


def _key_dtype(experts: int) -> torch.dtype:
    """Of the experts' numbers that tokens are sorted by: a radix sort takes a pass for every byte."""
    return torch.uint8 if experts < 256 else torch.int32  # E itself is compared with them


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# In plain PyTorch


def _route(x: Tensor, router_weight: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """p [T, E], logsumexp, gate and expert [T], and the means of p and of logsumexp^2, [E + 1]."""
    logits = F.linear(_wide(x), router_weight.to(_wide(x).dtype))
    p, logsumexp = torch.softmax(logits, dim=-1), torch.logsumexp(logits, dim=-1)
    gate, expert = p.max(dim=-1)
    sums = torch.cat([p, logsumexp.square().unsqueeze(-1)], dim=-1).sum(dim=0)
    return p, logsumexp, gate, expert.to(_key_dtype(p.shape[1])), sums / max(len(p), 1)


def _place(
    gate: Tensor, ascending: Tensor, order: Tensor, ends: Tensor, capacity: int
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gates [T], 0 beyond the capacity; the inverse of the order [T]; tokens of each expert [E]."""
    place, counts = torch.arange(len(order), device=order.device), torch.diff(ends, prepend=ends.new_zeros(1))
    inverse = torch.empty_like(order).scatter_(0, order, place)
    if capacity >= 0:
        kept = place - (ends - counts)[ascending.long()] < capacity
        gate = gate * kept.index_select(0, inverse)
    return gate, inverse, counts


def _permute(x: Tensor, index: Tensor, dtype: torch.dtype, fused: bool, gate: Optional[Tensor] = None) -> Tensor:
    """gate_t * x[index_t]: [T, d] -> [T, d]"""
    if fused:
        return _permute_fused(x, index, dtype, gate)
    x = x.to(dtype).index_select(0, index)
    return x if gate is None else x * gate.to(dtype).unsqueeze(-1)


def _gate_gradient(grad: Tensor, y: Tensor, gate: Tensor, order: Tensor) -> Tuple[Tensor, Tensor]:
    """Gradients of y, whose rows are in `order`, and of the gates [T], from that of gate * y."""
    grad = grad.index_select(0, order)
    grad_gate = torch.empty_like(gate).scatter_(0, order, (grad * y).sum(dim=-1, dtype=gate.dtype))
    return grad * gate.index_select(0, order).to(grad.dtype).unsqueeze(-1), grad_gate * (gate > 0)


def _router_gradient(
    p: Tensor,
    logsumexp: Tensor,
    expert: Tensor,
    grad_gate: Tensor,
    grad_means: Optional[Tensor],
    x: Tensor,
    router_weight: Tensor,
    grad_x: Tensor,
    inverse: Tensor,
) -> Tuple[Tensor, Tensor]:
    """Gradients of x and of the router's weight; that of x through the experts is given, in their order."""
    grad = F.one_hot(expert.long(), p.shape[1]) * grad_gate.unsqueeze(-1)
    if grad_means is not None:
        grad_means = grad_means / max(len(p), 1)
        grad = grad + grad_means[:-1]
    grad = p * (grad - (p * grad).sum(dim=-1, keepdim=True))
    if grad_means is not None:
        grad = grad + p * (2 * grad_means[-1] * logsumexp).unsqueeze(-1)
    through_experts = grad_x.index_select(0, inverse)
    return (through_experts + grad @ router_weight.to(grad.dtype)).to(x.dtype), grad.mT @ _wide(x)


# On Triton


def _route_fused(x: Tensor, router_weight: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (tokens, dim), experts = x.shape, router_weight.shape[0]
    p, logsumexp, gate = (x.new_empty(shape, dtype=torch.float32) for shape in ((tokens, experts), tokens, tokens))
    expert = x.new_empty(tokens, dtype=_key_dtype(experts))
    launch = _router_launch(tokens, dim, experts, dot_precision(logsumexp))
    parts = p.new_empty(launch.grid[0], experts + 1)
    launch(x, router_weight.contiguous(), p, logsumexp, gate, expert, parts)
    return p, logsumexp, gate, expert, parts.sum(dim=0)


def _place_fused(
    gate: Tensor, ascending: Tensor, order: Tensor, ends: Tensor, capacity: int
) -> Tuple[Tensor, Tensor, Tensor]:
    inverse, counts = torch.empty_like(order), torch.empty_like(ends)
    _place_launch(len(order), len(ends), capacity)(ascending, order, ends, gate, inverse, counts)
    return gate, inverse, counts


def _permute_fused(x: Tensor, index: Tensor, dtype: torch.dtype, gate: Optional[Tensor]) -> Tensor:
    out = torch.empty_like(x, dtype=dtype)
    _permute_launch(*x.shape)(x, index, gate, out)
    return out


def _gate_gradient_fused(grad: Tensor, y: Tensor, gate: Tensor, order: Tensor) -> Tuple[Tensor, Tensor]:
    grad_y, grad_gate = torch.empty_like(grad), torch.empty_like(gate)
    _gate_gradient_launch(*grad.shape)(grad, y, gate, order, grad_y, grad_gate)
    return grad_y, grad_gate


def _router_gradient_fused(
    p: Tensor,
    logsumexp: Tensor,
    expert: Tensor,
    grad_gate: Tensor,
    grad_means: Optional[Tensor],
    x: Tensor,
    router_weight: Tensor,
    grad_x: Tensor,
    inverse: Tensor,
) -> Tuple[Tensor, Tensor]:
    (tokens, dim), experts = x.shape, router_weight.shape[0]
    precision = dot_precision(p)
    grad_means = None if grad_means is None else grad_means.contiguous()
    total, grad_logits = torch.empty_like(x), torch.empty_like(p)
    arguments = p, logsumexp, expert, grad_gate, grad_means, router_weight.contiguous(), grad_x, inverse
    _input_gradient_launch(tokens, dim, experts, precision)(*arguments, total, grad_logits)
    launch = _weight_gradient_launch(tokens, dim, experts, precision, num_processors(x))
    parts = p.new_empty(launch.grid[0], experts, dim)
    launch(grad_logits, x, parts)
    return total, parts.sum(dim=0)


@triton.jit(do_not_specialize_on_alignment=['tokens'])
def router_kernel(
    x,  # [tokens, dim]
    weight,  # [experts, dim]
    p,  # [tokens, experts]: written
    logsumexp,  # [tokens]: written
    gate,  # [tokens]: written, the largest probability
    expert,  # [tokens]: written, its index
    parts,  # [programs, experts + 1]: written, parts of the means of p and of logsumexp^2
    tokens,
    dim,
    experts,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program routes BLOCK_T tokens."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column, has_row = tl.arange(0, BLOCK_E), row < tokens
    has_column = column < experts
    logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in range(0, dim, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        has_channel = channel < dim
        rows = tl.load(x + row[:, None] * dim + channel[None, :], has_row[:, None] & has_channel[None, :], other=0.0)
        place = column[None, :] * dim + channel[:, None]  # [BLOCK_D, BLOCK_E]
        columns = tl.load(weight + place, has_channel[:, None] & has_column[None, :], other=0.0)
        logits = tl.dot(rows.to(tl.float32), columns.to(tl.float32), logits, input_precision=PRECISION)
    logits = tl.where(has_column[None, :], logits, float('-inf'))
    largest = tl.max(logits, axis=1)
    power = tl.exp(logits - largest[:, None])
    total = tl.sum(power, axis=1)
    mask = has_row[:, None] & has_column[None, :]
    probability, log_total = power / total[:, None], largest + tl.log(total)
    tl.store(p + row[:, None] * experts + column[None, :], probability, mask)
    tl.store(logsumexp + row, log_total, has_row)
    part = parts + tl.program_id(0).to(tl.int64) * (experts + 1)
    tl.store(part + column, tl.sum(tl.where(mask, probability, 0.0), axis=0) / tokens, has_column)
    tl.store(part + experts, tl.sum(tl.where(has_row, log_total * log_total, 0.0), axis=0) / tokens)
    tl.store(gate + row, 1.0 / total, has_row)
    chosen = tl.minimum(tl.argmax(logits, axis=1), experts - 1)  # an expert even where logits are NaN
    tl.store(expert + row, chosen.to(expert.dtype.element_ty), has_row)


@triton.jit(do_not_specialize_on_alignment=['tokens'])
def place_kernel(
    ascending,  # [tokens], experts of the tokens in `order`
    order,  # [tokens]
    ends,  # [experts]
    gate,  # [tokens]: set to 0 beyond the capacity
    inverse,  # [tokens]: written
    counts,  # [experts]: written, by the first program
    tokens,
    experts,
    capacity,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """One program places BLOCK_T tokens."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    has_place = place < tokens
    token = tl.load(order + place, has_place, other=0)
    tl.store(inverse + token, place, has_place)
    if LIMITED:
        expert = tl.load(ascending + place, has_place, other=0).to(tl.int32)
        start = tl.load(ends + expert - 1, has_place & (expert > 0), other=0)
        tl.store(gate + token, 0.0, has_place & (place - start >= capacity))
    if tl.program_id(0) == 0:
        column = tl.arange(0, BLOCK_E)
        end = tl.load(ends + column, column < experts, other=0)
        before = tl.load(ends + column - 1, (column > 0) & (column < experts), other=0)
        tl.store(counts + column, end - before, column < experts)


@triton.jit(do_not_specialize_on_alignment=['tokens'])
def permute_kernel(
    x,  # [tokens, dim]
    index,  # [tokens]
    gate,  # [tokens] or None
    out,  # [tokens, dim]: written
    tokens,
    dim,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program writes ROWS rows: gate_t * x[index_t]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel, has_row = tl.arange(0, BLOCK_D), row < tokens
    mask = has_row[:, None] & (channel < dim)[None, :]
    source = tl.load(index + row, has_row, other=0)
    values = tl.load(x + source[:, None] * dim + channel[None, :], mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    if gate is not None:
        values *= tl.load(gate + row, has_row, other=0.0)[:, None]
    tl.store(out + row[:, None] * dim + channel[None, :], values.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize_on_alignment=['tokens'])
def gate_gradient_kernel(
    grad,  # [tokens, dim]
    y,  # [tokens, dim], in `order`
    gate,  # [tokens]
    order,  # [tokens]
    grad_y,  # [tokens, dim], in `order`: written
    grad_gate,  # [tokens]: written
    tokens,
    dim,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program treats ROWS rows of gate * y. A gate of 0 is that of a dropped token."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel, has_row = tl.arange(0, BLOCK_D), row < tokens
    mask = has_row[:, None] & (channel < dim)[None, :]
    token = tl.load(order + row, has_row, other=0)
    weight = tl.load(gate + token, has_row, other=0.0)  # [ROWS]
    place = row[:, None] * dim + channel[None, :]
    values = tl.load(grad + token[:, None] * dim + channel[None, :], mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    product = tl.sum(values * tl.load(y + place, mask, other=0.0).to(tl.float32), axis=1)
    tl.store(grad_gate + token, tl.where(weight > 0, product, 0.0), has_row)
    tl.store(grad_y + place, (values * weight[:, None]).to(grad_y.dtype.element_ty), mask)


@triton.jit(do_not_specialize_on_alignment=['tokens'])
def router_input_gradient_kernel(
    p,  # [tokens, experts]
    logsumexp,  # [tokens]
    expert,  # [tokens], chosen
    grad_gate,  # [tokens]
    grad_means,  # [experts + 1] or None
    weight,  # [experts, dim]
    grad_x,  # [tokens, dim], through the experts, in their order
    inverse,  # [tokens]
    total,  # [tokens, dim]: written, the gradient of x
    grad_logits,  # [tokens, experts]: written
    tokens,
    dim,
    experts,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program treats BLOCK_T tokens. With g the gradient of p: that of the logits is p * (g - sum(p * g))."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column, has_row = tl.arange(0, BLOCK_E), row < tokens
    has_column = column < experts
    mask = has_row[:, None] & has_column[None, :]
    place = row[:, None] * experts + column[None, :]
    probability = tl.load(p + place, mask, other=0.0)  # [BLOCK_T, BLOCK_E]
    chosen = column[None, :] == tl.load(expert + row, has_row, other=0).to(tl.int32)[:, None]
    grad = tl.where(chosen, tl.load(grad_gate + row, has_row, other=0.0)[:, None], 0.0)
    if grad_means is not None:
        grad += tl.load(grad_means + column, has_column, other=0.0)[None, :] / tokens
    grad = grad - tl.sum(probability * grad, axis=1)[:, None]
    if grad_means is not None:
        factor = 2.0 * tl.load(grad_means + experts) / tokens
        grad += (factor * tl.load(logsumexp + row, has_row, other=0.0))[:, None]
    grad *= probability
    tl.store(grad_logits + place, grad, mask)
    source = tl.load(inverse + row, has_row, other=0)
    for start in range(0, dim, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        has_channel = channel < dim
        inside = has_row[:, None] & has_channel[None, :]
        columns = tl.load(
            weight + column[:, None] * dim + channel[None, :], has_column[:, None] & has_channel[None, :], other=0.0
        )  # [BLOCK_E, BLOCK_D]
        values = tl.load(grad_x + source[:, None] * dim + channel[None, :], inside, other=0.0).to(tl.float32)
        values = tl.dot(grad, columns.to(tl.float32), values, input_precision=PRECISION)
        tl.store(total + row[:, None] * dim + channel[None, :], values.to(total.dtype.element_ty), inside)


@triton.jit(do_not_specialize_on_alignment=['tokens', 'rows_per_program'])
def router_weight_gradient_kernel(
    grad_logits,  # [tokens, experts]
    x,  # [tokens, dim]
    parts,  # [programs, experts, dim]: written, parts of the gradient of the router's weight
    tokens,
    rows_per_program,
    dim,
    experts,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program sums rows_per_program tokens for BLOCK_D channels."""
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    channel, column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    has_channel, has_column = channel < dim, column < experts
    sums = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for start in range(0, rows_per_program, BLOCK_T):
        row = first + start + tl.arange(0, BLOCK_T)
        has_row = (row < tokens) & (start + tl.arange(0, BLOCK_T) < rows_per_program)
        grad = tl.load(
            grad_logits + row[None, :] * experts + column[:, None], has_column[:, None] & has_row[None, :], other=0.0
        )  # [BLOCK_E, BLOCK_T]
        rows = tl.load(x + row[:, None] * dim + channel[None, :], has_row[:, None] & has_channel[None, :], other=0.0)
        sums = tl.dot(grad, rows.to(tl.float32), sums, input_precision=PRECISION)
    place = (tl.program_id(0).to(tl.int64) * experts + column[:, None]) * dim + channel[None, :]
    tl.store(parts + place, sums, has_column[:, None] & has_channel[None, :])


class _Block(NamedTuple):
    """Tokens and experts of a program of the router, and channels that it multiplies at a time."""

    block_t: int
    block_d: int
    block_e: int


def _block(experts: int) -> _Block:
    side = 64 if experts <= _FEW_EXPERTS else 32
    return _Block(side, side, product_block(experts))


@lru_cache(maxsize=MAX_PLANS)
def _router_launch(tokens: int, dim: int, experts: int, precision: str) -> Launch:
    block = _block(experts)
    grid = cdiv(tokens, block.block_t)
    return Launch(router_kernel, grid, (tokens, dim, experts), (*block, precision), stages=_STAGES)


@lru_cache(maxsize=MAX_PLANS)
def _input_gradient_launch(tokens: int, dim: int, experts: int, precision: str) -> Launch:
    block = _block(experts)
    grid = cdiv(tokens, block.block_t)
    return Launch(router_input_gradient_kernel, grid, (tokens, dim, experts), (*block, precision), stages=_STAGES)


@lru_cache(maxsize=MAX_PLANS)
def _weight_gradient_launch(tokens: int, dim: int, experts: int, precision: str, processors: int) -> Launch:
    block = _block(experts)
    columns = cdiv(dim, block.block_d)
    programs, rows = share_rows(tokens, block.block_t, _PROGRAMS_PER_PROCESSOR * processors // columns)
    sizes = tokens, rows, dim, experts
    return Launch(router_weight_gradient_kernel, (programs, columns), sizes, (*block, precision), stages=_STAGES)


@lru_cache(maxsize=MAX_PLANS)
def _place_launch(tokens: int, experts: int, capacity: int) -> Launch:
    grid = max(cdiv(tokens, _BLOCK_PLACES), 1)  # the first writes the counts
    constants = _BLOCK_PLACES, next_power_of_2(experts), capacity >= 0
    return Launch(place_kernel, grid, (tokens, experts, max(capacity, 0)), constants)


def _rows(tokens: int, dim: int) -> Tuple[int, Tuple[int, int]]:
    """Programs that permute rows, and the rows and channels of each."""
    block_d = next_power_of_2(dim)
    rows = max(_ROW_ELEMENTS // block_d, 1)
    return cdiv(tokens, rows), (rows, block_d)


@lru_cache(maxsize=MAX_PLANS)
def _permute_launch(tokens: int, dim: int) -> Launch:
    grid, constants = _rows(tokens, dim)
    return Launch(permute_kernel, grid, (tokens, dim), constants)


@lru_cache(maxsize=MAX_PLANS)
def _gate_gradient_launch(tokens: int, dim: int) -> Launch:
    grid, constants = _rows(tokens, dim)
    return Launch(gate_gradient_kernel, grid, (tokens, dim), constants)


_operator = Operator(
    'switch_mlp',
    _forward,
    _backward,
    _like,
    results=3,
    macs=lambda x, router_weight, fc1, *_: x[0] * x[1] * router_weight[0] + 2 * x[0] * fc1[1] * fc1[2],
)
