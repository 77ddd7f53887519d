"""Classification, detection and segmentation checkpoints: they load entirely, or are errors that name keys."""

import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from mm_cases import (
    ROOT,
    SMALL_V0,
    STAGES,
    assert_outputs,
    small_model,
    vim_backbone,
    vmamba_backbone,
    with_random_norms,
)
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from mmengine.runner import save_checkpoint as save
from official import vim_state, vmamba_state

import vmamba.mm
from vmamba.configs import find_config
from vmamba.models.vmamba import checkpoint_filter_fn

MASK_RCNN = ROOT / 'configs/detection/mask-rcnn_vmamba-t_fpn_amp-1x_coco.py'
UPERNET = ROOT / 'configs/segmentation/vmamba-t_upernet_8xb2-amp-160k_ade20k-512x512.py'
DEPTHS = dict(depths=(1, 1, 1, 1))


def official_file(path, state):
    torch.save({'model': state, 'epoch': 3}, path)
    return path


def converted_file(path, state):
    path = path.with_suffix('.safetensors')
    safetensors.torch.save_file({k: v.contiguous() for k, v in checkpoint_filter_fn(state, None).items()}, path)
    return path


def detection_file(path, state):
    kept = {f'backbone.{key}': value for key, value in state.items() if not key.startswith('classifier')}
    for i in range(4):
        kept[f'backbone.outnorm{i}.weight'], kept[f'backbone.outnorm{i}.bias'] = (
            torch.ones(8 * 2**i),
            torch.zeros(8 * 2**i),
        )
    torch.save({'state_dict': kept, 'meta': {}}, path)
    return path


@pytest.mark.parametrize('write', [official_file, converted_file, detection_file])
@pytest.mark.parametrize('how', ['pretrained', 'init_cfg'])
@pytest.mark.parametrize('indices', [(0, 1, 2, 3), (1, 2)], ids=str)
def test_pretrained_files(tmp_path, write, how, indices):
    state = vmamba_state(**DEPTHS)
    path = str(write(tmp_path / 'weights.pth', state))
    given = dict(pretrained=path) if how == 'pretrained' else dict(init_cfg=dict(type='Pretrained', checkpoint=path))
    backbone = vmamba_backbone(options=SMALL_V0, out_indices=indices, **given)
    backbone.init_weights()
    assert_outputs(backbone, state)


def test_pretrained_vim(tmp_path):
    state = vim_state(depth=4, patches=196)
    path = official_file(tmp_path / 'vim.pth', state)
    backbone = vim_backbone(pretrained=str(path))
    backbone.init_weights()
    weights = backbone.model.state_dict()
    for i in range(4):
        assert torch.equal(weights[f'blocks.{i}.mixer.out_proj.weight'], state[f'layers.{i}.mixer.out_proj.weight'])
    assert weights['pos_embed'].shape == (1, 5, 24)  # resized to the model's 2 x 2 patches


OWN = {'vmamba': vmamba_backbone, 'vim': vim_backbone}


def own_file(path, backbone, whole):
    weights = backbone.state_dict()
    if whole:
        weights = {f'backbone.{key}': value for key, value in weights.items()} | {'neck.weight': torch.ones(2)}
    return write(path, weights)


@pytest.mark.parametrize('whole', [True, False], ids=['whole', 'backbone'])
@pytest.mark.parametrize('family', OWN)
def test_pretrained_from_own_dense_checkpoints(tmp_path, family, whole):
    source = with_random_norms(OWN[family]())
    backbone = OWN[family](pretrained=own_file(tmp_path / 'own.pth', source, whole))
    backbone.init_weights()
    for key, value in source.model.state_dict().items():
        assert torch.equal(backbone.model.state_dict()[key], value), key
    fresh = OWN[family]().state_dict()
    assert torch.equal(backbone.outnorm0.weight, fresh['outnorm0.weight'])  # only the model's weights are taken


def test_own_dense_checkpoints_give_a_classification_model(tmp_path):
    source = with_random_norms(vmamba_backbone())
    weights = checkpoint_filter_fn(torch.load(own_file(tmp_path / 'own.pth', source, True))['state_dict'], None)
    assert torch.equal(weights['norm.weight'], source.outnorm3.weight)
    assert torch.equal(weights['norm.bias'], source.outnorm3.bias)
    assert len(weights) == len(source.model.state_dict()) + 2


