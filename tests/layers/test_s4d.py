"""S4D against the recurrence, one position at a time in complex128, and its steps against whole sequences."""

import math

import oracles
import pytest
import torch
from mixer_cases import assert_continues, assert_follows

from vmamba.layers import H3, S4D
from vmamba.layers.s4d import _legs, init_imaginary

CASES = {
    'minimal': {},
    'block': dict(layout='block'),
    'inv-bilinear': dict(layout='block', init='inv', disc='bilinear', n_ssm=2),
    'legs-channels': dict(layout='block', init='legs', channels=2, n_ssm=3),
    'real': dict(layout='block', init='real', n_ssm=1),
}
BIDIRECTIONAL = dict(layout='block', bidirectional=True, channels=2)


def make(**options):
    layer = S4D(6, d_state=8, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return layer


def reference(p, x, disc='zoh', channels=1, bidirectional=False, l_max=None):
    """p has the official names, in float64. [B, L, H] -> [B, L, H]"""
    heads = x.shape[-1]
    if 'D' in p:
        A = torch.complex(-torch.exp(p['kernel.log_A_real']), p['kernel.A_imag'])
        B, C, D = torch.ones_like(A), torch.view_as_complex(p['kernel.C'])[None], p['D'][None]
        dt = torch.exp(p['kernel.log_dt'])
    else:
        rows = [h % p['layer.kernel.A_real'].shape[0] for h in range(heads)]
        A = torch.complex(-torch.exp(p['layer.kernel.A_real']), -p['layer.kernel.A_imag'])[rows]
        B = torch.view_as_complex(p['layer.kernel.B'])[0, rows]
        C, D = torch.view_as_complex(p['layer.kernel.C']), p['layer.D']
        dt = torch.exp(p['layer.kernel.inv_dt'][:, 0])
    step = dt[:, None] * A
    if disc == 'zoh':
        dA, dB = torch.exp(step), B * (torch.exp(step) - 1) / A
    else:
        dA, dB = (1 + step / 2) / (1 - step / 2), B * dt[:, None] / (1 - step / 2)

    def kernel_of(row, length):
        return [2 * (C[row] * dB * dA**position).sum(-1).real for position in range(length)]

    seqlen = x.shape[1]
    length = min(seqlen, l_max or seqlen)
    outputs = []
    for c in range(channels):
        taps = kernel_of(c, length)
        ahead = kernel_of(channels + c, length) if bidirectional else []
        rows = []
        for t in range(seqlen):
            row = D[c] * x[:, t]
            for j in range(seqlen):
                if 0 <= t - j < length:
                    row = row + taps[t - j] * x[:, j]
                if 0 <= j - t - 1 < len(ahead):
                    row = row + ahead[j - t - 1] * x[:, j]
            rows.append(row)
        outputs.append(torch.stack(rows, dim=1))
    y = torch.cat(outputs, dim=-1)
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    weight = p['output_linear.0.weight'].reshape(2 * heads, -1)
    y, gate = (y @ weight.T + p['output_linear.0.bias']).chunk(2, dim=-1)
    return y / (1 + torch.exp(-gate))


@pytest.mark.parametrize(
    'options',
    [*CASES.values(), BIDIRECTIONAL, dict(layout='block', l_max=4)],
    ids=[*CASES, 'bidirectional', 'cut'],
)
def test_output_and_gradients_follow_the_definition(options):
    layer = make(**options)
    kept = {key: options[key] for key in ('disc', 'channels', 'bidirectional', 'l_max') if key in options}
    assert_follows(layer, lambda p, x: reference(p, x, **kept), (2, 9, 6), tolerance=2e-4)


@torch.no_grad()
@pytest.mark.parametrize('options', CASES.values(), ids=CASES)
def test_prompts_and_steps_equal_the_whole_sequence(options):
    layer = make(**options).double()
    x = torch.randn(2, 11, 6, dtype=torch.double)
    assert_continues(layer, layer.allocate_cache(2), x, 3, 7)


def test_official_names_and_shapes():
    assert {key: tuple(value.shape) for key, value in S4D(6).state_dict().items()} == {
        'D': (6,),
        'kernel.log_dt': (6,),
        'kernel.C': (6, 32, 2),
        'kernel.log_A_real': (6, 32),
        'kernel.A_imag': (6, 32),
        'output_linear.0.weight': (12, 6, 1),
        'output_linear.0.bias': (12,),
    }
    layer = S4D(6, layout='block', channels=3, bidirectional=True, n_ssm=2)
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == {
        'layer.D': (3, 6),
        'layer.kernel.inv_dt': (6, 1),
        'layer.kernel.C': (6, 6, 32, 2),
        'layer.kernel.B': (1, 2, 32, 2),
        'layer.kernel.A_real': (2, 32),
        'layer.kernel.A_imag': (2, 32),
        'output_linear.0.weight': (12, 18),
        'output_linear.0.bias': (12,),
    }
    assert layer.no_weight_decay() == {f'layer.kernel.{name}' for name in ('inv_dt', 'B', 'A_real', 'A_imag')}


def test_initial_imaginary_parts_are_the_published_ones():
    torch.testing.assert_close(init_imaginary(3, 'lin'), torch.tensor([0, math.pi, 2 * math.pi]))
    inverse = init_imaginary(32, 'inv')
    torch.testing.assert_close(inverse[[0, 1, -1]], torch.tensor([1283.43, 414.23, 0.323]), atol=0.01, rtol=1e-5)
    legs = init_imaginary(32, 'legs').float()
    torch.testing.assert_close(
        legs[[0, 1, 2, -1]], torch.tensor([1303.27, 433.03, 258.15, 0.264]), atol=0.01, rtol=1e-5
    )


def test_legs_is_the_normal_part_of_hippo():
    """The response of the diagonal model equals that of the real matrices that it diagonalises."""
    imaginary, B = _legs(3)
    n = torch.arange(6).double()
    root = torch.sqrt(2 * n + 1)
    normal = -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1) + root[:, None] * root / 2
    for time in (0.0, 0.1, 0.7):  # B^* exp(A t) B is the same in every basis
        expected = root @ torch.linalg.matrix_exp(normal * time) @ root
        found = 2 * (B.abs() ** 2 * torch.exp(torch.complex(torch.tensor(-0.5).double(), -imaginary) * time)).sum().real
        assert abs(found - expected) < 1e-10 * abs(root @ root)
    kernel = S4D(1, d_state=6, layout='block', init='legs').layer.kernel
    torch.testing.assert_close(kernel.A_imag.data[0], imaginary.float())
    torch.testing.assert_close(kernel.B.data[0, 0], torch.view_as_real(B).float().clamp(-2, 2))


