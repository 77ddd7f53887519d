"""`selective_state_update`, in plain PyTorch and on Triton, against one step of the scan's definition."""

from itertools import product

import oracles
import pytest
import torch
from cases import DEVICE, needs_gpu
from kernel_cases import place, randn
from kernel_cases import selective_scan as scan_arguments
from recorder import Recorder

from vmamba.kernels import causal_conv1d_update, selective_scan, selective_state_update, use_triton


def arguments(batch=2, dim=5, dstate=3, heads=None, groups=None, tied=False, optional='Dzb', dtype=torch.float32):
    """Tensors by name, as mamba_ssm's tests draw them; absent ones None.

    Args:
        heads: None for state [batch, dim, N].
        groups: None for B and C [batch, N].
        tied: One step, A, D and dt_bias for all channels of a head, expanded.
        dtype: Of state, x, dt and z; the others have at least fp32.
    """
    rows = (dim,) if heads is None else (heads, dim)
    own = (*rows[:-1], 1) if tied else rows
    maps = {
        'state': randn(batch, *rows, dstate),
        'x': randn(batch, *rows),
        'dt': randn(batch, *own),
        'z': randn(batch, *rows) if 'z' in optional else None,
    }
    parameters = {
        'A': -torch.rand(*own, 1 if tied else dstate, dtype=torch.float64) - 1,
        'B': randn(batch, *([groups] if groups else []), dstate),
        'C': randn(batch, *([groups] if groups else []), dstate),
        'D': randn(*own) if 'D' in optional else None,
        'dt_bias': torch.rand(own, dtype=torch.float64) - 4 if 'b' in optional else None,
    }
    placed = place(maps, parameters, dtype)
    shapes = {'dt': (batch, *rows), 'A': (*rows, dstate), 'D': rows, 'dt_bias': rows}
    for name, shape in shapes.items():
        placed[name] = None if placed[name] is None else placed[name].expand(shape)
    return {name: placed[name] for name in ('state', 'x', 'dt', 'A', 'B', 'C', 'D', 'z', 'dt_bias')}


