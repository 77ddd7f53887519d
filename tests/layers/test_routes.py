"""Causal mixers in two directions and along four routes."""

import oracles
import pytest
import torch

from vmamba.kernels import cross_merge, cross_scan
from vmamba.layers import H3, S4D, Attention, Bidirectional, FourRoutes, Mamba, Mamba2

MIXERS = {
    'mamba': lambda: Mamba(8, d_state=4),
    'mamba2': lambda: Mamba2(8, d_state=4, headdim=4),
    's4d': lambda: S4D(8, d_state=4),
    'h3': lambda: H3(8, d_state=4),
    'attention': lambda: Attention(8, 2, causal=True),
}


@torch.no_grad()
@pytest.mark.parametrize('make', MIXERS.values(), ids=MIXERS)
def test_a_causal_mixer_does_not_see_later_tokens(make):
    mixer, x = make(), torch.randn(2, 9, 8)
    changed = x.clone()
    changed[:, 6] += 1
    assert oracles.relative_error(mixer(changed)[:, :6], mixer(x)[:, :6]) < 1e-5
    assert oracles.relative_error(mixer(changed)[:, 6:], mixer(x)[:, 6:]) > 1e-3


@torch.no_grad()
def test_bidirectional_is_the_mean_of_both_directions():
    layer, x = Bidirectional(MIXERS['mamba']), torch.randn(2, 9, 8)
    along, against = layer.mixers
    expected = (along(x) + torch.flip(against(torch.flip(x, [1])), [1])) / 2
    assert oracles.relative_error(layer(x), expected) < 1e-6
    assert not torch.equal(along.in_proj.weight, against.in_proj.weight)


@torch.no_grad()
def test_four_routes_are_those_of_the_cross_scan():
    layer, x = FourRoutes(MIXERS['s4d']), torch.randn(2, 3, 5, 8)
    routes = cross_scan(x.permute(0, 3, 1, 2))  # [B, 4, C, L]
    y = torch.stack([mixer(routes[:, k].mT).mT for k, mixer in enumerate(layer.mixers)], dim=1)
    expected = cross_merge(y, 3, 5).permute(0, 2, 3, 1) / 4
    assert oracles.relative_error(layer(x), expected) < 1e-6
