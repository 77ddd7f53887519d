"""Checks of the constructor options of layers and models."""

from numbers import Integral
from typing import Any, Iterable, Sized


def check_counts(least: int = 1, **options: Any) -> None:
    """Raises ValueError with the option's name unless each option is an integer of at least `least`."""
    for name, value in options.items():
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f'{name} must be an integer of at least {least}, got {value!r}')


def check_divides(total: int, what: str, **option: int) -> None:
    """Raises ValueError with the option's name unless the one option given divides a total of something."""
    ((name, value),) = option.items()
    if total % value:
        raise ValueError(f'{name} must divide the {total} {what}, got {value}')


def check_indices(**options: Any) -> None:
    """Raises ValueError with the option's name unless it is None, an integer, or integers, at least one."""
    for name, value in options.items():
        if isinstance(value, Sized) and len(value) == 0:
            raise ValueError(f'{name} must hold at least one index, got {value!r}')
        indices = value if isinstance(value, Iterable) else [value]
        if value is not None and not all(isinstance(index, Integral) for index in indices):
            raise ValueError(f'{name} must be an integer or a sequence of integers, got {value!r}')


def check_rates(**options: float) -> None:
    """Raises ValueError with the option's name unless each option is in [0, 1]."""
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise ValueError(f'{name} must be between 0 and 1, got {value!r}')


def check_step_range(dt_min: float, dt_max: float) -> None:
    """Raises ValueError unless initial step sizes can be drawn log-uniformly from the range."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(f'dt_min and dt_max must be positive and ascending, got {dt_min} and {dt_max}')


def scaled_channels(dim: int, **ratio: float) -> int:
    """int(ratio * dim) for the one ratio given; raises ValueError with its name unless that is at least 1."""
    ((name, value),) = ratio.items()
    channels = int(value * dim)
    if channels < 1:
        raise ValueError(f'{name} must give at least one channel, got {name}={value!r} for {dim} channels')
    return channels


def check_choice(choices: Iterable[str], **option: Any) -> None:
    """Raises ValueError with the option's name unless the one option given is among the choices."""
    ((name, value),) = option.items()
    if value not in list(choices):
        raise ValueError(f'{name} must be one of {", ".join(map(repr, choices))}, got {value!r}')
