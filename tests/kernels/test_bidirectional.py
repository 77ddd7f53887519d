"""bidirectional_scan against two float64 loops, one of them on the flipped sequence."""

import oracles
import pytest
import torch
from vmamba.kernels import bidirectional_scan, reference

NAMES = ('u', 'x_dbl', 'dt_weight', 'dt_bias', 'A', 'D')


def arguments(batch=2, seqlen=17, dim=5, dstate=3, dt_rank=2, dtype=torch.float64):
    wide = torch.promote_types(dtype, torch.float32)
    shapes = (
        (batch, seqlen, 2, dim),
        (batch, seqlen, 2, dt_rank + 2 * dstate),
        (2, dim, dt_rank),
        (2, dim),
        (2, dim, dstate),
        (2, dim),
    )
    u, x_dbl, dt_weight, dt_bias, A, D = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    tensors = u.to(dtype), x_dbl.to(dtype), dt_weight.to(dtype), dt_bias.to(wide) - 2, -A.abs().to(wide), D.to(wide)
    return dict(zip(NAMES, tensors))


def loop(u, x_dbl, dt_weight, dt_bias, A, D):
    """Direction 1 by flipping what it sees and flipping its output back."""
    total = 0
    for k in range(2):
        turn = (lambda t: t.flip(1)) if k else (lambda t: t)
        dt, B, C = turn(x_dbl[:, :, k]).split([dt_weight.shape[-1], A.shape[-1], A.shape[-1]], dim=-1)
        y, _ = oracles.selective_scan(
            turn(u[:, :, k]).transpose(1, 2),
            (dt @ dt_weight[k].T).transpose(1, 2),
            A[k],
            B.transpose(1, 2),
            C.transpose(1, 2),
            D[k],
            delta_bias=dt_bias[k],
            delta_softplus=True,
        )
        total = total + turn(y.transpose(1, 2))
    return total


def run(function, tensors):
    leaves = {k: t.detach().clone().requires_grad_() for k, t in tensors.items()}
    y = function(**leaves)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(torch.bfloat16).to(y.dtype))
    return {'y': y, **{f'grad_{k}': t.grad for k, t in leaves.items()}}


@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
@pytest.mark.parametrize('seqlen,dstate,batch', [(1, 16, 2), (2, 1, 1), (37, 16, 2), (151, 3, 1), (5, 2, 0)])
def test_outputs_and_gradients(seqlen, dstate, batch, dtype):
    tensors = arguments(batch, seqlen, dstate=dstate, dtype=dtype)
    expected = run(loop, {k: t.double() for k, t in tensors.items()})
    oracles.assert_all_match(run(bidirectional_scan, tensors), expected, dtype)


def test_the_reference_agrees():
    tensors = arguments()
    oracles.assert_all_match(run(reference.bidirectional_scan, tensors), run(loop, tensors), torch.float64)


def test_memory_layout_does_not_matter():
    tensors = arguments()
    order = {k: t.permute(*reversed(range(t.ndim))).contiguous() for k, t in tensors.items()}
    strided = {k: t.permute(*reversed(range(t.ndim))).requires_grad_() for k, t in order.items()}
    y = bidirectional_scan(**strided)
    y.sum().backward()
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    expected = loop(**leaves)
    expected.sum().backward()
    oracles.assert_matches(y, expected, torch.float64)
    for name in NAMES:
        oracles.assert_matches(strided[name].grad, leaves[name].grad, torch.float64, name)


def test_flipping_the_sequence_swaps_the_directions():
    tensors = arguments()
    flipped = {k: t.flip(0) for k, t in tensors.items() if k not in ('u', 'x_dbl')}
    flipped.update({k: tensors[k].flip(1, 2) for k in ('u', 'x_dbl')})
    oracles.assert_matches(bidirectional_scan(**flipped).flip(1), bidirectional_scan(**tensors), torch.float64)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('backward', [False, True], ids=['forward', 'backward'])
def test_registration_of_the_operators(backward, dtype):
    args = list(arguments(dtype=dtype).values())
    if backward:
        grad = torch.randn(2, 17, 5, dtype=dtype)
        torch.library.opcheck(torch.ops.vmamba.bidirectional_scan_backward.default, (grad, *args))
    else:
        args = tuple(a.requires_grad_() for a in args)
        torch.library.opcheck(torch.ops.vmamba.bidirectional_scan.default, args, **oracles.OPCHECK_TOLERANCE)


@pytest.mark.parametrize(
    'name,shape',
    [
        ('u', (2, 17, 5)),
        ('u', (2, 17, 3, 5)),
        ('u', (2, 0, 2, 5)),
        ('x_dbl', (2, 16, 2, 8)),
        ('x_dbl', (2, 17, 2, 7)),
        ('dt_weight', (2, 6, 2)),
        ('dt_bias', (2, 6)),
        ('A', (10, 3)),
        ('D', (5,)),
    ],
)
def test_a_bad_argument_is_an_error_that_shows_it(name, shape):
    tensors = {**arguments(dtype=torch.float32), name: torch.zeros(shape)}
    with pytest.raises(ValueError) as caught:
        bidirectional_scan(**tensors)
    assert str(shape) in str(caught.value)
