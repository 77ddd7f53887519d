"""Weights of odd shapes are named, with advice that fits, and position embeddings come from their own grid."""

import official
import pytest
import timm
import torch

from vmamba.models._isotropic import resize_pos_embed

VMAMBA = dict(depths=(1, 1), embed_dim=8)
VIM = dict(depth=1, embed_dim=16, img_size=32)


def load(path, state, name, **kwargs):
    torch.save({'model': state}, path)
    overlay = dict(file=str(path), **kwargs.pop('overlay', {}))
    defaults = VIM if name.startswith('vim') else VMAMBA
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{**defaults, **kwargs})


VMAMBA_KEYS = [
    ('op.Ds', (7,), r'mixer\.D \(7,\)'),
    ('op.A_logs', (7, 1), r'mixer\.A_log \(7, 1\)'),
    ('op.dt_projs_bias', (5,), r'mixer\.dt_proj_bias \(5,\)'),
    ('op.dt_projs_weight', (3, 2), r'mixer\.dt_proj_weight \(3, 2\)'),
    ('op.x_proj_weight', (), r'mixer\.x_proj\.weight \(\)'),
    ('op.in_proj.weight', (3,), r'mixer\.in_proj\.weight \(3,\)'),
    # As many numbers as the parameter has, in another order.
    ('op.Ds', (16, 4), r'mixer\.D \(16, 4\) instead of \(4, 16\)'),
    ('op.Ds', (2, 32), r'mixer\.D \(2, 32\) instead of \(4, 16\)'),
    ('op.A_logs', (1, 64), r'mixer\.A_log \(1, 64\) instead of \(4, 16, 1\)'),
    ('op.dt_projs_bias', (16, 4), r'mixer\.dt_proj_bias \(16, 4\) instead of \(4, 16\)'),
    ('op.dt_projs_bias', (1, 64), r'mixer\.dt_proj_bias \(1, 64\) instead of \(4, 16\)'),
    ('op.dt_projs_weight', (16, 2, 2), r'mixer\.dt_proj_weight \(16, 2, 2\) instead of \(4, 16, 1\)'),
    ('op.x_proj_weight', (12, 8, 2), r'mixer\.x_proj\.weight \(12, 8, 2\) instead of \(12, 16\)'),
    ('op.in_proj.weight', (16, 4, 2), r'mixer\.in_proj\.weight \(16, 4, 2\) instead of \(16, 8\)'),
    ('mlp.fc1.weight', (32, 2, 4), r'mlp\.fc1\.weight \(32, 2, 4\) instead of \(32, 8\)'),
]


@pytest.mark.parametrize('classes', [10, 1000])
@pytest.mark.parametrize('source, target', [('avg', ''), ('', 'avg'), ('', '')])
def test_a_classifier_loads_with_and_without_pooling(tmp_path, source, target, classes):
    saved = timm.create_model('vmamba_t', num_classes=classes, global_pool=source, **VMAMBA)
    overlay = dict(num_classes=classes)
    model = load(
        tmp_path / 'weights.pth',
        saved.state_dict(),
        'vmamba_t',
        overlay=overlay,
        num_classes=classes,
        global_pool=target,
    )
    assert torch.equal(model.head.fc.weight.flatten(1), saved.head.fc.weight.flatten(1))
    images = torch.randn(1, 3, 64, 64)
    logits = model.eval()(images)
    expected = saved.eval().forward_features(images)
    expected = (
        torch.einsum('bdhw,cd->bchw', expected, saved.head.fc.weight.flatten(1)) + saved.head.fc.bias[:, None, None]
    )
    torch.testing.assert_close(logits, expected.mean(dim=(2, 3)) if target else expected)


@pytest.mark.parametrize('key,shape,named', VMAMBA_KEYS, ids=[f'{case[0]}-{case[1]}' for case in VMAMBA_KEYS])
def test_a_weight_of_vmamba_that_cannot_be_reshaped_is_named(tmp_path, key, shape, named):
    state = official.vmamba_state((1, 1), 8)
    state[f'layers.0.blocks.0.{key}'] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=rf'odd\.pth does not fit VMamba: of another shape: .*{named}'):
        load(tmp_path / 'odd.pth', state, 'vmamba_s')


