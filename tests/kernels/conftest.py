"""Fixtures of the operators' tests."""

import pytest
import torch
from cases import BACKENDS, needs_triton

from vmamba.kernels import conv1d, conv2d, norm, use_triton


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs a test in plain PyTorch and on Triton; whether it is Triton."""
    with use_triton(request.param):
        yield request.param


@pytest.fixture(params=[pytest.param(True, id='triton', marks=needs_triton)])
def triton_kernels(request):
    """Runs a test on Triton."""
    with use_triton(True):
        yield


@pytest.fixture
def dtype(backend):
    """The most exact one of the backend."""
    return torch.float32 if backend else torch.float64


@pytest.fixture
def fresh_launches(monkeypatch):
    """Launches of the small operators are planned again, as tests change what decides them."""
    for module in (conv1d, conv2d, norm):
        for name in ('_forward_launch', '_backward_launch'):
            monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
