"""ListOps of the Long Range Arena, by its published rules: nested lists of digits and operators, with a digit as value.

Long Range Arena, https://arxiv.org/abs/2011.04006. ListOps, https://arxiv.org/abs/1804.06028

A tree is a digit with probability 3/4, and always at depth 10; otherwise one of MIN, MAX, MED (the median, without its
fraction) and SM (the sum modulo 10) of 2 to 10 trees. Kept are those of 501 to 1,999 symbols, each once.
"""

import random
from typing import Dict, List, Optional, Set, Tuple

import numpy as np

PAD, UNKNOWN, END = 0, 1, 2
DIGITS, OPERATORS, CLOSE = 3, 13, 17  # the first of each
VOCABULARY = 18
LENGTH = 2048
NAMES = '<pad>', '<unk>', '<eos>', *'0123456789', '[MIN', '[MAX', '[MED', '[SM', 'X'
_DEEPEST, _SHORTEST, _LONGEST = 10, 501, 1999
_DIGIT_PROBABILITY = 0.75


def evaluate(operator: int, values: List[int]) -> int:
    """The value of an operator, 0 to 3 for MIN, MAX, MED and SM."""
    if operator == 0:
        return min(values)
    if operator == 1:
        return max(values)
    if operator == 3:
        return sum(values) % 10
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) // 2


def draw_tree(rng: random.Random, depth: int = 1) -> Optional[Tuple[List[int], int]]:
    """Symbols and value of a random tree whose root is at a depth; None once it is too long."""
    symbols: List[int] = []
    value = _append(rng, depth, symbols)
    return None if value is None else (symbols, value)


def _append(rng: random.Random, depth: int, symbols: List[int]) -> Optional[int]:
    """Appends a tree; returns its value, None if there are too many symbols."""
    if depth == _DEEPEST or rng.random() < _DIGIT_PROBABILITY:
        digit = int(rng.random() * 10)
        symbols.append(DIGITS + digit)
        return digit
    operator, children = int(rng.random() * 4), 2 + int(rng.random() * 9)
    symbols.append(OPERATORS + operator)
    values: List[int] = []
    for _ in range(children):
        value = _append(rng, depth + 1, symbols)
        if value is None or len(symbols) > _LONGEST:
            return None
        values.append(value)
    symbols.append(CLOSE)
    return evaluate(operator, values)


def make_listops(count: int, seed: int = 0) -> Dict[str, np.ndarray]:
    """Different trees: inputs (symbols, END and padding) uint8 [count, 2048], and targets (values) [count]."""
    rng = random.Random(seed)
    inputs, targets = np.full((count, LENGTH), PAD, np.uint8), np.zeros(count, np.int64)
    seen: Set[bytes] = set()
    while len(seen) < count:
        tree = draw_tree(rng)
        if tree is None or not _SHORTEST <= len(tree[0]) <= _LONGEST:
            continue
        symbols = bytes(tree[0])
        if symbols not in seen:
            inputs[len(seen), : len(symbols) + 1] = [*symbols, END]
            targets[len(seen)] = tree[1]
            seen.add(symbols)
    return {'inputs': inputs, 'targets': targets}
