"""Families whose blocks do not run fused: the Triton kernels give what plain PyTorch gives."""

import oracles
import pytest
import torch
from cases import DEVICE, needs_triton
from model_cases import FUSED, SMALL, images, small

from vmamba.kernels import use_triton

pytestmark = [needs_triton, pytest.mark.slow]
SHALLOW = {
    'mambavision': dict(depths=(0, 0, 1), window_size=3),
    'vssd': dict(depths=(1,)),
    'm2': dict(depths=(1,)),
    'adventurer': dict(depth=1, img_size=12),
    'vim2': dict(depth=1, img_size=12),
    'moe': dict(depths=(1,)),
    'vim-moe': dict(depth=1, img_size=12),
}


def outputs_and_gradients(model, x):
    logits = model(x)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    names, parameters = zip(*model.named_parameters())
    gradients = torch.autograd.grad((logits * weights).sum(), [x, *parameters])
    return dict(zip(['logits', 'images', *names], [logits, *gradients], strict=True))


@pytest.mark.parametrize('family', [family for family in SMALL if family not in FUSED])
def test_both_backends_give_the_same(family):
    model = small(family, **SHALLOW[family]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    size = (64, 48) if family == 'mambavision' else (12, 12) if 'depth' in SHALLOW[family] else (16, 12)
    model, x = model.to(DEVICE), images(2, 3, *size).to(DEVICE).requires_grad_()
    with use_triton(False):
        expected = outputs_and_gradients(model, x)
    with use_triton(True):
        actual = outputs_and_gradients(model, x)
    for name, value in actual.items():
        assert oracles.relative_error(value, expected[name]) < 1e-4, name
