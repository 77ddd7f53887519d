"""ss2d_scan against a float64 walk along routes of (row, column) pairs: output and every gradient."""

import oracles
import pytest
import torch
from vmamba.kernels import recurrence, reference, ss2d_scan

NAMES = ('x', 'x_dbl', 'dt_weight', 'dt_bias', 'A', 'D')


def arguments(size=(3, 5), batch=2, dim=5, dstate=2, dt_rank=2, dtype=torch.float64):
    wide = torch.promote_types(dtype, torch.float32)
    shapes = (
        (batch, *size, dim),
        (batch, *size, 4, dt_rank + 2 * dstate),
        (4, dim, dt_rank),
        (4, dim),
        (4, dim, dstate),
        (4, dim),
    )
    x, x_dbl, dt_weight, dt_bias, A, D = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    tensors = x.to(dtype), x_dbl.to(dtype), dt_weight.to(dtype), dt_bias.to(wide) - 2, -A.abs().to(wide), D.to(wide)
    return dict(zip(NAMES, tensors))


def run(function, tensors):
    """Output and gradients by name."""
    leaves = {k: t.detach().clone().requires_grad_() for k, t in tensors.items()}
    y = function(**leaves)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(torch.bfloat16).to(y))
    return {'y': y, **{f'grad_{k}': t.grad for k, t in leaves.items()}}


def compare(tensors, dtype):
    expected = run(oracles.ss2d_scan, {k: t.double() for k, t in tensors.items()})
    oracles.assert_all_match(run(ss2d_scan, tensors), expected, dtype)


@pytest.mark.parametrize('dstate', [1, 2, 16])
@pytest.mark.parametrize('size', [(1, 1), (1, 7), (6, 1), (3, 5), (5, 3), (7, 7), (4, 13)], ids='{0[0]}x{0[1]}'.format)
def test_outputs_and_gradients_in_double(size, dstate):
    compare(arguments(size, dstate=dstate), torch.float64)


@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
@pytest.mark.parametrize('dstate,dim,dt_rank', [(1, 24, 2), (16, 6, 1), (3, 1, 5)])
def test_dtypes(dtype, dstate, dim, dt_rank):
    tensors = arguments((5, 9), 1, dim, dstate, dt_rank, dtype)
    assert ss2d_scan(**tensors).dtype == dtype
    compare(tensors, dtype)


@pytest.mark.parametrize('x,x_dbl,weight', [('bfloat16', 'bfloat16', 'float32'), ('bfloat16', 'float32', 'float32')])
def test_mixed_dtypes(x, x_dbl, weight):
    """As under autocast: the map in bfloat16 and the parameters in fp32. The output has x's dtype."""
    tensors = arguments(dtype=torch.bfloat16)
    for name, dtype in (('x', x), ('x_dbl', x_dbl), ('dt_weight', weight)):
        tensors[name] = tensors[name].to(getattr(torch, dtype))
    assert ss2d_scan(**tensors).dtype == torch.bfloat16
    compare(tensors, torch.bfloat16)


@pytest.mark.parametrize('size', [(2, 3), (5, 1)], ids='{0[0]}x{0[1]}'.format)
def test_the_reference_agrees(size):
    tensors = arguments(size)
    oracles.assert_all_match(run(reference.ss2d_scan, tensors), run(oracles.ss2d_scan, tensors), torch.float64)


@pytest.mark.parametrize('case', ['underflow', 'tiny-steps', 'wide-range'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_extreme_steps_and_decays(case, dtype):
    tensors = arguments((9, 11), dim=3, dtype=dtype)
    if case == 'underflow':
        tensors['dt_bias'] = tensors['dt_bias'] + 60
        tensors['A'] = tensors['A'] * 1e3
    elif case == 'tiny-steps':
        tensors['dt_bias'] = tensors['dt_bias'] - 15
        tensors['A'] = tensors['A'] * 1e-3
    else:
        tensors['dt_bias'] = tensors['dt_bias'] * 20
        tensors['A'] = -(10 ** (-tensors['A'] * 4 - 3))
    results = run(ss2d_scan, tensors)
    assert all(t.isfinite().all() for t in results.values())
    compare(tensors, dtype)


@pytest.mark.parametrize('size', [(2, 3), (6, 5)], ids='{0[0]}x{0[1]}'.format)
def test_transposing_the_map_swaps_rows_and_columns_among_the_routes(size):
    tensors, swap = arguments(size), [1, 0, 3, 2]
    turned = {k: tensors[k][swap] for k in ('dt_weight', 'dt_bias', 'A', 'D')}
    turned['x'] = tensors['x'].transpose(1, 2)
    turned['x_dbl'] = tensors['x_dbl'].transpose(1, 2)[:, :, :, swap]
    oracles.assert_matches(ss2d_scan(**turned).transpose(1, 2), ss2d_scan(**tensors), torch.float64)


@pytest.mark.parametrize('size', [(2, 3), (6, 5)], ids='{0[0]}x{0[1]}'.format)
def test_turning_the_map_by_half_swaps_directions_among_the_routes(size):
    tensors, swap = arguments(size), [2, 3, 0, 1]
    turned = {k: tensors[k][swap] for k in ('dt_weight', 'dt_bias', 'A', 'D')}
    turned['x'] = tensors['x'].flip(1, 2)
    turned['x_dbl'] = tensors['x_dbl'].flip(1, 2)[:, :, :, swap]
    oracles.assert_matches(ss2d_scan(**turned).flip(1, 2), ss2d_scan(**tensors), torch.float64)


def test_every_route_matters():
    tensors = arguments((4, 3))
    y = ss2d_scan(**tensors)
    for k in range(4):
        changed = tensors['A'].clone()
        changed[k] *= 2
        assert oracles.relative_error(ss2d_scan(**{**tensors, 'A': changed}), y) > 1e-3


@pytest.mark.parametrize('batch', [0, 1])
def test_small_batches(batch):
    compare(arguments(batch=batch), torch.float64)


LAYOUTS = {
    'channels-first': lambda t: t.movedim(-1, 1).contiguous().movedim(1, -1) if t.ndim > 2 else t.t().contiguous().t(),
    'reversed': lambda t: t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim))),
    'sliced': lambda t: t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float('nan'))[..., ::2].copy_(t),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_memory_layout_does_not_matter(layout):
    tensors = arguments()
    expected = run(oracles.ss2d_scan, tensors)
    leaves = {k: LAYOUTS[layout](t).requires_grad_() for k, t in tensors.items()}
    assert not leaves['x'].is_contiguous()
    y = ss2d_scan(**leaves)
    assert y.is_contiguous()
    torch.manual_seed(1)
    grad = torch.randn(y.shape, dtype=torch.float64).to(torch.bfloat16).double()
    y.backward(LAYOUTS[layout](grad))
    oracles.assert_matches(y, expected['y'], torch.float64)
    for name, leaf in leaves.items():
        oracles.assert_matches(leaf.grad, expected[f'grad_{name}'], torch.float64, name)


