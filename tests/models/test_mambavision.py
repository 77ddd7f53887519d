"""MambaVision: variants, official checkpoints, windows, and the models against the definition in float64."""

import argparse
import json

import official_mambavision as official
import oracles
import pytest
import safetensors.torch
import timm
import torch
from timm.data import resolve_data_config

from vmamba.layers import MambaVisionMixer
from vmamba.models.mambavision import MambaVision, from_windows, to_windows

VARIANTS = [
    # name, tag, official name, parameters, tensors, windows, crop, Hugging Face repository
    ('mambavision_t', 'in1k', 'mamba_vision_T', 31_794_248, 252, (14, 7), 1.0, 'MambaVision-T-1K'),
    ('mambavision_t2', 'in1k', 'mamba_vision_T2', 35_104_008, 298, (14, 7), 0.98, 'MambaVision-T2-1K'),
    ('mambavision_s', 'in1k', 'mamba_vision_S', 50_140_584, 285, (14, 7), 0.93, 'MambaVision-S-1K'),
    ('mambavision_b', 'in1k', 'mamba_vision_B', 97_685_288, 356, (14, 7), 1.0, 'MambaVision-B-1K'),
    ('mambavision_b', 'in21k_ft_in1k', 'mamba_vision_B_21k', 97_685_288, 356, (14, 7), 1.0, 'MambaVision-B-21K'),
    ('mambavision_l', 'in1k', 'mamba_vision_L', 227_961_048, 356, (14, 7), 1.0, 'MambaVision-L-1K'),
    ('mambavision_l', 'in21k_ft_in1k', 'mamba_vision_L_21k', 227_961_048, 356, (14, 7), 1.0, 'MambaVision-L-21K'),
    ('mambavision_l2', 'in1k', 'mamba_vision_L2', 241_554_824, 389, (14, 7), 1.0, 'MambaVision-L2-1K'),
    (
        *('mambavision_l2', 'in21k_ft_in1k_512', 'mamba_vision_L2_512_21k', 241_554_824, 389, (32, 16), 0.93),
        'MambaVision-L2-512-21K',
    ),
    (
        *('mambavision_l3', 'in21k_ft_in1k_256', 'mamba_vision_L3_256_21k', 739_570_472, 601, (16, 8), 1.0),
        'MambaVision-L3-256-21K',
    ),
    (
        *('mambavision_l3', 'in21k_ft_in1k_512', 'mamba_vision_L3_512_21k', 739_570_472, 601, (32, 16), 0.93),
        'MambaVision-L3-512-21K',
    ),
]
SHAPE = dict(depths=(1, 2, 3, 2), embed_dim=8, stem_dim=6, num_heads=(2, 4), window_size=(3, 2))
LIKE = dict(windows=(3, 2), heads=(2, 4))


def make_state(**kwargs):
    return official.mambavision_state((1, 2, 3, 2), 8, 6, **kwargs)


def load(path, variant='mambavision_t', **kwargs):
    overlay = dict(file=str(path))
    return timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=overlay, **{**SHAPE, **kwargs}).eval()


@pytest.mark.parametrize('name,tag,official_name,count,tensors,windows,crop,repo', VARIANTS, ids=lambda v: str(v)[:30])
def test_variants(name, tag, official_name, count, tensors, windows, crop, repo):
    with pytest.warns(UserWarning, match=name):
        model = timm.create_model(official_name, device='meta')
    cfg = model.pretrained_cfg
    assert isinstance(model, MambaVision) and (cfg['architecture'], cfg['tag']) == (name, tag)
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(model.state_dict()) == tensors
    assert tuple(stage.window_size for stage in model.stages[2:]) == windows
    assert cfg['input_size'] == (3, windows[1] * 32, windows[1] * 32)
    assert (cfg['hf_hub_id'], cfg['hf_hub_filename']) == (f'nvidia/{repo}', 'model.safetensors')
    assert cfg['license'] == 'cc-by-nc-sa-4.0'
    config = resolve_data_config(model=model)
    assert (config['crop_pct'], config['crop_mode']) == (crop, 'squash' if '512' in tag else 'center')


def test_windows_come_from_the_tag_alone(tmp_path):
    """Neither other sizes of images nor a saved configuration change what the weights were trained with."""
    model = timm.create_model('mambavision_nano', pretrained_cfg_overlay=dict(input_size=(3, 64, 64)))
    assert model.stages[2].window_size == 2
    model.pretrained_cfg['input_size'] = (3, 64, 64)
    timm.models.save_for_hf(model, tmp_path)
    assert timm.create_model(f'local-dir:{tmp_path}', device='meta').stages[2].window_size == 2
    assert timm.create_model('mambavision_nano', window_size=(4, 3), device='meta').stages[3].window_size == 3


def test_windows_of_a_tag_are_saved_for_readers_that_ignore_the_tag(tmp_path):
    """transformers builds a saved model from its architecture and arguments alone."""
    pytest.importorskip('timm.models._input')  # earlier versions do not save the arguments of models
    model = timm.create_model('mambavision_l2.in21k_ft_in1k_512', depths=(1, 1, 2, 2), embed_dim=32, stem_dim=8)
    timm.models.save_for_hf(model, tmp_path)
    saved = json.loads((tmp_path / 'config.json').read_text())
    rebuilt = timm.create_model(saved['architecture'], device='meta', **saved['model_args'])
    assert [stage.window_size for stage in rebuilt.stages[2:]] == [32, 16]


FILES = ['safetensors', 'pth.tar', 'encoder', 'own']


