"""The operators in ordinary operators of PyTorch, for exporters: no custom operators, no loops over data.

`decompositions` is a table for `torch.export.ExportedProgram.run_decompositions`. Sizes are known when a model is
exported, except that of the batch, so loops over chunks and steps are unrolled.

A diagonal recurrence is walked in chunks, all at once: a first walk finds the state that each chunk adds, the same
method finds the states between chunks, and a second walk starts from these. The scan of Mamba-2 is a few products with
masked decays.
"""

from math import inf, isqrt
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check_that
from ._launch import cdiv
from ._operator import OPERATORS

_MAX_STEPS = 16  # that a chunk of a diagonal recurrence is walked; each is a few nodes of the graph
_SSD_CHUNK = 64


def decompositions() -> Dict[Any, Callable[..., Any]]:
    """The operators that models call in plain PyTorch, and what computes the same: forward passes only.

        program = torch.export.export(model, (images,)).run_decompositions(decompositions())

    Export within `use_triton(False)`, because there are no forms of the operators that only Triton has.
    """
    forms: Dict[str, Callable[..., Any]] = dict(
        causal_conv1d=_causal_conv1d,
        selective_scan=_selective_scan,
        ss2d_scan=_ss2d_scan,
        bidirectional_scan=_bidirectional_scan,
        ssd_scan=_ssd_scan,
        switch_mlp=_switch_mlp,
    )
    return {OPERATORS[name].overload: form for name, form in forms.items()}


def diagonal_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tuple[Tensor, Tensor]:
    """h_l = exp(delta_l * A) * h_{l-1} + delta_l * B_l * u_l and y_l = <C_l, h_l>, from h = 0.

    Args:
        u, delta: [batch, G, L, D].
        A: [G, N, D].
        B, C: [batch, G, L, N].

    Returns:
        y [batch, G, L, D] and the last state [batch, G, N, D].
    """
    seqlen, (chunks, steps) = u.shape[2], _cut(u.shape[2])
    padding = chunks * steps - seqlen
    if padding:  # steps of size 0 keep the state
        u, delta, B, C = (F.pad(tensor, (0, 0, 0, padding)) for tensor in (u, delta, B, C))
    log_decay = delta.unsqueeze(3) * A.unsqueeze(1)
    states = _recurrence(log_decay, B.unsqueeze(4) * (delta * u).unsqueeze(3))
    y = C * states.squeeze(3) if A.shape[1] == 1 else (C.unsqueeze(3) @ states).squeeze(3)
    return (y[:, :, :seqlen] if padding else y), states[:, :, -1]


def _recurrence(log_decay: Tensor, value: Tensor) -> Tensor:
    """h_l = exp(log_decay_l) * h_{l-1} + value_l along dimension 2 of [batch, G, L, N, D]"""
    seqlen, (chunks, steps) = value.shape[2], _cut(value.shape[2])
    if chunks == 1:
        return torch.cat(_walk(log_decay.exp().split(1, 2), value.split(1, 2)), dim=2)
    padding = chunks * steps - seqlen
    if padding:
        log_decay, value = (F.pad(tensor, (0, 0, 0, 0, 0, padding)) for tensor in (log_decay, value))
    log_decay, value = (tensor.unflatten(2, (chunks, steps)) for tensor in (log_decay, value))
    decays, values = log_decay.exp().split(1, 3), value.split(1, 3)
    added = _walk(decays, values)[-1].squeeze(3)
    carried = _recurrence(log_decay.sum(dim=3), added)
    before = F.pad(carried[:, :, :-1], (0, 0, 0, 0, 1, 0)).unsqueeze(3)  # the state before each chunk
    states = torch.cat(_walk(decays, values, before), dim=3).flatten(2, 3)
    return states[:, :, :seqlen] if padding else states


def _cut(seqlen: int) -> Tuple[int, int]:
    """Chunks, and steps of each."""
    if seqlen <= _MAX_STEPS:
        return 1, seqlen
    steps = min(isqrt(seqlen - 1) + 1, _MAX_STEPS)
    return cdiv(seqlen, steps), steps


def _walk(decays: Sequence[Tensor], values: Sequence[Tensor], before: Optional[Tensor] = None) -> List[Tensor]:
    """The states of all steps, from one before them or zero."""
    states: List[Tensor] = []
    for decay, value in zip(decays, values):
        last = states[-1] if states else before
        states.append(value if last is None else decay * last + value)
    return states


