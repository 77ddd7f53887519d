"""selective_scan as an operator: layouts, errors, registration, memory."""

import oracles
import pytest
import torch
from test_selective_scan import arguments, doubled, library, run
from vmamba.kernels import recurrence, selective_scan


def transposed(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def sliced(t):
    out = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 3), float('nan'))[..., 3::2]
    return out.copy_(t)


def channels_moved(t):
    """Batch and the next dimension swapped in memory."""
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim > 1 else sliced(t)


@pytest.mark.parametrize('layout', [transposed, sliced, channels_moved], ids=lambda f: f.__name__)
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('groups', [0, 2])
def test_memory_layout_does_not_matter(layout, groups, reverse):
    tensors = arguments(B=groups, C=groups)
    laid_out = {k: layout(t) if t.ndim > 1 else sliced(t) for k, t in tensors.items()}
    assert not laid_out['u'].is_contiguous()
    expected = run(oracles.selective_scan, tensors, delta_softplus=True, reverse=reverse)
    leaves = {k: t.requires_grad_() for k, t in laid_out.items()}
    y, state = library(**leaves, delta_softplus=True, reverse=reverse)
    oracles.assert_matches(y, expected['y'], torch.float64, 'y')
    oracles.assert_matches(state, expected['last_state'], torch.float64, 'state')
    torch.manual_seed(1)
    weights = [torch.randn(t.shape, dtype=torch.float64).to(torch.bfloat16).double() for t in (y, state)]
    torch.autograd.backward((y, state), weights)
    for name, leaf in leaves.items():
        oracles.assert_matches(leaf.grad, expected[f'grad_{name}'], torch.float64, name)


def test_expanded_inputs_and_gradients():
    """Tensors with a stride of zero, as `sum().backward()` gives them."""
    tensors = arguments()
    for name in ('u', 'delta', 'B', 'C', 'z', 'initial_state'):
        tensors[name] = tensors[name][:1].expand_as(tensors[name])
    tensors['D'] = tensors['D'][:1].expand(6)
    tensors['A'] = tensors['A'][:, :1].expand(6, 3)
    expected, actual = (
        {k: None if t is None else t.detach().requires_grad_() for k, t in tensors.items()} for _ in range(2)
    )
    for function, leaves in ((oracles.selective_scan, expected), (library, actual)):
        y, state = function(**leaves)
        (y.sum() + state.sum()).backward()
    for name in tensors:
        oracles.assert_matches(actual[name].grad, expected[name].grad, torch.float64, name)


@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
@pytest.mark.parametrize('layout', [torch.clone, transposed, channels_moved], ids=['plain', 'channels-last', 'batch'])
def test_the_output_has_the_dtype_and_layout_of_u(layout, dtype):
    tensors = arguments(dtype=dtype)
    tensors['u'] = layout(tensors['u'])
    y, state = library(**tensors)
    assert (y.dtype, y.stride()) == (dtype, tensors['u'].stride())
    assert state.dtype == torch.promote_types(dtype, torch.float32)
    assert state.is_contiguous()


def test_without_the_state_only_the_output_is_returned():
    tensors = arguments()
    assert torch.equal(selective_scan(**tensors), library(**tensors)[0])


def test_inputs_are_left_alone():
    tensors = arguments()
    copies = {k: t.clone() for k, t in tensors.items()}
    run(library, tensors, delta_softplus=True)
    y, state = library(**tensors, delta_softplus=True)
    y.zero_()
    state.zero_()
    assert all(torch.equal(t, copies[k]) for k, t in tensors.items())


BAD_ARGUMENTS = [
    pytest.param('u', (2, 6), torch.float32, r'\(2, 6\)', id='u-rank'),
    pytest.param('u', (2, 6, 37), torch.int64, 'int64', id='u-integer'),
    pytest.param('u', (2, 6, 0), torch.float32, 'L = 0', id='u-empty'),
    pytest.param('delta', (2, 6, 36), torch.float32, r'\(2, 6, 36\)', id='delta-length'),
    pytest.param('delta', (2, 4, 37), torch.float32, r'\(2, 4, 37\)', id='delta-no-divisor'),
    pytest.param('delta', (3, 6, 37), torch.float32, r'\(3, 6, 37\)', id='delta-batch'),
    pytest.param('delta', (2, 0, 37), torch.float32, r'\(2, 0, 37\)', id='delta-no-channels'),
    pytest.param('delta', (2, 6, 37), torch.complex64, 'complex64', id='delta-complex'),
    pytest.param('A', (5, 3), torch.float32, r'\(5, 3\)', id='A-channels'),
    pytest.param('A', (6,), torch.float32, r'\(6,\)', id='A-rank'),
    pytest.param('A', (6, 3), torch.complex64, 'complex64', id='A-complex'),
    pytest.param('B', (2, 2, 3, 36), torch.float32, r'\(2, 2, 3, 36\)', id='B-length'),
    pytest.param('B', (2, 4, 3, 37), torch.float32, r'\(2, 4, 3, 37\)', id='B-groups'),
    pytest.param('B', (2, 0, 3, 37), torch.float32, r'\(2, 0, 3, 37\)', id='B-no-groups'),
    pytest.param('B', (6, 4), torch.float32, r'\(6, 4\)', id='B-constant'),
    pytest.param('B', (2, 2, 3, 37), torch.complex64, 'complex64', id='B-complex'),
    pytest.param('C', (2, 4, 37), torch.float32, r'\(2, 4, 37\)', id='C-states'),
    pytest.param('C', (3, 3, 37), torch.float32, r'\(3, 3, 37\)', id='C-batch'),
    pytest.param('C', (2, 3, 37), torch.complex64, 'complex64', id='C-complex'),
    pytest.param('D', (6, 1), torch.float32, r'\(6, 1\)', id='D'),
    pytest.param('z', (2, 3, 37), torch.float32, r'\(2, 3, 37\)', id='z'),
    pytest.param('z', (2, 6, 37), torch.complex64, 'complex64', id='z-complex'),
    pytest.param('delta_bias', (3,), torch.float32, r'\(3,\)', id='delta_bias'),
    pytest.param('initial_state', (2, 6, 4), torch.float32, r'\(2, 6, 4\)', id='initial_state'),
]