def test_an_expanded_map_and_gradient():
    tensors = arguments()
    tensors['x'] = tensors['x'][:1, :1].expand_as(tensors['x'])
    expected, actual = ({k: t.detach().requires_grad_() for k, t in tensors.items()} for _ in range(2))
    oracles.ss2d_scan(**expected).sum().backward()
    ss2d_scan(**actual).sum().backward()
    for name in NAMES:
        oracles.assert_matches(actual[name].grad, expected[name].grad, torch.float64, name)


@pytest.mark.parametrize('elements,wide', [(1, 1), (500, 2**14), (2000, 2**14)])
def test_blocks_of_any_size_agree(monkeypatch, elements, wide):
    monkeypatch.setattr(recurrence, '_BLOCK_ELEMENTS', elements)
    monkeypatch.setattr(recurrence, '_BLOCK_WIDTH', max(elements // 8, 1))
    monkeypatch.setattr(recurrence, '_WIDE_STEP', wide)
    compare(arguments((7, 11)), torch.float64)


@pytest.mark.parametrize(
    'name,shape,dtype',
    [
        ('x', (2, 15, 5), torch.float32),
        ('x', (2, 3, 5, 5), torch.int64),
        ('x_dbl', (2, 3, 5, 4, 7), torch.float32),
        ('x_dbl', (2, 3, 5, 2, 6), torch.float32),
        ('x_dbl', (2, 5, 3, 4, 6), torch.float32),
        ('dt_weight', (5, 2), torch.float32),
        ('dt_weight', (4, 6, 2), torch.float32),
        ('dt_bias', (4, 6), torch.float32),
        ('A', (20, 2), torch.float32),
        ('A', (4, 6, 2), torch.float32),
        ('D', (20,), torch.float32),
    ],
)
def test_a_bad_argument_is_an_error_that_shows_it(name, shape, dtype):
    tensors = {**arguments(dtype=torch.float32), name: torch.zeros(shape, dtype=dtype)}
    shown = str(shape) if dtype == torch.float32 else 'int64'
    with pytest.raises(ValueError) as caught:
        ss2d_scan(**tensors)
    assert shown in str(caught.value) or str(list(shape)) in str(caught.value)


@pytest.mark.parametrize('size', [(3, 0), (0, 3)])
def test_a_map_without_pixels_is_an_error_or_empty(size):
    tensors = arguments(size, dtype=torch.float32)
    try:
        y = ss2d_scan(**tensors)
    except ValueError as error:
        assert str(tuple(tensors['x'].shape)) in str(error)
    else:
        assert y.shape == tensors['x'].shape


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layout', ['plain', *LAYOUTS])
@pytest.mark.parametrize('backward', [False, True], ids=['forward', 'backward'])
def test_registration_of_the_operators(layout, dtype, backward):
    args = [LAYOUTS.get(layout, torch.clone)(t) for t in arguments(dtype=dtype).values()]
    if backward:
        grad = torch.randn_like(args[0])
        torch.library.opcheck(torch.ops.vmamba.ss2d_scan_backward.default, (grad, *args))
    else:
        args = [a.requires_grad_() for a in args]
        torch.library.opcheck(torch.ops.vmamba.ss2d_scan.default, tuple(args), **oracles.OPCHECK_TOLERANCE)


def test_gradients_by_finite_differences():
    tensors = arguments((2, 3), 1, 2, 2, 1)
    leaves = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(ss2d_scan, leaves, fast_mode=True)


@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
def test_two_runs_are_equal_bit_by_bit(dtype):
    tensors = arguments((9, 7), dtype=dtype)
    first, second = run(ss2d_scan, tensors), run(ss2d_scan, tensors)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize('dstate', [1, 16])
def test_memory_for_the_backward_pass_holds_no_copies_of_the_map(dstate):
    """Only the inputs are saved: neither the four routes' copies of the map nor states."""
    tensors = arguments((13, 11), dim=24, dstate=dstate, dtype=torch.float32)
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ss2d_scan(**leaves)
    distinct = {t.data_ptr(): t.numel() for t in saved}
    assert 0 < sum(distinct.values()) <= 1.1 * sum(t.numel() for t in tensors.values())


def test_inputs_are_left_alone():
    tensors = arguments((1, 1))
    copies = {k: t.clone() for k, t in tensors.items()}
    run(ss2d_scan, tensors)
    ss2d_scan(**tensors).zero_()
    assert all(torch.equal(t, copies[k]) for k, t in tensors.items())
