"""The selective scan in plain PyTorch, a chunk of the sequence at a time: fast on a CPU, correct on any device.

Works on channels-last tensors whose channels are split into groups that share B and C: u, delta [batch, L, G, D/G],
B, C [batch, L, G, N], A [G, N, D/G], states [batch, G, N, D/G], all in one dtype. Memory is linear in L and independent
of N: states exist for one bounded chunk of L at a time, and the backward pass recomputes them from the state at the
start of each chunk.
"""

import math
import threading
from functools import cached_property
from typing import List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

_LOG2_E = math.log2(math.e)  # torch's vectorised exp2 is three times as fast as its exp
# A step of at least this many elements keeps the processor busy by itself, so that steps are walked one by one; so are
# the last few steps that an odd-even reduction leaves.
_WIDE_STEP = 2**12
_FEW_STEPS = 8
# Elements of a step, and of all steps of a chunk, that are held at a time: small enough for the caches.
_CHUNK_WIDTH = 2**16
_CHUNK_ELEMENTS = 2**19
_SCRATCH_BYTES = 2**25

Block = Tuple[slice, slice]  # entries of the batch, and steps

_scratch = threading.local()


class GivenSteps:
    """Step sizes [batch, L, G, D/G], before their softplus, and their gradient."""

    def __init__(self, delta: Tensor) -> None:
        self.delta = delta

    def of(self, block: Block) -> Tensor:
        """The steps of a block, valid until the next call."""
        return self.delta[block]

    def add_gradient(self, block: Block, grad: Tensor) -> None:
        """Takes the gradient of a block, once for each."""
        self.grad[block] = grad

    @cached_property
    def grad(self) -> Tensor:
        return torch.empty_like(self.delta, memory_format=torch.contiguous_format)