def test_own_dense_checkpoints_of_vim_have_no_final_norm(tmp_path, caplog):
    source = vim_backbone()
    overlay = dict(file=own_file(tmp_path / 'own.pth', source, True))
    options = dict(source.model_options, pretrained=True, pretrained_cfg_overlay=overlay)
    with caplog.at_level('WARNING'):
        model = timm.create_model('vim_nano', num_classes=0, **options)
    assert 'no final norm' in caplog.text and (model.norm.weight == 1).all()
    assert torch.equal(model.pos_embed, source.model.pos_embed)
    with pytest.raises(RuntimeError, match=r'missing: head\.weight'):
        timm.create_model('vim_nano', **options)


@pytest.mark.parametrize('family', OWN)
def test_own_dense_checkpoints_of_another_variant(tmp_path, family):
    source = OWN[family]()
    weights = without(source.state_dict(), next(key for key in source.state_dict() if key.endswith('A_log')))
    with pytest.raises(RuntimeError, match='missing: .*A_log'):
        OWN[family](pretrained=write(tmp_path / 'own.pth', weights)).init_weights()


def test_pretrained_inside_a_detector(tmp_path):
    state = vmamba_state(**DEPTHS)
    model = small_model(MASK_RCNN)
    model.backbone.pretrained = str(official_file(tmp_path / 'weights.pth', state))
    model._is_init = model.backbone._is_init = False
    model.init_weights()
    assert_outputs(model.backbone, state)


def test_without_a_checkpoint_the_model_keeps_its_own_initialisation():
    backbone = vmamba_backbone()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_a_url_is_downloaded_once_and_read(tmp_path, monkeypatch):
    state, fetched = vmamba_state(**DEPTHS), []
    path = official_file(tmp_path / 'weights.pth', state)
    monkeypatch.setattr(vmamba.mm.base, 'download_cached_file', lambda url, **_: fetched.append(url) or str(path))
    backbone = vmamba_backbone(options=SMALL_V0, pretrained='https://example.org/weights.pth')
    assert not fetched
    backbone.init_weights()
    assert set(fetched) == {'https://example.org/weights.pth'}
    assert_outputs(backbone, state)


def test_a_failed_download_says_what_to_do(monkeypatch):
    def refuse(url, **_):
        raise OSError('no network')

    monkeypatch.setattr(vmamba.mm.base, 'download_cached_file', refuse)
    with pytest.raises(RuntimeError, match='could not download https://example.org/a.pth .*no network.* its path'):
        vmamba_backbone(pretrained='https://example.org/a.pth').init_weights()


