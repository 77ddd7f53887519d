"""Checks of the options that layers and models are made with."""

from numbers import Integral
from typing import Any, Iterable, Sized


def check_counts(least: int = 1, **options: Any) -> None:
    """Raises ValueError, naming the option, unless each is an integer of at least `least`."""
    for name, value in options.items():
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f'{name} must be an integer of at least {least}, got {value!r}')


def check_indices(**options: Any) -> None:
    """Raises ValueError, naming the option, if it holds no indices; a number or None chooses indices elsewhere."""
    for name, value in options.items():
        if isinstance(value, Sized) and len(value) == 0:
            raise ValueError(f'{name} must hold at least one index, got {value!r}')


def check_rates(**options: float) -> None:
    """Raises ValueError, naming the option, unless each is in [0, 1]."""
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise ValueError(f'{name} must be between 0 and 1, got {value!r}')


def scaled_channels(dim: int, **ratio: float) -> int:
    """int(ratio * dim) of the one ratio given; ValueError, naming it, unless that is at least 1."""
    ((name, value),) = ratio.items()
    channels = int(value * dim)
    if channels < 1:
        raise ValueError(f'{name} must give at least one channel, got {name}={value!r} of {dim} channels')
    return channels


def check_choice(choices: Iterable[str], **option: Any) -> None:
    """Raises ValueError, naming the one option given, unless it is one of the choices."""
    ((name, value),) = option.items()
    if value not in list(choices):
        raise ValueError(f'{name} must be one of {", ".join(map(repr, choices))}, got {value!r}')
