"""Option values that make no model are errors at construction that show them."""

import pytest
import timm

from vmamba.layers import SS2D, BiMamba, DepthwiseConv2d, MambaVisionMixer
from vmamba.models._isotropic import PatchEmbed

MODELS = [
    ('num_classes', -1),
    ('num_classes', 2.5),
    ('in_chans', 0),
    ('embed_dim', 0),
    ('d_state', 0),
    ('drop_rate', -0.5),
    ('drop_path_rate', -0.5),
    ('drop_path_rate', 1.5),
]
VMAMBA = [
    ('depths', ()),
    ('depths', 2),
    ('depths', '12'),
    ('depths', (1, -1)),
    ('embed_dim', 1),
    ('ssm_ratio', 0.0),
    ('ssm_ratio', -1.0),
    ('ssm_ratio', 0.01),
    ('mlp_ratio', -1.0),
    ('mlp_ratio', 0.001),
    ('mlp', 'none'),
]
VIM = [
    ('depth', 0),
    ('patch_size', 0),
    ('patch_size', (8, 8)),
    ('stride', 0),
    ('stride', -4),
    ('d_conv', 0),
    ('expand', 0.0),
    ('expand', -2.0),
    ('mlp', 'mlp'),
]
MOE = [
    ('num_experts', 0),
    ('capacity_factor', -1.0),
]
CASES = [
    *(('vmamba_nano', option) for option in [*MODELS, *VMAMBA]),
    *(('vim_nano', option) for option in [*MODELS, *VIM]),
    *((name, option) for name in ('vmamba_nano_moe', 'vim_nano_moe') for option in MOE),
    ('vmamba_nano_moe', ('mlp_ratio', 0.0)),
    *(('mambavision_nano', option) for option in [*MODELS, *VMAMBA[:4]]),
    *(('vssd_nano', option) for option in [*MODELS, *VMAMBA[:5]]),
    *(('adventurer_nano', option) for option in [*MODELS, *VIM[:5]]),
]


@pytest.mark.parametrize('name,option', CASES, ids=str)
def test_a_model_names_the_option_and_its_value(name, option):
    key, value = option
    with pytest.raises(ValueError) as error:
        timm.create_model(name, device='meta', **{key: value})
    assert key in str(error.value)
    assert str(value) in str(error.value) or (key, value) == ('depths', (1, -1))


@pytest.mark.parametrize(
    'layer,options',
    [
        (SS2D, dict(dt_rank=0)),
        (SS2D, dict(d_conv=0)),
        (SS2D, dict(d_conv=-1)),
        (SS2D, dict(d_state=-1)),
        (SS2D, dict(ssm_ratio=0.0)),
        (BiMamba, dict(dt_rank=0)),
        (BiMamba, dict(dt_rank=-1)),
        (BiMamba, dict(d_state=0)),
        (BiMamba, dict(expand=0.1)),
        (MambaVisionMixer, dict(d_conv=2)),
        (MambaVisionMixer, dict(dim=7)),
        (DepthwiseConv2d, dict(kernel_size=4)),
        (PatchEmbed, dict(stride=0)),
        (PatchEmbed, dict(embed_dim=0)),
    ],
    ids=lambda value: getattr(value, '__name__', None) or str(value),
)
def test_a_layer_names_the_option_and_its_value(layer, options):
    ((key, value),) = options.items()
    arguments = {} if layer is PatchEmbed else dict(dim=8)
    with pytest.raises(ValueError, match=f'{key}.*{value}'):
        layer(device='meta', **{**arguments, **options})


@pytest.mark.parametrize(
    'name,options',
    [
        ('vmamba_nano', dict(depths=[1, 0, 1])),
        ('vmamba_nano', dict(mlp_ratio=0.0)),
        ('vmamba_nano', dict(drop_path_rate=1.0)),
        ('vim_nano', dict(depth=1, num_classes=0)),
    ],
    ids=str,
)
def test_the_limits_themselves_are_models(name, options):
    assert timm.create_model(name, device='meta', **options)
