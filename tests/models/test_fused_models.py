"""Whole models on the Triton kernels; without a GPU, in Triton's interpreter (see conftest.py)."""

import oracles
import pytest
import timm
import torch
from recorder import Recorder
from vmamba.kernels import use_triton
from vmamba.kernels.backend import triton

import vmamba  # noqa: F401  registers the models

pytestmark = pytest.mark.skipif(triton is None, reason='needs the package triton')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
SMALL = {
    'vmamba': ('vmamba_nano', dict(depths=(1, 1), embed_dim=8), (2, 3, 12, 20)),
    'v0': ('vmamba_t_v0', dict(depths=(1,), embed_dim=3, d_state=2), (1, 3, 12, 20)),
}


def outputs_and_gradients(model, images, triton_kernels):
    images = images.clone().requires_grad_()
    with use_triton(triton_kernels), Recorder() as recorder:
        logits = model(images)
    fused = {'add_norm_fused', 'depthwise_conv2d_fused', 'ss2d_fused'}
    assert set(recorder.names) == (fused if triton_kernels else {'ss2d_scan'})
    names, parameters = zip(*model.named_parameters())
    gradients = torch.autograd.grad(logits.square().sum(), [images, *parameters])
    return dict(zip(['logits', 'images', *names], [logits, *gradients]))


@pytest.mark.parametrize('family', SMALL)
def test_outputs_and_gradients_equal_the_plain_paths(family):
    name, options, shape = SMALL[family]
    model, images = timm.create_model(name, num_classes=10, **options).to(DEVICE), torch.randn(shape, device=DEVICE)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    expected = outputs_and_gradients(model, images, False)
    for name, actual in outputs_and_gradients(model, images, True).items():
        assert oracles.relative_error(actual, expected[name]) < 1e-4, name
