"""State space duality (SSD), the scan of Mamba-2.

Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality,
https://arxiv.org/abs/2405.21060
"""

from math import inf, prod
from numbers import Integral, Real
from typing import Any, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .._check import check, check_that
from .._launch import runs_on_triton
from .._operator import Operator, is_watched
from . import plain
from .launch import MAX_DIM, MAX_STATES, Scan, scan_backward, scan_forward, states_dtype, states_shape, steps_shape
from .non_causal import non_causal_ssd

__all__ = ['non_causal_ssd', 'ssd_scan']


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    dt_bias: Optional[Tensor] = None,
    initial_states: Optional[Tensor] = None,
    seq_idx: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    dt_softplus: bool = False,
    dt_limit: Tuple[float, float] = (0.0, inf),
    return_final_states: bool = False,
    reverse: bool = False,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """The scan of Mamba-2 with the signature and layouts of mamba_ssm's `mamba_chunk_scan_combined`.

    With dt' = clamp(softplus(dt + dt_bias), *dt_limit) (bias and softplus optional), for every head, with a state
    [P, N]:

        S_l = exp(dt'_l * A) * S_{l-1} + dt'_l * x_l B_l^T,    y_l = (S_l C_l + D * x_l) * silu(z_l)

    This is `selective_scan` with one A and step size for all channels and states of a head. The state, A, D and dt_bias
    are kept in fp32 (fp64 if x is fp64). Triton supports up to 128 channels of a head and 128 states; otherwise plain
    PyTorch runs. Differentiable in reverse mode in every floating tensor argument.

    Args:
        x: Input [batch, L, H, P], in any floating dtype and with any strides.
        dt: Step size [batch, L, H].
        A: [H], negative for a stable recurrence.
        B: Input projection [batch, L, G, N], for G groups of heads.
        C: Output projection [batch, L, G, N].
        chunk_size: Unused, as the result does not depend on it: the operator chooses its own chunks.
        D: Skip connection, [H] or [H, P].
        z: Gate [batch, L, H, P].
        dt_bias: [H].
        initial_states: State before the first step [batch, H, P, N], zero by default.
        seq_idx: Integers [batch, L], the number of the packed sequence of each position. Where it changes, the state
            starts again from zero. initial_states belongs to number 0.
        cu_seqlens: Integers [sequences + 1], the first positions of packed sequences and L, instead of seq_idx. The
            batch must be 1. Not checked on a GPU.
        dt_softplus: Apply softplus to the step size.
        dt_limit: Smallest and largest step size. Beyond them dt has no gradient.
        return_final_states: Also return the state after the last step.
        reverse: Walk from the last position to the first; the output stays in order. Not together with seq_idx,
            cu_seqlens or initial_states.

    Returns:
        y [batch, L, H, P] in x's dtype; with `return_final_states` also the last state [batch, H, P, N] in fp32.

    Raises:
        ValueError: If shapes, dtypes, devices or options do not fit together.
    """
    _check(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, dt_limit)
    sequence = _sequences(x, seq_idx, cu_seqlens)
    excluded = dict(seq_idx=seq_idx, cu_seqlens=cu_seqlens, initial_states=initial_states)
    given = [name for name, tensor in excluded.items() if tensor is not None]
    check_that(not (reverse and given), f'ssd_scan: reverse=True cannot be combined with {", ".join(given)}')
    low, high = map(float, dt_limit)
    triton = x.shape[-1] <= MAX_DIM and B.shape[-1] <= MAX_STATES and runs_on_triton(x)
    y, last = _scan(x, dt, A, B, C, D, z, dt_bias, initial_states, sequence, dt_softplus, low, high, reverse, triton)
    return (y, last) if return_final_states else y


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: Any,
    D: Optional[Tensor],
    z: Optional[Tensor],
    dt_bias: Optional[Tensor],
    initial_states: Optional[Tensor],
    dt_limit: Tuple[float, float],
) -> None:
    sizes = check(
        'ssd_scan',
        x=(x, 'batch L>0 H>0 P>0'),
        dt=(dt, 'batch L H'),
        A=(A, 'H'),
        B=(B, 'batch L G>0 N>0'),
        C=(C, 'batch L G N'),
        D=(D, 'H | H P'),
        z=(z, 'batch L H P'),
        dt_bias=(dt_bias, 'H'),
        initial_states=(initial_states, 'batch H P N'),
    )
    heads, groups = sizes['H'], sizes['G']
    check_that(heads % groups == 0, 'ssd_scan: groups of B must divide the {} heads, got {}', heads, groups)
    if not isinstance(chunk_size, Integral) or int(chunk_size) < 1:
        raise ValueError(f'ssd_scan: chunk_size must be an integer of at least 1, got {chunk_size!r}')
    check_dt_limit(dt_limit)


