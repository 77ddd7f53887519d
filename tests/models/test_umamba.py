"""U-Mamba against the definition, computed in float64 from random checkpoints with the official names."""

import copy

import oracles
import pytest
import torch
from cases import BACKENDS, DEVICE
from official_umamba import umamba_logits, umamba_state
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from umamba_cases import ABDOMEN_3D, FLAT, PUBLISHED, SOLID, build, train

from vmamba.kernels import use_triton
from vmamba.models import UMamba
from vmamba.models.umamba import MambaLayer

CASES = {
    'bot-2d': ('bot', FLAT, 'mamba'),
    'enc-2d': ('enc', FLAT, 'mamba'),
    'bot-3d': ('bot', SOLID, 'mamba'),
    'enc-3d': ('enc', SOLID, 'mamba'),
    'bot-mamba2': ('bot', FLAT, 'mamba2'),
    'enc-mamba2': ('enc', SOLID, 'mamba2'),
    'bot-none': ('bot', SOLID, 'none'),
    'enc-none': ('enc', FLAT, 'none'),
}


@pytest.mark.parametrize('kind, plan, mixer', CASES.values(), ids=CASES)
def test_outputs_and_gradients_follow_the_definition(kind, plan, mixer):
    model = build(kind, plan, mixer=mixer, deep_supervision=True)
    state = umamba_state(kind, plan, 2, 3, mixer)
    model.load_state_dict(state)
    images = torch.randn(2, 2, *plan['patch_size'], requires_grad=True)
    wide = {key: value.double().requires_grad_() for key, value in state.items()}
    wide_images = images.detach().double().requires_grad_()
    outputs, expected = model(images), umamba_logits(wide, kind, plan, wide_images, mixer)
    assert [y.shape for y in outputs] == [y.shape for y in expected]
    for y, exact in zip(outputs, expected):
        assert oracles.relative_error(y, exact) < 1e-4
    grads = [torch.randn_like(y) for y in outputs]
    torch.autograd.backward(outputs, grads)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    scale = max(parameter.grad.norm() for parameter in model.parameters())
    assert oracles.relative_error(images.grad, wide_images.grad) < 1e-3
    for key, parameter in model.named_parameters():
        error = (parameter.grad - wide[key].grad).norm()  # a bias before a norm has no gradient but rounding
        assert error < 1e-3 * parameter.grad.norm() + 1e-6 * scale, key


@pytest.mark.parametrize('name', PUBLISHED)
def test_numbers_of_parameters_are_the_published(name):
    plan, in_chans, num_classes, bot, enc, by_channel = PUBLISHED[name]
    options = dict(in_chans=in_chans, num_classes=num_classes, device='meta', **plan)
    models = {kind: UMamba(kind, **options) for kind in ('bot', 'enc')}
    assert {kind: sum(p.numel() for p in model.parameters()) for kind, model in models.items()} == dict(
        bot=bot, enc=enc
    )
    layers = dict(enumerate(models['enc'].encoder.mamba_layers))
    found = {s: len(layer.norm.weight) for s, layer in layers.items() if getattr(layer, 'channel_tokens', False)}
    assert found == by_channel


def test_mamba_layers_of_2d_encoders_are_at_every_second_stage():
    for n, expected in ((7, [0, 2, 4, 6]), (8, [1, 3, 5, 7])):
        plan = dict(patch_size=[128, 128], features=[4] * n, kernel_sizes=[3] * n, strides=[1] + [2] * (n - 1))
        layers = UMamba('enc', 1, 2, device='meta', **plan).encoder.mamba_layers
        assert [s for s, layer in enumerate(layers) if isinstance(layer, MambaLayer)] == expected


@pytest.mark.parametrize('kind, plan', [('bot', FLAT), ('enc', SOLID)], ids=['bot', 'enc'])
def test_state_dict_has_the_official_names(kind, plan):
    model = build(kind, plan)
    assert set(model.state_dict()) == set(umamba_state(kind, plan, 2, 3))
    alias = model.state_dict()['decoder.encoder.stem.1.conv2.all_modules.1.bias']
    assert alias.data_ptr() == model.encoder.stem[1].conv2.norm.bias.data_ptr()


