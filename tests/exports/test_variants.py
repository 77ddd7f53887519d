"""Every registered variant at its own size: ONNX Runtime computes the same as PyTorch, and the file is small.

`make test-export` runs this; it takes hours on two cores.
"""

import pytest
import timm
import torch

import vmamba  # noqa: F401
from vmamba.export import export_onnx

VARIANTS = timm.list_models(module=['adventurer', 'mambavision', 'vim', 'vmamba', 'vssd'])


@pytest.mark.parametrize('name', VARIANTS)
def test_variant(name, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    file = export_onnx(model, torch.randn(1, *model.pretrained_cfg['input_size']), tmp_path / f'{name}.onnx')
    print(name, *(f'{key}={value:.4g}' for key, value in file._asdict().items()))
    assert file.size <= 1.15 * file.weights
