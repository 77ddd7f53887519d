"""Wrong arguments of `mamba_step`; its results are tested with the layer, in test_mamba_layer.py."""

import pytest
import torch
from cases import DEVICE

from vmamba.kernels import MambaWeights, can_step_mamba, mamba_step, use_triton

pytestmark = pytest.mark.usefixtures('triton_kernels')


def arguments(batch=2):
    empty = torch.zeros
    weights = MambaWeights(
        *(empty(12, 4), empty(6, 3), empty(6), empty(8, 6), empty(6, 2)),
        *(empty(6), empty(6, 3), empty(6), empty(4, 6)),
    )
    weights = MambaWeights(*(None if weight is None else weight.to(DEVICE) for weight in weights))
    states = torch.zeros(batch, 6, 3, device=DEVICE), torch.zeros(batch, 6, 3, device=DEVICE)
    return dict(x=torch.zeros(batch, 4, device=DEVICE), conv_state=states[0], ssm_state=states[1], weights=weights)


def test_wrong_arguments():
    given = arguments()
    assert mamba_step(**given).shape == (2, 4)
    wrong = given['weights']._replace(x_proj=torch.zeros(9, 6, device=DEVICE))
    with pytest.raises(ValueError, match=r'x_proj must be a floating tensor \[8, 6\], got \(9, 6\)'):
        mamba_step(**{**given, 'weights': wrong})
    with pytest.raises(ValueError, match=r'ssm_state must be a floating tensor \[2, 6, 3\], got \(1, 6, 3\)'):
        mamba_step(**{**given, 'ssm_state': given['ssm_state'][:1]})
    with pytest.raises(ValueError, match='states and weights must be contiguous'):
        mamba_step(**{**given, 'ssm_state': torch.zeros(2, 3, 6, device=DEVICE).mT})
    with pytest.raises(RuntimeError, match='mamba_step has no gradients'):
        mamba_step(**{**given, 'x': given['x'].requires_grad_()})
    with pytest.raises(ValueError, match=r'needs Triton and 1 to 8 tokens, got \(9, 4\)'):
        mamba_step(**arguments(9))


def test_where_it_runs():
    x = torch.zeros(8, 4, device=DEVICE)
    assert can_step_mamba(x) and not can_step_mamba(torch.zeros(9, 4, device=DEVICE))
    with use_triton(False):
        assert not can_step_mamba(x)
