"""VMamba's checkpoint layouts, and what the loading of both families accepts."""

import re

import official
import oracles
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import vmamba  # noqa: F401, registers the models

DEPTHS, DIM = (1, 2), 12


def load(path, variant='vmamba_s', **kwargs):
    kwargs = {'depths': DEPTHS, 'embed_dim': DIM, **kwargs}
    return timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs).eval()


def save(path, state, **others):
    torch.save({'model': state, **others}, path)
    return path


def renamed(state, *rules):
    out = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        out[key] = value
    return out


def legacy(state):
    """The names of the first release."""
    stem = [(r'^patch_embed\.0\.', 'patch_embed.proj.'), (r'^patch_embed\.2\.', 'patch_embed.norm.')]
    return renamed(
        state,
        *(stem if 'patch_embed.5.weight' not in state else []),
        (r'(blocks\.\d+)\.norm\.', r'\1.ln_1.'),
        (r'\.op\.', '.self_attention.'),
        (r'^classifier\.', ''),
    )


def one_file(state):
    """The later single-file code: projections of all routes stacked, downsampling without permutations."""
    out = renamed(
        state,
        (r'\.downsample\.1\.', '.downsample.0.'),
        (r'\.downsample\.3\.', '.downsample.1.'),
        (r'\.downsample\.norm\.', '.downsample.1.'),
        (r'\.downsample\.reduction\.', '.downsample.2.'),
        (r'\.(x_proj|dt_projs)_weight$', r'.\1.weight'),
    )
    return {
        key: value.flatten(0, 1) if key.endswith(('x_proj.weight', 'dt_projs.weight')) else value
        for key, value in out.items()
    }


def channel_first(state):
    """Linear layers written as 1x1 convolutions."""
    linear = ('in_proj.weight', 'out_proj.weight', 'fc1.weight', 'fc2.weight', 'reduction.weight', 'x_proj.weight')
    linear = (*linear, 'dt_projs.weight', 'downsample.2.weight')
    return {
        key: value[..., None, None] if key.endswith(linear) and value.ndim == 2 else value
        for key, value in state.items()
    }


def one_dimensional(state):
    """The projections of all routes as convolutions of width 1."""
    grouped = ('x_proj.weight', 'dt_projs.weight')
    return {key: value[..., None] if key.endswith(grouped) else value for key, value in state.items()}


LAYOUTS = {
    'release': lambda state: state,
    'legacy': legacy,
    'one-file': one_file,
    'one-file-1x1': lambda state: channel_first(one_file(state)),
    'one-file-1d': lambda state: one_dimensional(one_file(state)),
    'release-1x1': channel_first,
    'distributed': lambda state: {f'module.{key}': value for key, value in state.items()},
}


@torch.no_grad()
@pytest.mark.parametrize('v0', [pytest.param(False, id='current'), pytest.param(True, id='v0')])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_classification_layout_gives_the_same_logits(tmp_path, layout, v0):
    state = official.vmamba_state(DEPTHS, DIM, 2.0, v0)
    model = load(save(tmp_path / 'ckpt.pth', LAYOUTS[layout](state)), 'vmamba_t_v0' if v0 else 'vmamba_s')
    images = torch.randn(1, 3, 24, 20)
    assert oracles.relative_error(model(images), official.vmamba_logits(state, images)) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize('v0', [pytest.param(False, id='current'), pytest.param(True, id='v0')])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_gives_the_same_parameters(tmp_path, layout, v0):
    state, variant = official.vmamba_state(DEPTHS, DIM, 2.0, v0), 'vmamba_t_v0' if v0 else 'vmamba_s'
    release = load(save(tmp_path / 'release.pth', state), variant).state_dict()
    other = load(save(tmp_path / 'other.pth', LAYOUTS[layout](state)), variant).state_dict()
    assert release.keys() == other.keys()
    assert all(torch.equal(release[key], other[key]) for key in release)


FOUR_STAGES = dict(depths=(1, 1, 1, 1), embed_dim=8)


