"""RMSNorm with a gate against its float64 definition. What holds for all operators is in test_contract.py."""

import kernel_cases
import oracles
import pytest
import torch
from kernel_cases import CASES, compare, run

from vmamba.kernels import gated_norm, gated_rms_norm

CASE = CASES['gated_rms_norm']


@pytest.mark.parametrize('before', (False, True), ids=('gate-first', 'norm-first'))
@pytest.mark.parametrize('optional', ('o', ''), ids=('two', 'one'))
def test_definition(backend, optional, before):
    tensors = kernel_cases.gated_rms_norm((2, 7, 24), optional)
    compare(CASE, tensors, torch.float32, groups=1, norm_before_gate=before)
    compare(CASE, tensors, torch.float32, groups=4, norm_before_gate=before)


@pytest.mark.parametrize('shape', [(2, 3), (1, 3, 1000), (2, 0, 12), (70, 64)], ids=str)
def test_shapes(dtype, shape):
    compare(CASE, kernel_cases.gated_rms_norm(shape, dtype=dtype), dtype, groups=1)


@pytest.mark.parametrize('programs', (1, 3))
def test_programs_of_the_backward_pass_that_walk_several_blocks(triton_kernels, fresh_launches, monkeypatch, programs):
    monkeypatch.setattr(gated_norm, '_BLOCK_ELEMENTS', 64)
    monkeypatch.setattr(gated_norm, '_PROGRAMS_PER_PROCESSOR', programs)
    compare(CASE, kernel_cases.gated_rms_norm((3, 11, 24)), torch.float32, groups=1)


def test_gate_that_is_a_part_of_a_wider_projection(backend):
    tensors = kernel_cases.gated_rms_norm((2, 5, 8))
    wide = torch.randn(2, 5, 20, device=tensors['z'].device, dtype=tensors['z'].dtype)
    expected = run(gated_rms_norm, dict(tensors, z=wide[..., 3:11].contiguous()))
    actual = run(gated_rms_norm, dict(tensors, z=wide[..., 3:11]))
    oracles.assert_all_match(actual, expected, torch.float32)


def test_bad_arguments_are_refused():
    tensors = kernel_cases.gated_rms_norm((2, 5, 8))
    with pytest.raises(ValueError, match='groups must divide the 8 channels, got 3'):
        gated_rms_norm(**tensors, groups=3)
    with pytest.raises(ValueError, match=r'z must be \(2, 5, 8\) like y, got \(1, 5, 8\)'):
        gated_rms_norm(**dict(tensors, z=tensors['z'][:1]))
    with pytest.raises(ValueError, match='other must be torch.float32 like y, got torch.float64'):
        gated_rms_norm(**dict(tensors, other=tensors['other'].double()))