class ProjectedSteps:
    """Step sizes dt_weight @ dt + dt_bias, computed block by block, and gradients of their parameters.

    Args:
        dt: [batch, L, K, R].
        weight: [K, D, R].
        bias: [K, D].
    """

    def __init__(self, dt: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.dt, self.weight, self.bias = dt, weight.to(dt.dtype), bias.to(dt.dtype)

    def of(self, block: Block) -> Tensor:
        """As of `GivenSteps`."""
        dt = self.dt[block]
        delta = scratch('delta', dt, (*dt.shape[:-1], self.weight.shape[1]))
        torch.baddbmm(
            self.bias.unsqueeze(1),  # [K, 1, D]
            _routes_first(dt),
            self.weight.transpose(1, 2),  # [K, R, D]
            out=_routes_first(delta),
        )
        return delta

    def add_gradient(self, block: Block, grad: Tensor) -> None:
        """As of `GivenSteps`."""
        grad_dt, grad_weight, grad_bias = self.grads
        grad = _routes_first(grad)
        grad_dt[block] = (grad @ self.weight).transpose(0, 1).unflatten(0, grad_dt[block].shape[:2])
        grad_weight.baddbmm_(grad.transpose(1, 2), _routes_first(self.dt[block]))
        grad_bias.add_(grad.sum(dim=1))

    @cached_property
    def grads(self) -> Tuple[Tensor, Tensor, Tensor]:
        """Gradients of dt, weight and bias."""
        grad_dt = torch.empty_like(self.dt, memory_format=torch.contiguous_format)
        return grad_dt, torch.zeros_like(self.weight), torch.zeros_like(self.bias)


Steps = Union[GivenSteps, ProjectedSteps]


class ScanGradients(NamedTuple):
    A: Tensor
    B: Tensor
    C: Tensor
    initial_state: Tensor


def scan_forward(
    u: Tensor,
    steps: Steps,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    delta_softplus: bool,
    y: Tensor,
    reverse: bool = False,
    add: bool = False,
) -> Tensor:
    """Computes h_l = exp(delta_l * A) * h_{l-1} + delta_l * B_l * u_l and y_l = <C_l, h_l>.

    Args:
        u, A, B, C: See the module.
        steps: Of delta.
        state: State before the first step.
        delta_softplus: Apply softplus to delta first.
        y: Where to write [batch, L, G, D/G], with any strides.
        reverse: Walk from the last step to the first.
        add: Add to y instead.

    Returns:
        The state after the last step.
    """
    last_state = torch.empty_like(state)
    A_log2 = A * _LOG2_E
    grows = _grows(A, steps, delta_softplus)
    batches, chunks = _cut(u.shape[0], u.shape[1], A.numel(), reverse)
    for rows in batches:
        carried = state[rows]
        for chunk in chunks:
            states = _states_of(u, steps, A_log2, B, (rows, chunk), carried, delta_softplus, grows, reverse)
            _contract_states(C[rows, chunk], states, y[rows, chunk], add)
            carried = states[:, 0 if reverse else -1].clone()
        last_state[rows] = carried
    return last_state


def scan_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    u: Tensor,
    steps: Steps,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    delta_softplus: bool,
    grad_u: Tensor,
    reverse: bool = False,
    add: bool = False,
) -> ScanGradients:
    """Gradients of `scan_forward` by the adjoint recurrence g_l = C_l * grad_y_l + exp(delta_{l+1} * A) * g_{l+1}.

    `steps` gets the gradient of delta.

    Args:
        grad_y: Gradient of y.
        grad_state: Gradient of the state after the last step.
        u, steps, A, B, C, state, delta_softplus, reverse: The arguments of `scan_forward`.
        grad_u: Where to write the gradient of u, with any strides.
        add: Add to grad_u instead.
    """
    grad_B, grad_C = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (B, C))
    grad_A = torch.zeros_like(A, memory_format=torch.contiguous_format)
    grad_initial = torch.empty_like(state)
    A_log2 = A * _LOG2_E
    grows = _grows(A, steps, delta_softplus)
    batches, chunks = _cut(u.shape[0], u.shape[1], A.numel(), reverse)
    # Buffers have one step more than a chunk: for the state before it, and a decay of one into the step after it.
    own, other, last = (slice(1, None), slice(-1), 0) if reverse else (slice(-1), slice(1, None), -1)
    for rows in batches:
        starts = [state[rows]]
        for chunk in chunks[:-1]:
            states = _states_of(u, steps, A_log2, B, (rows, chunk), starts[-1], delta_softplus, grows, reverse)
            starts.append(states[:, last].clone())
        grad_carried = grad_state[rows]
        for chunk, start in zip(reversed(chunks), reversed(starts)):
            block = rows, chunk
            u_chunk, B_chunk, grad_y_chunk = u[block], B[block], grad_y[block]
            delta = steps.of(block)
            dt = _step_sizes(delta, delta_softplus)
            decay, states, products, adjoint = _buffers(4, dt.shape[1] + 1, start)
            states[:, -1 - last] = start
            decay[:, last] = 1
            entries = start, decay[:, own], states[:, other], products[:, own], grows, reverse
            _compute_states(u_chunk, dt, A_log2, B_chunk, *entries)
            _contract_channels(states[:, other], grad_y_chunk, out=grad_C[block])

            adjoint = adjoint[:, 1:]
            torch.mul(C[block].unsqueeze(-1), grad_y_chunk.unsqueeze(-2), out=adjoint)
            linear_recurrence_(decay[:, other], adjoint, grad_carried, products[:, 1:], grows, not reverse)
            grad_carried = decay[:, -1 - last] * adjoint[:, -1 - last]

            _contract_channels(adjoint, dt * u_chunk, out=grad_B[block])
            grad_input = torch.empty_like(dt, memory_format=torch.contiguous_format)
            _contract_states(B_chunk, adjoint, grad_input)
            if add:
                grad_u[block].addcmul_(grad_input, dt)
            else:
                torch.mul(grad_input, dt, out=grad_u[block])

            grad_exponent = adjoint.mul_(states[:, own]).mul_(decay[:, own])
            grad_dt = torch.mul(grad_exponent, A, out=products[:, 1:]).sum(dim=-2).addcmul_(grad_input, u_chunk)
            if delta_softplus:
                grad_dt.mul_(torch.sigmoid(delta))
            steps.add_gradient(block, grad_dt)
            grad_A += grad_exponent.mul_(dt.unsqueeze(-2)).sum(dim=(0, 1))
        grad_initial[rows] = grad_carried
    return ScanGradients(grad_A, grad_B, grad_C, grad_initial)