BAD_FILES = {
    'another variant': (lambda state: vmamba_state(depths=(1, 1, 2, 1)), r'unexpected: .*stages\.2\.blocks\.1\.'),
    'another width': (lambda state: vmamba_state(depths=(1, 1, 1, 1), embed_dim=16), r'another shape: .*stem\.conv1'),
    'v0': (lambda state: vmamba_state(**DEPTHS, v0=True), r'missing: .*stem\.conv1'),
    'a key less': (
        lambda state: without(state, 'layers.1.blocks.0.op.A_logs'),
        r'missing: stages\.1\.blocks\.0\.mixer\.A_log',
    ),
    'a key more': (lambda state: {**state, 'layers.0.extra.weight': torch.ones(1)}, 'unexpected: .*extra'),
    'Vim': (lambda state: vim_state(depth=1), 'missing: '),
}


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize('make,message', BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_do_not_fit(tmp_path, make, message):
    path = official_file(tmp_path / 'weights.pth', make(vmamba_state(**DEPTHS)))
    with pytest.raises(RuntimeError, match=f'does not fit VMamba: .*{message}'):
        vmamba_backbone(options=SMALL_V0, pretrained=str(path)).init_weights()


def test_files_that_are_not_there_or_hold_code(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no checkpoint file .*nothing.pth'):
        vmamba_backbone(pretrained=str(tmp_path / 'nothing.pth')).init_weights()
    with open(tmp_path / 'code.pth', 'wb') as file:
        pickle.dump({'model': print}, file)
    with pytest.raises(RuntimeError, match='code.pth'):
        vmamba_backbone(pretrained=str(tmp_path / 'code.pth')).init_weights()


def test_a_variant_without_published_weights():
    with pytest.raises(RuntimeError, match='(?i)no pretrained weights'):
        vmamba_backbone(options=None, pretrained=True).init_weights()


# Checkpoints of whole detectors and segmentors.

CLASSIFIERS = ('classifier.', 'norm.', 'head.')
WHOLE = {
    'vmamba': (MASK_RCNN.stem, UPERNET.stem),
    'vmamba_v0': (MASK_RCNN.stem, UPERNET.stem),
    'mambavision': (
        'cascade-mask-rcnn_mambavision-t_fpn_amp-ms-crop-3x_coco',
        'mambavision-t_upernet_8xb2-amp-160k_ade20k-512x512',
    ),
    'vssd': ('mask-rcnn_vssd-t_fpn_amp-1x_coco', 'vssd-t_upernet_4xb4-amp-160k_ade20k-512x512'),
}


def official_weights(model, state):
    """The model's weights with those of its backbone in the official layout, and the norms of its outputs."""
    weights = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith('backbone.')}
    for i in range(4):
        weights[f'backbone.outnorm{i}.weight'] = torch.rand(8 * 2**i) + 0.5
        weights[f'backbone.outnorm{i}.bias'] = torch.rand(8 * 2**i)
    weights.update({f'backbone.{key}': value for key, value in state.items() if not key.startswith(CLASSIFIERS)})
    return weights


def write(path, weights):
    save({'state_dict': weights, 'meta': dict(epoch=12)}, str(path))
    return str(path)


@pytest.mark.parametrize('family,name', [(family, name) for family, names in WHOLE.items() for name in names])
def test_official_checkpoints_of_whole_models(tmp_path, family, name):
    config, state = find_config(Path(name)), STAGES[family][0]()
    source, model = small_model(config), small_model(config)
    if family == 'vmamba_v0':
        model.backbone = vmamba_backbone('vmamba_t_v0', SMALL_V0)
    weights = official_weights(source, state)
    load_checkpoint(model, write(tmp_path / 'whole.pth', weights), map_location='cpu')
    assert_outputs(model.backbone, state, family)
    own = model.state_dict()
    for key, value in weights.items():
        if key in own:  # the heads', and the norms of the outputs
            assert torch.equal(own[key], value), key
    assert any('outnorm' in key for key in own)


def test_differences_in_the_output_norms_are_allowed(tmp_path):
    state = vmamba_state(**DEPTHS)
    source = small_model(MASK_RCNN)
    weights = official_weights(source, state)
    lacking = {key: value for key, value in weights.items() if 'outnorm' not in key}
    model = small_model(MASK_RCNN)
    load_checkpoint(model, write(tmp_path / 'lacking.pth', lacking), map_location='cpu')
    assert_outputs(model.backbone, state)
    model.backbone = vmamba_backbone(options=SMALL_V0, out_indices=(1, 2))
    load_checkpoint(model, write(tmp_path / 'all.pth', weights), map_location='cpu')
    assert_outputs(model.backbone, state)
    assert torch.equal(model.backbone.outnorm2.weight, weights['backbone.outnorm2.weight'])


BAD_WEIGHTS = {
    'another variant': (
        lambda w: with_state(w, vmamba_state(depths=(1, 1, 2, 1))),
        r'unexpected: model\.stages\.2\.blocks\.1',
    ),
    'another width': (
        lambda w: with_state(w, vmamba_state(**DEPTHS, embed_dim=16)),
        r'another shape: model\.stem\.conv1',
    ),
    'a key less': (lambda w: without(w, 'backbone.layers.0.blocks.0.op.in_proj.weight'), r'missing: .*mixer\.in_proj'),
    'a key more': (lambda w: {**w, 'backbone.layers.0.blocks.0.extra': torch.ones(1)}, 'unexpected: .*extra'),
    'integers': (
        lambda w: {**w, 'backbone.patch_embed.0.weight': w['backbone.patch_embed.0.weight'].long()},
        r'not floating: model\.stem\.conv1\.weight torch\.int64',
    ),
    'no backbone': (lambda w: {k: v for k, v in w.items() if not k.startswith('backbone')}, r'missing: model\.stem'),
    'a classifier': (lambda w: vmamba_state(**DEPTHS), r'missing: model\.stem'),
}


def with_state(weights, state):
    weights = {key: value for key, value in weights.items() if not key.startswith('backbone.')}
    return {**weights, **{f'backbone.{k}': v for k, v in state.items() if not k.startswith('classifier')}}


@pytest.mark.parametrize('change,message', BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_whole_models_whose_backbone_does_not_fit(tmp_path, change, message):
    model = small_model(MASK_RCNN)
    path = write(tmp_path / 'whole.pth', change(official_weights(model, vmamba_state(**DEPTHS))))
    with pytest.raises(RuntimeError, match=rf'backbone\.\*.* does not fit StageBackbone: .*{message}'):
        load_checkpoint(model, path, map_location='cpu')


@pytest.mark.parametrize('make', [vmamba_backbone, vim_backbone])
def test_own_checkpoints_come_back(tmp_path, make):
    source, model = with_random_norms(make()), make()
    x = torch.randn(1, 3, 40, 56)
    load_checkpoint(model, write(tmp_path / 'own.pth', source.state_dict()), map_location='cpu')
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        for out, expected in zip(model.eval()(x), source(x)):
            assert torch.equal(out, expected)


@pytest.mark.parametrize('lost', ['pyramid.0.0.weight', 'model.blocks.3.norm.weight', 'model.pos_embed'])
def test_own_checkpoints_of_vim_are_checked(lost):
    backbone = vim_backbone()
    with pytest.raises(RuntimeError, match=f'missing: {re.escape(lost)}'):
        backbone.load_state_dict(without(backbone.state_dict(), lost), strict=False)


def test_a_strict_load_is_strict_about_the_output_norms():
    backbone = vmamba_backbone()
    with pytest.raises(RuntimeError, match='outnorm1.bias'):
        backbone.load_state_dict(without(backbone.state_dict(), 'outnorm1.bias'))


def test_loading_leaves_the_given_weights_alone():
    state = vmamba_state(**DEPTHS)
    before = dict(state)
    vmamba_backbone(options=SMALL_V0).load_state_dict(state, strict=False)
    assert state.keys() == before.keys() and all(state[key] is value for key, value in before.items())


# The official name and arguments.

OFFICIAL = dict(
    type='MM_VSSM', dims=8, depths=(1, 1, 1, 1), out_indices=(0, 1, 2, 3), ssm_d_state=1, ssm_dt_rank='auto',
    ssm_ratio=2.0, ssm_conv=3, ssm_conv_bias=False, forward_type='v05_noz', mlp_ratio=4.0, downsample_version='v3',
    patchembed_version='v2', drop_path_rate=0.2, norm_layer='ln2d',
)  # fmt: skip
OFFICIAL_V0 = dict(
    type='MM_VSSM', dims=[8, 16, 32, 64], depths=(1, 1, 1, 1), ssm_d_state=16, ssm_dt_rank='auto', ssm_ratio=2.0,
    mlp_ratio=0.0, downsample_version='v1', patchembed_version='v1', pretrained='',
)  # fmt: skip


@pytest.mark.parametrize('config,v0', [(OFFICIAL, False), (OFFICIAL_V0, True)], ids=['current', 'v0'])
def test_official_arguments(tmp_path, config, v0):
    state = vmamba_state(**DEPTHS, v0=v0)
    path = official_file(tmp_path / 'weights.pth', state)
    backbone = MODELS.build({**config, 'pretrained': str(path)})
    backbone.init_weights()
    assert_outputs(backbone, state)
    assert backbone.out_channels == [8, 16, 32, 64]


@pytest.mark.parametrize('v0', [False, True], ids=['current', 'v0'])
def test_official_configs_that_inherit_those_of_swin(tmp_path, v0):
    import mmseg
    from mmengine.config import Config

    swin = (
        f'{mmseg.__path__[0]}/.mim/configs/swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
    )
    for i, base in enumerate(('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', swin)):
        path = tmp_path / f'official_{i}.py'
        path.write_text(f'_base_ = [{base!r}]\nmodel = dict(backbone={OFFICIAL_V0 if v0 else OFFICIAL})\n')
        backbone = MODELS.build(Config.fromfile(str(path)).model.backbone)
        backbone.init_weights()  # not from Swin's checkpoint
        assert backbone.out_channels == [8, 16, 32, 64]


REFUSED = [
    (dict(forward_type='v052d'), ValueError, "forward_type must be one of v0, .*'v052d'"),
    (dict(downsample_version='v2'), ValueError, 'downsample_version must be one of v1, v3'),
    (dict(patchembed_version='v9'), ValueError, 'patchembed_version'),
    (dict(ssm_conv=5), ValueError, 'ssm_conv must be one of 3, got 5'),
    (dict(ssm_dt_rank=4), ValueError, 'ssm_dt_rank'),
    (dict(norm_layer='bn'), ValueError, 'norm_layer'),
    (dict(norm_layer=None), ValueError, 'norm_layer must be one of ln, ln2d, got None'),
    (dict(norm_layer=['ln']), ValueError, r"norm_layer must be one of ln, ln2d, got \['ln'\]"),
    (dict(out_indices=3), ValueError, r'out_indices must be a sequence of integers, .*within 0\.\.3 .*got 3'),
    (dict(out_indices='0123'), ValueError, "out_indices must be a sequence of integers, .*got '0123'"),
    (dict(out_indices=(1.0,)), ValueError, r'out_indices must be a sequence of integers, .*got \(1\.0,\)'),
    (dict(out_indices=None), ValueError, 'out_indices must be a sequence of integers, .*got None'),
    (dict(dims=[8, 16, 32, 48]), ValueError, r'dims must double .*48'),
    (dict(dims='8'), ValueError, "dims must double .*'8'"),
    (dict(depths=2), ValueError, 'depths must be a tuple or list .* got 2'),
    (dict(patch_size=8), ValueError, 'patch_size must be one of 4, got 8'),
    (dict(patch_norm=False), ValueError, 'patch_norm must be one of True, got False'),
    (dict(ssm_act_layer='gelu'), ValueError, "ssm_act_layer must be one of silu, got 'gelu'"),
    (dict(ssm_drop_rate=0.1), ValueError, 'ssm_drop_rate must be one of 0.0, got 0.1'),
    (dict(ssm_init='v1'), ValueError, 'ssm_init'),
    (dict(mlp_act_layer='relu'), ValueError, 'mlp_act_layer'),
    (dict(mlp_drop_rate=0.1), ValueError, 'mlp_drop_rate'),
    (dict(gmlp=True), ValueError, 'gmlp must be one of False, got True'),
    (dict(posembed=True), ValueError, 'posembed'),
    (dict(ssm_rank=4), TypeError, 'ssm_rank'),
]


@pytest.mark.parametrize('change,error,message', REFUSED, ids=[next(iter(change)) for change, *_ in REFUSED])
def test_official_arguments_of_other_models(change, error, message):
    with pytest.raises(error, match=message):
        MODELS.build({**OFFICIAL, **change})


def test_every_official_argument_at_its_default():
    defaults = dict(
        patch_size=4, in_chans=3, num_classes=1000, ssm_act_layer='silu', ssm_drop_rate=0.0, ssm_init='v0',
        mlp_act_layer='gelu', mlp_drop_rate=0.0, gmlp=False, patch_norm=True, use_checkpoint=False, posembed=False,
        imgsize=224,
    )  # fmt: skip
    backbone, plain = MODELS.build({**OFFICIAL, **defaults}), MODELS.build(OFFICIAL)
    assert str(backbone) == str(plain)


def test_the_official_image_channels():
    backbone = MODELS.build({**OFFICIAL, 'in_chans': 4}).eval()
    assert backbone(torch.randn(1, 4, 32, 32))[3].shape == (1, 64, 1, 1)


@pytest.mark.parametrize('name', ['use_checkpoint', 'with_cp'])
def test_the_official_drop_path_and_checkpointing(name):
    backbone = MODELS.build({**OFFICIAL, name: True})
    assert all(stage.grad_checkpointing for stage in backbone.model.stages)
    assert backbone.model.stages[3].blocks[0].drop_path1.drop_prob == pytest.approx(0.2)
