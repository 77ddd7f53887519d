"""The backbones' outputs against the official definitions, and their options."""

import re

import pytest
import torch
import torch.nn.functional as F
from mm_cases import SMALL_V0, normalised, vim_backbone, vmamba_backbone, with_random_norms
from mmengine.registry import MODELS
from official import vim_state, vim_tokens, vmamba_maps, vmamba_state
from timm.layers import DropPath
from torch import nn

import vmamba
from vmamba.layers import LayerNorm2d


@torch.no_grad()
@pytest.mark.parametrize('indices', [(0, 1, 2, 3), (1, 3), (0, 2)], ids=str)
@pytest.mark.parametrize('v0', [False, True], ids=['current', 'v0'])
def test_vmamba_gives_each_stage_before_its_downsampling(v0, indices):
    state = vmamba_state(depths=(1, 1, 1, 1), v0=v0)
    variant = 'vmamba_t_v0' if v0 else 'vmamba_nano'
    backbone = with_random_norms(vmamba_backbone(variant, SMALL_V0, out_indices=indices))
    backbone.load_state_dict(state, strict=False)
    x = torch.randn(2, 3, 40, 72)
    maps = vmamba_maps(state, x)
    outputs = backbone(x)
    assert len(outputs) == len(indices)
    for i, channels, out in zip(indices, backbone.out_channels, outputs):
        assert out.shape[1] == channels
        torch.testing.assert_close(out.double(), normalised(backbone, i, maps[i]), rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize('size', [(37, 50), (64, 33), (31, 95)], ids=str)
def test_vmamba_takes_images_of_any_size(size):
    outputs = vmamba_backbone().eval()(torch.randn(1, 3, *size))
    for out, stride in zip(outputs, (4, 8, 16, 32)):
        assert out.shape[-2:] == tuple(-(-side // stride) for side in size)


def pyramid(backbone, maps):
    """The four maps at half to twice and four times their size, written out."""
    up4, up2 = backbone.pyramid[0], backbone.pyramid[1]
    first, norm, _, second = up4
    x = upsampled(first, maps[0]).permute(0, 2, 3, 1)
    x = F.layer_norm(x, x.shape[-1:], norm.weight.double(), norm.bias.double(), 1e-5).permute(0, 3, 1, 2)
    x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    return [upsampled(second, x), upsampled(up2[0], maps[1]), maps[2], pooled(maps[3])]


def upsampled(conv, x):
    """Every pixel becomes 2x2 pixels through a matrix each."""
    blocks = torch.einsum('bchw,cdij->bdhiwj', x, conv.weight.double())
    return blocks.flatten(4, 5).flatten(2, 3) + conv.bias.double()[:, None, None]


def pooled(x):
    x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), value=-torch.inf)
    return x.unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(-1, -2))


@torch.no_grad()
@pytest.mark.parametrize('padded', [(0, 0), (5, 9)], ids=['whole', 'padded'])
def test_vim_gives_a_pyramid_of_its_blocks(padded):
    state = vim_state(depth=4, patches=15)
    state['pos_embed'] = state['pos_embed'][:, :16]
    backbone = vim_backbone()
    backbone.model.set_input_size((48, 80))
    backbone.model.patch_embed.dynamic_img_size = True
    weights = vmamba.models.vim.checkpoint_filter_fn(state, backbone.model)
    backbone.model.load_state_dict({key: weights[key] for key in backbone.model.state_dict()})
    with_random_norms(backbone)
    x = torch.randn(2, 3, 48, 80)
    x[..., 48 - padded[0] :, :] = 0
    x[..., 80 - padded[1] :] = 0
    maps = []
    for i, tokens in enumerate(vim_tokens(state, x)):
        tokens = torch.cat([tokens[:, :7], tokens[:, 8:]], dim=1)  # without the class token in the middle
        maps.append(normalised(backbone, i, tokens.unflatten(1, (3, 5))))
    outputs = backbone(x[..., : 48 - padded[0], : 80 - padded[1]])
    for out, expected in zip(outputs, pyramid(backbone, maps)):
        assert out.shape == expected.shape
        torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize('stride,patch_grid', [(16, (3, 4)), (8, (5, 7))])
