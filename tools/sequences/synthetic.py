"""Selective copying and induction heads: tasks of fresh random tokens.

Mamba, https://arxiv.org/abs/2312.00752; Hungry Hungry Hippos, https://arxiv.org/abs/2212.14052
"""

from typing import Tuple

import numpy as np

VOCABULARY = 16


def selective_copying(rng: np.random.Generator, length: int = 4096, tokens: int = 16) -> Tuple[np.ndarray, np.ndarray]:
    """Tokens at random places among noise, which are to be written out in order at the end.

    The noise is symbol 0, the end is `tokens` times the symbol 15, and the tokens are the symbols between.

    Args:
        length: Positions before the end.

    Returns:
        Input [length + tokens], and the tokens [tokens], the targets of the last positions.

    Raises:
        ValueError: If there are more tokens than positions, or none.
    """
    if not 1 <= tokens <= length:
        raise ValueError(f'tokens must be from 1 to length={length}, got {tokens}')
    inputs = np.zeros(length + tokens, np.int64)
    targets = rng.integers(1, VOCABULARY - 1, tokens)
    inputs[np.sort(rng.choice(length, tokens, replace=False))] = targets
    inputs[length:] = VOCABULARY - 1
    return inputs, targets


def induction_heads(rng: np.random.Generator, length: int = 256) -> Tuple[np.ndarray, np.ndarray]:
    """Random symbols 0 to 14, and the symbol 15 somewhere and at the end, where its successor is to follow again.

    Args:
        length: Positions, the last symbol included.

    Returns:
        Input [length], and the symbol after the first 15 [1], the target of the last position.

    Raises:
        ValueError: If the sequence is too short.
    """
    if length < 3:
        raise ValueError(f'length must be at least 3, got {length}')
    inputs = rng.integers(0, VOCABULARY - 1, length)
    place = int(rng.integers(length - 2))
    inputs[[place, length - 1]] = VOCABULARY - 1
    return inputs, inputs[place + 1 : place + 2].copy()
