"""The scan in plain PyTorch: chunks walked one after another, each by matrix products, with a backward pass by hand.

In here sequences are in walking order and heads are [G, R], R heads to each of G groups. With a the running sum of
dt * A over the steps of a chunk and S the state before it:

    y_i = sum_{j <= i} <C_i, B_j> exp(a_i - a_j) dt_j x_j + exp(a_i) S C_i
    S <- exp(a_last) S + sum_j exp(a_last - a_j) dt_j x_j B_j^T
"""

from math import log
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

CHUNK = 64


class Core(NamedTuple):
    """What a scan walks, in fp32 or fp64: x [batch, L, G, R, P], dt [batch, L, G, R], A [G, R], B and C
    [batch, L, G, N], the state before the first step [batch, G, R, P, N], and the sequence of each step [batch, L], of
    which the state belongs to 0, or None."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    state: Tensor
    sequence: Optional[Tensor]

    @property
    def chunks(self) -> List[slice]:
        length = self.x.shape[1]
        return [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]


class CoreGradients(NamedTuple):
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    state: Tensor


class _Chunk(NamedTuple):
    """A chunk of Q steps, with decays between its steps, its begin and its end: zero between sequences."""

    x: Tensor  # [batch, Q, G, R, P]
    dt: Tensor  # [batch, Q, G, R]
    B: Tensor  # [batch, Q, G, N]
    C: Tensor  # [batch, Q, G, N]
    decay: Tensor  # [batch, G, R, Q, Q], from step j to step i <= j, else 0
    from_begin: Tensor  # [batch, Q, G, R]
    to_end: Tensor  # [batch, Q, G, R]
    across: Tensor  # [batch, G, R]

    def weights(self) -> Tensor:
        """<C_i, B_j> exp(a_i - a_j), [batch, G, R, Q, Q]."""
        return torch.einsum('bign,bjgn->bgij', self.C, self.B).unsqueeze(2) * self.decay

    def state_after(self, state: Tensor) -> Tensor:
        added = torch.einsum('bjgrp,bjgn->bgrpn', self.x * (self.dt * self.to_end).unsqueeze(-1), self.B)
        return self.across[..., None, None] * state + added


def scan_forward(core: Core) -> Tuple[Tensor, Tensor]:
    """y [batch, L, G, R, P] and the state after the last step."""
    y, state = torch.empty_like(core.x), core.state
    for steps in core.chunks:
        chunk = _chunk(core, steps)
        inside = torch.einsum('bgrij,bjgrp->bigrp', chunk.weights(), chunk.x * chunk.dt.unsqueeze(-1))
        before = torch.einsum('bign,bgrpn->bigrp', chunk.C, state)
        y[:, steps] = inside + chunk.from_begin.unsqueeze(-1) * before
        state = chunk.state_after(state)
    return y, state


def scan_backward(grad_y: Tensor, grad_state: Tensor, core: Core) -> CoreGradients:
    """Gradients of `scan_forward` from those of y and of the last state.

    A step's decay is part of the decay between every two steps around it: the gradient of its exponent is a sum over
    these pairs, among which are the state before the chunk and the gradient of the state after it.
    """
    grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (core.x, core.dt, core.B, core.C))
    grad_A = torch.zeros_like(core.A)
    states = [core.state]
    for steps in core.chunks[:-1]:
        states.append(_chunk(core, steps).state_after(states[-1]))
    for steps, state in zip(reversed(core.chunks), reversed(states)):
        x, dt, B, C, decay, from_begin, to_end, across = chunk = _chunk(core, steps)
        grad = grad_y[:, steps]
        weights = chunk.weights()
        from_state = to_end.unsqueeze(-1) * torch.einsum('bjgn,bgrpn->bjgrp', B, grad_state)
        grad_input = torch.einsum('bgrij,bigrp->bjgrp', weights, grad) + from_state  # of dt * x
        grad_x[:, steps] = dt.unsqueeze(-1) * grad_input

        x_dt = x * dt.unsqueeze(-1)
        products = torch.einsum('bigrp,bjgrp->bgrij', grad, x_dt)
        grad_scores = (products * decay).sum(dim=2)
        grad_before = from_begin.unsqueeze(-1) * torch.einsum('bigrp,bgrpn->bigrn', grad, state)
        grad_C[:, steps] = torch.einsum('bgij,bjgn->bign', grad_scores, B) + grad_before.sum(dim=3)
        grad_after = torch.einsum('bjgrp,bgrpn->bjgn', x_dt * to_end.unsqueeze(-1), grad_state)
        grad_B[:, steps] = torch.einsum('bgij,bign->bjgn', grad_scores, C) + grad_after

        pairs = (weights * products).tril(-1)
        begins = (grad_before * C.unsqueeze(3)).sum(dim=-1) + (pairs.sum(dim=-1) - pairs.sum(dim=-2)).movedim(-1, 1)
        ends = (from_state * x_dt).sum(dim=-1)
        grad_exponent = begins.flip(1).cumsum(1).flip(1) + ends.cumsum(1) - ends
        grad_exponent += (across * (grad_state * state).sum(dim=(-2, -1))).unsqueeze(1)
        grad_dt[:, steps] = core.A * grad_exponent + (grad_input * x).sum(dim=-1)
        grad_A += (grad_exponent * dt).sum(dim=(0, 1))

        added = torch.einsum('bigrp,bign->bgrpn', grad * from_begin.unsqueeze(-1), C)
        grad_state = across[..., None, None] * grad_state + added
    return CoreGradients(grad_x, grad_dt, grad_A, grad_B, grad_C, grad_state)


def _chunk(core: Core, steps: slice) -> _Chunk:
    dt = core.dt[:, steps]
    sums = (dt * core.A).cumsum(dim=1)  # [batch, Q, G, R]
    last = sums[:, -1:]
    rows = sums.movedim(1, -1)  # [batch, G, R, Q]
    exponent = rows.unsqueeze(-1) - rows.unsqueeze(-2)
    causal = torch.ones(exponent.shape[-2:], dtype=torch.bool, device=dt.device).tril()
    from_begin, to_end, across = _exp_(sums.clone()), _exp_(last - sums), _exp_(last[:, 0].clone())
    if core.sequence is not None:
        here = core.sequence[:, steps]
        start = core.sequence[:, steps.start - 1, None] if steps.start else torch.zeros_like(here[:, :1])
        end = here[:, -1:]
        causal = causal & (here.unsqueeze(-1) == here.unsqueeze(-2))[:, None, None]
        from_begin = torch.where((here == start)[..., None, None], from_begin, 0)
        to_end = torch.where((here == end)[..., None, None], to_end, 0)
        across = torch.where((start == end).unsqueeze(-1), across, 0)
    decay = _exp_(exponent.masked_fill_(~causal, -torch.inf))
    return _Chunk(core.x[:, steps], dt, core.B[:, steps], core.C[:, steps], decay, from_begin, to_end, across)


def _exp_(exponent: Tensor) -> Tensor:
    """exp in place. With A > 0 it stops short of overflow: infinity times a zero would be NaN."""
    return exponent.clamp_(max=0.9 * log(torch.finfo(exponent.dtype).max)).exp_()