def test_vim_takes_images_of_any_size(stride, patch_grid):
    outputs = vim_backbone(stride=stride).eval()(torch.randn(1, 3, 37, 50))
    for out, out_stride in zip(outputs, (4, 8, 16, 32)):
        assert out.shape[-2:] == tuple(-(-side * stride // out_stride) for side in patch_grid)


@torch.no_grad()
def test_vim_resizes_its_position_embedding_to_each_input():
    backbone = vim_backbone().eval()
    small, large = backbone(torch.zeros(1, 3, 32, 32))[2], backbone(torch.zeros(1, 3, 96, 64))[2]
    assert large.shape[-2:] == (6, 4) and large.std(dim=(-1, -2)).min() > 0
    backbone.model.pos_embed.zero_()
    assert not torch.allclose(backbone(torch.zeros(1, 3, 32, 32))[2], small)


@pytest.mark.parametrize('make,layers', [(vmamba_backbone, 'stages'), (vim_backbone, 'blocks')])
@pytest.mark.parametrize('frozen', [-1, 0, 1, 3])
def test_frozen_stages(make, layers, frozen):
    backbone = make(frozen_stages=frozen, drop_path_rate=0.5).train()
    model = backbone.model
    stem = model.stem if layers == 'stages' else model.patch_embed
    parts = [stem, *getattr(model, layers)]
    assert [part.training for part in parts] == [i > frozen for i in range(5)]
    for i, part in enumerate(parts):
        assert {parameter.requires_grad for parameter in part.parameters()} == {i > frozen}
    if layers == 'blocks':
        assert model.cls_token.requires_grad == model.pos_embed.requires_grad == (frozen < 0)
    sum(out.square().sum() for out in backbone(torch.randn(2, 3, 64, 64))).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert backbone.outnorm0.weight.requires_grad


def test_all_frozen_layers_leave_only_the_norms():
    backbone = vmamba_backbone(frozen_stages=4)
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained == {f'outnorm{i}.{kind}' for i in range(4) for kind in ('weight', 'bias')}


@pytest.mark.parametrize('make', [vmamba_backbone, vim_backbone])
def test_checkpointing_changes_no_output_and_no_gradient(make):
    x, results = torch.randn(2, 3, 48, 64), []
    for with_cp in (False, True):
        torch.manual_seed(0)
        backbone = make(with_cp=with_cp, frozen_stages=1).train()
        calls = []
        layer = list(backbone.model.stages[2].blocks if make is vmamba_backbone else backbone.model.blocks)[-1]
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        outputs = backbone(x)
        sum(out.square().sum() for out in outputs).backward()
        assert len(calls) == 1 + with_cp
        results.append([*outputs, *(p.grad for p in backbone.parameters() if p.requires_grad)])
    for plain, recomputed in zip(*results):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize('make', [vmamba_backbone, vim_backbone])
def test_drop_path_grows_to_its_rate(make):
    rates = [m.drop_prob for m in make(drop_path_rate=0.4).modules() if isinstance(m, DropPath)]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.4) and rates[0] < 0.2
    assert not any(isinstance(m, DropPath) for m in make().modules())


def test_what_no_output_needs_is_removed():
    backbone = vmamba_backbone(out_indices=(0, 1))
    assert len(backbone.model.stages) == 2
    outputs = backbone(torch.randn(1, 3, 32, 32))
    sum(out.sum() for out in outputs).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    assert len(vim_backbone(out_indices=(0, 2), out_strides=(16, 16)).model.blocks) == 3


def test_the_registry_is_that_of_every_package():
    from mmdet.registry import MODELS as DETECTION
    from mmseg.registry import MODELS as SEGMENTATION

    for name in ('VMambaBackbone', 'VimBackbone', 'MM_VSSM'):
        assert MODELS.get(name) is DETECTION.get(name) is SEGMENTATION.get(name) is getattr(vmamba.mm, name)
    # The norm of the maps also under the name that it had in configs which earlier runs saved.
    assert DETECTION.get('FusedLayerNorm2d') is DETECTION.get('LayerNorm2d') is LayerNorm2d


@torch.no_grad()
@pytest.mark.parametrize('make', [vmamba_backbone, vim_backbone])
@pytest.mark.parametrize('whole', [False, True], ids=['backbone', 'detector'])
def test_backbones_of_earlier_checkpoints_load(make, whole):
    """Vim's embedding was a module, `embed`."""
    source, backbone = with_random_norms(make()), make().eval()
    prefix = 'backbone.' if whole else ''
    now = re.compile(r'^model\.(patch_embed\.(?=proj)|(?=pos_embed|cls_token))')
    state = {prefix + now.sub('model.embed.', key): value for key, value in source.state_dict().items()}
    assert any(f'{prefix}model.embed.' in key for key in state) == (make is vim_backbone)
    (nn.ModuleDict({'backbone': backbone}) if whole else backbone).load_state_dict(state)
    x = torch.randn(1, 3, 32, 48)
    assert all(map(torch.equal, backbone(x), source(x)))


@pytest.mark.parametrize('make', [vmamba_backbone, vim_backbone])
def test_bf16_autocast(make):
    backbone = make().train()
    x = torch.randn(2, 3, 64, 64)
    exact = backbone(x)
    with torch.autocast('cpu', torch.bfloat16):
        outputs = backbone(x)
    for out, expected in zip(outputs, exact):
        assert out.dtype == torch.bfloat16
        assert (out.float() - expected).norm() < 0.05 * expected.norm()


ERRORS = [
    (dict(type='VMambaBackbone', variant='vmamba_x'), ValueError, "unknown variant 'vmamba_x'.*vmamba_nano"),
    (dict(type='VMambaBackbone', variant='resnet18'), ValueError, 'resnet18 is not a VMamba'),
    (dict(type='VMambaBackbone', variant='vim_nano'), ValueError, 'vim_nano is not a VMamba'),
    (dict(type='VimBackbone', variant='vmamba_nano'), ValueError, 'vmamba_nano is not a Vim'),
    (dict(type='VMambaBackbone', variant='vmamba_nano', out_indices=(0, 4)), ValueError, r'0\.\.3 .* \(0, 4\)'),
    (dict(type='VMambaBackbone', variant='vmamba_nano', out_indices=(1, 0)), ValueError, 'ascending'),
    (dict(type='VMambaBackbone', variant='vmamba_nano', out_indices=()), ValueError, 'out_indices'),
    (dict(type='VMambaBackbone', variant='vmamba_nano', frozen_stages=5), ValueError, r'-1\.\.4, got 5'),
    (dict(type='VMambaBackbone', variant='vmamba_nano', droppath=0.1), TypeError, 'droppath'),
    (dict(type='VMambaBackbone', variant='vmamba_nano', model_options=dict(embeddim=8)), TypeError, 'embeddim'),
    *(
        (
            dict(type=name, variant=variant, model_options={'embed_dim': 8, key: value}),
            ValueError,
            f'{{{key!r}: {value}}}',
        )
        for name, variant in (('VMambaBackbone', 'vmamba_nano'), ('VimBackbone', 'vim_nano'))
        for key, value in (('features_only', True), ('num_classes', 3), ('drop_path_rate', 0.5), ('pretrained', True))
    ),
    (
        dict(type='VMambaBackbone', variant='vmamba_nano', pretrained='a', init_cfg=dict(type='b')),
        ValueError,
        'not both',
    ),
    (
        dict(type='VMambaBackbone', variant='vmamba_nano', init_cfg=dict(type='Xavier')),
        ValueError,
        'Pretrained.*Xavier',
    ),
    (dict(type='VimBackbone', variant='vim_nano', out_indices=3), ValueError, 'sequence of integers.*got 3'),
    (dict(type='VimBackbone', variant='vim_nano', out_indices=(1, 3)), ValueError, '2 out_indices need as many'),
    (dict(type='VimBackbone', variant='vim_nano', out_indices=(3,), out_strides=(12,)), ValueError, '12 .*stride 4'),
]


@pytest.mark.parametrize('config,error,message', ERRORS, ids=[message for *_, message in ERRORS])
def test_what_cannot_be_is_an_error(config, error, message):
    with pytest.raises(error, match=message):
        MODELS.build(config)
