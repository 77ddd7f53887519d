"""Experts on both backends: what the shared tests leave out."""

import kernel_cases
import pytest
import torch
from cases import BACKENDS, DEVICE
from kernel_cases import CASES, compare

from vmamba.kernels import switch_mlp, use_triton


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(
    ('sizes', 'capacity'),
    [(dict(batch=5, seqlen=27, dim=70, experts=3), None), (dict(seqlen=20, dim=33, experts=67), 1)],
    ids=('many-tokens', 'many-experts'),
)
def test_several_tiles(backend, sizes, capacity):
    with use_triton(backend):
        tensors = kernel_cases.switch_mlp(**sizes)
        compare(CASES['switch_mlp'], tensors, torch.float32, capacity=capacity)


@pytest.mark.parametrize('backend', BACKENDS)
def test_more_experts_than_a_program_holds_run_in_pytorch(backend):
    with use_triton(backend):
        tensors = kernel_cases.switch_mlp(batch=1, seqlen=7, experts=300)
        compare(CASES['switch_mlp'], tensors, torch.float32)


@pytest.mark.parametrize('backend', BACKENDS)
def test_counts_and_order_of_dropped_tokens(backend):
    """The first tokens of an expert are kept."""
    x = torch.eye(3, device=DEVICE)[[2, 0, 0, 2, 0, 0]]
    fc1, fc2 = torch.ones(3, 3, 4, device=DEVICE), torch.ones(3, 4, 3, device=DEVICE)
    with use_triton(backend):
        result = switch_mlp(x, 5 * torch.eye(3, device=DEVICE), fc1, fc2, capacity=2)
    assert result.counts.tolist() == [4, 0, 2]
    assert (result.out[:, 0] > 0).tolist() == [True, True, True, True, False, False]


@pytest.mark.skipif(DEVICE == 'cpu', reason='grouped products of a GPU')
def test_grouped_products_on_a_gpu():
    tensors = kernel_cases.switch_mlp(batch=6, seqlen=50, dim=64, hidden=96, experts=8)
    case = CASES['switch_mlp']
    tensors = {name: tensor * tensor.shape[-1] ** -0.5 if 'fc' in name else tensor for name, tensor in tensors.items()}
    rounded = {name: tensor.bfloat16() if name != 'router_weight' else tensor for name, tensor in tensors.items()}
    compare(case, rounded, torch.bfloat16, capacity=20)


def test_a_capacity_below_one_is_refused():
    tensors = kernel_cases.switch_mlp()
    with pytest.raises(ValueError, match='switch_mlp: capacity must be at least 1, or None, got 0'):
        switch_mlp(**tensors, capacity=0)
