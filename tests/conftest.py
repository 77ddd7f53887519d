"""Fixtures that every test runs under.

Lying in the root of the tests, this file makes pytest put `oracles` and `official` beside it on the path.
"""

import pytest
import torch
from torch.utils import deterministic
from vmamba.kernels import chunked, routed, ss2d

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory is NaN (the largest number for integers), so that what is left unwritten shows.

    So is the memory that the scans keep between calls.
    """
    monkeypatch.setattr(deterministic, 'fill_uninitialized_memory', True)
    scratch = chunked.scratch
    for module in (chunked, routed, ss2d):
        monkeypatch.setattr(module, 'scratch', lambda *args: scratch(*args).fill_(float('nan')))
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
