"""selective_state_update, plain and on its Triton kernel, against the float64 loop of the scan over one step.

Without a GPU the kernel runs in Triton's interpreter (see conftest.py), where raw bfloat16 is not computed as on a GPU.
"""

from itertools import product

import oracles
import pytest
import torch
from recorder import Recorder
from test_selective_scan import arguments as scan_arguments
from vmamba.kernels import selective_scan, selective_state_update, use_triton
from vmamba.kernels.backend import triton

HAS_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if HAS_GPU else 'cpu'
needs_triton = pytest.mark.skipif(triton is None, reason='needs the package triton')
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason='needs a CUDA device')
BACKENDS = [pytest.param(False, id='plain'), pytest.param(True, id='triton', marks=needs_triton)]
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_triton(request.param):
        yield request.param


def arguments(batch=2, dim=5, dstate=3, heads=None, groups=None, tied=False, optional='Dzb', dtype=torch.float32):
    """Tensors by name, as mamba_ssm's tests draw them; absent ones None.

    Args:
        heads: None for state [batch, dim, N].
        groups: None for B and C [batch, N].
        tied: One step, A, D and dt_bias for all channels of a head, expanded.
        dtype: Of state, x, dt and z; the others are fp32, or fp64 with it.
    """
    wide = torch.promote_types(dtype, torch.float32)
    rows = (dim,) if heads is None else (heads, dim)
    own = (*rows[:-1], 1) if tied else rows

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64)

    tensors = {
        'state': randn(batch, *rows, dstate).to(dtype),
        'x': randn(batch, *rows).to(dtype),
        'dt': randn(batch, *own).to(dtype).expand(-1, *rows),
        'A': (-torch.rand(*own, 1 if tied else dstate, dtype=torch.float64) - 1).to(wide).expand(*rows, dstate),
        'B': randn(batch, *([groups] if groups else []), dstate).to(wide),
        'C': randn(batch, *([groups] if groups else []), dstate).to(wide),
        'D': randn(*own).to(wide).expand(rows) if 'D' in optional else None,
        'z': randn(batch, *rows).to(dtype) if 'z' in optional else None,
        'dt_bias': (torch.rand(own, dtype=torch.float64) - 4).to(wide).expand(rows) if 'b' in optional else None,
    }
    return {k: None if t is None else t.to(DEVICE) for k, t in tensors.items()}