def check_dt_limit(dt_limit: Any) -> None:
    """Raises ValueError unless dt_limit is a pair of ascending numbers."""
    pair = isinstance(dt_limit, (tuple, list)) and len(dt_limit) == 2
    numbers = pair and all(isinstance(limit, Real) for limit in dt_limit)
    if not (numbers and dt_limit[0] <= dt_limit[1]):
        raise ValueError(f'dt_limit must be the smallest and the largest step size, got {dt_limit!r}')


def _sequences(x: Tensor, seq_idx: Optional[Tensor], cu_seqlens: Optional[Tensor]) -> Optional[Tensor]:
    """The sequence of each step [batch, L] in int32, in ascending order: 0 is the one that the initial state is of."""
    for name, tensor, shape in (('seq_idx', seq_idx, tuple(x.shape[:2])), ('cu_seqlens', cu_seqlens, None)):
        if tensor is None:
            continue
        fits = isinstance(tensor, Tensor) and tensor.dtype in (torch.int32, torch.int64)
        if fits:
            fits = tensor.ndim == 1 and len(tensor) > 1 if shape is None else tuple(tensor.shape) == shape
        expected = '[sequences + 1]' if shape is None else list(shape)
        found = f'{tuple(tensor.shape)} {tensor.dtype}' if isinstance(tensor, Tensor) else type(tensor).__name__
        check_that(fits, f'ssd_scan: {name} must be integers {expected}, got {found}')
        same = tensor.device == x.device
        check_that(same, f'ssd_scan: {name} must be on {x.device} like x, got {tensor.device}')
    batch, length = x.shape[:2]
    starts = None if seq_idx is None else seq_idx.diff(dim=1, prepend=torch.zeros_like(seq_idx[:, :1])) != 0
    if cu_seqlens is not None:
        check_that(batch == 1, f'ssd_scan: cu_seqlens needs a batch of 1, got {batch}')
        if x.device.type == 'cpu' and not is_watched():
            numbers = cu_seqlens.tolist()
            fits = numbers == sorted(numbers) and (numbers[0], numbers[-1]) == (0, length)
            check_that(fits, f'ssd_scan: cu_seqlens must ascend from 0 to {length}, got {numbers}')
        positions = torch.arange(length, device=x.device, dtype=cu_seqlens.dtype)
        numbers = torch.searchsorted(cu_seqlens[1:], positions, right=True)[None]
        implied = numbers.diff(dim=1, prepend=torch.zeros_like(numbers[:, :1])) != 0
        if starts is not None and not is_watched() and not x.is_meta:
            same = torch.equal(starts[:, 1:], implied[:, 1:])
            check_that(
                same, f'ssd_scan: seq_idx must change where cu_seqlens does, got cu_seqlens {cu_seqlens.tolist()}'
            )
        starts = implied if starts is None else starts
    return None if starts is None else starts.cumsum(dim=1, dtype=torch.int32)