def definition(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """y and the new state in float64, by the scan's loop over channels without heads."""
    tensors = state, x, dt, A, B, C, D, z, dt_bias
    state, x, dt, A, B, C, D, z, dt_bias = (None if t is None else t.double().cpu() for t in tensors)
    B, C = (t if t.ndim == 3 else t[:, None] for t in (B, C))
    y, h = oracles.selective_scan(
        *(t.flatten(1).unsqueeze(-1) for t in (x, dt)),
        A.reshape(-1, A.shape[-1]),
        *(t.unsqueeze(-1) for t in (B, C)),
        None if D is None else D.reshape(-1),
        None if z is None else z.flatten(1).unsqueeze(-1),
        None if dt_bias is None else dt_bias.reshape(-1),
        delta_softplus=dt_softplus,
        initial_state=state.flatten(1, state.ndim - 2),
    )
    return y.reshape(x.shape), h.reshape(state.shape)


def check(tensors, dtype=torch.float32, softplus=True):
    expected, expected_state = definition(**tensors, dt_softplus=softplus)
    y = selective_state_update(**tensors, dt_softplus=softplus)
    assert (y.dtype, y.shape) == (tensors['x'].dtype, tensors['x'].shape) and y.is_contiguous()
    oracles.assert_matches(y.cpu(), expected, dtype, 'y')
    oracles.assert_matches(tensors['state'].cpu(), expected_state, dtype, 'state')


SIZES = {
    'one': dict(batch=1, dim=1, dstate=1),
    '33-channels-of-16-states': dict(dim=33, dstate=16),
    'one-group': dict(dim=6, dstate=5, groups=1),
    'groups-of-channels': dict(dim=6, groups=3),
    'a-group-a-channel': dict(dim=3, dstate=70, groups=3),
    'more-states-than-a-block': dict(batch=1, dim=3, dstate=600),
    'one-head': dict(heads=1, dim=7),
    'heads': dict(heads=4, dim=5, groups=2),
    'heads-without-groups': dict(heads=4, dim=5),
    'heads-of-one': dict(heads=3, dim=1, groups=3, dstate=16),
    'tied-heads': dict(heads=4, dim=70, dstate=9, groups=2, tied=True),
    'tied-channels': dict(dim=6, groups=2, tied=True),
    'tied-heads-alone': dict(heads=2, dim=3, tied=True, optional=''),
    'no-batch': dict(batch=0),
}


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
def test_one_step(sizes, backend):
    check(arguments(**sizes))


@pytest.mark.parametrize('optional', ['', 'D', 'z', 'b', 'Dz'])
@pytest.mark.parametrize('softplus', [False, True], ids=['plain', 'softplus'])
def test_every_optional_argument(optional, softplus, backend):
    tensors = arguments(optional=optional)
    tensors['dt'] = tensors['dt'].abs()
    check(tensors, softplus=softplus)


@pytest.mark.parametrize('own', ['dt', 'A', 'D', 'dt_bias'])
def test_channels_that_share_all_but_one_parameter(own, backend):
    tensors = arguments(heads=2, dim=6, tied=True)
    tensors[own] = arguments(heads=2, dim=6)[own]
    check(tensors)


@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
@pytest.mark.parametrize('state_dtype', [torch.float32, None], ids=['fp32-state', 'state'])
def test_dtypes(dtype, state_dtype, backend):
    if backend and dtype == torch.float64:
        pytest.skip('not on Triton')
    tensors = arguments(dim=33, dstate=16, dtype=dtype)
    tensors['state'] = tensors['state'].to(state_dtype or dtype)
    check(tensors, torch.float32 if dtype == torch.float64 and state_dtype else dtype)


def test_a_state_in_fp32_keeps_its_precision_beside_half(backend):
    tensors = arguments(dim=33, dstate=16, dtype=torch.float16)
    tensors['state'] = tensors['state'].float()
    _, expected = definition(**tensors, dt_softplus=True)
    selective_state_update(**tensors, dt_softplus=True)
    oracles.assert_matches(tensors['state'].cpu(), expected, torch.float32)


@pytest.mark.parametrize('tied', [False, True], ids=['own', 'tied'])
@pytest.mark.parametrize('heads,groups', [(None, None), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize('dim,dstate', [(48, 16), (80, 64)])
def test_cases_of_mamba_ssm_made_small(dim, dstate, heads, groups, tied, backend):
    check(arguments(2, dim // (heads or 1), dstate, heads, groups, tied, 'Db' if tied else 'Dzb'))


@pytest.mark.parametrize('B,C', [(0, 0), (2, 2)], ids=['shared', 'groups'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_a_sequence_walked_step_by_step_is_a_scan(B, C, dtype, backend):
    if backend and dtype == torch.float64:
        pytest.skip('not on Triton')
    tensors = scan_arguments(seqlen=13, B=B, C=C, dtype=dtype)
    expected, last_state = selective_scan(**tensors, delta_softplus=True, return_last_state=True)
    state = tensors.pop('initial_state').clone()
    u, delta, A, B, C, D, z, bias = tensors.values()
    steps = [
        selective_state_update(state, u[..., i], delta[..., i], A, B[..., i], C[..., i], D, z[..., i], bias, True)
        for i in range(13)
    ]
    oracles.assert_matches(torch.stack(steps, dim=-1), expected, dtype)
    oracles.assert_matches(state, last_state, dtype)


@pytest.mark.parametrize('index_dtype', [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize('sizes', [dict(dim=6, groups=2), dict(heads=2, dim=5, dstate=9)], ids=['channels', 'heads'])
def test_entries_of_a_larger_state(sizes, index_dtype, backend):
    tensors = arguments(batch=7, **sizes)
    chosen = torch.tensor([5, 0, 3], device=DEVICE)
    some = {k: t[:3] if k in ('x', 'dt', 'B', 'C', 'z') else t for k, t in tensors.items()}
    before = tensors['state'].clone()
    expected, updated = definition(**{**some, 'state': before[chosen]}, dt_softplus=True)
    y = selective_state_update(**some, dt_softplus=True, state_batch_indices=chosen.to(index_dtype))
    oracles.assert_matches(y.cpu(), expected, torch.float32)
    oracles.assert_matches(some['state'][chosen].cpu(), updated, torch.float32)
    others = [1, 2, 4, 6]
    assert torch.equal(some['state'][others], before[others])


# --- memory


def sliced(tensor):
    larger = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float('nan'))
    return larger[..., 3::2].copy_(tensor)


def part_of_a_projection(tensor):
    if tensor.ndim < 2:
        return tensor
    size = tensor[0].numel()
    return tensor.new_full((tensor.shape[0], 2 * size), float('nan'))[:, size:].view(tensor.shape).copy_(tensor)


def transposed(tensor):
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else sliced(tensor)


@pytest.mark.parametrize('layout', [sliced, part_of_a_projection, transposed], ids=lambda f: f.__name__)
@pytest.mark.parametrize('heads', [None, 2], ids=['channels', 'heads'])
def test_memory_layout_does_not_matter(layout, heads, backend):
    tensors = {k: layout(t) for k, t in arguments(dim=6, dstate=4, heads=heads).items()}
    assert not tensors['x'].is_contiguous()
    check(tensors)


@pytest.mark.parametrize('heads', [None, 2], ids=['channels', 'heads'])
def test_a_state_of_another_layout_is_updated_by_its_indices(heads, backend):
    tensors = arguments(batch=3, dim=6, heads=heads)
    indices = torch.tensor([2, 0, 1], device=DEVICE)
    expected, updated = definition(**{**tensors, 'state': tensors['state'][indices]}, dt_softplus=True)
    tensors['state'] = transposed(tensors['state'])
    y = selective_state_update(**tensors, dt_softplus=True, state_batch_indices=indices)
    oracles.assert_matches(y.cpu(), expected, torch.float32)
    oracles.assert_matches(tensors['state'][indices].cpu(), updated, torch.float32)


def allocate(size, dtype, file):
    """Uninitialised; on a CPU in a file that is sparse."""
    if DEVICE == 'cpu':
        return torch.from_file(str(file), shared=True, size=size, dtype=dtype)
    return torch.empty(size, dtype=dtype, device=DEVICE)


def test_rows_beyond_32_bits(tmp_path, triton_kernels):
    tensors = arguments(batch=3, groups=1, dtype=torch.float16)
    for name in ('x', 'dt', 'B', 'C', 'z'):
        tensor = tensors[name]
        strides = 2**30, *tensor.stride()[1:]
        memory = allocate(2**31 + tensor[0].numel(), tensor.dtype, tmp_path / name)
        tensors[name] = memory.as_strided(tensor.shape, strides).copy_(tensor)
    check(tensors, torch.float16)


def test_a_state_beyond_32_bits(tmp_path, triton_kernels):
    tensors = arguments(batch=2, dim=8, dstate=16, dtype=torch.float16)
    entries = 2**24 + 3  # of 2^7 numbers
    indices = torch.tensor([entries - 1, 1], device=DEVICE)
    expected, updated = definition(**tensors, dt_softplus=True)
    state = allocate(entries * 128, torch.float16, tmp_path / 'state').view(entries, 8, 16)
    state[indices] = tensors['state']
    y = selective_state_update(**{**tensors, 'state': state}, dt_softplus=True, state_batch_indices=indices)
    oracles.assert_matches(y.cpu(), expected, torch.float16)
    oracles.assert_matches(state[indices].cpu(), updated, torch.float16)


@pytest.mark.parametrize('indexed', [False, True], ids=['all', 'indexed'])
def test_only_the_state_is_written(indexed, backend):
    """And graphs that saved it get to know."""
    tensors = arguments(heads=2, groups=2)
    indices = torch.tensor([1, 0], device=DEVICE) if indexed else None
    copies = {k: t.clone() for k, t in tensors.items()}
    version = tensors['state']._version
    selective_state_update(**tensors, state_batch_indices=indices)
    assert [k for k, t in tensors.items() if not torch.equal(t, copies[k])] == ['state']
    assert tensors['state']._version > version


@pytest.mark.parametrize('softplus', [False, True], ids=['plain', 'softplus'])
def test_extreme_steps(softplus, backend):
    tensors = arguments(dim=6, dstate=2, optional='')
    tensors['dt'] = torch.tensor([0.0, 1e-6, 19.9, 20.1, 100.0, 1e4], device=DEVICE).expand(2, 6)
    check(tensors, softplus=softplus)


def test_small_steps_are_exact(backend):
    """softplus of -15, to its own precision."""
    tensors = arguments(optional='')
    tensors.update(state=torch.zeros_like(tensors['state']), dt=torch.full_like(tensors['dt'], -15))
    check(tensors)


# --- arguments


def test_gradients_are_an_error_that_says_so(backend):
    tensors = arguments()
    tensors['A'].requires_grad_()
    with pytest.raises(RuntimeError, match=r'has no gradients; call it within torch.no_grad\(\)'):
        selective_state_update(**tensors)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert selective_state_update(**tensors).isfinite().all()


@pytest.mark.parametrize('indexed', [False, True], ids=['all', 'indexed'])
@pytest.mark.parametrize('heads', [None, 2], ids=['channels', 'heads'])
def test_captured(heads, indexed, backend):
    """Without graph breaks, and the state is updated."""
    torch.compiler.reset()
    tensors = arguments(heads=heads, dim=6, groups=2)
    indices = torch.tensor([1, 0], device=DEVICE) if indexed else None
    states = [tensors.pop('state').clone()]
    states.append(states[0].clone())

    def steps(state):
        for _ in range(2):
            y = selective_state_update(state, **tensors, dt_softplus=True, state_batch_indices=indices)
        return y

    captured = torch.compile(steps, fullgraph=True, backend='aot_eager')
    expected = steps(states[0])
    torch.testing.assert_close(captured(states[1]), expected)
    torch.testing.assert_close(*states)


@pytest.mark.parametrize('indexed', [False, True], ids=['all', 'indexed'])
def test_watched_calls_give_the_same(indexed, triton_kernels):
    """Through PyTorch's dispatcher, by an operator that PyTorch's own checks pass."""
    indices = torch.tensor([1, 0], device=DEVICE) if indexed else None
    tensors = arguments(heads=2, groups=1)
    first, second = ({**tensors, 'state': tensors['state'].clone()} for _ in range(2))
    expected = selective_state_update(**first, state_batch_indices=indices)
    with Recorder() as calls:
        y = selective_state_update(**second, state_batch_indices=indices)
    assert calls.names == ['selective_state_update']
    assert torch.equal(y, expected) and torch.equal(first['state'], second['state'])
    torch.library.opcheck(calls.operators[0], calls.arguments[0], **oracles.OPCHECK_TOLERANCE)


def test_without_data_only_shapes_are_computed():
    tensors = {k: t.to('meta') for k, t in arguments(heads=2, groups=1, dtype=torch.float16).items()}
    y = selective_state_update(**tensors)
    assert y.is_meta and (y.shape, y.dtype) == ((2, 2, 5), torch.float16)


def test_doubles_on_triton_are_an_error_that_says_so(triton_kernels):
    with pytest.raises(RuntimeError, match='torch.float64'):
        selective_state_update(**arguments(dtype=torch.float64))


BAD_ARGUMENTS = [
    pytest.param('state', (2, 5), torch.float32, r'\(2, 5\)', id='state-rank'),
    pytest.param('state', (2, 5, 0), torch.float32, r'\(2, 5, 0\)', id='state-empty'),
    pytest.param('state', (2, 5, 3), torch.int64, 'int64', id='state-integer'),
    pytest.param('x', (2, 4), torch.float32, r'\(2, 4\)', id='x-channels'),
    pytest.param('x', (3, 5), torch.float32, r'\(3, 5\)', id='x-batch'),
    pytest.param('dt', (2, 1), torch.float32, r'\(2, 1\)', id='dt'),
    pytest.param('A', (5, 4), torch.float32, r'\(5, 4\)', id='A'),
    pytest.param('A', (5, 3), torch.complex64, 'complex64', id='A-complex'),
    pytest.param('B', (2, 4), torch.float32, r'\(2, 4\)', id='B-states'),
    pytest.param('B', (2, 0, 3), torch.float32, r'\(2, 0, 3\)', id='B-no-groups'),
    pytest.param('C', (2, 5, 3), torch.float32, r'\(2, 5, 3\)', id='C-unlike-B'),
    pytest.param('D', (5, 1), torch.float32, r'\(5, 1\)', id='D'),
    pytest.param('z', (1, 5), torch.float32, r'\(1, 5\)', id='z'),
    pytest.param('dt_bias', (3,), torch.float32, r'\(3,\)', id='dt_bias'),
    pytest.param('state_batch_indices', (2, 1), torch.int32, r'\(2, 1\)', id='indices-rank'),
    pytest.param('state_batch_indices', (2,), torch.float32, 'float32', id='indices-floating'),
]


@pytest.mark.parametrize('name,shape,dtype,value', BAD_ARGUMENTS)
def test_a_bad_argument_is_an_error_that_shows_it(name, shape, dtype, value):
    tensors = {**arguments(), name: torch.zeros(shape, dtype=dtype, device=DEVICE)}
    with pytest.raises(ValueError, match=rf'{name} .*{value}'):
        selective_state_update(**tensors)


@pytest.mark.parametrize('heads,divided', [(None, 5), (4, 4)])
def test_groups_that_do_not_divide_are_an_error(heads, divided):
    """Channels, or heads where there are some."""
    tensors = arguments(heads=heads)
    tensors.update({name: torch.zeros(2, 3, 3, device=DEVICE) for name in ('B', 'C')})
    with pytest.raises(ValueError, match=rf'groups of B must divide {divided}, got 3'):
        selective_state_update(**tensors)


def test_tensors_on_two_devices_and_tangents_are_errors():
    tensors = arguments()
    with pytest.raises(ValueError, match='state on .* and z on meta'):
        selective_state_update(**{**tensors, 'z': tensors['z'].to('meta')})
    indices = torch.zeros(2, dtype=torch.int64, device='meta')
    with pytest.raises(ValueError, match=f'state_batch_indices must be on {DEVICE}.* got meta'):
        selective_state_update(**tensors, state_batch_indices=indices)
    with pytest.raises(NotImplementedError, match='selective_state_update is .* got x '):
        torch.func.jvp(lambda x: selective_state_update(**{**tensors, 'x': x}), (tensors['x'],), (tensors['x'],))


# --- on a GPU


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize('dtype', oracles.DTYPES[1:], ids=str)
@pytest.mark.parametrize('dstate', [16, 32, 64])
@pytest.mark.parametrize(
    'dim,heads,groups,tied',
    [
        *((dim, None, None, False) for dim in (2048, 2048 + 16, 4096)),
        *((64, dim // 64, groups, tied) for dim, groups, tied in product((2048, 4096), (1, 2, 4), (False, True))),
    ],
)
def test_cases_of_mamba_ssm(dim, heads, groups, tied, dstate, dtype):
    """In full, against the plain path: the loop takes its time."""
    tensors = arguments(2, dim, dstate, heads, groups, tied, dtype=dtype)
    for optional in (tensors, {**tensors, 'z': None}):
        plain, fused = ({**optional, 'state': optional['state'].clone()} for _ in range(2))
        with use_triton(False):
            expected = selective_state_update(**plain, dt_softplus=True)
        y = selective_state_update(**fused, dt_softplus=True)
        oracles.assert_matches(y, expected.double(), dtype, 'y')
        oracles.assert_matches(fused['state'], plain['state'].double(), dtype, 'state')


@pytest.mark.parametrize('bias', [True, False], ids=['bias', 'no-bias'])
@pytest.mark.parametrize('width,silu', [(4, True), (1, True), (6, False)])
def test_steps_of_the_convolution_equal_the_whole_sequence(bias, width, silu, backend, dtype):
    batch, dim, seqlen = 2, 133, 5
    x = randn(batch, dim, seqlen).to(DEVICE, dtype)
    parameters = place({}, {'weight': randn(dim, width), 'bias': randn(dim) if bias else None}, dtype)
    state = torch.zeros(batch, dim, width, device=DEVICE, dtype=dtype)
    activation = 'silu' if silu else None
    steps = [causal_conv1d_update(t, state, **parameters, activation=activation) for t in x.unbind(-1)]
    wide = (None if t is None else t.double().cpu() for t in parameters.values())
    expected, _ = oracles.causal_conv1d(x.double().cpu(), *wide, activation=activation)
    oracles.assert_matches(torch.stack(steps, dim=-1).cpu(), expected, dtype, 'y')
    newest = torch.cat([torch.zeros_like(state), x], dim=-1)[..., -width:]
    assert steps[0].dtype == dtype and torch.equal(state, newest)


def test_a_state_of_the_convolution_in_another_order_is_updated(backend):
    state = torch.randn(4, 3, 2, device=DEVICE).permute(2, 1, 0)  # [2, 3, 4]
    x, weight = torch.randn(2, 6, device=DEVICE)[:, ::2], torch.randn(3, 4, device=DEVICE)
    expected = torch.cat([state[..., 1:], x.unsqueeze(-1)], dim=-1)
    y = causal_conv1d_update(x, state, weight)
    assert torch.equal(state, expected)
    torch.testing.assert_close(y, (expected * weight).sum(-1))


def test_wrong_arguments_of_the_step_of_the_convolution():
    x, state, weight = torch.randn(2, 3), torch.zeros(2, 3, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r'weight must be a floating tensor \[3, 4\], got \(3, 5\)'):
        causal_conv1d_update(x, state, torch.randn(3, 5))
    with pytest.raises(ValueError, match="activation must be None, 'silu' or 'swish', got 'gelu'"):
        causal_conv1d_update(x, state, weight, activation='gelu')
    with pytest.raises(RuntimeError, match='causal_conv1d_update has no gradients'):
        causal_conv1d_update(x.requires_grad_(), state, weight)