def dense(state):
    """The checkpoint of a detector or segmenter around the backbone."""
    out = {f'backbone.{key}': value for key, value in state.items() if not key.startswith('classifier.')}
    for i in range(4):
        out[f'backbone.outnorm{i}.weight'] = torch.rand(8 * 2**i)
        out[f'backbone.outnorm{i}.bias'] = torch.rand(8 * 2**i)
    out['neck.lateral_convs.0.conv.weight'] = torch.rand(4, 4, 1, 1)
    out['neck.norm.bias'] = torch.rand(4)
    out['roi_head.bbox_head.fc_cls.bias'] = torch.rand(5)
    return out


@torch.no_grad()
@pytest.mark.parametrize('v0', [pytest.param(False, id='current'), pytest.param(True, id='v0')])
@pytest.mark.parametrize(
    'layout,key', [('release', 'model'), ('one-file', 'state_dict'), ('release-1x1', 'state_dict')]
)
def test_the_backbone_of_a_dense_checkpoint_gives_its_features(tmp_path, layout, key, v0):
    state = official.vmamba_state((1, 1, 1, 1), 8, 2.0, v0)
    torch.save({key: dense(LAYOUTS[layout](state)), 'meta': {'epoch': 12}}, tmp_path / 'det.pth')
    model = load(tmp_path / 'det.pth', 'vmamba_t_v0' if v0 else 'vmamba_s', features_only=True, **FOUR_STAGES)
    images = torch.randn(1, 3, 40, 36)
    for feature, expected in zip(model(images), official.vmamba_maps(state, images)):
        assert oracles.relative_error(feature.permute(0, 2, 3, 1), expected) < 1e-4


@torch.no_grad()
def test_a_dense_checkpoint_gives_a_headless_model_its_last_norm(tmp_path):
    state = official.vmamba_state((1, 1, 1, 1), 8, 2.0)
    checkpoint = dense(state)
    torch.save({'state_dict': checkpoint}, tmp_path / 'seg.pth')
    model = load(tmp_path / 'seg.pth', num_classes=0, **FOUR_STAGES)
    images = torch.randn(1, 3, 32, 32)
    norm = [checkpoint[f'backbone.outnorm3.{name}'].double() for name in ('weight', 'bias')]
    expected = oracles.layer_norm(official.vmamba_maps(state, images)[-1], *norm).mean(dim=(1, 2))
    assert oracles.relative_error(model(images), expected) < 1e-4


def test_a_dense_checkpoint_into_a_classifier_is_an_error(tmp_path):
    path = save(tmp_path / 'det.pth', dense(official.vmamba_state((1, 1, 1, 1), 8)))
    with pytest.raises(RuntimeError, match=r'head\.fc\.weight'):
        load(path, **FOUR_STAGES)


@torch.no_grad()
def test_a_classification_checkpoint_loads_without_its_classifier(tmp_path):
    state = official.vmamba_state(DEPTHS, DIM)
    model = load(save(tmp_path / 'ckpt.pth', state), num_classes=0)
    images = torch.randn(1, 3, 24, 20)
    last = official.vmamba_maps(state, images)[-1]
    norm = [state[f'classifier.norm.{name}'].double() for name in ('weight', 'bias')]
    assert oracles.relative_error(model(images), oracles.layer_norm(last, *norm).mean(dim=(1, 2))) < 1e-4


def test_another_number_of_classes_starts_a_fresh_classifier_and_says_so(tmp_path, caplog):
    state = official.vmamba_state(DEPTHS, DIM)
    model = load(save(tmp_path / 'ckpt.pth', state), num_classes=7)
    assert model.head.fc.weight.shape == (7, 24)
    assert torch.equal(model.norm.weight, state['classifier.norm.weight'])
    assert 'classifier of 7 classes' in caplog.text


def test_a_checkpoint_with_the_wanted_number_of_classes_keeps_its_classifier(tmp_path, caplog):
    state = official.vmamba_state(DEPTHS, DIM, num_classes=7)
    model = load(save(tmp_path / 'ckpt.pth', state), num_classes=7)
    assert torch.equal(model.head.fc.weight, state['classifier.head.weight'])
    assert torch.equal(model.head.fc.bias, state['classifier.head.bias'])
    assert 're-initialised' not in caplog.text