@torch.no_grad()
@pytest.mark.parametrize('layout', FILES)
def test_official_files_give_the_official_logits(tmp_path, layout):
    state, path = make_state(layer_scale=layout != 'own'), tmp_path / f'model.{layout}'
    if layout == 'safetensors':
        safetensors.torch.save_file({f'model.{key}': value for key, value in state.items()}, path)
    elif layout == 'own':
        torch.save({'model': state}, path)
        torch.save(load(path).state_dict(), path)
    else:
        prefix = 'module.encoder.' if layout == 'encoder' else ''
        weights = {prefix + key: value for key, value in state.items()}
        torch.save({'epoch': 1, 'state_dict': weights, 'args': argparse.Namespace(lr=1), 'optimizer': {}}, path)
    model = load(path, init_values=None if layout == 'own' else 1.0)
    images = torch.randn(2, 3, 72, 100)
    expected = official.mambavision_logits(state, images, **LIKE)
    assert oracles.relative_error(model(images), expected) < 1e-4
    assert oracles.relative_error(model.double()(images.double()), expected) < 1e-6


@pytest.mark.parametrize('size', [(64, 64), (50, 90)], ids=str)
def test_maps_and_gradients_follow_the_definition(tmp_path, size):
    """With a batch of 2: on CPUs, PyTorch's BatchNorm in evaluation has wrong gradients at batch 1."""
    state = make_state()
    torch.save(state, tmp_path / 'model.pth')
    model = load(tmp_path / 'model.pth').double()
    images = torch.randn(2, 3, *size, dtype=torch.double)
    results = []
    for maps in (
        lambda x: model.forward_intermediates(x, intermediates_only=True),
        lambda x: official.mambavision_maps(state, x, **LIKE),
    ):
        x = images.clone().requires_grad_()
        out = maps(x)
        sum(y.square().mean() for y in out).backward()
        results.append([*out, x.grad])
    for actual, expected in zip(*results, strict=True):
        assert oracles.relative_error(actual, expected) < 1e-8


@torch.no_grad()
def test_a_dense_checkpoint_gives_the_backbone(tmp_path, caplog):
    state = make_state()
    dense = {f'backbone.{key}': v for key, v in state.items() if not key.startswith(('norm.', 'head.'))}
    dense.update(
        {f'backbone.outnorm{i}.weight': torch.rand(8 * 2**i) for i in range(4)}, **{'neck.bias': torch.ones(2)}
    )
    torch.save({'state_dict': dense}, tmp_path / 'seg.pth')
    model = load(tmp_path / 'seg.pth', features_only=True)
    assert 'no final norm' in caplog.text
    images = torch.randn(2, 3, 64, 48)
    for actual, expected in zip(model(images), official.mambavision_maps(state, images, **LIKE), strict=True):
        assert oracles.relative_error(actual, expected) < 1e-4


def test_the_mixer_follows_the_definition():
    layer = MambaVisionMixer(20)
    names = {'conv1d_x_weight': 'conv1d_x.weight', 'conv1d_z_weight': 'conv1d_z.weight'}
    names.update({f'dt_proj_{kind}': f'dt_proj.{kind}' for kind in ('weight', 'bias')})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    wide = {key: value.double().requires_grad_() for key, value in layer.state_dict().items()}
    x = torch.randn(3, 7, 20, requires_grad=True)
    wide_x = x.detach().double().requires_grad_()
    parameters = {names.get(key, key): v.unsqueeze(1) if 'conv1d' in key else v for key, v in wide.items()}
    y, expected = layer(x), official.mixer(parameters, wide_x)
    assert oracles.relative_error(y, expected) < 1e-5
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    assert oracles.relative_error(x.grad, wide_x.grad) < 1e-5
    for key, parameter in layer.named_parameters():
        assert oracles.relative_error(parameter.grad, wide[key].grad) < 1e-4, key


@pytest.mark.parametrize('size', [(6, 9), (5, 8), (2, 2)], ids=str)
def test_windows_and_back(size):
    x = torch.randn(2, *size, 4)
    windows = to_windows(x, 3)
    assert windows.shape == (2 * -(-size[0] // 3) * -(-size[1] // 3), 9, 4)
    torch.testing.assert_close(windows[0, 1], x[0, 0, 1])
    assert torch.equal(from_windows(windows, 3, x.permute(0, 3, 1, 2).shape), x)


def test_initial_weights():
    """The step size starts at softplus(0): linear layers overwrite Mamba's initialisation, as in the official code."""
    model = timm.create_model('mambavision_nano')
    mixer = model.stages[2].blocks[0].mixer
    assert not mixer.dt_proj_bias.any() and (mixer.D == 1).all()
    torch.testing.assert_close(mixer.A_log.detach(), torch.arange(1.0, 9).log().expand(64, 8))
    for weight in (mixer.x_proj.weight, mixer.in_proj.weight, mixer.dt_proj_weight):
        assert 0.017 < weight.std() < 0.023


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(num_heads=(3, 2)), 'num_heads must divide .* 128, got 3'),
        (dict(num_heads=(2,)), r'num_heads must have a value for each of the 2 stages of tokens, got \(2,\)'),
        (dict(window_size=0), r'window_size\[0\] must be .* got 0'),
        (dict(window_size=2.5), r'window_size\[0\] must be .* got 2.5'),
        (dict(stem_dim=0), 'stem_dim .* got 0'),
    ],
)
def test_options_that_make_no_model_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('mambavision_nano', device='meta', **options)