def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    z: Optional[Tensor],
    delta_bias: Optional[Tensor],
    initial_state: Optional[Tensor],
    delta_softplus: bool,
    reverse: bool,
    out_dtype: torch.dtype,
    triton: bool,
    save: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    check_that(initial_state is None, 'selective_scan cannot be exported with an initial state')
    wide = torch.promote_types(u.dtype, torch.float32)
    groups = B.shape[1]
    u_wide, delta, A = u.to(wide), delta.to(wide), A.to(wide)
    if delta_bias is not None:
        delta = delta + delta_bias.to(wide).unsqueeze(1)
    delta = _softplus(delta) if delta_softplus else delta
    # [batch, G * D, L] -> [batch, G, L, D]
    grouped = [tensor.unflatten(1, (groups, -1)).transpose(2, 3) for tensor in (u_wide, delta)]
    sequences = [*grouped, *(tensor.to(wide).transpose(2, 3) for tensor in (B, C))]
    if reverse:
        sequences = [tensor.flip(2) for tensor in sequences]
    u, delta, B, C = sequences
    y, last_state = diagonal_scan(u, delta, A.unflatten(0, (groups, -1)).mT, B, C)
    y = (y.flip(2) if reverse else y).transpose(2, 3).flatten(1, 2)
    if D is not None:
        y = y + u_wide * D.to(wide).unsqueeze(1)
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(out_dtype), last_state.mT.flatten(1, 2), y.new_empty(0, dtype=torch.float32)


def _ss2d_scan(
    x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, triton: bool, save: bool
) -> Tuple[Tensor, Tensor]:
    height, width = x.shape[1:3]
    by_row = torch.arange(height * width, device=x.device)
    by_column = by_row.unflatten(0, (height, width)).mT.flatten()
    order = torch.stack([by_row, by_column, by_row.flip(0), by_column.flip(0)])
    back = by_row.unflatten(0, (width, height)).mT.flatten()  # the step of the second route at each pixel
    steps = torch.stack([by_row, back, by_row.flip(0), (height * width - 1) - back])
    pixels = x.flatten(1, 2).to(torch.promote_types(x.dtype, torch.float32))
    u = pixels.index_select(1, order.flatten()).unflatten(1, order.shape)
    y = _routed_scan(u, x_dbl.flatten(1, 2), order, steps, dt_weight, dt_bias, A)
    y = y + pixels * D.sum(dim=0)
    return y.unflatten(1, (height, width)).to(x.dtype), x.new_empty(0, dtype=torch.float32)


def _bidirectional_scan(
    u: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, save: bool
) -> Tensor:
    along = torch.arange(u.shape[1], device=u.device)
    order = torch.stack([along, along.flip(0)])
    u_wide = u.to(torch.promote_types(u.dtype, torch.float32))
    y = _routed_scan(_route(u_wide, order), x_dbl, order, order, dt_weight, dt_bias, A)
    return (y + (u_wide * D).sum(dim=2)).to(u.dtype)


def _routed_scan(
    u: Tensor, x_dbl: Tensor, order: Tensor, steps: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor
) -> Tensor:
    """A scan along each route without its skip connection, summed at the positions.

    Args:
        u: In the order of the routes [batch, K, L, D].
        x_dbl: In the order of positions [batch, L, K, R + 2N].
        order: Position of each step [K, L].
        steps: Step of each position [K, L].
        dt_weight, dt_bias, A: [K, D, R], [K, D] and [K, D, N].

    Returns:
        [batch, L, D].
    """
    routes, _, dt_rank = dt_weight.shape
    dstate = A.shape[-1]
    dt, B, C = _route(x_dbl.to(u.dtype), order).split([dt_rank, dstate, dstate], dim=-1)
    delta = _softplus(dt @ dt_weight.to(u.dtype).mT + dt_bias.to(u.dtype).unsqueeze(1))
    y, _ = diagonal_scan(u, delta, A.to(u.dtype).mT, B, C)
    places = steps + torch.arange(routes, device=u.device).unsqueeze(1) * u.shape[2]
    return y.flatten(1, 2).index_select(1, places.flatten()).unflatten(1, places.shape).sum(dim=1)


def _route(x: Tensor, order: Tensor) -> Tensor:
    """Each route's own map in its order: [batch, L, K, E] -> [batch, K, L, E]"""
    routes = order.shape[0]
    places = order * routes + torch.arange(routes, device=x.device).unsqueeze(1)
    return x.flatten(1, 2).index_select(1, places.flatten()).unflatten(1, order.shape)


def _softplus(x: Tensor) -> Tensor:
    """softplus(x); ONNX Runtime has vectorised exp and log, but no vectorised softplus."""
    return torch.relu(x) + torch.log(1 + torch.exp(-x.abs()))