@pytest.mark.parametrize('kwargs', [dict(), dict(num_classes=1000)], ids=['default', 'explicit'])
def test_another_number_of_classes_that_nobody_asked_for_is_an_error(tmp_path, kwargs):
    path = save(tmp_path / 'ckpt.pth', official.vmamba_state(DEPTHS, DIM, num_classes=100))
    with pytest.raises(RuntimeError, match=r'head\.fc\.weight \(100, 24\) instead of \(1000, 24\)'):
        load(path, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize('v0', [pytest.param(False, id='current'), pytest.param(True, id='v0')])
def test_one_image_channel_sums_the_colours(tmp_path, v0):
    state = official.vmamba_state(DEPTHS, DIM, 2.0, v0)
    model = load(save(tmp_path / 'ckpt.pth', state), 'vmamba_t_v0' if v0 else 'vmamba_s', in_chans=1)
    grey = torch.randn(1, 1, 24, 20)
    expected = official.vmamba_logits(state, grey.expand(-1, 3, -1, -1))
    assert oracles.relative_error(model(grey), expected) < 1e-4


@torch.no_grad()
def test_four_image_channels_repeat_the_colours(tmp_path):
    state = official.vmamba_state(DEPTHS, DIM)
    model = load(save(tmp_path / 'ckpt.pth', state), in_chans=4)
    weight = state['patch_embed.0.weight']
    expected = torch.cat([weight, weight[:, :1]], dim=1) * 3 / 4
    torch.testing.assert_close(model.stem.conv1.weight, expected)


@torch.no_grad()
def test_own_layout_loads_from_safetensors_and_from_a_bare_state_dict(tmp_path):
    model = timm.create_model('vmamba_s', depths=DEPTHS, embed_dim=DIM)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'own.safetensors')
    torch.save(model.state_dict(), tmp_path / 'own.pth')
    torch.save({'state_dict': model.state_dict(), 'epoch': 3, 'arch': 'vmamba_s'}, tmp_path / 'timm.pth')
    for name in ('own.safetensors', 'own.pth', 'timm.pth'):
        loaded = load(tmp_path / name).state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items()), name


@pytest.mark.parametrize(
    'key',
    [
        'patch_embed.5.bias',
        'layers.0.downsample.3.weight',
        'layers.1.blocks.1.op.Ds',
        'layers.1.blocks.0.op.x_proj_weight',
        'classifier.norm.bias',
        'classifier.head.weight',
    ],
)
def test_a_missing_weight_is_an_error_that_names_it(tmp_path, key):
    state = official.vmamba_state(DEPTHS, DIM)
    own = {
        'patch_embed.5.bias': 'stem.conv2.bias',
        'layers.0.downsample.3.weight': 'stages.1.downsample.norm.weight',
        'layers.1.blocks.1.op.Ds': 'stages.1.blocks.1.mixer.D',
        'layers.1.blocks.0.op.x_proj_weight': 'stages.1.blocks.0.mixer.x_proj.weight',
        'classifier.norm.bias': 'norm.bias',
        'classifier.head.weight': 'head.fc.weight',
    }[key]
    del state[key]
    with pytest.raises(RuntimeError, match=rf'missing: .*{re.escape(own)}'):
        load(save(tmp_path / 'ckpt.pth', state))


@pytest.mark.parametrize('kwargs', [dict(), dict(num_classes=7), dict(num_classes=0)], ids=['same', 'seven', 'none'])
@pytest.mark.parametrize(
    'key', ['layers.1.blocks.0.op.gamma', 'layers.1.blocks.7.norm.weight', 'something.else', 'classifier.extra.bias']
)
def test_an_unexpected_weight_is_an_error_that_names_it(tmp_path, key, kwargs):
    state = {**official.vmamba_state(DEPTHS, DIM), key: torch.zeros(3)}
    with pytest.raises(RuntimeError, match=rf'unexpected: .*{re.escape(key.rsplit(".", 1)[-1])}'):
        load(save(tmp_path / 'ckpt.pth', state), **kwargs)


