"""Fixtures that every test runs under.

Lying in the root of the tests, this file makes pytest put `oracles` and `official` beside it on the path.
"""

import importlib.util
import os

import pytest
import torch
from torch.utils import deterministic

# Without a GPU `use_triton(True)` interprets the kernels. That is settled when they are defined.
INTERPRETED = importlib.util.find_spec('triton') is not None and not torch.cuda.is_available()
if INTERPRETED:
    os.environ['TRITON_INTERPRET'] = '1'
    from interpreter import speed_up

    speed_up()

from vmamba.kernels import bimamba, chunked, ss2d  # noqa: E402

torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Autograd counts devices once, at its first backward pass. Exporters register devices that are not there, and with
    # any, autograd refuses to run in the processes that tests fork.
    torch.ones(1, requires_grad=True).backward()

# Kernels that are compiled cannot be interpreted, see `make test-targets`; `make test-export` takes hours.
collect_ignore = ['targets', 'exports']


def pytest_collection_modifyitems(items):
    """The tools come first: their tests run for long, and one that begins last would leave other workers idle."""
    items.sort(key=lambda item: 'tools' not in item.path.parts)


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
    for module in (bimamba, chunked, ss2d):
        monkeypatch.setattr(module, 'scratch', lambda *args: scratch(*args).fill_(float('nan')))
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