def definition(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """y and the new state in float64, by the scan's loop over channels without heads."""
    state, x, dt, A, B, C, D, z, dt_bias = (
        None if t is None else t.double().cpu() for t in (state, x, dt, A, B, C, D, z, dt_bias)
    )
    shape, last = x.shape, state.ndim - 1
    groups = (B if B.ndim == 3 else B[:, None]), (C if C.ndim == 3 else C[:, None])
    y, h = oracles.selective_scan(
        *(t.flatten(1).unsqueeze(-1) for t in (x, dt)),
        A.reshape(-1, A.shape[-1]),
        *(t.unsqueeze(-1) for t in groups),
        None if D is None else D.reshape(-1),
        None if z is None else z.flatten(1).unsqueeze(-1),
        None if dt_bias is None else dt_bias.reshape(-1),
        delta_softplus=dt_softplus,
        initial_state=state.flatten(1, last - 1),
    )
    return y.reshape(shape), h.reshape(state.shape)


def check(tensors, dtype=torch.float32, softplus=True):
    expected, expected_state = definition(**tensors, dt_softplus=softplus)
    state = tensors['state']
    y = selective_state_update(**tensors, dt_softplus=softplus)
    assert (y.dtype, y.shape) == (tensors['x'].dtype, tensors['x'].shape) and y.is_contiguous()
    oracles.assert_matches(y.cpu(), expected, dtype, 'y')
    oracles.assert_matches(state.cpu(), expected_state, dtype, 'state')


SIZES = [
    pytest.param(dict(batch=1, dim=1, dstate=1), id='one'),
    pytest.param(dict(dim=33, dstate=16), id='33-n16'),
    pytest.param(dict(dim=6, dstate=5, groups=1), id='one-group'),
    pytest.param(dict(dim=6, groups=3), id='groups-of-channels'),
    pytest.param(dict(dim=3, dstate=70, groups=3), id='a-group-a-channel-n70'),
    pytest.param(dict(heads=1, dim=7), id='one-head'),
    pytest.param(dict(heads=4, dim=5, groups=2), id='heads'),
    pytest.param(dict(heads=3, dim=1, groups=3, dstate=16), id='heads-of-one'),
    pytest.param(dict(heads=4, dim=70, dstate=9, groups=2, tied=True), id='tied-heads'),
    pytest.param(dict(dim=6, groups=2, tied=True), id='tied-channels'),
    pytest.param(dict(batch=0), id='no-batch'),
]


@pytest.mark.parametrize('sizes', SIZES)
def test_one_step(sizes, backend):
    check(arguments(**sizes))


@pytest.mark.parametrize('optional', ['', 'D', 'z', 'b', 'Dz'])
@pytest.mark.parametrize('softplus', [False, True], ids=['plain', 'softplus'])
def test_every_optional_argument(optional, softplus, backend):
    tensors = arguments(optional=optional)
    tensors['dt'] = tensors['dt'].abs()
    check(tensors, softplus=softplus)


@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
@pytest.mark.parametrize('state_dtype', [torch.float32, None], ids=['fp32-state', 'state'])
def test_dtypes(dtype, state_dtype, backend):
    if backend and dtype == torch.float64:
        pytest.skip('runs in plain PyTorch')
    tensors = arguments(dim=33, dstate=16, dtype=dtype)
    tensors['state'] = tensors['state'].to(state_dtype or dtype)
    check(tensors, torch.float32 if dtype == torch.float64 and state_dtype else dtype)


@pytest.mark.parametrize('tied', [False, True], ids=['own', 'tied'])
@pytest.mark.parametrize('has_z', [False, True], ids=['', 'z'])
@pytest.mark.parametrize('heads,groups', [(None, None), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize('dim,dstate', [(48, 16), (48, 32), (80, 64)])
def test_the_peers_cases_made_small(dim, dstate, heads, groups, has_z, tied, backend):
    check(arguments(2, dim // (heads or 1), dstate, heads, groups, tied, 'Dzb' if has_z else 'Db'))


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize('dtype', [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize('dstate', [16, 32, 64])
@pytest.mark.parametrize(
    'dim,heads,groups,tied',
    [
        *((dim, None, None, False) for dim in (2048, 2048 + 16, 4096)),
        *((64, dim // 64, groups, tied) for dim, groups, tied in product((2048, 4096), (1, 2, 4), (False, True))),
    ],
)
def test_the_peers_cases(dim, heads, groups, tied, dstate, dtype):
    """In full, against the plain path: the loop takes its time."""
    tensors = arguments(2, dim, dstate, heads, groups, tied, dtype=dtype)
    for optional in (tensors, {**tensors, 'z': None}):
        plain, fused = ({**optional, 'state': optional['state'].clone()} for _ in range(2))
        with use_triton(False):
            expected = selective_state_update(**plain, dt_softplus=True)
        y = selective_state_update(**fused, dt_softplus=True)
        oracles.assert_matches(y, expected.double(), dtype, 'y')
        oracles.assert_matches(fused['state'], plain['state'].double(), dtype, 'state')


@pytest.mark.parametrize('B,C', [(0, 0), (2, 2)], ids=['shared', 'groups'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_a_sequence_walked_step_by_step_is_a_scan(B, C, dtype, backend):
    if backend and dtype == torch.float64:
        pytest.skip('runs in plain PyTorch')
    tensors = {k: t.to(DEVICE) for k, t in scan_arguments(seqlen=13, B=B, C=C, dtype=dtype).items()}
    expected, last_state = selective_scan(**tensors, delta_softplus=True, return_last_state=True)
    state = tensors.pop('initial_state').clone()
    u, delta, A, B, C, D, z, bias = tensors.values()
    steps = [
        selective_state_update(
            state, *(t[..., i] for t in (u, delta)), A, B[..., i], C[..., i], D, z[..., i], bias, True
        )
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


def sliced(t):
    return t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 3), float('nan'))[..., 3::2].copy_(t)


def part_of_a_projection(t):
    return t.new_full((t.shape[0], 2 * t[0].numel()), float('nan'))[:, t[0].numel() :].view(t.shape).copy_(t)


def transposed(t):
    return t.mT.contiguous().mT if t.ndim > 1 else sliced(t)


@pytest.mark.parametrize('layout', [sliced, part_of_a_projection, transposed], ids=lambda f: f.__name__)
@pytest.mark.parametrize('heads', [None, 2], ids=['channels', 'heads'])
def test_memory_layout_does_not_matter(layout, heads, backend):
    tensors = arguments(dim=6, dstate=4, heads=heads)
    check({k: t if layout is part_of_a_projection and t.ndim < 2 else layout(t) for k, t in tensors.items()})


def test_only_the_state_is_written(backend):
    tensors = arguments(heads=2, groups=2)
    copies = {k: t.clone() for k, t in tensors.items()}
    version = tensors['state']._version
    selective_state_update(**tensors)
    assert [k for k, t in tensors.items() if not torch.equal(t, copies[k])] == ['state']
    assert tensors['state']._version > version


@pytest.mark.parametrize('softplus', [False, True], ids=['plain', 'softplus'])
def test_extreme_steps(softplus, backend):
    tensors = arguments(dim=6, dstate=2, optional='')
    tensors['dt'] = torch.tensor([0.0, 1e-6, 19.9, 20.1, 100.0, 1e4], device=DEVICE).expand(2, 6)
    check(tensors, softplus=softplus)


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


@needs_triton
@pytest.mark.parametrize('indexed', [False, True], ids=['all', 'indexed'])
def test_registration(indexed):
    tensors = list(arguments(heads=2, groups=1).values())
    tensors[4:6] = (t if t.ndim == 3 else t[:, None] for t in tensors[4:6])
    indices = torch.tensor([1, 0], device=DEVICE) if indexed else None
    operator = torch.ops.vmamba.state_update_fused.default
    torch.library.opcheck(operator, (*tensors, indices, True), **oracles.OPCHECK_TOLERANCE)


@needs_triton
def test_watched_calls_give_the_same():
    tensors = arguments()
    first, second = ({**tensors, 'state': tensors['state'].clone()} for _ in range(2))
    with use_triton(True):
        expected = selective_state_update(**first)
        with Recorder() as calls:
            y = selective_state_update(**second)
    assert calls.names == ['state_update_fused']
    assert torch.equal(y, expected) and torch.equal(first['state'], second['state'])


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
    pytest.param('B', (2, 2, 3), torch.float32, r'\(2, 2, 3\)', id='B-groups'),
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
    with pytest.raises(ValueError, match=value) as caught:
        selective_state_update(**tensors)
    assert str(caught.value).startswith(f'{name} ')


def test_tensors_on_two_devices_and_tangents_are_errors():
    tensors = arguments()
    with pytest.raises(ValueError, match='state on .* and z on meta'):
        selective_state_update(**{**tensors, 'z': tensors['z'].to('meta')})
    with pytest.raises(NotImplementedError, match='selective_state_update is .* got x '):
        torch.func.jvp(lambda x: selective_state_update(**{**tensors, 'x': x}), (tensors['x'],), (tensors['x'],))
