"""VSSD: variants, official checkpoints, and the models against the definition in float64."""

import official_vssd as official
import oracles
import pytest
import timm
import torch
from cases import DEVICE, needs_triton

from vmamba.kernels import use_triton
from vmamba.kernels.ssd import gated
from vmamba.layers import NonCausalSSD, non_causal
from vmamba.models.vssd import VSSD

VARIANTS = [
    # name, tag, official name, parameters, tensors, file
    ('vssd_micro', 'in1k', 'vssd_micro', 13_512_964, 379, 'vssd_micro_best.pth'),
    ('vssd_t', 'in1k', 'vssd_tiny', 24_270_724, 421, 'vssd_tiny_best_ema.pth'),
    ('vssd_t', 'mesa_in1k', '', 24_270_724, 421, 'vssd_tiny_e300_with_mesa.pth'),
    ('vssd_s', 'in1k', 'vssd_small', 40_075_650, 730, 'vssd_small_best_ema.pth'),
    ('vssd_s', 'mesa_in1k', '', 40_075_650, 730, 'vssd_small_e300_with_mesa.pth'),
    ('vssd_b', 'in1k', 'vssd_base', 88_823_151, 730, 'vssd_base_best_ema.pth'),
    ('vssd_b', 'mesa_in1k', '', 88_823_151, 730, 'vssd_base_e300_with_mesa.pth'),
]
SHAPE = dict(depths=(1, 2, 1, 1), embed_dim=8, num_heads=(2, 2, 4, 4), d_state=6)


def make_state():
    return official.vssd_state((1, 2, 1, 1))


def load(path, variant='vssd_micro', **kwargs):
    overlay = dict(file=str(path))
    return timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=overlay, **{**SHAPE, **kwargs}).eval()


@pytest.mark.parametrize(
    'name,tag,official_name,count,tensors,file', VARIANTS, ids=[f'{v[0]}.{v[1]}' for v in VARIANTS]
)
def test_variants(name, tag, official_name, count, tensors, file):
    cfg = timm.get_pretrained_cfg(f'{name}.{tag}').to_dict()
    if tag == 'in1k':
        model = timm.create_model(name, device='meta')
        assert isinstance(model, VSSD)
        assert sum(p.numel() for p in model.parameters()) == count
        assert len(model.state_dict()) == tensors
    assert (cfg['hf_hub_id'], cfg['hf_hub_filename'], cfg['license']) == ('YuhengSSS/VSSD', file, 'none')
    assert (cfg['input_size'], cfg['crop_pct']) == ((3, 224, 224), 0.875)
    if official_name not in ('', name):
        with pytest.warns(UserWarning, match=name):
            assert timm.create_model(official_name, depths=(1,), device='meta').pretrained_cfg['tag'] == tag


@torch.no_grad()
@pytest.mark.parametrize(
    'variant,taken', [('vssd_micro', 'model'), ('vssd_t', 'model_ema'), ('vssd_t.mesa_in1k', 'model')]
)
def test_official_files_give_the_official_logits(tmp_path, variant, taken):
    """Of the EMA's file, the EMA weights."""
    states = {'model': make_state(), 'model_ema': make_state()}
    torch.save({**states, 'epoch': 3}, tmp_path / 'vssd.pth')
    model = load(tmp_path / 'vssd.pth', variant)
    images = torch.randn(2, 3, 40, 68)
    expected = official.vssd_logits(states[taken], images)
    assert oracles.relative_error(model(images), expected) < 1e-4
    assert oracles.relative_error(model.double()(images.double()), expected) < 1e-6


def test_maps_and_gradients_follow_the_definition(tmp_path):
    """With a batch of 2: on CPUs, PyTorch's BatchNorm in evaluation has wrong gradients at batch 1."""
    state = make_state()
    torch.save(state, tmp_path / 'vssd.pth')
    model = load(tmp_path / 'vssd.pth').double()
    images, results = torch.randn(2, 3, 50, 36, dtype=torch.double), []
    for maps in (
        lambda x: model.forward_intermediates(x, intermediates_only=True),
        lambda x: official.vssd_maps(state, x),
    ):
        x = images.clone().requires_grad_()
        out = maps(x)
        sum(y.square().mean() for y in out).backward()
        results.append([*out, x.grad])
    for actual, expected in zip(*results, strict=True):
        assert oracles.relative_error(actual, expected) < 1e-8


