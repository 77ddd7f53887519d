"""Images of discs with their masks."""

import numpy as np


def discs(count, size, seed=0):
    """Pairs of a noisy grey image or volume and its mask, both uint8 of this size."""
    rng, places = np.random.default_rng(seed), np.indices(size)
    for _ in range(count):
        mask = np.zeros(size, np.uint8)
        for _ in range(3):
            centre = np.array([rng.integers(side // 5, side - side // 5) for side in size])
            distance = np.square(places - centre.reshape(-1, *[1] * len(size))).sum(axis=0)
            mask[distance < (min(size) / 6) ** 2] = 1
        yield (60 + 120 * mask + rng.normal(0, 15, size)).clip(0, 255).astype(np.uint8), mask
