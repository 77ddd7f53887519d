"""VMamba and Vim on the scan of Mamba-2: variants, the official layout, and the mixers against their definitions."""

import official_mamba2 as official
import oracles
import pytest
import timm
import torch
from mixer_cases import assert_follows

from vmamba.layers import SSD2D, BiMamba2

VARIANTS = [
    # name, parameters, tensors (None where no official model exists), official name
    ('vmamba_t_m2', 25_340_296, 194, 'vmamba_tiny_m2'),
    ('vmamba_s_m2', 39_079_816, 330, 'vmamba_small_m2'),
    ('vmamba_b_m2', 67_527_528, 330, 'vmamba_base_m2'),
    ('vim2_t', 6_442_312, None, None),
    ('vim2_s', 23_525_032, None, None),
]


@pytest.mark.parametrize('name,count,tensors,official_name', VARIANTS, ids=[v[0] for v in VARIANTS])
def test_variants(name, count, tensors, official_name):
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == count
    assert tensors in (None, len(model.state_dict()))
    cfg = model.pretrained_cfg
    assert not cfg.get('url') and not cfg.get('hf_hub_id') and cfg['tag'] == 'untrained'
    assert cfg['paper_ids'][1:] == ('arXiv:2405.21060',)
    if official_name:
        with pytest.warns(UserWarning, match=name):
            assert timm.create_model(official_name, depths=(1,), device='meta').pretrained_cfg == cfg


def randomised(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return layer


def ssd2d(p, h):
    """The mixer of VMamba's m2 models from its parameters; each route's pixels are listed."""
    routes, heads, side = p['D'].shape
    states = (p['x_proj.weight'].shape[0] // routes - heads) // 2
    x = oracles.gelu(oracles.depthwise_conv2d(h @ p['in_proj.weight'].T, p['conv2d.weight'][:, 0]))
    out = {}
    for k, pixels in enumerate(oracles.route_pixels(*h.shape[1:3])):
        u = torch.stack([x[:, row, column] for row, column in pixels], dim=1)
        dt, B, C = (u @ p['x_proj.weight'].view(routes, -1, u.shape[-1])[k].T).split([heads, states, states], dim=-1)
        parameters = p['A_log'][k], p['D'][k].flatten(), p['dt_bias'][k]
        y = official.ssd(torch.cat([u, B, C], dim=-1), dt, *parameters, side, states)
        for pixel, value in zip(pixels, y.unbind(dim=1), strict=True):
            out[pixel] = out.get(pixel, 0) + value
    rows = [torch.stack([out[row, column] for column in range(h.shape[2])], dim=1) for row in range(h.shape[1])]
    y = oracles.layer_norm(torch.stack(rows, dim=1), p['out_norm.weight'], p['out_norm.bias'])
    return y @ p['out_proj.weight'].T


def bimamba2(p, h):
    """The mixer of Vim from its parameters, the second direction by flipping what it sees and its output."""
    (_, heads), inner, channels = p['A_log'].shape, len(p['norm.weight']), p['conv1d_weight'].shape[1]
    z, xBC, dt = (h @ p['in_proj.weight'].T).split([inner, channels, heads], dim=-1)
    total = 0
    for k in range(2):
        turn = (lambda t: t.flip(1)) if k else (lambda t: t)
        conv, _ = oracles.causal_conv1d(turn(xBC).mT, p['conv1d_weight'][k], p['conv1d_bias'][k])
        parameters = p['A_log'][k], p['D'][k], p['dt_bias'][k]
        y = official.ssd(oracles.silu(conv.mT), turn(dt), *parameters, inner // heads, (channels - inner) // 2)
        total = total + turn(y) / 2
    return official.gated_norm(total, z, p['norm.weight']) @ p['out_proj.weight'].T


MIXERS = [
    pytest.param(lambda: SSD2D(20, d_state=3), ssd2d, (2, 3, 5, 20), id='ssd2d'),
    pytest.param(lambda: SSD2D(12, ssm_ratio=2.0, num_heads=3, d_state=4), ssd2d, (1, 4, 2, 12), id='ssd2d-wide'),
    pytest.param(lambda: BiMamba2(12, d_state=5, headdim=4), bimamba2, (2, 7, 12), id='bimamba2'),
    pytest.param(lambda: BiMamba2(10, 1.0, 3, 5, d_conv=2), bimamba2, (2, 4, 10), id='bimamba2-narrow'),
]


@pytest.mark.parametrize('make,definition,shape', MIXERS)
def test_the_mixer_follows_the_definition(make, definition, shape):
    layer = randomised(make())
    assert_follows(layer, definition, shape)


def test_the_official_layout_of_the_m2_models_loads():
    options = dict(depths=(1, 2), embed_dim=16, d_state=3)
    model = timm.create_model('vmamba_t_m2', **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    official_names = {}
    for key, value in model.state_dict().items():
        key = key.replace('stages.1.downsample.conv.', 'layers.0.downsample.1.')
        key = key.replace('stages.1.downsample.norm.', 'layers.0.downsample.3.').replace('stages.', 'layers.')
        for ours, theirs in (('conv1', '0'), ('norm1', '2'), ('conv2', '5'), ('norm2', '7')):
            key = key.replace(f'stem.{ours}.', f'patch_embed.{theirs}.')
        key = key.replace('.norm1.', '.norm.').replace('.mixer.', '.op.').replace('.conv2d.', '.conv2d.1.')
        if key.endswith('x_proj.weight'):
            key, value = key.replace('x_proj.weight', 'x_proj_weight'), value.unflatten(0, (4, -1))
        key = key.replace('.dt_bias', '.dt_projs_bias').replace('.A_log', '.A_logs')
        key = key[:-1] + 'Ds' if key.endswith('.D') else key
        key = key.replace('head.fc.', 'classifier.head.')
        official_names[f'classifier.{key}' if key.startswith('norm.') else key] = value
    shapes = {key.partition('blocks.0.op.')[2]: tuple(v.shape) for key, v in official_names.items()}
    assert shapes['A_logs'] == (4, 2) and shapes['Ds'] == (4, 2, 16) and shapes['x_proj_weight'] == (4, 8, 32)
    overlay = dict(state_dict=official_names)
    loaded = timm.create_model('vmamba_t_m2', pretrained=True, pretrained_cfg_overlay=overlay, **options)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_initial_values():
    ssd, bidirectional = SSD2D(64), BiMamba2(128, headdim=2)
    assert not ssd.A_log.any() and (ssd.D == 1).all()
    assert 0 <= ssd.dt_bias.min() and 0.05 < ssd.dt_bias.max() <= 0.1
    assert 1 <= bidirectional.A_log.exp().min() < 1.5 and 15 < bidirectional.A_log.exp().max() <= 16.001
    assert not torch.equal(*bidirectional.dt_bias) and not torch.equal(*bidirectional.conv1d_weight)


@pytest.mark.parametrize(
    'name,options,message',
    [
        ('vmamba_t_m2', dict(gate=True), 'gate=True'),
        ('vmamba_t_m2', dict(mixer='ssd'), "mixer must be one of 'ss2d', 'ssd2d', got 'ssd'"),
        ('vmamba_t_m2', dict(embed_dim=34), 'num_heads must divide the 34 inner channels, got 3'),
        ('vim2_t', dict(mixer='ssd'), "mixer must be one of 'mamba', .*, got 'ssd'"),
        ('vim2_t', dict(headdim=100), 'headdim must divide the 384 inner channels, got 100'),
    ],
)
def test_options_that_make_no_model_are_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, device='meta', **options)
