"""The models on a CUDA device: the same answers as on the CPU, under autocast, compiled and captured."""

import pytest
import timm
import torch
from torch import nn

import vmamba  # noqa: F401  registers the models

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]

NAMES = [
    'vmamba_nano',
    'vim_nano',
    'vmamba_t_v0',
    'mambavision_nano',
    'vssd_nano',
    'adventurer_nano',
    'vmamba_t_m2',
    'vim2_t',
    'vmamba_nano_moe',
    'vim_nano_moe',
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Convolutions in fp32: by default they round to TF32 there."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


def build(name):
    shallow = {
        'vim2_t': dict(depth=2, img_size=64),
        **dict.fromkeys(('vmamba_t_v0', 'vmamba_t_m2'), dict(depths=[1] * 4)),
        'mambavision_nano': dict(window_size=(4, 2)),
    }
    # On a map or a window of one pixel A has no gradient.
    size = 32 if name in ('vim_nano', 'vim_nano_moe', 'adventurer_nano') else 64
    model = timm.create_model(name, num_classes=10, **shallow.get(name, {}))
    # Statistics of small batches amplify rounding.
    return model.train(not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())), torch.randn(4, 3, size, size)


def relative_error(actual, expected):
    return ((actual.cpu().double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize('name', NAMES)
def test_outputs_and_gradients_equal_the_cpus(name):
    model, images = build(name)
    expected = model(images)
    expected.square().sum().backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    model.cuda()
    logits = model(images.cuda())
    logits.square().sum().backward()
    assert relative_error(logits, expected) < 1e-4
    for key, parameter in model.named_parameters():
        assert relative_error(parameter.grad, gradients[key]) < 2e-3, key


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
def test_autocast(name, dtype):
    model, images = build(name)
    model.eval().cuda()
    with torch.no_grad():
        expected = model(images.cuda()).cpu()
        with torch.autocast('cuda', dtype):
            assert relative_error(model(images.cuda()), expected) < 5e-2


@pytest.mark.parametrize('name', NAMES)
def test_compiled_without_graph_breaks(name):
    model, images = build(name)
    model.cuda()
    expected = model(images.cuda()).detach().cpu()
    compiled = torch.compile(model, fullgraph=True)
    logits = compiled(images.cuda())
    logits.sum().backward()
    assert relative_error(logits.detach(), expected) < 1e-4


@pytest.mark.parametrize('name', NAMES)
def test_captured_in_a_cuda_graph(name):
    model, images = build(name)
    model.eval().cuda()
    static = images.cuda()
    # In fp32 experts run one by one, which waits for their numbers of tokens.
    autocast = torch.autocast('cuda', torch.bfloat16, enabled=name.endswith('moe'))
    with torch.inference_mode(), autocast:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(static)
        other = torch.randn_like(images)
        static.copy_(other)
        graph.replay()
        assert relative_error(captured, model(other.cuda()).cpu()) < 1e-5