@torch.no_grad()
def test_a_dense_checkpoint_gives_the_backbone_and_its_last_norm(tmp_path):
    state = make_state()
    dense = {f'backbone.{key}': v for key, v in state.items() if not key.startswith(('norm.', 'head.'))}
    norms = {f'backbone.outnorm{i}.{kind}': torch.rand(8 * 2**i) for i in range(4) for kind in ('weight', 'bias')}
    torch.save({'state_dict': {**dense, **norms, 'neck.bias': torch.ones(2)}}, tmp_path / 'det.pth')
    model = load(tmp_path / 'det.pth', num_classes=0)
    images = torch.randn(2, 3, 48, 64)
    assert torch.equal(model.norm.weight, norms['backbone.outnorm3.weight'])
    for actual, expected in zip(
        model.forward_intermediates(images, intermediates_only=True), official.vssd_maps(state, images), strict=True
    ):
        assert oracles.relative_error(actual, expected) < 1e-4


def test_the_mixer_follows_the_definition():
    layer = NonCausalSSD(10, 4, d_state=3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    wide = {key: value.double().requires_grad_() for key, value in layer.state_dict().items()}
    x = torch.randn(2, 3, 5, 10, requires_grad=True)
    wide_x = x.detach().double().requires_grad_()
    y = layer(x)
    expected = official.mixer({key.replace('out_norm.', 'norm.'): value for key, value in wide.items()}, wide_x)
    assert oracles.relative_error(y, expected) < 1e-5
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    assert oracles.relative_error(x.grad, wide_x.grad) < 1e-5
    for key, parameter in layer.named_parameters():
        assert oracles.relative_error(parameter.grad, wide[key].grad) < 1e-4, key


@needs_triton
@pytest.mark.parametrize('size,dtype', [((3, 5), torch.float32), ((11, 13), torch.float32), ((7, 6), torch.float16)])
def test_one_operator_gives_what_the_modules_give(size, dtype, monkeypatch):
    """Of one part of the pixels, of several, and in half precision; unless somebody watches the norm."""
    monkeypatch.setattr(gated, '_MIN_STEPS', 64)
    monkeypatch.setattr(gated, 'num_processors', lambda tensor: 5)
    layer = NonCausalSSD(9, 3, d_state=5).to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    x, calls = torch.randn(2, *size, 9, device=DEVICE, dtype=dtype), []
    run, grad = non_causal.gated_non_causal_ssd, torch.randn_like(x)
    monkeypatch.setattr(non_causal, 'gated_non_causal_ssd', lambda *args: calls.append(args) or run(*args))

    def results(triton):
        leaf = x.clone().requires_grad_()
        with use_triton(triton):
            y = layer(leaf)
            return y, *torch.autograd.grad(y, [leaf, *layer.parameters()], grad)

    expected, actual = results(False), results(True)
    assert len(calls) == 1
    layer.out_norm.register_forward_hook(lambda *args: calls.append(args))
    watched = results(True)
    assert len(calls) == 2 and len(calls[1]) == 3
    for a, b, c in zip(actual, expected, watched):
        bound = 1e-5 if dtype == torch.float32 else 3e-2
        assert oracles.relative_error(a, b) < bound and oracles.relative_error(c, b) < bound


def test_initial_weights():
    mixer = timm.create_model('vssd_nano').stages[0].blocks[0].mixer
    step = torch.nn.functional.softplus(mixer.dt_bias)
    assert (step > 0.9e-3).all() and (step < 0.11).all()
    assert (mixer.A_log.exp() >= 1).all() and (mixer.A_log.exp() <= 16).all() and (mixer.D == 1).all()


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(num_heads=(3, 2, 2, 2)), 'num_heads must divide the 64 inner channels, got 3'),
        (dict(num_heads=(2, 2, 2, 3)), 'num_heads must divide .* 256, got 3'),
        (dict(num_heads=(2,)), r'num_heads must have the heads of each of the 4 stages, got \(2,\)'),
        (dict(d_state=0), 'd_state .* got 0'),
    ],
)
def test_options_that_make_no_model_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('vssd_nano', device='meta', **options)