def _forward(
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
    """y, the last state, and the steps and states that the backward pass starts from."""
    y = torch.empty_like(x)
    options = dt_softplus, dt_min, dt_max, reverse
    if triton:
        scan = _scan_of(x, dt, A, B, C, D, z, dt_bias, initial_states, sequence, *options)
        last, *saved = scan_forward(scan, y)
        return y, last, *(saved if save else _empty_saved(x, B, False))
    core = _core_of(x, dt, A, B, C, dt_bias, initial_states, sequence, *options)
    out, last = plain.scan_forward(core)
    y.copy_(_with_skip_and_gate(_to_sequence(out, reverse), x, D, z))
    return y, last.flatten(1, 2).clone(), *_empty_saved(x, B, False)


def _backward(grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Optional[Tensor]]:
    (grad_y, grad_last), (x, dt, A, B, C, D, z, dt_bias, initial_states, sequence, *options, triton) = grads, inputs
    *_, reverse = options
    if triton:
        grad_y = torch.zeros_like(x) if grad_y is None else grad_y
        scan = _scan_of(x, dt, A, B, C, D, z, dt_bias, initial_states, sequence, *options)
        return _triton_backward(scan, grad_y, grad_last, *saved)
    core = _core_of(x, dt, A, B, C, dt_bias, initial_states, sequence, *options)
    wide, groups = core.x.dtype, core.B.shape[2]
    grad_y = torch.zeros_like(core.x).view(x.shape) if grad_y is None else grad_y.to(wide)
    grad_state = torch.zeros_like(core.state) if grad_last is None else grad_last.to(wide).view(core.state.shape)
    grad_D = grad_z = grad_bias = None
    if z is not None:
        y = _with_skip_and_gate(_to_sequence(plain.scan_forward(core)[0], reverse), x, D, None)
        wide_z = z.to(wide)
        gate = torch.sigmoid(wide_z)
        grad_z = grad_y * y * gate * (1 + wide_z * (1 - gate))
        grad_y = grad_y * wide_z * gate
    core_grads = plain.scan_backward(_to_groups(grad_y, groups, reverse), grad_state, core)
    grad_x, grad_step = (_to_sequence(grad, reverse) for grad in (core_grads.x, core_grads.dt))
    if D is not None:
        grad_x = grad_x + grad_y * _per_channel(D, wide)
        grad_D = (grad_y * x.to(wide)).sum(dim=(0, 1) if D.ndim == 2 else (0, 1, 3))
    grad_dt = grad_step * _step_slope(_raw_step(dt, dt_bias, wide), *options[:-1])
    if dt_bias is not None:
        grad_bias = grad_dt.sum(dim=(0, 1))
    grad_B, grad_C = (grad.flip(1) if reverse else grad for grad in (core_grads.B, core_grads.C))
    grad_initial = None if initial_states is None else core_grads.state.flatten(1, 2)
    grad_A = core_grads.A.flatten()
    return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial, None


def _like(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others: Any) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, triton, save = others
    batch, _, heads, dim = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    last = x.new_empty((batch, heads, dim, B.shape[-1]), dtype=wide)
    return torch.empty_like(x), last, *_empty_saved(x, B, save and triton)


def _empty_saved(x: Tensor, B: Tensor, save: bool) -> Tuple[Tensor, Tensor]:
    steps = x.new_empty(steps_shape(x, B) if save else (0,), dtype=torch.float32)
    return steps, x.new_empty(states_shape(x, B) if save else (0,), dtype=states_dtype(x))


def _macs(x: Sequence[int], dt: Any, A: Any, B: Sequence[int], C: Any, D: Any, z: Any, *others: Any) -> int:
    """3 * L * H * P * N of the recurrence (decay, input and output), the skip and the gate L * H * P each."""
    return prod(x) * (3 * B[-1] + (D is not None) + (z is not None))


_scan = Operator('ssd_scan', _forward, _backward, _like, results=2, macs=_macs)


def _scan_of(*arguments: Any) -> Scan:
    """The scan as its kernels take it."""
    scan = Scan(*arguments)
    A, D, dt_bias, initial = (
        None if tensor is None else tensor.contiguous()
        for tensor in (scan.A, scan.D, scan.dt_bias, scan.initial_states)
    )
    return scan._replace(A=A, D=D, dt_bias=dt_bias, initial_states=initial)


def _triton_backward(
    scan: Scan, grad_y: Tensor, grad_last: Optional[Tensor], steps: Tensor, states: Tensor
) -> Sequence[Optional[Tensor]]:
    grads = scan_backward(scan, grad_y, None if grad_last is None else grad_last.contiguous(), steps, states)
    grad_B, grad_C = (grad.squeeze(0) if len(grad) == 1 else grad.sum(dim=0) for grad in (grads.B, grads.C))
    parameters = grads.parts.sum(dim=0)  # [H, 2 + numbers of D]
    grad_A, grad_bias = parameters[:, 0], None if scan.dt_bias is None else parameters[:, 1]
    grad_D = None if scan.D is None else parameters[:, 2:].reshape(scan.D.shape)
    grad_initial = None if scan.initial_states is None else grads.initial_states
    return grads.x, grads.dt, grad_A, grad_B, grad_C, grad_D, grads.z, grad_bias, grad_initial, None


def _core_of(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Optional[Tensor],
    initial_states: Optional[Tensor],
    sequence: Optional[Tensor],
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    reverse: bool,
) -> plain.Core:
    wide, groups = torch.promote_types(x.dtype, torch.float32), B.shape[2]
    step = _raw_step(dt, dt_bias, wide)
    step = (F.softplus(step) if dt_softplus else step).clamp(dt_min, dt_max)
    batch, _, heads, dim = x.shape
    shape = batch, groups, heads // groups, dim, B.shape[-1]
    state = x.new_zeros(shape, dtype=wide) if initial_states is None else initial_states.to(wide).reshape(shape)
    x, step = (_to_groups(tensor.to(wide), groups, reverse) for tensor in (x, step))
    B, C = (tensor.to(wide).flip(1) if reverse else tensor.to(wide) for tensor in (B, C))
    return plain.Core(x, step, A.to(wide).unflatten(0, (groups, -1)), B, C, state, sequence)


def _raw_step(dt: Tensor, dt_bias: Optional[Tensor], wide: torch.dtype) -> Tensor:
    return dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)


