"""What is registered, under which names, with which sizes and pretrained configurations."""

import pytest
import timm
import torch
from model_cases import VARIANTS
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config

from vmamba import Vim, VMamba

RELEASES = 'https://github.com/MzeroMiko/VMamba/releases/download/'
LONG_VIM = 'vim_{}_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2'.format

VMAMBAS = [
    # name, official name, parameters, embed_dim, depths, checkpoint
    ('vmamba_t', 'vmamba_tiny_s1l8', 30_249_064, 96, (2, 2, 8, 2), '%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth'),
    ('vmamba_s', 'vmamba_small_s2l15', 50_147_752, 96, (2, 2, 15, 2), '%23v2cls/vssm_small_0229_ckpt_epoch_222.pth'),
    ('vmamba_b', 'vmamba_base_s2l15', 88_557_800, 128, (2, 2, 15, 2), '%23v2cls/vssm_base_0229_ckpt_epoch_237.pth'),
    ('vmamba_t_s2l5', 'vmamba_tiny_s2l5', 30_705_832, 96, (2, 2, 5, 2), '%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth'),
    (
        'vmamba_s_s1l20',
        'vmamba_small_s1l20',
        49_012_840,
        96,
        (2, 2, 20, 2),
        '%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth',
    ),
    (
        'vmamba_b_s1l20',
        'vmamba_base_s1l20',
        86_614_504,
        128,
        (2, 2, 20, 2),
        '%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth',
    ),
    ('vmamba_t_v0', 'vanilla_vmamba_tiny', 22_893_448, 96, (2, 2, 9, 2), '%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth'),
    (
        'vmamba_s_v0',
        'vanilla_vmamba_small',
        44_417_416,
        96,
        (2, 2, 27, 2),
        '%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth',
    ),
    ('vmamba_b_v0', 'vanilla_vmamba_base', 76_254_056, 128, (2, 2, 27, 2), '%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth'),
]
VIMS = [
    # name, official name, parameters, embed_dim, patches, Hugging Face repository and file
    ('vim_t', LONG_VIM('tiny_patch16'), 7_148_008, 192, 196, 'Vim-tiny', 'vim_t_midclstok_76p1acc.pth'),
    (
        'vim_t_stride8',
        LONG_VIM('tiny_patch16_stride8'),
        7_250_344,
        192,
        729,
        'Vim-tiny',
        'vim_t_midclstok_ft_78p3acc.pth',
    ),
    ('vim_s', LONG_VIM('small_patch16'), 25_796_584, 384, 196, 'Vim-small', 'vim_s_midclstok_80p5acc.pth'),
    (
        'vim_s_stride8',
        LONG_VIM('small_patch16_stride8'),
        26_001_256,
        384,
        729,
        'Vim-small',
        'vim_s_midclstok_ft_81p6acc.pth',
    ),
    ('vim_b', LONG_VIM('base_patch16'), 97_598_440, 768, 196, 'Vim-base', 'vim_b_midclstok_81p9acc.pth'),
]
BUILT = [case[0] for case in (*VMAMBAS, *VIMS)]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_just_these_are_registered():
    vmambas = {'vmamba_t_m2', 'vmamba_s_m2', 'vmamba_b_m2', 'vmamba_nano', 'vmamba_nano_moe'}
    vims = {'vim2_t', 'vim2_s', 'vim_nano', 'vim_nano_moe'}
    assert set(timm.list_models(module='vmamba')) == {case[0] for case in VMAMBAS} | vmambas
    assert set(timm.list_models(module='vim')) == {case[0] for case in VIMS} | vims
    prefixes = {'adventurer', 'mambavision', 'vim', 'vim2', 'vmamba', 'vssd'}
    assert {name.split('_')[0] for name in VARIANTS} == prefixes
    assert {name for prefix in prefixes for name in timm.list_models(f'{prefix}_*')} == set(VARIANTS)


def test_just_the_published_ones_are_listed_as_pretrained():
    listed = timm.list_pretrained('vmamba*') + timm.list_pretrained('vim_*')
    assert set(listed) == {f'{name}.in1k' for name in BUILT}


@pytest.mark.parametrize('name,official_name,count,embed_dim,depths,file', VMAMBAS, ids=[c[0] for c in VMAMBAS])
def test_vmamba(name, official_name, count, embed_dim, depths, file):
    model = timm.create_model(name, device='meta')
    assert isinstance(model, VMamba)
    assert parameters(model) == count
    assert tuple(len(stage.blocks) for stage in model.stages) == depths
    assert [info['num_chs'] for info in model.feature_info] == [embed_dim * 2**i for i in range(4)]
    assert model.pretrained_cfg['url'] == RELEASES + file
    assert model.pretrained_cfg['license'] == 'mit'


@pytest.mark.parametrize('name,official_name,count,embed_dim,patches,repo,file', VIMS, ids=[c[0] for c in VIMS])
def test_vim(name, official_name, count, embed_dim, patches, repo, file):
    model = timm.create_model(name, device='meta')
    assert isinstance(model, Vim)
    assert parameters(model) == count
    assert model.pos_embed.shape == (1, patches + 1, embed_dim)
    assert len(model.blocks) == 24
    assert model.pretrained_cfg['hf_hub_id'] == f'hustvl/{repo}-midclstok'
    assert model.pretrained_cfg['hf_hub_filename'] == file
    assert model.pretrained_cfg['license'] == 'apache-2.0'


