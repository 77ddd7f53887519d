"""bidirectional_conv1d against a float64 loop over positions and taps."""

import oracles
import pytest
import torch
from vmamba.kernels import bidirectional_conv1d

NAMES = ('x', 'weight', 'bias')


def arguments(batch=2, seqlen=9, dim=5, width=4, dtype=torch.float64):
    shapes = (batch, seqlen, dim), (2, dim, width), (2, dim)
    return dict(zip(NAMES, (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)))


def loop(x, weight, bias):
    batch, seqlen, dim = x.shape
    width = weight.shape[-1]
    rows = []
    for position in range(seqlen):
        directions = []
        for direction, sign in enumerate((1, -1)):
            total = bias[direction].expand(batch, dim)
            for tap in range(width):
                source = position + sign * (tap - width + 1)
                if 0 <= source < seqlen:
                    total = total + weight[direction, :, tap] * x[:, source]
            directions.append(total)
        rows.append(torch.stack(directions, dim=1))
    return torch.stack(rows, dim=1)


def run(function, tensors):
    leaves = {k: t.detach().clone().requires_grad_() for k, t in tensors.items()}
    u = function(**leaves)
    torch.manual_seed(1)
    u.backward(torch.randn(u.shape, dtype=torch.float64).to(torch.bfloat16).to(u.dtype))
    return {'u': u, **{f'grad_{k}': t.grad for k, t in leaves.items()}}


@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
@pytest.mark.parametrize('seqlen,width,batch', [(9, 4, 2), (1, 4, 1), (3, 7, 2), (6, 1, 3), (12, 2, 0)])
def test_outputs_and_gradients(seqlen, width, batch, dtype):
    tensors = arguments(batch, seqlen, width=width, dtype=dtype)
    expected = run(loop, {k: t.double() for k, t in tensors.items()})
    oracles.assert_all_match(run(bidirectional_conv1d, tensors), expected, dtype)


def test_memory_layout_does_not_matter():
    tensors = arguments()
    expected = run(loop, tensors)
    wide = torch.randn(2, 9, 10, dtype=torch.float64)
    wide[..., 3:8] = tensors['x']
    views = dict(x=wide[..., 3:8], weight=tensors['weight'].mT.contiguous().mT, bias=tensors['bias'])
    u = bidirectional_conv1d(**views)
    assert u.is_contiguous()
    oracles.assert_matches(u, expected['u'], torch.float64)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_registration_of_the_operators(dtype):
    tensors = [t.requires_grad_() for t in arguments(dtype=dtype).values()]
    torch.library.opcheck(torch.ops.vmamba.bidirectional_conv1d, tuple(tensors))
    grad = torch.randn(2, 9, 2, 5, dtype=dtype)
    torch.library.opcheck(torch.ops.vmamba.bidirectional_conv1d_backward, (grad, *(t.detach() for t in tensors)))


@pytest.mark.parametrize(
    'name,shape',
    [
        ('x', (9, 5)),
        ('weight', (2, 5)),
        ('weight', (1, 5, 4)),
        ('weight', (2, 6, 4)),
        ('weight', (2, 5, 0)),
        ('bias', (5,)),
    ],
)
def test_a_bad_shape_is_an_error_that_shows_it(name, shape):
    with pytest.raises(ValueError, match=f'^{name} must be .*{str(shape)[1:-1]}'):
        bidirectional_conv1d(**{**arguments(), name: torch.randn(shape, dtype=torch.float64)})


def test_integers_are_an_error():
    with pytest.raises(ValueError, match='int64'):
        bidirectional_conv1d(**{**arguments(), 'x': torch.ones(2, 9, 5, dtype=torch.int64)})