def _ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    z: Optional[Tensor],
    dt_bias: Optional[Tensor],
    initial_states: Optional[Tensor],
    sequence: Optional[Tensor],
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    reverse: bool,
    triton: bool,
    save: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    check_that(initial_states is None, 'ssd_scan cannot be exported with initial states')
    check_that(sequence is None, 'ssd_scan cannot be exported with packed sequences')
    wide, groups, seqlen = torch.promote_types(x.dtype, torch.float32), B.shape[2], x.shape[1]
    step = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
    step = _softplus(step) if dt_softplus else step
    if (dt_min, dt_max) != (0.0, inf) or not dt_softplus:
        step = step.clamp(dt_min, dt_max)
    chunks = cdiv(seqlen, _SSD_CHUNK)
    padding = chunks * cdiv(seqlen, chunks) - seqlen
    x_wide = x.to(wide)
    sequences = [x_wide * step.unsqueeze(3), (step * A.to(wide)).unsqueeze(3), B.to(wide), C.to(wide)]
    if reverse:
        sequences = [tensor.flip(1) for tensor in sequences]
    if padding:
        sequences = [F.pad(tensor, (0, 0, 0, 0, 0, padding)) for tensor in sequences]
    # [batch, L, heads, E] -> [batch, G, R, chunks, Q, E], for B and C with R = 1
    value, exponent, B, C = (
        tensor.transpose(1, 2).unflatten(1, (groups, -1)).unflatten(3, (chunks, -1)) for tensor in sequences
    )
    sums = exponent.cumsum(dim=4)
    last = sums[..., -1:, :]
    y = ((C @ B.mT) * _decays(sums)) @ value
    added = (value * torch.exp(last - sums)).mT @ B  # [batch, G, R, chunks, P, N]
    totals = last.squeeze(-1).cumsum(dim=3)  # [batch, G, R, chunks, 1]
    states = (_decays(totals) @ added.flatten(4)).unflatten(4, added.shape[4:])
    if chunks > 1:
        before = F.pad(states[:, :, :, :-1], (0, 0, 0, 0, 1, 0))
        y = y + torch.exp(sums) * (C @ before.mT)
    y = y.flatten(3, 4).flatten(1, 2).transpose(1, 2)[:, :seqlen]  # [batch, L, H, P]
    y = y.flip(1) if reverse else y
    if D is not None:
        y = y + x_wide * (D if D.ndim == 2 else D.unsqueeze(1)).to(wide)
    if z is not None:
        y = y * F.silu(z.to(wide))
    empty = x.new_empty(0, dtype=torch.float32)
    return y.to(x.dtype), states[:, :, :, -1].flatten(1, 2), empty, empty.to(x.dtype)


def _decays(sums: Tensor) -> Tensor:
    """exp(sums_i - sums_j) for j <= i, else 0: [..., Q, 1] -> [..., Q, Q]"""
    size = sums.shape[-2]
    ahead = torch.full((size, size), -inf, dtype=sums.dtype, device=sums.device).triu(1)
    return torch.exp(sums - sums.mT + ahead)


def _causal_conv1d(x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool, triton: bool, save: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    directions, dim, width = weight.shape
    outputs = []
    for direction in range(directions):
        taps = weight[direction].to(wide).unsqueeze(1)
        padding, taps = ((0, width - 1), taps.flip(2)) if direction else ((width - 1, 0), taps)
        own = None if bias is None else bias[direction].to(wide)
        outputs.append(F.conv1d(F.pad(x.to(wide).mT, padding), taps, own, groups=dim).mT)
    u = torch.stack(outputs, dim=2)
    return (F.silu(u) if silu else u).to(x.dtype)


def _switch_mlp(
    x: Tensor,
    router_weight: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    capacity: int,
    grouped: bool,
    fused: bool,
    save: bool,
) -> Tuple[Tensor, ...]:
    """All experts compute all tokens, because groups of rows are not an ordinary operator."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(wide) @ router_weight.to(wide).mT  # [T, E]
    p, logsumexp = logits.softmax(dim=-1), logits.logsumexp(dim=-1)
    chosen = logits.argmax(dim=-1, keepdim=True) == torch.arange(logits.shape[1], device=x.device)
    weight = torch.where(chosen, p, 0)
    if capacity >= 0:
        weight = torch.where(chosen.long().cumsum(dim=0) <= capacity, weight, 0)
    y = torch.relu(x.to(fc1.dtype) @ fc1) @ fc2  # [E, T, d]
    out = (y * weight.mT.unsqueeze(2)).sum(dim=0).to(fc1.dtype)
    means = torch.cat([p.mean(dim=0), logsumexp.square().mean(dim=0, keepdim=True)])
    return out, means, chosen.sum(dim=0, dtype=torch.int32), *(x.new_empty(0) for _ in range(9))
