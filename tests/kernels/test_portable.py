"""The forms of the operators for exporters against their definitions."""

from math import inf

import oracles
import pytest
import torch

from vmamba.kernels import OPERATORS, naive, portable

LENGTHS = [1, 5, 16, 17, 197]


def form_of(name):
    return portable.decompositions()[OPERATORS[name].overload]


def assert_close(actual, expected, dtype=torch.float64):
    assert actual.dtype == expected.dtype == dtype and actual.shape == expected.shape
    assert oracles.relative_error(actual, expected) < (1e-12 if dtype == torch.float64 else 1e-3)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize('length', LENGTHS)
@pytest.mark.parametrize('states', [1, 3])
@pytest.mark.parametrize('reverse', [False, True], ids=['along', 'against'])
def test_selective_scan(length, states, reverse):
    u, delta, z, A = randn(2, 6, length), randn(2, 6, length), randn(2, 6, length), -randn(6, states).exp()
    B, C, D, bias = randn(2, 2, states, length), randn(2, 2, states, length), randn(6), randn(6)
    y, last, _ = form_of('selective_scan')(
        u, delta, A, B, C, D, z, bias, None, True, reverse, torch.float64, False, False
    )
    expected, last_expected = naive.selective_scan(u, delta, A, B, C, D, z, bias, True, reverse=reverse)
    assert_close(y, expected)
    assert_close(last, last_expected)


def test_selective_scan_without_options_in_half_precision():
    u, B, C, A = randn(2, 6, 20).half(), randn(2, 1, 3, 20).half(), randn(2, 1, 3, 20).half(), -torch.rand(6, 3)
    delta = torch.rand(2, 6, 20).half()
    y, _, _ = form_of('selective_scan')(
        u, delta, A, B, C, None, None, None, None, False, False, torch.float16, False, False
    )
    assert_close(y, naive.selective_scan(u, delta, A, B, C)[0], torch.float16)


def test_large_steps_do_not_overflow():
    u, B, C = (randn(1, 1, 40) for _ in range(3))
    delta, A = torch.full_like(u, 1e3), torch.full((1, 1), -1e3, dtype=torch.float64)
    arguments = None, None, None, None, False, False, torch.float64, False, False
    y, _, _ = form_of('selective_scan')(u, delta, A, B[:, None], C[:, None], *arguments)
    assert_close(y, 1e3 * u * B * C)


@pytest.mark.parametrize('size', [(1, 1), (3, 5), (7, 6)], ids=str)
@pytest.mark.parametrize('states', [1, 3])
def test_ss2d_scan(size, states):
    x, x_dbl, weight, bias = randn(2, *size, 6), randn(2, *size, 4, 2 + 2 * states), randn(4, 6, 2), randn(4, 6)
    A, D = -randn(4, 6, states).exp(), randn(4, 6)
    y, _ = form_of('ss2d_scan')(x, x_dbl, weight, bias, A, D, False, False)
    assert_close(y, naive.ss2d_scan(x, x_dbl, weight, bias, A, D))


@pytest.mark.parametrize('length', LENGTHS)
def test_bidirectional_scan(length):
    u, x_dbl, weight, bias = randn(2, length, 2, 6), randn(2, length, 2, 8), randn(2, 6, 2), randn(2, 6)
    A, D = -randn(2, 6, 3).exp(), randn(2, 6)
    y = form_of('bidirectional_scan')(u, x_dbl, weight, bias, A, D, False)
    assert_close(y, naive.bidirectional_scan(u, x_dbl, weight, bias, A, D))


@pytest.mark.parametrize('length', LENGTHS)
@pytest.mark.parametrize('reverse', [False, True], ids=['along', 'against'])
@pytest.mark.parametrize('limits', [(0.0, inf), (0.3, 0.9)], ids=str)
def test_ssd_scan(length, reverse, limits):
    x, z, dt, A = randn(2, length, 4, 3), randn(2, length, 4, 3), randn(2, length, 4), -randn(4).exp()
    B, C, D, bias = randn(2, length, 2, 5), randn(2, length, 2, 5), randn(4, 3), randn(4)
    y, last, *_ = form_of('ssd_scan')(x, dt, A, B, C, D, z, bias, None, None, True, *limits, reverse, False, False)
    expected, last_expected = naive.ssd_scan(
        x, dt, A, B, C, D, z, bias, dt_softplus=True, dt_limit=limits, reverse=reverse
    )
    assert_close(y, expected)
    assert_close(last, last_expected)


@pytest.mark.parametrize('directions', [1, 2])
@pytest.mark.parametrize('length', [2, 9])
@pytest.mark.parametrize('silu', [False, True], ids=['linear', 'silu'])
def test_causal_conv1d(directions, length, silu):
    x, weight, bias = randn(2, length, 6), randn(directions, 6, 4), randn(directions, 6)
    for own in (bias, None):
        expected = OPERATORS['causal_conv1d'](x, weight, own, silu, False)
        assert_close(form_of('causal_conv1d')(x, weight, own, silu, False, False), expected)


def test_states_before_the_sequence_are_refused():
    x = torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match='initial state'):
        form_of('selective_scan')(
            *(x, x, x[0, :, :1], x[:, None], x[:, None], None, None, None, x),
            *(False, False, torch.float32, False, False),
        )
    x = torch.ones(1, 3, 2, 2)
    for given in ((x, None), (None, x[:, :, 0, 0])):
        with pytest.raises(ValueError, match='initial states|packed'):
            form_of('ssd_scan')(
                *(x, x[..., 0], x[0, 0, 0], x, x, None, None, None), *given, *(True, 0.0, inf, False, False, False)
            )


@pytest.mark.parametrize('capacity', [-1, 3])
def test_switch_mlp(capacity):
    arguments = randn(11, 6), randn(4, 6), randn(4, 6, 5), randn(4, 5, 6), capacity, False, False
    out, means, counts, *_ = form_of('switch_mlp')(*arguments, False)
    out_expected, means_expected, counts_expected = OPERATORS['switch_mlp'](*arguments)
    assert_close(out, out_expected)
    assert_close(means, means_expected)
    assert torch.equal(counts, counts_expected) and counts.dtype == torch.int32
