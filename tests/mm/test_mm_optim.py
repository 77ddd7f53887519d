"""Learning rates and weight decay of every parameter."""

import pytest
from mm_cases import vim_backbone, vmamba_backbone
from mmengine.optim import build_optim_wrapper
from torch import nn


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(4, 4)
        self.query = nn.Embedding(3, 4)


def options(model, wrapper='OptimWrapper', **paramwise):
    """(learning rate over the base, weight decay) by name"""
    config = dict(
        type=wrapper, constructor='LayerDecayConstructor', optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.1)
    )
    wrapper = build_optim_wrapper(model, dict(config, paramwise_cfg=paramwise or None))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = wrapper.optimizer.param_groups
    found = {names[p]: (group['lr'] / 0.01, group['weight_decay']) for group in groups for p in group['params']}
    assert sum(len(group['params']) for group in groups) == len(found)
    keys = [tuple((k, v) for k, v in group.items() if k != 'params') for group in groups]
    assert len(set(keys)) == len(keys)
    return found


def test_layer_decay_of_vim():
    model = Detector(vim_backbone(depth=4))
    found = options(model, layer_decay_rate=0.5)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, (scale, _) in found.items():
        if name.startswith('backbone.model.blocks.'):
            expected = 0.5 ** (4 - int(name.split('.')[3]))
        else:
            stem = name.startswith(
                tuple(f'backbone.model.{part}' for part in ('patch_embed', 'cls_token', 'pos_embed'))
            )
            expected = 0.5**5 if stem else 1.0
        assert scale == pytest.approx(expected), name


def test_layer_decay_of_vmamba_falls_block_by_block():
    found = options(Detector(vmamba_backbone()), layer_decay_rate=0.5)
    scales = [
        found[f'backbone.model.stages.{i}.blocks.{j}.mlp.fc1.weight'][0]
        for i, j in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))
    ]
    assert scales[-1] == 0.5 and found['backbone.model.stem.conv1.weight'][0] < scales[0]
    assert all(a < b for a, b in zip(scales, scales[1:]))
    assert found['backbone.outnorm0.weight'][0] == found['head.weight'][0] == 1


DECAYED = {
    'vmamba': (
        'in_proj.weight',
        'x_proj.weight',
        'dt_proj_weight',
        'out_proj.weight',
        'fc1.weight',
        'fc2.weight',
        'conv2d.weight',
    ),
    'vim': ('in_proj.weight', 'x_proj_weight', 'dt_proj_weight', 'out_proj.weight', 'conv1d_weight'),
}


@pytest.mark.parametrize('family', ['vmamba', 'vim'])
def test_no_weight_decay(family):
    model = Detector({'vmamba': vmamba_backbone, 'vim': vim_backbone}[family]())
    for name, (_, decay) in options(model).items():
        if '.blocks.' in name:
            assert (decay > 0) == name.endswith(DECAYED[family]), name
        elif name.startswith(('head', 'query')) or 'conv' in name or 'proj' in name or 'pyramid' in name:
            assert (decay > 0) == (model.get_parameter(name).ndim > 1), name
        else:
            assert decay == 0, name  # norms and embeddings


def test_options_of_the_default_constructor_apply_too():
    model = Detector(vmamba_backbone())
    keys = {'backbone': dict(lr_mult=0.1), 'query': dict(decay_mult=0.0)}
    found = options(model, custom_keys=keys, layer_decay_rate=0.5)
    assert found['backbone.model.stages.3.blocks.0.mlp.fc1.weight'] == (pytest.approx(0.05), 0.1)
    assert found['backbone.model.stages.3.blocks.0.mixer.A_log'] == (pytest.approx(0.05), 0.0)
    assert found['query.weight'] == (1.0, 0.0) and found['head.weight'] == (1.0, 0.1)


def test_frozen_parameters_are_left_out():
    found = options(Detector(vmamba_backbone(frozen_stages=2)))
    assert not any('stem' in name or 'stages.1.' in name for name in found)
    assert any('stages.2.' in name for name in found)


def test_a_wrapped_model():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = Detector(vim_backbone())
    wrapper = dict(constructor='LayerDecayConstructor', optimizer=dict(type='SGD', lr=1.0))
    optimizer = build_optim_wrapper(Wrapper(model), dict(wrapper, paramwise_cfg=dict(layer_decay_rate=0.5))).optimizer
    rates = {p: group['lr'] for group in optimizer.param_groups for p in group['params']}
    assert rates[model.backbone.model.pos_embed] == 0.5**5 and rates[model.head.weight] == 1


def test_a_misspelt_option_is_an_error():
    with pytest.raises(ValueError, match='layer_decay_rat'):
        options(nn.Linear(2, 2), layer_decay_rat=0.5)


def test_models_without_our_backbones():
    assert options(nn.Linear(2, 2), layer_decay_rate=0.5) == {'weight': (1.0, 0.1), 'bias': (1.0, 0.0)}
