"""Residual branches in a row, each x + scale * f(norm(x)), as one function of their tensors."""

from itertools import islice
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Protocol, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._launch import on_device
from .parameters import Parts, Weight, lay_out_weights, sum_parts
from .stream import Stream, StreamGradient


class Link(NamedTuple):
    """A branch of a chain.

    Args:
        branch: f and its norm.
        parameters: `branch.Parameters`, contiguous.
        scale: Factor of each sample, [B] in fp32, as stochastic depth draws it; None for 1.
    """

    branch: 'Branch'
    parameters: Any
    scale: Optional[Tensor] = None


class ParameterGradients(NamedTuple):
    """Gradients of some parameters by name, and partial sums of the others'."""

    complete: Dict[str, Tensor]
    parts: Sequence[Parts]


class Branch(Protocol):
    """f and its norm: a named tuple of its constants."""

    Parameters: Any  # named tuple of its parameters
    Saved: Any  # named tuple of what the forward pass leaves for the backward pass

    def weights(self, parameters: Any) -> List[Weight]:
        """What is to be laid out before the passes, which get it in this order."""

    def forward(self, stream: Stream, link: Link, weights: Sequence[Tensor], save: bool) -> Tuple[Stream, Any]:
        """The stream after the branch, and with `save` what it saves, else None."""

    def backward(
        self, grad: StreamGradient, link: Link, weights: Sequence[Tensor], saved: Any, before: Optional[Link]
    ) -> Tuple[StreamGradient, ParameterGradients]:
        """From the gradient of the stream after the branch, that before it; with its y if there is a link before."""


def run_chain(x: Tensor, links: Sequence[Link], dtype: torch.dtype) -> Tensor:
    """x = x + scale * f(norm(x)) for each link in turn, on Triton. Differentiable once, in reverse mode, in every
    tensor but the scales.

    Args:
        x: [B, ..., d] in at most fp32.
        links: One or more.
        dtype: That of the products, and of the maps between them.

    Returns:
        [B, ..., d] in x's dtype, that of the stream between branches.
    """
    with on_device(x):
        if torch.is_grad_enabled():
            tensors = [tensor for _, parameters, scale in links for tensor in (*parameters, scale)]
            if x.requires_grad or any([tensor is not None and tensor.requires_grad for tensor in tensors]):
                return _Chain.apply(x, dtype, [link.branch for link in links], *tensors)
        return _forward(x, links, dtype, save=False)[0]


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, branches: List[Branch], *tensors: Optional[Tensor]) -> Tensor:
        out, weights, saved = _forward(x, _links(branches, iter(tensors)), dtype, save=True)
        ctx.branches, ctx.counts = branches, [len(own) for own in weights]
        ctx.save_for_backward(*tensors, *sum(weights, []), *sum(saved, ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        tensors = iter(ctx.saved_tensors)
        links = _links(ctx.branches, tensors)
        weights = [list(islice(tensors, count)) for count in ctx.counts]
        saved = [branch.Saved(*islice(tensors, len(branch.Saved._fields))) for branch in ctx.branches]
        stream = StreamGradient(grad.contiguous().view(-1, grad.shape[-1]))
        gradients: List[Any] = []
        with on_device(grad):
            for i in reversed(range(len(links))):
                before = links[i - 1] if i > 0 else None
                stream, own = links[i].branch.backward(stream, links[i], weights[i], saved[i], before)
                gradients.insert(0, own)
            sums = iter(sum_parts([parts for own in gradients for parts in own.parts]))
        flat = []
        for link, own in zip(links, gradients):
            by_name = {**own.complete, **{name: next(sums) for parts in own.parts for name in parts.names}}
            flat += [parameter if parameter is None else by_name[name] for name, parameter in _named(link.parameters)]
            flat.append(None)  # of the scale
        return stream.x.view(grad.shape), None, None, *flat


def _forward(
    x: Tensor, links: Sequence[Link], dtype: torch.dtype, save: bool
) -> Tuple[Tensor, List[List[Tensor]], List[Any]]:
    """The output of the chain; the weights of each link, and what it saves."""
    wanted = [link.branch.weights(link.parameters) for link in links]
    laid_out = iter(lay_out_weights(sum(wanted, []), dtype))
    weights = [list(islice(laid_out, len(own))) for own in wanted]
    stream, saved = Stream(x.contiguous().view(-1, x.shape[-1]), x.shape[:-1]), []
    for link, own in zip(links, weights):
        stream, kept = link.branch.forward(stream, link, own, save)
        saved.append(kept)
    # No view: autograd refuses to change a view that a function returns in place.
    return stream.total().resize_(x.shape), weights, saved


def _links(branches: Sequence[Branch], tensors: Iterator[Optional[Tensor]]) -> List[Link]:
    """Links of the next tensors: of each branch its parameters and scale."""
    return [
        Link(branch, branch.Parameters(*islice(tensors, len(branch.Parameters._fields))), next(tensors))
        for branch in branches
    ]


def _named(parameters: Any) -> Iterator[Tuple[str, Optional[Tensor]]]:
    return zip(parameters._fields, parameters)
