"""Attention against sums over keys, one query at a time in float64, and its steps against whole sequences."""

import math

import oracles
import pytest
import torch
from mixer_cases import assert_continues, assert_follows, assert_packs

from vmamba.layers import Attention

CAUSAL = {
    'causal': {},
    'grouped': dict(num_heads_kv=2, qkv_proj_bias=False, out_proj_bias=False),
    'rotary': dict(rotary_emb_dim=4, head_dim=6, softmax_scale=0.3),
    'interleaved': dict(rotary_emb_dim=2, rotary_emb_interleaved=True, rotary_emb_base=50.0, num_heads_kv=1),
    'convolution': dict(d_conv=3, num_heads_kv=2, rotary_emb_dim=2),
    'window': dict(window=3),
}
NARROW = dict(window=2)


def make(**options):
    return Attention(8, 4, **options)


def turn(x, position, dim, base, interleaved):
    """Rotary embedding of [B, head_dim] at a position, pair by pair as complex numbers."""
    out = x.clone()
    for i in range(dim // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
        angle = torch.tensor(position * base ** (-2 * i / dim), dtype=x.dtype)
        turned = torch.complex(x[:, a], x[:, b]) * torch.polar(torch.ones_like(angle), angle)
        out[:, a], out[:, b] = turned.real, turned.imag
    return out


def reference(p, x, causal, heads=4, num_heads_kv=4, head_dim=2, softmax_scale=None, window=None, d_conv=0,
              rotary_emb_dim=0, rotary_emb_base=1e4, rotary_emb_interleaved=False, **_):  # fmt: skip
    """p has the official names, in float64. [B, L, d] -> [B, L, d]"""
    qkv = x @ p['in_proj.weight'].T + p.get('in_proj.bias', 0)
    if d_conv:
        qkv = oracles.causal_conv1d(qkv.mT, p['conv1d.weight'][:, 0], p['conv1d.bias'], None)[0].mT
    parts = [part * head_dim for part in (heads, num_heads_kv, num_heads_kv)]
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in qkv.split(parts, dim=-1))
    rotary = rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved
    rows = []
    for t in range(x.shape[1]):
        outputs = []
        for head in range(heads):
            group = head * num_heads_kv // heads
            query = turn(q[:, t, head], t, *rotary)
            seen = [s for s in range(x.shape[1]) if (s <= t or not causal) and abs(t - s) < (window or math.inf)]
            scores = [(query * turn(k[:, s, group], s, *rotary)).sum(-1) for s in seen]
            weights = torch.softmax(torch.stack(scores) * (softmax_scale or head_dim**-0.5), dim=0)
            outputs.append(sum(weight[:, None] * v[:, s, group] for weight, s in zip(weights, seen)))
        rows.append(torch.cat(outputs, dim=-1))
    return torch.stack(rows, dim=1) @ p['out_proj.weight'].T + p.get('out_proj.bias', 0)


@pytest.mark.parametrize('causal', (True, False), ids=('causal', 'both-sides'))
@pytest.mark.parametrize('options', [*CAUSAL.values(), NARROW], ids=[*CAUSAL, 'narrow-window'])
def test_output_and_gradients_follow_the_definition(options, causal):
    if 'd_conv' in options and not causal:
        with pytest.raises(ValueError, match='d_conv=3 needs causal=True'):
            make(**options)
        return
    layer = make(causal=causal, **options)
    assert_follows(layer, lambda p, x: reference(p, x, causal, **options), (2, 6, 8))


@torch.no_grad()
@pytest.mark.parametrize('options', CAUSAL.values(), ids=CAUSAL)
def test_prompts_and_steps_equal_the_whole_sequence(options):
    layer = make(causal=True, **options).double()
    x = torch.randn(2, 9, 8, dtype=torch.double)
    cache = layer.allocate_cache(2, max_seqlen=9)
    assert_continues(layer, cache, x, 2, 6)
    with pytest.raises(ValueError, match='the cache has room for 9 tokens, got 10'):
        layer.step(x[:, 0], cache)


@torch.no_grad()
@pytest.mark.parametrize('options', CAUSAL.values(), ids=CAUSAL)
def test_steps_of_sequences_that_are_of_different_lengths(options):
    layer = make(causal=True, **options).double()
    x, ends = torch.randn(2, 9, 8, dtype=torch.double), (6, 2)
    cache = layer.allocate_cache(2, max_seqlen=9)
    for row, end in enumerate(ends):  # the cache of a row, longest first
        part = [t[row : row + 1] if t is not None and t.ndim else t for t in cache]
        layer(x[row : row + 1, :end], cache=type(cache)(*part)._replace(length=torch.zeros((), dtype=torch.long)))
    cache.length.fill_(max(ends))
    for step in range(3):
        y = layer.step(torch.stack([x[row, end + step] for row, end in enumerate(ends)]), cache)
        for row, end in enumerate(ends):
            expected = layer(x[row : row + 1, : end + step + 1])[0, -1]
            assert oracles.relative_error(y[row], expected) < 1e-10


@pytest.mark.parametrize('options', [*CAUSAL.values(), NARROW], ids=[*CAUSAL, 'narrow-window'])
def test_packed_sequences_do_not_see_each_other(options):
    layer = make(causal=options is not NARROW, **options).double()
    assert_packs(layer, torch.randn(1, 9, 8, dtype=torch.double), [4, 1, 4])
    with pytest.raises(ValueError, match='give seq_idx or a cache, not both'):
        make(causal=True)(torch.randn(1, 1, 8), make(causal=True).allocate_cache(1, 1), torch.zeros(1, 1))


def test_official_names():
    names = set(make(causal=True, d_conv=4, layer_idx=1).state_dict())
    assert names == {f'{module}.{part}' for module in ('in_proj', 'conv1d', 'out_proj') for part in ('weight', 'bias')}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(num_heads_kv=3), 'num_heads_kv must divide the 4 heads, got 3'),
        (dict(rotary_emb_dim=4), 'rotary_emb_dim must be even and at most 2, got 4'),
        (dict(window=0), 'window must be an integer of at least 1, got 0'),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
    with pytest.raises(ValueError, match='num_heads must divide the 8 channels, or give head_dim; got 3'):
        Attention(8, 3)
    with pytest.raises(ValueError, match='attention has steps only with causal=True'):
        make().allocate_cache(1, 4)
    with pytest.raises(ValueError, match='max_seqlen must be an integer of at least 1, got 0'):
        make(causal=True).allocate_cache(1, 0)