@pytest.mark.parametrize('name,shape,dtype,value', BAD_ARGUMENTS)
def test_a_bad_argument_is_an_error_that_shows_it(name, shape, dtype, value):
    tensors = {**arguments(dtype=torch.float32), name: torch.zeros(shape, dtype=dtype)}
    with pytest.raises(ValueError, match=value) as caught:
        selective_scan(**tensors)
    assert str(caught.value).startswith(f'{name} ')


def operator_arguments(optional, reverse, dtype=torch.float32):
    tensors = arguments(seqlen=11, dim=4, B=1, C=1, optional=optional, dtype=dtype)
    leaves = [None if t is None else t.requires_grad_() for t in tensors.values()]
    return (*leaves, True, reverse)


@pytest.mark.parametrize('optional,reverse', [('Dzbs', False), ('Dzbs', True), ('', False), ('zs', True)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_registration_of_the_forward_operator(optional, reverse, dtype):
    torch.library.opcheck(
        torch.ops.vmamba.selective_scan.default,
        operator_arguments(optional, reverse, dtype),
        **oracles.OPCHECK_TOLERANCE,
    )


@pytest.mark.parametrize('optional,reverse', [('Dzbs', False), ('Dzbs', True), ('', False), ('zs', True)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_registration_of_the_backward_operator(optional, reverse, dtype):
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in operator_arguments(optional, reverse, dtype)]
    y, state = torch.ops.vmamba.selective_scan(*args)
    torch.library.opcheck(torch.ops.vmamba.selective_scan_backward.default, (y, state, *args))


@pytest.mark.parametrize('backward', [False, True], ids=['forward', 'backward'])
@pytest.mark.parametrize('layout', [transposed, channels_moved], ids=lambda f: f.__name__)
def test_registration_with_strided_inputs(layout, backward):
    tensors = arguments(seqlen=11, dim=4, B=1, C=1, dtype=torch.float32)
    args = [layout(t) if t.ndim > 1 else sliced(t) for t in tensors.values()] + [True, False]
    if backward:
        grads = torch.ops.vmamba.selective_scan(*args)
        torch.library.opcheck(torch.ops.vmamba.selective_scan_backward.default, (*grads, *args))
    else:
        torch.library.opcheck(torch.ops.vmamba.selective_scan.default, tuple(args))


@pytest.mark.parametrize('optional,reverse', [('Dzbs', False), ('Dzbs', True), ('', False)])
def test_gradients_by_finite_differences(optional, reverse):
    tensors = doubled(arguments(batch=1, dim=2, seqlen=9, dstate=2, B=1, C=2, optional=optional))
    names = [k for k, t in tensors.items() if t is not None]

    def function(*leaves):
        return library(**dict(zip(names, leaves)), delta_softplus=True, reverse=reverse)

    assert torch.autograd.gradcheck(function, [tensors[k].requires_grad_() for k in names], fast_mode=True)


@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
def test_two_runs_are_equal_bit_by_bit(dtype):
    tensors = arguments(seqlen=151, dtype=dtype)
    first, second = (run(library, tensors, delta_softplus=True) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_only_what_is_asked_for_gets_a_gradient():
    tensors = arguments()
    tensors['B'].requires_grad_()
    library(**tensors)[1].sum().backward()
    assert tensors['B'].grad.abs().sum() > 0
    assert all(t.grad is None for k, t in tensors.items() if k != 'B')


def test_memory_for_the_backward_pass_does_not_hold_the_states():
    batch, dim, seqlen, dstate = 2, 6, 301, 16
    tensors = arguments(batch, dim, seqlen, dstate, dtype=torch.float32)
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        library(**leaves, delta_softplus=True)
    assert saved
    assert max(t.numel() for t in saved) < batch * dim * seqlen * dstate
    inputs = sum(t.numel() for t in tensors.values())
    distinct = {t.data_ptr(): t.numel() for t in saved}
    assert sum(distinct.values()) <= 1.1 * inputs


@pytest.mark.parametrize('elements', [1, 90, 700], ids='blocks-of-{}'.format)
@pytest.mark.parametrize('wide', [1, 2**14], ids=['walked', 'reduced'])
@pytest.mark.parametrize('seqlen', [1, 8, 9, 77])
def test_blocks_of_any_size_agree(monkeypatch, elements, wide, seqlen):
    monkeypatch.setattr(recurrence, '_BLOCK_ELEMENTS', elements)
    monkeypatch.setattr(recurrence, '_BLOCK_WIDTH', max(elements // 8, 1))
    monkeypatch.setattr(recurrence, '_WIDE_STEP', wide)
    tensors = arguments(seqlen=seqlen, dim=4)
    for reverse in (False, True):
        expected = run(oracles.selective_scan, tensors, delta_softplus=True, reverse=reverse)
        oracles.assert_all_match(run(library, tensors, delta_softplus=True, reverse=reverse), expected, torch.float64)