@pytest.mark.parametrize(
    'kwargs,v0',
    [
        pytest.param(dict(depths=(1, 3)), False, id='deeper'),
        pytest.param(dict(depths=(1, 1)), False, id='shallower'),
        pytest.param(dict(embed_dim=24), False, id='wider'),
        pytest.param(dict(variant='vmamba_t'), False, id='other-ssm-ratio'),
        pytest.param(dict(variant='vmamba_t_v0'), False, id='current-into-v0'),
        pytest.param(dict(), True, id='v0-into-current'),
        pytest.param(dict(depths=(1, 3), num_classes=7), False, id='deeper-fresh-classifier'),
        pytest.param(dict(depths=(1, 3), features_only=True, out_indices=(0, 1)), False, id='deeper-features'),
    ],
)
def test_the_checkpoint_of_another_variant_is_an_error(tmp_path, kwargs, v0):
    path = save(tmp_path / 'ckpt.pth', official.vmamba_state(DEPTHS, DIM, 2.0, v0))
    with pytest.raises(RuntimeError, match=r'does not fit VMamba: (missing|unexpected|of another shape)'):
        load(path, **kwargs)


@torch.no_grad()
def test_a_state_dict_can_be_given_instead_of_a_file(tmp_path):
    state = official.vmamba_state(DEPTHS, DIM)
    kwargs = dict(pretrained=True, depths=DEPTHS, embed_dim=DIM, pretrained_cfg_overlay=dict(state_dict=state))
    images = torch.randn(1, 3, 24, 20)
    expected = official.vmamba_logits(state, images)
    assert oracles.relative_error(timm.create_model('vmamba_s', **kwargs).eval()(images), expected) < 1e-4
    grey = timm.create_model('vmamba_s', in_chans=1, **kwargs)
    torch.testing.assert_close(grey.stem.conv1.weight, state['patch_embed.0.weight'].sum(dim=1, keepdim=True))


@torch.no_grad()
@pytest.mark.parametrize('given', [7, 5, None])
def test_the_classifier_of_a_state_dict_is_kept_if_it_fits(given, caplog):
    state = official.vmamba_state(DEPTHS, DIM, num_classes=given or 1)
    if given is None:
        state = {key: value for key, value in state.items() if not key.startswith('classifier.head')}
    kwargs = dict(pretrained=True, depths=DEPTHS, embed_dim=DIM, pretrained_cfg_overlay=dict(state_dict=state))
    model = timm.create_model('vmamba_s', num_classes=7, **kwargs)
    assert torch.equal(model.norm.weight, state['classifier.norm.weight'])
    if given == 7:
        assert torch.equal(model.head.fc.weight, state['classifier.head.weight'])
        assert torch.equal(model.head.fc.bias, state['classifier.head.bias'])
    else:
        assert not model.head.fc.bias.any()
    assert ('classifier of 7 classes' in caplog.text) == (given != 7)


def test_another_number_of_classes_of_a_state_dict_that_nobody_asked_for_is_an_error():
    overlay = dict(state_dict=official.vmamba_state(DEPTHS, DIM, num_classes=100))
    with pytest.raises(RuntimeError, match=r'head\.fc\.weight \(100, 24\) instead of \(1000, 24\)'):
        timm.create_model('vmamba_s', pretrained=True, depths=DEPTHS, embed_dim=DIM, pretrained_cfg_overlay=overlay)


@torch.no_grad()
def test_timm_initialises_from_a_file_given_as_checkpoint_path(tmp_path):
    model = timm.create_model('vmamba_s', depths=DEPTHS, embed_dim=DIM)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'own.pth')
    other = timm.create_model('vmamba_s', depths=DEPTHS, embed_dim=DIM, checkpoint_path=str(tmp_path / 'own.pth'))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
