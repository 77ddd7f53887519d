"""Long convolutions and diagonal kernels against sums over positions, in float64."""

import oracles
import pytest
import torch

from vmamba.kernels import diagonal_kernel, diagonal_state, long_conv
from vmamba.kernels.fft_conv import _fft_size


def decays(heads=3, states=2):
    return torch.complex(-torch.rand(heads, states).double() * 0.3 - 0.01, torch.randn(heads, states).double())


@pytest.mark.parametrize('seqlen', (1, 2, 7, 30))
@pytest.mark.parametrize('taps', (1, 5, 40))
@pytest.mark.parametrize('ahead', (0, 3, 40))
def test_convolution_is_a_sum_over_earlier_and_later_positions(seqlen, taps, ahead):
    u, kernel = torch.randn(2, 3, seqlen).double(), torch.randn(3, taps).double()
    later = torch.randn(3, ahead).double()
    expected = torch.zeros_like(u)
    for t in range(seqlen):
        for j in range(seqlen):
            if j <= t and t - j < taps:
                expected[..., t] += kernel[:, t - j] * u[..., j]
            if j > t and j - t - 1 < ahead:
                expected[..., t] += later[:, j - t - 1] * u[..., j]
    out = long_conv(u, kernel, later if ahead else None)
    assert oracles.relative_error(out, expected) < 1e-12


def test_convolution_is_computed_in_fp32_and_has_gradients():
    u, kernel = torch.randn(2, 3, 8).bfloat16(), torch.randn(3, 8)
    assert long_conv(u, kernel).dtype == torch.float32
    inputs = [torch.randn(2, 6).double().requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(long_conv, inputs)
    with pytest.raises(ValueError, match='must not be empty, got L = 0'):
        long_conv(u[..., :0], kernel)


@pytest.mark.parametrize('length', (1, 2, 9, 23))
def test_kernel_and_state_are_sums_over_states_and_positions(length):
    log_decay, coefficient = decays(), torch.randn(4, 3, 2, dtype=torch.complex128)
    expected = [2 * (coefficient * torch.exp(position * log_decay)).sum(-1).real for position in range(length)]
    assert oracles.relative_error(diagonal_kernel(log_decay, coefficient, length), torch.stack(expected, -1)) < 1e-12
    u, state = torch.randn(4, 3, length).double(), torch.zeros(4, 3, 2, dtype=torch.complex128)
    for position in range(length):
        state = torch.exp(log_decay) * state + u[..., position, None]
    found = diagonal_state(log_decay, u)
    assert oracles.relative_error(torch.view_as_real(found), torch.view_as_real(state)) < 1e-12


def test_gradients_of_kernel_and_state():
    log_decay, coefficient = decays().requires_grad_(), torch.randn(3, 2, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, c: diagonal_kernel(a, c, 7), (log_decay, coefficient))
    assert torch.autograd.gradcheck(diagonal_state, (log_decay, torch.randn(3, 7).double().requires_grad_()))


def test_autocast_does_not_round_the_kernel():
    log_decay, coefficient = decays().to(torch.complex64), torch.randn(3, 2, dtype=torch.complex64)
    with torch.autocast('cpu', torch.bfloat16):
        kernel = diagonal_kernel(log_decay, coefficient, 20)
    assert torch.equal(kernel, diagonal_kernel(log_decay, coefficient, 20))


def test_no_tensor_has_states_times_positions_elements():
    """Of 8 channels, 32 states and 10,000 positions a whole power table would be 2.56 million numbers."""
    log_decay = decays(8, 32).requires_grad_()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t))])
            return out

    with Watch():
        kernel = diagonal_kernel(log_decay, torch.ones(8, 32, dtype=torch.complex128), 10_000)
        long_conv(torch.randn(8, 10_000).double(), kernel).sum().backward()
    assert largest < 400_000


def test_fft_sizes_are_the_next_products_of_2_3_and_5():
    smooth = sorted(2**a * 3**b * 5**c for a in range(12) for b in range(8) for c in range(6))
    for least in (1, 2, 7, 11, 97, 393, 1001, 1999):
        assert _fft_size(least) == next(size for size in smooth if size >= least)
