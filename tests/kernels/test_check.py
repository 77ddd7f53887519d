"""Shape specs, and what beyond the contract no function takes."""

import kernel_cases
import pytest
import torch

from vmamba import kernels
from vmamba.kernels._check import check, check_that


def zeros(*shape):
    return torch.zeros(shape)


def test_sizes_by_name():
    sizes = check('f', dict(K=4), x=(zeros(2, 3, 5), 'B L D'), y=(zeros(4, 5), 'K D'), z=(None, 'B'))
    assert sizes == dict(B=2, L=3, D=5, K=4)


@pytest.mark.parametrize(
    'specs,message',
    [
        (dict(x=(zeros(2, 3), 'B D'), y=(zeros(4), 'D')), 'f: y must be a floating tensor [3], got (4,) torch.float32'),
        (dict(x=(zeros(2, 3), 'B L D')), 'f: x must be a floating tensor [B, L, D], got (2, 3) torch.float32'),
        (dict(x=(zeros(2, 3), '2 4')), 'f: x must be a floating tensor [2, 4], got (2, 3) torch.float32'),
        (dict(x=(zeros(2, 0), 'B L>0')), 'f: x must be a floating tensor [2, L>0], got (2, 0) torch.float32'),
        (dict(x=(zeros(2, 0).int(), 'B L')), 'f: x must be a floating tensor [B, L], got (2, 0) torch.int32'),
        (dict(x=(zeros(1).to(torch.complex64), 'L')), 'f: x must be a floating tensor [L], got (1,) torch.complex64'),
        (dict(x=(None, 'L')), 'f: x must be a floating tensor [L], got NoneType'),
        (dict(x=(zeros(2).numpy(), 'L')), 'f: x must be a floating tensor [L], got ndarray'),
        (
            dict(x=(zeros(2, 3), 'B D'), y=(zeros(3), 'B | B D')),
            'f: y must be a floating tensor [2] or [2, 3], got (3,) torch.float32',
        ),
    ],
)
def test_what_does_not_fit_is_shown_with_what_would(specs, message):
    with pytest.raises(ValueError) as error:
        check('f', **specs)
    assert str(error.value) == message


def test_any_dimensions_at_the_beginning():
    for shape in ((3,), (2, 3), (1, 2, 3)):
        assert check('f', x=(zeros(*shape), '... d')) == dict(d=3)


def test_specs_of_several_ranks():
    for shape in ((3, 4), (2, 3, 4)):
        assert check('f', x=(zeros(*shape), 'B d | A B d'))['d'] == 4


def test_a_condition():
    check_that(True, 'fine')
    with pytest.raises(ValueError, match='^not so$'):
        check_that(False, 'not so')


def test_reverse_mode_beside_tangents():
    tensors = {k: t for k, t in kernel_cases.ss2d_scan().items()}
    leaf = tensors.pop('x').requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        y = kernels.ss2d_scan(leaf, **tensors)
        y.backward(torch.randn_like(y))
    assert leaf.grad.abs().sum() > 0


def test_what_is_no_real_number_is_on_the_same_device_too():
    tensors = kernel_cases.causal_conv1d(1, 5, 4)
    seq_idx = torch.zeros(1, 5, dtype=torch.int32, device='meta')
    with pytest.raises(ValueError, match='seq_idx .* meta'):
        kernels.causal_conv1d(**tensors, seq_idx=seq_idx)
    states = torch.zeros(1, 4, 3, dtype=torch.float64, device='meta')
    with pytest.raises(ValueError, match='final_states_out .* meta'):
        kernels.causal_conv1d(**tensors, return_final_states=True, final_states_out=states)