VIM_KEYS = [
    ('layers.0.mixer.A_log', (3, 16), r'mixer\.A_log \(3, 16\)'),
    ('layers.0.mixer.conv1d.weight', (32,), r'mixer\.conv1d_weight \(32,\)'),
    ('layers.0.mixer.gamma', (5,), r'ls\.gamma'),
    ('pos_embed', (1, 0, 16), r'pos_embed \(1, 0, 16\)'),
    ('pos_embed', (5, 16), r'pos_embed \(5, 16\)'),
]


@pytest.mark.parametrize('key,shape,named', VIM_KEYS, ids=[f'{case[0]}-{len(case[1])}' for case in VIM_KEYS])
def test_a_weight_of_vim_that_does_not_fit_its_partner_is_named(tmp_path, key, shape, named):
    state = {**official.vim_state(1, 16, 4, gamma=True), key: torch.zeros(shape)}
    with pytest.raises(RuntimeError, match=rf'odd\.pth does not fit Vim: .*{named}'):
        load(tmp_path / 'odd.pth', state, 'vim_t')


DISCRETE = [
    ('vmamba_s', 'patch_embed.0.weight', torch.int8, r'stem\.conv1\.weight torch\.int8'),
    ('vmamba_s', 'layers.1.blocks.0.op.Ds', torch.int64, r'mixer\.D torch\.int64'),
    ('vmamba_s', 'classifier.head.bias', torch.bool, r'head\.fc\.bias torch\.bool'),
    ('vim_t', 'layers.0.mixer.A_log', torch.int32, r'mixer\.A_log torch\.int32'),
    ('vim_t', 'layers.0.mixer.D_b', torch.int32, r'unexpected: .*mixer\.D_b'),
    ('vim_t', 'layers.0.mixer.out_proj.weight', torch.int8, r'mixer\.out_proj\.weight torch\.int8'),
    ('vim_t', 'pos_embed', torch.uint8, r'pos_embed torch\.uint8'),
    ('vim_t', 'head.weight', torch.complex64, r'head\.weight torch\.complex64'),
]


@pytest.mark.parametrize('kwargs', [dict(), dict(in_chans=1)], ids=['same', 'grey'])
@pytest.mark.parametrize('name,key,dtype,named', DISCRETE, ids=[f'{case[0]}-{case[1]}' for case in DISCRETE])
def test_weights_that_are_no_floating_numbers_are_named(tmp_path, name, key, dtype, named, kwargs):
    state = official.vim_state(1, 16, 4, gamma=True) if name == 'vim_t' else official.vmamba_state((1, 1), 8)
    state[key] = state[key].to(dtype)
    with pytest.raises(RuntimeError, match=rf'does not fit (VMamba|Vim): .*{named}'):
        load(tmp_path / 'odd.pth', state, name, **kwargs)
    with pytest.raises(RuntimeError, match=rf'does not fit (VMamba|Vim): .*{named}'):
        overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(state_dict=state))
        timm.create_model(name, **{**(VIM if name == 'vim_t' else VMAMBA), **overlay, **kwargs})


def test_integers_all_over_are_an_error_with_advice(tmp_path):
    state = {key: value.long() for key, value in official.vmamba_state((1, 1), 8).items()}
    with pytest.raises(RuntimeError, match=r'not floating: .*torch\.int64.*\. Save the weights in a floating dtype'):
        load(tmp_path / 'odd.pth', state, 'vmamba_s')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_other_floating_dtypes_load(tmp_path, caplog, dtype):
    state = {key: value.to(dtype) for key, value in official.vmamba_state((1, 1), 8).items()}
    model = load(tmp_path / 'odd.pth', state, 'vmamba_s')
    assert torch.equal(model.norm.weight, state['classifier.norm.weight'].float())
    assert not caplog.text