def routed_scan(
    u: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    y: Tensor,
    reverse: bool = False,
    add: bool = False,
) -> None:
    """Selective scans along K routes at once, each with its own parameters.

    On route k, with dt, B, C = split(x_dbl, [R, N, N]) and delta = softplus(dt_weight @ dt + dt_bias):

        h_l = exp(delta_l * A) * h_{l-1} + delta_l * B_l * u_l,    y_l = <C_l, h_l>

    Args:
        u: [B, L, K, D], in the order of each route, in the computing dtype.
        x_dbl: [B, L, K, R + 2N], likewise.
        dt_weight: [K, D, R].
        dt_bias: [K, D].
        A: [K, D, N].
        y: Where to write [B, L, K, D], with any strides.
        reverse: Walk from the last step to the first.
        add: Add to y instead.
    """
    scan_forward(u, *_core_arguments(x_dbl, dt_weight, dt_bias, A), True, y, reverse, add)


def routed_scan_backward(
    grad_y: Tensor,
    u: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    grad_u: Tensor,
    reverse: bool = False,
    add: bool = False,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x_dbl, dt_weight, dt_bias and A of `routed_scan`, in the computing dtype.

    Args:
        grad_y: Gradient of y.
        u, x_dbl, dt_weight, dt_bias, A, reverse: The arguments of `routed_scan`.
        grad_u: Where to write the gradient of u, with any strides.
        add: Add to grad_u instead.
    """
    steps, A, B, C, state = _core_arguments(x_dbl, dt_weight, dt_bias, A)
    grads = scan_backward(grad_y, torch.zeros_like(state), u, steps, A, B, C, state, True, grad_u, reverse, add)
    grad_dt, grad_weight, grad_bias = steps.grads
    return torch.cat([grad_dt, grads.B, grads.C], dim=-1), grad_weight, grad_bias, grads.A.transpose(-2, -1)


def linear_recurrence_(
    decay: Tensor,
    value: Tensor,
    initial: Tensor,
    products: Tensor,
    grows: Optional[bool] = False,
    reverse: bool = False,
) -> None:
    """Computes h_t = decay_t * h_{t-1} + value_t in place of `value` (h_t = decay_t * h_{t+1} + value_t in reverse).

    Narrow steps are solved by odd-even reduction: every second step absorbs the one before it, which leaves a
    recurrence of half as many steps, whose solution gives the steps between. T steps become 2 log2(T) operations on
    many steps at once, for three times the arithmetic of a walk.

    Args:
        decay: [batch, T, ...].
        value: [batch, T, ...], overwritten by the states.
        initial: [batch, ...], the state before the first step.
        products: Scratch memory of decay's shape for products of decays; decay itself if it is not needed again.
        grows: A decay may be above 1. Then products of decays could overflow, so that steps are walked one by one. None
            if it is not known; then products stop at the largest number, as an infinite one would make a NaN of a zero.
        reverse: Walk from the last step to the first.
    """
    first = -1 if reverse else 0
    value[:, first].addcmul_(decay[:, first], initial)
    if grows or initial.numel() >= _WIDE_STEP:
        _walk_(decay, value, reverse)
        return
    if products is not decay:
        products.copy_(decay)
    _reduce_(products, value, reverse, grows is None)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) in scratch memory."""
    if x.device.type == 'cpu':
        # In PyTorch's log1p for AVX-512 a masked load reads the result for -0. While that constant's page is not
        # mapped, the processor stops at each such load, although the mask is empty: the function takes ten times as
        # long. So -0 is computed first, by enough numbers for vector instructions.
        torch.log1p(x.new_full((64,), -0.0))
    return torch.logaddexp(x, x.new_zeros(()), out=scratch('dt', x, x.shape))


def scratch(slot: str, like: Tensor, shape: Tuple[int, ...]) -> Tensor:
    """Uninitialised memory of `like`'s dtype and device, valid until the thread's next call for the same slot.

    On a CPU up to 32 MiB per slot and dtype are kept: pages fresh from the operating system cost more than the
    arithmetic of a small scan. More than that, and memory of other devices, is allocated as usual.
    """
    size = math.prod(shape)
    if like.device.type != 'cpu' or size * like.element_size() > _SCRATCH_BYTES:
        return like.new_empty(shape)
    key = f'{slot} {like.dtype}'
    buffer = _scratch.__dict__.get(key)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # memory made in inference mode could not be written outside of it
            buffer = _scratch.__dict__[key] = torch.empty(size, dtype=like.dtype)
    return buffer[:size].view(shape)


def _grows(A: Tensor, steps: Steps, delta_softplus: bool) -> Optional[bool]:
    """Whether a decay exp(delta * A) may be above 1; None on other devices than a CPU, which would have to wait."""
    if A.device.type != 'cpu':
        return None
    positive = delta_softplus or isinstance(steps, GivenSteps) and bool((steps.delta >= 0).all())
    return not positive or bool((A > 0).any())


def _step_sizes(delta: Tensor, delta_softplus: bool) -> Tensor:
    return softplus(delta) if delta_softplus else delta


def _cut(batch: int, steps: int, width: int, reverse: bool = False) -> Tuple[List[slice], List[slice]]:
    """Cuts a scan into pieces of bounded memory: entries of the batch, and chunks of steps, in walking order.

    Args:
        batch: Entries of the batch.
        steps: Number of steps.
        width: Elements of one step of one entry.
        reverse: Walk from the last step to the first.
    """
    rows = max(_CHUNK_WIDTH // max(width, 1), 1)
    length = max(_CHUNK_ELEMENTS // (min(rows, max(batch, 1)) * max(width, 1)), 8)
    chunks = _slices(steps, length)
    return _slices(batch, rows), chunks[::-1] if reverse else chunks


def _slices(total: int, length: int) -> List[slice]:
    return [slice(start, min(start + length, total)) for start in range(0, total, length)]


def _buffers(count: int, steps: int, state: Tensor) -> Tensor:
    """`count` buffers [batch, steps, G, N, D/G] in one piece of scratch memory."""
    batch, *sizes = state.shape
    return scratch('states', state, (count, batch, steps, *sizes))


def _states_of(
    u: Tensor,
    steps: Steps,
    A_log2: Tensor,
    B: Tensor,
    block: Block,
    carried: Tensor,
    delta_softplus: bool,
    grows: Optional[bool],
    reverse: bool,
) -> Tensor:
    """States [batch, S, G, N, D/G] of a block after the carried one, in scratch memory."""
    dt = _step_sizes(steps.of(block), delta_softplus)
    decay, states = _buffers(2, dt.shape[1], carried)
    _compute_states(u[block], dt, A_log2, B[block], carried, decay, states, decay, grows, reverse)
    return states


def _compute_states(
    u: Tensor,
    dt: Tensor,
    A_log2: Tensor,
    B: Tensor,
    state: Tensor,
    decay: Tensor,
    states: Tensor,
    products: Tensor,
    grows: Optional[bool],
    reverse: bool,
) -> None:
    """Fills decay and states [batch, S, G, N, D/G] of one chunk; its decays are lost if `products` is decay."""
    torch.mul(dt.unsqueeze(-2), A_log2, out=decay).exp2_()
    dt_u = torch.mul(dt, u, out=scratch('dt_u', u, u.shape))
    torch.mul(B.unsqueeze(-1), dt_u.unsqueeze(-2), out=states)
    linear_recurrence_(decay, states, state, products, grows, reverse)


def _contract_states(weight: Tensor, states: Tensor, out: Tensor, add: bool = False) -> None:
    """out[..., d] = sum_n weight[..., n] * states[..., n, d], or added to it"""
    if weight.shape[-1] == 1 and add:
        out.addcmul_(weight, states.squeeze(-2))
    elif weight.shape[-1] == 1:
        torch.mul(weight, states.squeeze(-2), out=out)
    else:
        if _is_small(states):
            total = torch.sum(weight.unsqueeze(-1) * states, dim=-2)
        else:
            total = torch.matmul(weight.unsqueeze(-2), states).squeeze(-2)
        torch.add(out, total, out=out) if add else out.copy_(total)


def _contract_channels(states: Tensor, channels: Tensor, out: Tensor) -> None:
    """out[..., n] = sum_d states[..., n, d] * channels[..., d]"""
    if _is_small(states):
        torch.sum(states * channels.unsqueeze(-2), dim=-1, out=out)
    else:
        out.copy_(torch.matmul(states, channels.unsqueeze(-1)).squeeze(-1))


def _is_small(states: Tensor) -> bool:
    """Whether starting a product with each [N, D/G] matrix takes longer than the arithmetic."""
    return states.shape[-2] * states.shape[-1] < 2**11


def _walk_(decay: Tensor, value: Tensor, reverse: bool) -> None:
    decays, states = decay.unbind(1), value.unbind(1)
    if reverse:
        decays, states = decays[::-1], states[::-1]
    for step in range(1, len(states)):
        states[step].addcmul_(decays[step], states[step - 1])


def _reduce_(decay: Tensor, value: Tensor, reverse: bool, bounded: bool) -> None:
    """Odd-even reduction; turns every second decay into a product of decays, where `bounded` of the largest number."""
    steps = value.shape[1]
    if steps <= _FEW_STEPS:
        _walk_(decay, value, reverse)
        return
    odd = steps % 2
    if reverse:
        absorbed, absorbing = slice(odd + 1, steps, 2), slice(odd, steps - 1, 2)
        solved, between = slice(2 - odd, steps - 1, 2), slice(1 - odd, steps - 2, 2)
    else:
        absorbed, absorbing = slice(0, steps - 1, 2), slice(1, steps, 2)
        solved, between = slice(1, steps - 1, 2), slice(2, steps, 2)
    half_decay, half_value = decay[:, absorbing], value[:, absorbing]
    half_value.addcmul_(half_decay, value[:, absorbed])
    half_decay.mul_(decay[:, absorbed])
    if bounded:
        half_decay.clamp_(max=torch.finfo(decay.dtype).max)
    _reduce_(half_decay, half_value, reverse, bounded)
    value[:, between].addcmul_(decay[:, between], value[:, solved])


def _routes_first(x: Tensor) -> Tensor:
    """[batch, L, K, E] -> [K, batch * L, E]"""
    return x.flatten(0, 1).transpose(0, 1)


def _core_arguments(
    x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor
) -> Tuple[ProjectedSteps, Tensor, Tensor, Tensor, Tensor]:
    """The steps, A, B, C and a zero initial state as `scan_forward` takes them."""
    dstate = A.shape[-1]
    dt, B, C = x_dbl.split([dt_weight.shape[-1], dstate, dstate], dim=-1)
    A = A.to(B.dtype).transpose(-2, -1).contiguous()  # [K, D, N] -> [K, N, D]
    return ProjectedSteps(dt, dt_weight, dt_bias), A, B.contiguous(), C.contiguous(), A.new_zeros(len(B), *A.shape)