def test_lists_of_blocks_are_reduced_in_a_copy():
    encoder_blocks, decoder_blocks = [3, 1, 4, 4], [2, 3, 4]
    model = build('bot', FLAT, encoder_blocks=encoder_blocks, decoder_blocks=decoder_blocks)
    assert (encoder_blocks, decoder_blocks) == ([3, 1, 4, 4], [2, 3, 4])
    assert [len(stage) for stage in model.encoder.stages] == [3, 1, 1, 1]
    assert len(model.encoder.stem) == 3
    assert [len(stage) for stage in model.decoder.stages] == [2, 3, 1]


def test_deep_supervision_can_be_switched():
    model, images = build('bot', FLAT), torch.randn(1, 2, *FLAT['patch_size'])
    logits = model(images)
    assert logits.shape == (1, 3, *FLAT['patch_size'])
    model.decoder.deep_supervision = True
    outputs = model(images)
    torch.testing.assert_close(outputs[0], logits, rtol=0, atol=0)
    assert len(outputs) == 3


def test_convolutions_are_initialised_as_officially_and_mamba_keeps_its_own():
    model = build('enc', SOLID)
    weight = model.encoder.stages[2][0].conv2.weight
    std = (2 / (1 + 0.01**2) / weight[0].numel()) ** 0.5
    assert abs(weight.std() / std - 1) < 0.1
    assert not any(m.bias.any() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    mixer = model.encoder.mamba_layers[0].mamba
    assert mixer.conv1d.bias.any()
    torch.testing.assert_close(mixer.A_log[0], torch.arange(1, 17).log())


def test_a_network_on_the_meta_device_is_initialised_later():
    model = build('enc', SOLID, device='meta').to_empty(device='cpu')
    model.init_weights()
    assert model(torch.randn(1, 2, *SOLID['patch_size'])).isfinite().all()
    assert set(model.state_dict()) == set(build('enc', SOLID).state_dict())


def test_copies_keep_the_shared_modules():
    model = copy.deepcopy(build('bot', FLAT))
    assert model.decoder.encoder is model.encoder
    assert model.encoder.stem[1].conv1.all_modules[0] is model.encoder.stem[1].conv1.conv


@pytest.mark.parametrize('mixer', ['mamba', 'mamba2', 'none'])
def test_bot_takes_other_sizes(mixer):
    assert build('bot', FLAT, mixer=mixer)(torch.randn(1, 2, 32, 48)).shape == (1, 3, 32, 48)


def test_enc_takes_other_sizes_if_its_tokens_are_positions():
    plan = {**FLAT, 'patch_size': [64, 64]}
    assert build('enc', plan)(torch.randn(1, 2, 32, 48)).shape == (1, 3, 32, 48)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('mixer', ['mamba', 'mamba2'])
def test_steps_convolution_and_scan_are_in_fp32_under_autocast(dtype, mixer, monkeypatch):
    model, seen = build('enc', SOLID, mixer=mixer), {}
    module = 'vmamba.layers.mamba' if mixer == 'mamba' else 'vmamba.layers.mamba2'
    name = 'selective_scan' if mixer == 'mamba' else 'ssd_scan'
    scan = getattr(__import__(module, fromlist=[name]), name)

    def record(u, delta, *args, **kwargs):
        seen['scan'] = u.dtype, delta.dtype
        return scan(u, delta, *args, **kwargs)

    monkeypatch.setattr(f'{module}.{name}', record)
    layer = model.encoder.mamba_layers[0].mamba
    layer.conv1d.register_forward_hook(lambda _, args, out: seen.update(conv=(args[0].dtype, out.dtype)))
    for projection in (layer.in_proj, layer.out_proj):
        projection.register_forward_hook(lambda _, args, out: seen.setdefault('projections', set()).add(out.dtype))
    with torch.autocast('cpu', dtype):
        logits = model(torch.randn(1, 2, *SOLID['patch_size']))
    assert seen == dict(scan=(torch.float32,) * 2, conv=(torch.float32,) * 2, projections={dtype})
    assert logits.isfinite().all()


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('mixer', ['mamba', 'mamba2'])
def test_mamba_layers_in_half_precision_stay_close_to_fp32(mixer, backend):
    layer, x, grad = MambaLayer(24, mixer, device=DEVICE), torch.randn(2, 24, 5, 7), torch.randn(2, 24, 5, 7)
    x, grad = x.to(DEVICE).requires_grad_(), grad.to(DEVICE)
    parameters = list(layer.parameters())

    def run(x):
        y = layer(x)
        return y, *torch.autograd.grad(y, [x, *parameters], grad.to(y.dtype))

    with use_triton(backend):
        exact = run(x)
        with torch.autocast(DEVICE, torch.bfloat16):
            rounded = run(x)
        for found, expected in zip(rounded, exact):  # gradients of single numbers are sums that nearly cancel
            assert oracles.relative_error(found, expected) < (0.02 if found.numel() > 1 else 0.1)
        with torch.no_grad():
            assert oracles.relative_error(layer.bfloat16()(x.bfloat16()), exact[0]) < 0.01


@pytest.mark.parametrize('kind, mixer, dtype', [('bot', 'mamba2', torch.bfloat16), ('enc', 'mamba', torch.float16)])
def test_training_under_autocast_stays_finite(kind, mixer, dtype):
    losses = train(build(kind, SOLID, mixer=mixer, deep_supervision=True), SOLID, 200, dtype)
    assert torch.tensor(losses).isfinite().all() and losses[-1] < losses[0]


def test_recomputed_layers_have_the_same_gradients():
    model, images = build('enc', SOLID), torch.randn(2, 2, *SOLID['patch_size'])
    gradients = []
    for recompute in (True, False):
        for layer in model.encoder.mamba_layers:
            layer.recompute = recompute
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for recomputed, kept in zip(*gradients):
        torch.testing.assert_close(recomputed, kept, rtol=0, atol=0)


def test_networks_compile():
    model, images = build('enc', SOLID, deep_supervision=True), torch.randn(1, 2, *SOLID['patch_size'])
    compiled = torch.compile(model, backend='aot_eager')
    for y, expected in zip(compiled(images), model(images)):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    compiled(images)[0].sum().backward()


def test_checkpoints_of_nnunet_load(tmp_path):
    model, state = build('bot', FLAT), umamba_state('bot', FLAT, 2, 3)
    checkpoint = dict(network_weights=state, optimizer_state={}, current_epoch=3, trainer_name='nnUNetTrainer')
    torch.save(checkpoint, tmp_path / 'checkpoint_final.pth')
    model.load_pretrained(tmp_path / 'checkpoint_final.pth')
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    other = build('bot', FLAT)
    other.load_state_dict(checkpoint)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize('prefix', ['_orig_mod.', 'module.', 'module._orig_mod.'])
def test_weights_of_compiled_and_parallel_networks_load(prefix, tmp_path):
    state = umamba_state('bot', FLAT, 2, 3)
    wrapped = {prefix + key: value for key, value in state.items()}
    torch.save(wrapped, tmp_path / 'weights.pth')
    models = [build('bot', FLAT) for _ in range(3)]
    models[0].load_state_dict(wrapped)
    models[1].load_state_dict(dict(network_weights=wrapped))
    models[2].load_pretrained(tmp_path / 'weights.pth')
    for model in models:
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('kind, plan', [('bot', FLAT), ('enc', SOLID)], ids=['bot', 'enc'])
def test_files_with_one_name_of_each_weight_load(kind, plan, tmp_path):
    source, path = build(kind, plan), tmp_path / 'weights.safetensors'
    save_model(source, path)
    models = [build(kind, plan) for _ in range(2)]
    models[0].load_pretrained(path)
    load_model(models[1], path)
    for model in models:
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    weights = load_file(path)
    save_file({key: value for key, value in weights.items() if 'stem.1.conv2' not in key}, path)
    with pytest.raises(RuntimeError, match=r'missing: encoder\.stem\.1\.conv2'):
        models[0].load_pretrained(path)


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    torch.save(umamba_state('bot', FLAT, 2, 5), tmp_path / 'weights.pth')
    message = r'decoder.seg_layers.0.weight \(5, .*\) instead of \(3, .*Build the network from the plans'
    with pytest.raises(RuntimeError, match=message):
        build('bot', FLAT).load_pretrained(tmp_path / 'weights.pth')
    with pytest.raises(FileNotFoundError, match='no checkpoint file'):
        build('bot', FLAT).load_pretrained(tmp_path / 'absent.pth')


ERRORS = {
    'kind': (dict(kind='dec'), "kind must be one of 'bot', 'enc', got 'dec'"),
    'mixer': (dict(mixer='mamba3'), "mixer must be one of 'mamba', 'mamba2', 'none', got 'mamba3'"),
    'classes': (dict(num_classes=0), 'num_classes must be an integer of at least 1, got 0'),
    'rank': (dict(patch_size=[16]), r'patch_size must have 2 or 3 numbers, got \(16,\)'),
    'patch': (dict(patch_size=[16, 20]), r'patch_size must be divisible by .*\(8, 8\), got \(16, 20\)'),
    'no-list': (dict(patch_size=16), 'patch_size must be a list of numbers, got 16'),
    'stages': (dict(features=[8]), r'features must have at least 2 stages, got \(8,\)'),
    'strides': (dict(strides=[1, 2]), r'strides must have an entry for each of the 4 stages, got \[1, 2\]'),
    'stride-rank': (dict(strides=[1, 2, 2, (2, 2, 2)]), 'strides must have 2 numbers per stage'),
    'first-stride': (dict(strides=[2, 2, 2, 2]), r'strides of the first stage must be 1, got \(2, 2\)'),
    'kernel': (dict(kernel_sizes=[3, 3, 2, 3]), 'kernel_sizes must be odd'),
    'blocks': (dict(encoder_blocks=[2, 2]), r'encoder_blocks must be a number or a list of 4, got \[2, 2\]'),
    'no-blocks': (dict(decoder_blocks=0), r'decoder_blocks\[0\] must be an integer of at least 1, got 0'),
}


@pytest.mark.parametrize('options, message', ERRORS.values(), ids=ERRORS)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UMamba(**{**dict(kind='bot', in_chans=2, num_classes=3), **FLAT, **options})


def test_bad_images_are_refused():
    bot, enc = build('bot', FLAT), build('enc', FLAT)
    with pytest.raises(ValueError, match=r'divisible by the product of the strides \(8, 8\), got \(16, 20\)'):
        bot(torch.randn(1, 2, 16, 20))
    with pytest.raises(ValueError, match=r'\[B, 2\] with 2 axes of positions, got \(1, 2, 16, 16, 16\)'):
        bot(torch.randn(1, 2, 16, 16, 16))
    with pytest.raises(ValueError, match=r'\[B, 2\] with 2 axes of positions, got \(1, 3, 16, 16\)'):
        bot(torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r'takes images of \(16, 24\) only, got \(32, 48\)'):
        enc(torch.randn(1, 2, 32, 48))
    for size in ((8, 8), (0, 8)):
        with pytest.raises(ValueError, match=r'larger than the product of the strides \(8, 8\), got'):
            bot(torch.randn(1, 2, *size))
    assert bot(torch.randn(1, 2, 8, 16)).shape == (1, 3, 8, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('mixer', ['mamba', 'mamba2'])
@pytest.mark.parametrize('kind', ['bot', 'enc'])
def test_200_steps_under_fp16_autocast_stay_finite(kind, mixer):
    plan = {**ABDOMEN_3D, 'patch_size': [16, 64, 64]}
    model = UMamba(kind, 1, 5, **plan, deep_supervision=True, mixer=mixer).cuda()
    losses = train(model, plan, 200, torch.float16)
    assert torch.tensor(losses).isfinite().all() and losses[-1] < losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('kind, plan, mixer', CASES.values(), ids=CASES)
def test_a_gpu_computes_the_same(kind, plan, mixer, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    model, images = build(kind, plan, mixer=mixer), torch.randn(2, 2, *plan['patch_size'])
    expected = model(images).detach()
    assert oracles.relative_error(model.cuda()(images.cuda()).cpu(), expected) < 1e-4
