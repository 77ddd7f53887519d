"""Checks of what public functions are given, by shape specs such as 'B H W D'."""

from typing import Dict, Optional, Sequence, Tuple

from torch import Tensor
from torch.autograd import forward_ad

Spec = Tuple[Optional[Tensor], str]


def check(function: str, sizes: Optional[Dict[str, int]] = None, **tensors: Spec) -> Dict[str, int]:
    """Checks tensors against their specs, in order.

    A spec has a word per dimension: a number, or a name that stands for the same size everywhere. 'L>0' must not be
    empty. '...' at the beginning stands for any dimensions. Specs of several ranks are separated by ' | '. Every tensor
    must be real and floating, on the device of the first one, and without a tangent of forward-mode differentiation:
    PyTorch would silently take the result of an operator with a backward pass of its own for constant.

    Args:
        function: Name of the public function.
        sizes: Sizes that are known beforehand, by name.
        tensors: Pairs of a tensor and its spec, by argument; all but the first may be None.

    Returns:
        Sizes by name.

    Raises:
        ValueError: If a tensor has another shape, dtype or device, or is none, with its name and what it should be.
        NotImplementedError: If a tensor has a tangent.
    """
    sizes = dict(sizes or {})
    main, (reference, _) = next(iter(tensors.items()))
    for name, (tensor, spec) in tensors.items():
        if tensor is None and reference is not None:
            continue
        if not _fits(tensor, spec, sizes):
            raise ValueError(f'{function}: {name} must be {_expected(spec, sizes)}, got {_found(tensor)}')
        assert tensor is not None and reference is not None  # they fit
        if tensor.device != reference.device:
            found = f'{main} on {reference.device} and {name} on {tensor.device}'
            raise ValueError(f'{function} needs all tensors on one device, got {found}')
    if forward_ad._current_level >= 0:
        _refuse_tangents(function, tensors)
    return sizes


def check_that(holds: bool, message: str, *sizes: int) -> None:
    """Raises ValueError with the message unless the condition holds.

    Sizes take the places of its {} only then: Dynamo of torch 2.11 cannot format those that are symbols.
    """
    if not holds:
        raise ValueError(message.format(*sizes) if sizes else message)


def _fits(tensor: object, spec: str, sizes: Dict[str, int]) -> bool:
    """Whether a tensor fits a spec; adds to the sizes what the spec names first."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return False
    shape = tensor.shape
    if spec.startswith('... '):
        words = spec.split()[1:]
        return _fits_words(shape[-len(words) :], words, sizes)
    # A loop: Dynamo of torch 2.7 knows no default of `next`.
    for ranked in spec.split(' | '):
        words = ranked.split()
        if len(words) == len(shape):
            return _fits_words(shape, words, sizes)
    return False


def _fits_words(shape: Sequence[int], words: Sequence[str], sizes: Dict[str, int]) -> bool:
    for word, size in zip(words, shape):
        name, _, positive = word.partition('>')
        if positive and size == 0:
            return False
        if (int(name) if name.isdigit() else sizes.setdefault(name, size)) != size:
            return False
    return True


def _expected(spec: str, sizes: Dict[str, int]) -> str:
    shapes = [', '.join(str(sizes.get(word, word)) for word in words.split()) for words in spec.split(' | ')]
    return 'a floating tensor ' + ' or '.join(f'[{shape}]' for shape in shapes)


def _found(tensor: object) -> str:
    return f'{tuple(tensor.shape)} {tensor.dtype}' if isinstance(tensor, Tensor) else type(tensor).__name__


def _refuse_tangents(function: str, tensors: Dict[str, Spec]) -> None:
    for name, (tensor, _) in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f'{function} is differentiable in reverse mode only, got {name} with a tangent of forward mode '
                '(torch.func.jvp, torch.func.jacfwd, torch.autograd.forward_ad)'
            )