@pytest.mark.parametrize('given', ['file', 'state_dict'])
def test_weights_that_are_not_finite_are_reported_with_their_counts(tmp_path, caplog, given):
    state = official.vmamba_state((1, 1), 8)
    state['classifier.norm.weight'].fill_(float('nan'))
    state['layers.1.blocks.0.op.Ds'][:3] = float('-inf')
    if given == 'file':
        load(tmp_path / 'odd.pth', state, 'vmamba_s')
    else:
        overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(state_dict=state))
        timm.create_model('vmamba_s', **VMAMBA, **overlay)
    (record,) = [record for record in caplog.records if 'NaN' in record.message]
    assert record.levelname == 'WARNING'
    assert 'mixer.D (3 of 128)' in record.message and 'norm.weight (16 of 16)' in record.message
    assert 'odd.pth' in record.message or 'vmamba_s' in record.message


def test_a_scale_without_its_projection_is_named(tmp_path):
    state = official.vim_state(1, 16, 4, gamma=True)
    del state['layers.0.mixer.out_proj.weight']
    with pytest.raises(RuntimeError, match=r'missing: blocks\.0\.mixer\.out_proj\.weight; unexpected: .*gamma'):
        load(tmp_path / 'odd.pth', state, 'vim_t')


@pytest.mark.parametrize(
    'changes,kwargs,advice,others',
    [
        pytest.param(dict(in_chans=4), {}, 'For images of its 4 channels pass in_chans=4', 'classes', id='channels'),
        pytest.param(dict(num_classes=5), {}, 'For weights without this classifier', 'variant', id='classifier'),
        pytest.param({}, dict(depths=(1, 2)), 'Check the variant', 'classifier', id='variant'),
    ],
)
def test_the_advice_is_about_what_does_not_fit(tmp_path, changes, kwargs, advice, others):
    state = timm.create_model('vmamba_s', **{**VMAMBA, **changes}).state_dict()
    with pytest.raises(RuntimeError, match=advice) as error:
        load(tmp_path / 'other.pth', state, 'vmamba_s', **kwargs)
    assert others not in str(error.value)


def own_vim(size):
    return timm.create_model('vim_t', **{**VIM, 'img_size': size}).state_dict()


@pytest.mark.parametrize('source,target', [((96, 96), (64, 144)), ((32, 64), (64, 32)), ((32, 64), (48, 48))], ids=str)
def test_positions_are_resized_from_the_grid_of_the_stated_image_size(tmp_path, source, target):
    state = own_vim(source)
    stated = dict(input_size=(3, *source))
    model = load(tmp_path / 'own.pth', state, 'vim_t', img_size=target, overlay=stated)
    grids = [tuple(side // 16 for side in size) for size in (source, target)]
    assert torch.equal(model.pos_embed, resize_pos_embed(state['pos_embed'], *grids))


def test_positions_are_resized_from_the_grid_of_the_models_arguments(tmp_path):
    pytest.importorskip('timm.models._input')
    source = timm.create_model('vim_t', **{**VIM, 'img_size': (32, 64)})
    timm.models.save_for_hf(source, tmp_path)
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=(64, 32))
    assert torch.equal(model.pos_embed, resize_pos_embed(source.pos_embed, (2, 4), (4, 2)))


@pytest.mark.parametrize('source,target,warned', [
    pytest.param((96, 96), (64, 144), True, id='square-to-flat'),
    pytest.param((32, 64), (64, 32), True, id='turned'),
    pytest.param((48, 48), (48, 48), False, id='same'),
])  # fmt: skip
def test_positions_of_a_grid_that_nobody_states_are_kept_with_a_warning(tmp_path, caplog, source, target, warned):
    state = own_vim(source)
    model = load(tmp_path / 'own.pth', state, 'vim_t', img_size=target)
    assert torch.equal(model.pos_embed, state['pos_embed'])
    assert ('input_size=(3, height, width)' in caplog.text) == warned
