"""Feed-forward networks ("experts") of which each token passes one: Switch Transformers.

https://arxiv.org/abs/2101.03961

Tokens are sorted by expert, so that each product is a grouped one: consecutive rows times the matrix of their group.
"""

from typing import NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check, check_that
from ._operator import Operator


class Assignment(NamedTuple):
    """The expert of each of T tokens; see `assign`.

    Attributes:
        order: Tokens sorted by expert, those of an expert in their own order, int64 [T].
        inverse: Place of each token in that order, int64 [T].
        ends: Where each expert's tokens end in that order, int32 [E].
    """

    order: Tensor
    inverse: Tensor
    ends: Tensor


def assign(expert: Tensor, num_experts: int) -> Assignment:
    """Sorts tokens by their expert, without waiting for a GPU.

    Args:
        expert: Index of each token's expert, integers [T].
        num_experts: Number E of experts.
    """
    # A radix sort takes a pass for every byte.
    key = expert.to(torch.uint8 if num_experts < 256 else torch.int32)
    ascending, order = torch.sort(key, stable=True)
    place = torch.arange(expert.shape[0], device=expert.device)
    inverse = torch.empty_like(order).scatter_(0, order, place)
    following = torch.arange(1, num_experts + 1, device=expert.device, dtype=key.dtype)
    return Assignment(order, inverse, torch.searchsorted(ascending, following, out_int32=True))


def expert_mlp(x: Tensor, gate: Tensor, fc1: Tensor, fc2: Tensor, assignment: Assignment) -> Tensor:
    """Each token through the network of its expert e.

        out_t = gate_t * relu(x_t fc1[e]) fc2[e]

    Products are of x's dtype. They are grouped ones of PyTorch from torch 2.10 on, in bf16, if d and h are multiples of
    8; otherwise they run expert by expert, after waiting for a GPU. Differentiable in reverse mode in every tensor.

    Args:
        x: Tokens [T, d], in any floating dtype.
        gate: [T].
        fc1: [E, d, h].
        fc2: [E, h, d].
        assignment: Of the tokens to the experts, by `assign`.

    Returns:
        [T, d] in x's dtype.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    sizes = check('expert_mlp', x=(x, 'T d'), gate=(gate, 'T'), fc1=(fc1, 'E d h'), fc2=(fc2, 'E h d'))
    found = tuple(map(tuple, (tensor.shape for tensor in assignment)))
    fits = found == ((sizes['T'],), (sizes['T'],), (sizes['E'],))
    check_that(fits, f'expert_mlp: assignment must be of {sizes["T"]} tokens to {sizes["E"]} experts, got {found}')
    aligned = sizes['d'] % 8 == sizes['h'] % 8 == 0
    grouped = hasattr(F, 'grouped_mm') and x.dtype == torch.bfloat16 and aligned
    return _operator(x.contiguous(), gate, fc1.to(x.dtype), fc2.to(x.dtype), *assignment, grouped)


def _forward(
    x: Tensor,
    gate: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    order: Tensor,
    inverse: Tensor,
    ends: Tensor,
    grouped: bool,
    save: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    product = _Products(ends, grouped)
    hidden = product.rows(x.index_select(0, order), fc1).relu_()
    y = product.rows(hidden, fc2).index_select(0, inverse)
    out = y * gate.to(y.dtype).unsqueeze(-1)
    return (out, hidden, y) if save else (out, *_nothing(x))


def _backward(grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Optional[Tensor]]:
    (grad,), (x, gate, fc1, fc2, order, inverse, ends, grouped), (hidden, y) = grads, inputs, saved
    product = _Products(ends, grouped)
    grad_gate = (grad * y).sum(dim=-1, dtype=gate.dtype)
    grad = (grad * gate.to(grad.dtype).unsqueeze(-1)).index_select(0, order)
    grad_fc2 = product.weights(hidden, grad)
    grad_hidden = product.rows(grad, fc2.mT)
    grad_hidden = torch.ops.aten.threshold_backward(grad_hidden, hidden, 0)
    grad_fc1 = product.weights(x.index_select(0, order), grad_hidden)
    grad_x = product.rows(grad_hidden, fc1.mT).index_select(0, inverse)
    return grad_x, grad_gate, grad_fc1, grad_fc2, None, None, None


def _like(
    x: Tensor,
    gate: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    order: Tensor,
    inverse: Tensor,
    ends: Tensor,
    grouped: bool,
    save: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(x)
    return (out, x.new_empty(x.shape[0], fc1.shape[2]), torch.empty_like(x)) if save else (out, *_nothing(x))


def _nothing(x: Tensor) -> Tuple[Tensor, Tensor]:
    return x.new_empty(0), x.new_empty(0)


_operator = Operator('expert_mlp', _forward, _backward, _like, macs=lambda x, gate, fc1, *_: 2 * x[0] * fc1[1] * fc1[2])


class _Products:
    """Matrix products of groups of consecutive rows, which end at `ends`."""

    def __init__(self, ends: Tensor, grouped: bool) -> None:
        self.ends = ends if grouped else None
        self.sizes = [] if grouped else torch.diff(ends, prepend=ends.new_zeros(1)).tolist()

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