@torch.no_grad()
def test_autocast_and_half_precision_keep_the_convolution_in_fp32():
    layer, x = make(), torch.randn(2, 9, 6)
    expected = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and oracles.relative_error(y, expected) < 1e-2
    layer.bfloat16()
    assert oracles.relative_error(layer(x.bfloat16()), expected) < 5e-2
    cache = layer.allocate_cache(2)
    assert cache.state.dtype == torch.complex64
    assert oracles.relative_error(layer.step(x[:, 0].bfloat16(), cache), expected[:, 0]) < 5e-2


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(layout='full'), "layout must be one of 'minimal', 'block', got 'full'"),
        (dict(init='diag', layout='block'), "init must be one of .* got 'diag'"),
        (dict(disc='dplr', layout='block'), "disc must be one of .* got 'dplr'"),
        (dict(d_state=7), 'd_state must be even.* got 7'),
        (dict(n_ssm=4, layout='block'), 'n_ssm must divide the 6 channels, got 4'),
        (dict(bidirectional=True), "give layout='block'"),
        (dict(l_max=0, layout='block'), 'l_max must be an integer of at least 1, got 0'),
        (dict(dt_min=0.2), 'dt_min and dt_max must be positive and ascending, got 0.2 and 0.1'),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        S4D(6, **options)


@pytest.mark.parametrize('options', [BIDIRECTIONAL, dict(layout='block', l_max=4)], ids=['bidirectional', 'cut'])
def test_layers_without_a_recurrence_have_no_cache(options):
    with pytest.raises(ValueError, match='has steps only if it is causal and its kernel is not cut'):
        make(**options).allocate_cache(1)


@pytest.mark.parametrize('shape', [(5, 6), (2, 5, 1), (2, 0, 6), (1, 2, 5, 6), (1, 5, 6)], ids=str)
@pytest.mark.parametrize('layer', [S4D(6, 4), H3(6, 4)], ids=['S4D', 'H3'])
def test_tokens_of_another_shape_are_refused(layer, shape):
    """Products with the parameters could spread over dimensions that are missing or have size 1."""
    cache = layer.allocate_cache(2)
    with pytest.raises(ValueError, match=r'x must be .*, got \('):
        layer(torch.zeros(shape), cache=cache)
    with pytest.raises(ValueError, match=r'x must be .*, got \('):
        layer.step(torch.zeros(shape[1:]), cache)
    if shape != (1, 5, 6):
        with pytest.raises(ValueError, match=r'x must be .*, got \('):
            layer(torch.zeros(shape))