def _step_slope(raw: Tensor, dt_softplus: bool, dt_min: float, dt_max: float) -> Tensor:
    """The derivative of the step size, zero beyond its limits."""
    step = F.softplus(raw) if dt_softplus else raw
    slope = torch.sigmoid(raw) if dt_softplus else torch.ones_like(raw)
    return torch.where((step >= dt_min) & (step <= dt_max), slope, 0)


def _with_skip_and_gate(y: Tensor, x: Tensor, D: Optional[Tensor], z: Optional[Tensor]) -> Tensor:
    if D is not None:
        y = y + x.to(y.dtype) * _per_channel(D, y.dtype)
    return y if z is None else y * F.silu(z.to(y.dtype))


def _per_channel(D: Tensor, dtype: torch.dtype) -> Tensor:
    """D as [H, P] or [H, 1]."""
    return (D if D.ndim == 2 else D.unsqueeze(-1)).to(dtype)


def _to_groups(sequence: Tensor, groups: int, reverse: bool) -> Tensor:
    """[batch, L, H, ...] -> [batch, L, G, H / G, ...], in walking order."""
    grouped = sequence.unflatten(2, (groups, -1))
    return grouped.flip(1) if reverse else grouped


def _to_sequence(grouped: Tensor, reverse: bool) -> Tensor:
    """[batch, L, G, H / G, ...] in walking order -> [batch, L, H, ...]"""
    return (grouped.flip(1) if reverse else grouped).flatten(2, 3)
