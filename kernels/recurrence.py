"""First-order linear recurrences in plain PyTorch."""

from torch import Tensor

# A step of at least this many elements keeps the processor busy by itself, so that the steps are walked one by one;
# so are the last few steps that a reduction leaves.
_WIDE_STEP = 2**14
_FEW_STEPS = 8
# Elements of a time step, and of all time steps, of a buffer that is held at a time: small enough for the caches.
_BLOCK_WIDTH = 2**16
_BLOCK_ELEMENTS = 2**20


def blocks(batch: int, steps: int, width: int) -> tuple[list[slice], list[slice]]:
    """Cuts a recurrence into blocks of bounded memory: some entries of the batch, some time steps.

    Args:
        batch: Entries of the batch.
        steps: Number of time steps.
        width: Elements of one time step of one entry.

    Returns:
        Slices that cover `range(batch)`, and slices that cover `range(steps)`, both in order and longest first.
    """
    rows = max(_BLOCK_WIDTH // max(width, 1), 1)
    length = max(_BLOCK_ELEMENTS // (min(rows, max(batch, 1)) * max(width, 1)), 8)
    return _slices(batch, rows), _slices(steps, length)


def _slices(total: int, length: int) -> list[slice]:
    return [slice(start, min(start + length, total)) for start in range(0, total, length)]


def linear_recurrence_(decay: Tensor, value: Tensor, initial: Tensor, products: Tensor, reverse: bool = False) -> None:
    """Computes h_t = decay_t * h_{t-1} + value_t in place of `value` (h_t = decay_t * h_{t+1} + value_t in reverse).

    Narrow steps are taken by odd-even reduction: every second step absorbs the one before it, which leaves a
    recurrence of half as many steps, whose solution gives the steps between. T steps become 2 log2(T) operations on
    many steps at once, for three times the arithmetic of a walk.

    Args:
        decay: [batch, T, ...].
        value: [batch, T, ...], overwritten by the states.
        initial: [batch, ...], the state before the first step.
        products: Scratch memory of decay's shape for products of decays; decay itself if it is not needed again.
        reverse: Walk from the last step to the first.
    """
    first = -1 if reverse else 0
    value[:, first].addcmul_(decay[:, first], initial)
    if initial.numel() >= _WIDE_STEP:
        _walk_(decay, value, reverse)
        return
    if products is not decay:
        products.copy_(decay)
    _reduce_(products, value, reverse)


def _walk_(decay: Tensor, value: Tensor, reverse: bool) -> None:
    decays, states = decay.unbind(1), value.unbind(1)
    if reverse:
        decays, states = decays[::-1], states[::-1]
    for step in range(1, len(states)):
        states[step].addcmul_(decays[step], states[step - 1])


def _reduce_(decay: Tensor, value: Tensor, reverse: bool) -> None:
    """Odd-even reduction; turns every second decay into a product of decays."""
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
    _reduce_(half_decay, half_value, reverse)
    value[:, between].addcmul_(decay[:, between], value[:, solved])