@pytest.mark.parametrize('name', BUILT)
def test_pretrained_configuration(name):
    model = timm.create_model(f'{name}.in1k', device='meta')
    cfg = model.pretrained_cfg
    assert (cfg['mean'], cfg['std']) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert (cfg['num_classes'], cfg['input_size'], cfg['interpolation']) == (1000, (3, 224, 224), 'bicubic')
    assert (cfg['architecture'], cfg['tag']) == (name, 'in1k')
    assert 224 / cfg['crop_pct'] == 256
    assert resolve_data_config(model=model)['crop_pct'] == 0.875
    assert isinstance(model.get_submodule(cfg['first_conv']), torch.nn.Conv2d)
    assert model.get_submodule(cfg['classifier']) is model.get_classifier()
    assert model.get_classifier().out_features == 1000


@pytest.mark.parametrize('name,official_name', [case[:2] for case in (*VMAMBAS, *VIMS)], ids=BUILT)
def test_official_names_resolve(name, official_name):
    with pytest.warns(UserWarning, match=name):
        model = timm.create_model(official_name, device='meta')
    expected = timm.create_model(name, device='meta')
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}
    assert model.pretrained_cfg == expected.pretrained_cfg


def test_the_other_official_name_of_vim_b_resolves():
    name = 'vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2'
    with pytest.warns(UserWarning, match='vim_b'):
        assert parameters(timm.create_model(name, device='meta')) == 97_598_440


NANO = [name for name in VARIANTS if name.endswith('_nano')]


@pytest.mark.parametrize('name', ['vmamba_t', 'vmamba_t_v0', 'vim_t', *NANO])
@pytest.mark.parametrize('option', ['forward_type', 'drop_paths', 'ssm_rato', 'if_bidirectional'])
def test_an_unknown_option_is_an_error_that_names_it(name, option):
    with pytest.raises(TypeError, match=option):
        timm.create_model(name, device='meta', **{option: 'v05_noz'})


@pytest.mark.parametrize(
    'name,options,value',
    [
        ('vim_t', dict(global_pool='max'), 'max'),
        ('vim_t', dict(img_size=100), '100'),
        ('vmamba_t', dict(global_pool='middle'), 'middle'),
    ],
)
def test_an_unknown_value_is_an_error_that_shows_it(name, options, value):
    with pytest.raises((ValueError, AssertionError), match=value):
        timm.create_model(name, device='meta', **options)


@pytest.mark.parametrize('name', NANO)
def test_small_variants_are_small_and_have_no_weights(name):
    model = timm.create_model(name, device='meta')
    assert parameters(model) < 6_000_000
    assert not model.pretrained_cfg.get('url') and not model.pretrained_cfg.get('hf_hub_id')
    assert model.pretrained_cfg['input_size'] == (3, 32, 32)


@pytest.mark.parametrize('name,depths', [('vmamba_t', (2, 2, 8, 2)), ('vmamba_s_v0', (2, 2, 27, 2))])
def test_vmamba_drop_path_grows_linearly_over_all_blocks(name, depths):
    model = timm.create_model(name, device='meta', drop_path_rate=0.3)
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [getattr(block.drop_path1, 'drop_prob', 0.0) for block in blocks]
    assert rates == pytest.approx([0.3 * i / (sum(depths) - 1) for i in range(sum(depths))])
    if name == 'vmamba_t':
        assert rates == [getattr(block.drop_path2, 'drop_prob', 0.0) for block in blocks]


def test_vim_drop_path_grows_linearly_from_the_first_mixer_to_the_last():
    model = timm.create_model('vim_t', device='meta', drop_path_rate=0.2)
    rates = [getattr(block.drop_path, 'drop_prob', 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.2 * i / 23 for i in range(24)])


@pytest.mark.parametrize('name', [*NANO, 'vmamba_t_v0'])
def test_initial_weights(name):
    kwargs = dict(depths=(1, 1)) if name == 'vmamba_t_v0' else {}
    model = timm.create_model(name, **kwargs)
    for key, parameter in model.named_parameters():
        assert parameter.isfinite().all(), key
        if key.endswith('norm.weight') or 'norm1.weight' in key or 'norm2.weight' in key:
            assert (parameter == 1).all(), key
        elif key.endswith(('head.weight', 'head.fc.weight', 'fc1.weight', 'fc2.weight', 'cls_token', 'pos_embed')):
            if name == 'adventurer_nano' and '.mlp.' in key:
                continue  # PyTorch's own
            assert 0.015 < parameter.std() < 0.025, key
            assert parameter.abs().max() <= 2, key
        elif key.endswith(('head.bias', 'fc1.bias', 'fc2.bias', 'norm.bias')):
            assert (parameter == 0).all(), key


def test_vims_output_projections_start_small():
    """Over sqrt(depth), from the uniform distribution of a linear layer."""
    model = timm.create_model('vim_nano', depth=16)
    for block in model.blocks:
        bound = block.mixer.out_proj.in_features**-0.5
        assert block.mixer.in_proj.weight.abs().max() > 0.9 * block.mixer.in_proj.in_features**-0.5
        assert 0.9 * bound / 4 < block.mixer.out_proj.weight.abs().max() <= bound / 4


@pytest.mark.parametrize('name', NANO)
def test_initialising_again_draws_from_the_same_distribution(name):
    model = timm.create_model(name)
    before = {key: p.std() for key, p in model.named_parameters() if p.numel() > 1000}
    model.init_weights()
    for key, parameter in model.named_parameters():
        if key in before and before[key] > 0:
            assert 0.8 < parameter.std() / before[key] < 1.25, key
