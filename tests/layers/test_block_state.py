"""The Block-State layer against one query at a time in float64, and its steps against whole sequences."""

import math

import oracles
import pytest
import torch
from mixer_cases import assert_continues, assert_follows

from vmamba.layers import BlockState
from vmamba.layers.block_state import MODES

WINDOW, HEADS, DIM, STATES = 4, 2, 6, 3
CASES = [(mode, ssm) for mode in MODES for ssm in ('s4d', 'filter')]


def make(mode, ssm='s4d', **options):
    sizes = dict(window=WINDOW, num_heads=HEADS, head_dim=4, num_states=STATES, d_state=4)
    layer = BlockState(DIM, mode, ssm=ssm, num_buckets=6, max_distance=7, **{**sizes, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def taps_of(p, length):
    """Kernels [outputs, d, length] of the SSM, tap by tap; p has the layer's names."""
    if 'ssm.kernel.A_real' in p:
        A = torch.complex(-torch.exp(p['ssm.kernel.A_real']), -p['ssm.kernel.A_imag'])
        step = torch.exp(p['ssm.kernel.inv_dt']) * A
        B = torch.view_as_complex(p['ssm.kernel.B'])[0] * (torch.exp(step) - 1) / A
        C = torch.view_as_complex(p['ssm.kernel.C'])
        return torch.stack([2 * (C * B * torch.exp(step * t)).sum(-1).real for t in range(length)], dim=-1)
    rows = []
    for t in range(length):
        angles = t * 10000 ** -(torch.arange(16).double() / 16)
        hidden = p['ssm.kernel.fc1.weight'] @ torch.cat([angles.sin(), angles.cos()]) + p['ssm.kernel.fc1.bias']
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        value = (p['ssm.kernel.fc2.weight'] @ hidden + p['ssm.kernel.fc2.bias']).view_as(p['ssm.D'])
        rows.append(torch.exp(-torch.exp(p['ssm.kernel.log_decay']) * t) * value)
    return torch.stack(rows, dim=-1)


def bucket(distance, buckets=6, most=7):
    exact = buckets // 2
    if distance < exact:
        return distance
    return min(exact + int(math.log(distance / exact) / math.log(most / exact) * (buckets - exact)), buckets - 1)


def reference(p, x, mode):
    """[B, L, d] -> [B, L, d]"""
    seqlen = x.shape[1]
    taps = taps_of(p, seqlen)
    outputs = []  # of the SSM, [B, outputs, d] each
    for t in range(seqlen):
        outputs.append(sum(taps[..., t - j] * x[:, None, j] for j in range(t + 1)) + p['ssm.D'] * x[:, None, t])
    q, k, v, q_state = (x @ p['in_proj.weight'].T).unflatten(-1, (4, HEADS, 4)).unbind(2)
    rows = []
    for t in range(seqlen):
        start = t // WINDOW * WINDOW
        if mode != 'mf':
            states = torch.stack(outputs[start : t + 1], dim=2)  # [B, outputs, seen, d]
        else:
            states = (outputs[start - 1] if start else p['first_states'].expand(len(x), -1, -1)) + p['state_embed']
            states = states.unsqueeze(1)
        own, cross = [], []
        for head in range(HEADS):
            seen = range(max(start - WINDOW, 0), t + 1)
            bias = torch.stack([p['relative_bias'][bucket(t - s), head] for s in seen])
            scores = torch.einsum('bc,bsc->bs', q[:, t, head], k[:, seen[0] : t + 1, head]) / 2
            own.append(torch.einsum('bs,bsc->bc', torch.softmax(scores + bias, -1), v[:, seen[0] : t + 1, head]))
            weight = p['state_proj'][head] if mode == 'mh' else p['state_proj'][0].unflatten(-1, (HEADS, 8))[:, head]
            keys, values = (states[:, head if mode == 'mh' else 0] @ weight).chunk(2, dim=-1)
            scores = torch.einsum('bc,bsc->bs', q_state[:, t, head], keys) / 2
            cross.append(torch.einsum('bs,bsc->bc', torch.softmax(scores, -1), values))
        rows.append(torch.cat([*own, *cross], dim=-1) @ p['out_proj.weight'].T)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize('seqlen', (3, 8, 14))
@pytest.mark.parametrize(('mode', 'ssm'), CASES)
def test_output_and_gradients_follow_the_definition(mode, ssm, seqlen):
    if seqlen < 14 and ssm == 'filter':
        pytest.skip('the same as with s4d')
    layer = make(mode, ssm)
    if mode == 'mf' and seqlen < WINDOW:  # no context comes from the SSM
        x = torch.randn(2, seqlen, DIM, dtype=torch.double)
        layer.double()
        assert oracles.relative_error(layer(x), reference(layer.state_dict(), x, mode)) < 1e-10
        return
    assert_follows(layer, lambda p, x: reference(p, x, mode), (2, seqlen, DIM), tolerance=5e-4)


@torch.no_grad()
@pytest.mark.parametrize('ends', [(3, 7), (4, 13), (1, 2, 8)], ids=str)
@pytest.mark.parametrize('mode', MODES)
def test_prompts_and_steps_equal_the_whole_sequence(mode, ends):
    layer = make(mode).double()
    x = torch.randn(2, 19, DIM, dtype=torch.double)
    assert_continues(layer, layer.allocate_cache(2), x, *ends)


@pytest.mark.parametrize('mode', MODES)
def test_a_prompt_has_the_gradients_of_the_whole_sequence(mode):
    layer = make(mode).double()
    x = torch.randn(2, 14, DIM, dtype=torch.double)
    grads = []
    for cache in (None, layer.allocate_cache(2)):
        layer.zero_grad()
        layer(x, cache=cache).square().sum().backward()
        grads.append([parameter.grad for parameter in layer.parameters()])
    for (name, _), a, b in zip(layer.named_parameters(), *grads):
        if name != 'first_states':  # which the cache holds without gradients
            assert oracles.relative_error(a, b) < 1e-9, name


@torch.no_grad()
def test_the_cache_does_not_grow():
    layer = make('sh')
    cache = layer.allocate_cache(2)
    sizes = [part.shape for part in cache]
    layer(torch.randn(2, 21, DIM), cache=cache)
    assert (
        [part.shape for part in cache] == sizes
        and cache.keys.shape[2] == 2 * WINDOW
        and cache.position.tolist() == [21, 21]
    )


@torch.no_grad()
@pytest.mark.parametrize('mode', MODES)
def test_sequences_of_different_lengths_step_together(mode):
    layer = make(mode).double()
    x = torch.randn(2, 17, DIM, dtype=torch.double)
    cache = layer.allocate_cache(2)
    layer(x[:1, :3], cache=type(cache)(*(part[:1] for part in cache)))  # the first row is three tokens ahead
    for i in range(14):
        y = layer.step(torch.stack([x[0, 3 + i], x[1, i]]), cache)
        assert oracles.relative_error(y[0], layer(x[:1])[0, 3 + i]) < 1e-10
        assert oracles.relative_error(y[1], layer(x[1:])[0, i]) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize(('mode', 'ssm'), CASES)
def test_nothing_leaks_backwards(mode, ssm):
    layer = make(mode, ssm)
    x = torch.randn(1, 15, DIM)
    y = layer(x)
    for position in range(15):
        changed = x.clone()
        changed[:, position:] += torch.randn(1, 15 - position, DIM)
        other = layer(changed)
        torch.testing.assert_close(other[:, :position], y[:, :position])
        assert not torch.allclose(other[:, position], y[:, position])


@torch.no_grad()
@pytest.mark.parametrize('mode', MODES)
def test_later_windows_remember_the_first_token(mode):
    """Through the SSM, since attention does not reach it."""
    layer, x = make(mode), torch.randn(1, 15, DIM)
    changed = x.clone()
    changed[:, 0] += 1
    assert (layer(changed)[:, -1] - layer(x)[:, -1]).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize(('mode', 'ssm'), CASES)
def test_autocast_is_close_to_full_precision(mode, ssm):
    layer, x = make(mode, ssm), torch.randn(2, 14, DIM)
    expected = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        assert oracles.relative_error(layer(x), expected) < 3e-2
        if ssm == 's4d':
            cache = layer.allocate_cache(2)
            assert oracles.relative_error(layer(x, cache=cache), expected) < 3e-2


def test_every_parameter_is_used_and_the_ssm_has_no_weight_decay():
    for mode, ssm in CASES:
        layer = make(mode, ssm)
        layer(torch.randn(2, 9, DIM)).square().sum().backward()
        assert [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()] == []
        names = ('log_decay',) if ssm == 'filter' else ('inv_dt', 'B', 'A_real', 'A_imag')
        assert layer.no_weight_decay() == {f'ssm.kernel.{name}' for name in names}


@torch.no_grad()
def test_compiled_in_one_graph():
    layer, x = make('mf'), torch.randn(2, 14, DIM)
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    assert oracles.relative_error(compiled(x), layer(x)) < 1e-5


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(mode='SM'), "mode must be one of 'sh', 'mh', 'mf', got 'SM'"),
        (dict(ssm='s5'), "ssm must be one of 's4d', 'filter', got 's5'"),
        (dict(window=0), 'window must be an integer of at least 1, got 0'),
        (dict(num_heads=4, head_dim=None), 'num_heads must divide the 6 channels, or give head_dim; got 4'),
        (dict(max_distance=5, num_buckets=6), 'max_distance must be an integer of at least 6, got 5'),
        (dict(d_state=3), 'd_state must be even.* got 3'),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BlockState(DIM, **options)


def test_filters_have_no_steps():
    with pytest.raises(ValueError, match="has steps only with ssm='s4d', got ssm='filter'"):
        make('sh', 'filter').allocate_cache(1)
