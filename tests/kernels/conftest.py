"""Fixtures of the operators' tests."""

import pytest
from cases import BACKENDS, needs_triton
from vmamba.kernels import use_triton


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
