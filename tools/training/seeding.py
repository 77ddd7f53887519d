"""Random numbers that depend on the seed and their purpose only.

RNG state is not saved: all randomness is derived from seed, epoch and step. So a resumed run draws the same numbers
with any number of loading processes, and two processes augment as one does.
"""

import hashlib
import random
from contextlib import contextmanager
from typing import Iterator

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """A seed of 63 bits that depends on all of the numbers."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def seed_all(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch, its GPUs included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of the CPU follow this seed inside, and afterwards what they followed before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
