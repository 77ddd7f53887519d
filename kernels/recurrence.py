"""First-order linear recurrences, walked a chunk at a time in plain PyTorch."""

import math
from typing import Iterator

import torch
from torch import Tensor

# A step narrower than this is bound by the cost of starting an operator, so several chunks walk together.
_NARROW_STEP = 2**13
# Elements of one [steps, width] buffer that is held at a time: small enough for the processor's cache.
_SEGMENT_ELEMENTS = 2**19


def segments(steps: int, width: int) -> tuple[list[slice], int]:
    """Cuts `steps` time steps of `width` elements into consecutive slices of bounded memory.

    Args:
        steps: Number of time steps.
        width: Elements that one time step of a state buffer holds.

    Returns:
        Slices that cover `range(steps)` in order, and the length of the longest.
    """
    length = min(max(_SEGMENT_ELEMENTS // max(width, 1), 8), steps)
    return [slice(start, min(start + length, steps)) for start in range(0, steps, length)], length


def linear_recurrence_(
    decay: Tensor, value: Tensor, initial: Tensor, products: Tensor, reverse: bool = False
) -> Tensor:
    """Computes h_t = decay_t * h_{t-1} + value_t in place of `value` (h_t = decay_t * h_{t+1} + value_t in reverse).

    T steps are cut into about sqrt(T) chunks that walk together from a zero state; each chunk's state at its end is
    then carried into the next one, h_t = h_t(zero start) + (product of decays up to t) * (state carried in).
    A step that is wide enough to keep the processor busy is walked uncut.

    Args:
        decay: [batch, T, width].
        value: [batch, T, width], overwritten by the states.
        initial: [batch, width], the state before the first step.
        products: Scratch memory of decay's shape for the products of decays; decay itself if it is not needed again.
        reverse: Walk from the last step to the first.

    Returns:
        `value`.
    """
    batch, steps, width = value.shape
    chunks = _num_chunks(steps, batch * width)
    if chunks == 1:
        _walk_(decay, value, initial, reverse)
        return value
    length = steps // chunks
    whole = chunks * length
    rest = decay[:, whole:], value[:, whole:]
    if products is not decay:
        products[:, :whole] = decay[:, :whole]
    if reverse and whole < steps:
        _walk_(*rest, initial, reverse)
        initial = value[:, whole]
    _walk_chunks_(
        products[:, :whole].unflatten(1, (chunks, length)),
        value[:, :whole].unflatten(1, (chunks, length)),
        initial,
        reverse,
    )
    if not reverse and whole < steps:
        _walk_(*rest, value[:, whole - 1], reverse)
    return value


def _num_chunks(steps: int, width: int) -> int:
    if width >= _NARROW_STEP or steps < 8:
        return 1
    return min(math.isqrt(steps), -(-2 * _NARROW_STEP // max(width, 1)))


def _steps(tensor: Tensor, dim: int, reverse: bool) -> Iterator[Tensor]:
    views = tensor.unbind(dim)
    return reversed(views) if reverse else iter(views)


def _walk_(decay: Tensor, value: Tensor, state: Tensor, reverse: bool) -> None:
    for decay_t, value_t in zip(_steps(decay, 1, reverse), _steps(value, 1, reverse)):
        state = value_t.addcmul_(decay_t, state)


def _walk_chunks_(product: Tensor, value: Tensor, initial: Tensor, reverse: bool) -> None:
    """As `_walk_`, on [batch, chunks, length, width]; turns the decays in `product` into their running products."""
    previous_product = previous_state = None
    for product_t, state_t in zip(_steps(product, 2, reverse), _steps(value, 2, reverse)):
        if previous_state is not None:
            state_t.addcmul_(product_t, previous_state)
            product_t.mul_(previous_product)
        previous_product, previous_state = product_t, state_t

    carried = torch.empty_like(previous_state)
    state = initial
    ends = (_steps(tensor, 1, reverse) for tensor in (carried, previous_product, previous_state))
    for carried_q, product_q, end_q in zip(*ends):
        carried_q.copy_(state)
        state = torch.addcmul(end_q, product_q, state)
    value.addcmul_(product, carried.unsqueeze(2))
