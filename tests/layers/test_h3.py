"""H3 against its recurrences, one position at a time in float64, and its steps against whole sequences."""

import math

import oracles
import pytest
import torch
from mixer_cases import assert_continues, assert_follows

from vmamba.layers import H3

CASES = {
    'default': {},
    'heads': dict(head_dim=2),
    'inv-zoh': dict(init='inv', disc='zoh', head_dim=3),
}


def make(**options):
    layer = H3(6, d_state=4, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return layer


def reference(p, x, head_dim=1, disc='bilinear', l_max=None):
    """p has the official names, in float64. [B, L, d] -> [B, L, d]"""
    batch, seqlen, dim = x.shape
    q, k, v = (x @ p[f'{name}_proj.weight'].T + p[f'{name}_proj.bias'] for name in 'qkv')
    B, C = p['ssm_k_kernel.kernel.B'], p['ssm_k_kernel.kernel.C'][0]
    A = torch.complex(-torch.exp(p['kernel.kernel.inv_A_real']), p['kernel.kernel.A_imag'])
    dt = torch.exp(p['kernel.kernel.log_dt'])[:, None]
    if disc == 'zoh':
        dA, dB = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A
    else:
        dA, dB = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
    dB = dB * torch.view_as_complex(p['kernel.kernel.B'])
    CC = torch.view_as_complex(p['kernel.kernel.C'])[0]
    length = min(seqlen, l_max or seqlen)
    shift = []
    for position in range(length):
        kept = B.shape[1] - position
        shift.append((C[:, position:] * B[:, :kept]).sum(-1) if kept > 0 else torch.zeros_like(B[:, 0]))
    diagonal = [2 * (CC * dB * dA**position).sum(-1).real for position in range(length)]
    u = []
    for t in range(seqlen):
        u.append(p['ssm_k_D'] * k[:, t] + sum(shift[t - j] * k[:, j] for j in range(t + 1) if t - j < length))
    rows = []
    for t in range(seqlen):
        out = torch.zeros(batch, dim, dtype=x.dtype)
        for h in range(dim // head_dim):
            for i in range(head_dim):
                for j in range(head_dim):
                    left, right = h * head_dim + i, h * head_dim + j
                    w = [u[s][:, left] * v[:, s, right] for s in range(t + 1)]
                    y = p['D'][h] * w[t] + sum(diagonal[t - s][h] * w[s] for s in range(t + 1) if t - s < length)
                    out[:, right] = out[:, right] + q[:, t, left] * y
        rows.append(out)
    return torch.stack(rows, dim=1) @ p['output_linear.weight'].T + p['output_linear.bias']


@pytest.mark.parametrize('options', [*CASES.values(), dict(l_max=3)], ids=[*CASES, 'cut'])
def test_output_and_gradients_follow_the_definition(options):
    layer = make(**options)
    kept = {key: value for key, value in options.items() if key != 'init'}
    assert_follows(layer, lambda p, x: reference(p, x, **kept), (2, 7, 6), tolerance=2e-4)


@torch.no_grad()
@pytest.mark.parametrize('options', CASES.values(), ids=CASES)
def test_prompts_and_steps_equal_the_whole_sequence(options):
    """The prompts are shorter and longer than the state of the shift model."""
    layer = make(**options).double()
    x = torch.randn(2, 14, 6, dtype=torch.double)
    assert_continues(layer, layer.allocate_cache(2), x, 2, 9, 10)


def test_official_names_and_shapes():
    shapes = {key: tuple(value.shape) for key, value in H3(6, head_dim=2, layer_idx=3).state_dict().items()}
    linear = {f'{name}.{part}': (6, 6)[: 2 - (part == 'bias')] for name in ('q_proj', 'k_proj', 'v_proj',
              'output_linear') for part in ('weight', 'bias')}  # fmt: skip
    assert shapes == {
        **linear,
        'ssm_k_kernel.kernel.B': (6, 64),
        'ssm_k_kernel.kernel.C': (1, 6, 64),
        'ssm_k_D': (6,),
        'kernel.kernel.log_dt': (3,),
        'kernel.kernel.C': (1, 3, 32, 2),
        'kernel.kernel.B': (3, 32, 2),
        'kernel.kernel.inv_A_real': (3, 32),
        'kernel.kernel.A_imag': (3, 32),
        'D': (3,),
    }
    assert len(shapes) == 17


def test_initial_shift_model_is_the_convolution_with_C():
    layer = H3(6, d_state=8)
    shift = layer.ssm_k_kernel.kernel
    assert torch.equal(shift(20), shift.C[0])
    assert math.isclose(layer.kernel.kernel.A_imag[0, 2].item(), 2 * math.pi, rel_tol=1e-6)


@torch.no_grad()
def test_autocast_and_half_precision_keep_the_convolutions_in_fp32():
    layer, x = make(), torch.randn(2, 9, 6)
    expected = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and oracles.relative_error(y, expected) < 3e-2
    layer.bfloat16()
    assert oracles.relative_error(layer(x.bfloat16()), expected) < 5e-2


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(d_state=5), 'd_state must be even.* got 5'),
        (dict(head_dim=4), 'head_dim must divide the 6 channels, got 4'),
        (dict(init='legs'), "init must be one of 'lin', 'inv', got 'legs'"),
        (dict(disc='euler'), "disc must be one of .* got 'euler'"),
        (dict(dt_max=0), 'dt_min and dt_max must be positive and ascending, got 0.001 and 0'),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        H3(6, **options)


def test_bidirectional_is_the_mean_of_both_directions_with_shared_projections():
    layer, x = make(bidirectional=True, head_dim=2).double(), torch.randn(2, 7, 6, dtype=torch.double)
    state = layer.state_dict()
    shared = {key: value for key, value in state.items() if '_proj' in key or 'output' in key}
    rest = {key: value for key, value in state.items() if key not in shared}
    own = [
        {key: value for key, value in rest.items() if '_b' not in key},
        {key.replace('_b', ''): value for key, value in rest.items() if '_b' in key},
    ]
    along = reference({**shared, **own[0]}, x, head_dim=2)
    against = reference({**shared, **own[1]}, x.flip(1), head_dim=2).flip(1)
    assert oracles.relative_error(layer(x), (along + against) / 2) < 1e-10
    assert len(state) == 8 + 2 * 9 and len(layer.no_weight_decay()) == 8


@pytest.mark.parametrize('options', [dict(l_max=5), dict(bidirectional=True)], ids=str)
def test_layers_without_a_recurrence_have_no_cache(options):
    with pytest.raises(ValueError, match='has steps only if it is causal and its kernels are not cut'):
        H3(6, **options).allocate_cache(1)
