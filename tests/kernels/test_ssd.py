"""`ssd_scan` against its definition, in plain PyTorch and on Triton, and `non_causal_ssd`. What holds for all operators
is in test_contract.py.
"""

from math import inf

import oracles
import pytest
import torch
from cases import DEVICE
from kernel_cases import CASES, assert_equal, compare, in_double, run
from kernel_cases import ssd_scan as arguments

from vmamba.kernels import naive, non_causal_ssd, selective_scan, selective_state_update, ssd_scan, use_triton
from vmamba.kernels.ssd import launch, plain

SCAN = CASES['ssd_scan']
CHUNK = 16  # of both paths here, so that short sequences have several
needs_gpu = pytest.mark.skipif(DEVICE != 'cuda', reason='needs a CUDA device')


@pytest.fixture(autouse=True)
def configure(monkeypatch):
    """Sets how the kernels cut their work."""
    small = launch.CONFIG._replace(chunk=CHUNK)

    def set_config(**changes):
        monkeypatch.setattr(launch, 'CONFIG', small._replace(**changes))

    set_config()
    monkeypatch.setattr(plain, 'CHUNK', CHUNK)
    return set_config


def small(**changes):
    return arguments(**{**dict(batch=1, heads=2, dim=3, groups=1), **changes})


SIZES = {
    'one-step': dict(seqlen=1),
    'two-steps-in-reverse': dict(seqlen=2, reverse=True),
    'a-chunk': dict(seqlen=16, heads=1),
    'a-chunk-and-one': dict(seqlen=17, heads=1, dim=17),
    'several-chunks': dict(seqlen=38, heads=1, dstate=18),
    'several-chunks-in-reverse': dict(seqlen=38, optional='Dzb', reverse=True),
    'a-group-a-head': dict(heads=3, groups=3, dstate=1, dim=1),
    'groups-of-3': dict(seqlen=5, heads=6, groups=2, head_dims=True),
    'wide-heads': dict(seqlen=5, heads=1, dim=70, dstate=100),
    'wider-than-the-kernels': dict(seqlen=5, heads=1, dim=130, dstate=4),
}


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
def test_sizes_and_groups(sizes, dtype):
    sizes = {'optional': 'Dzb' if sizes.get('reverse') else 'Dzbs', **sizes}
    compare(SCAN, small(**sizes_of(sizes), dtype=dtype), dtype, reverse=sizes.get('reverse', False))


def sizes_of(sizes):
    return {name: size for name, size in sizes.items() if name != 'reverse'}


@pytest.mark.parametrize('optional', ['', 'D', 'z', 'b', 's', 'zs'])
def test_every_optional_argument(optional, dtype):
    compare(SCAN, small(seqlen=7, heads=1, optional=optional, dtype=dtype), dtype, dt_softplus='s' in optional)


def test_the_chunk_size_does_not_matter(backend):
    tensors = small(seqlen=5, heads=1)
    expected = run(SCAN.function, tensors, **SCAN.options)
    assert_equal(run(SCAN.function, tensors, **{**SCAN.options, 'chunk_size': 1}), expected)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
def test_growing_states_of_nothing_are_zero(reverse):
    tensors = small(seqlen=40, optional='D', dtype=torch.float32)
    tensors.update(x=torch.zeros_like(tensors['x']), dt=torch.full_like(tensors['dt'], 30.0), A=3 + tensors['A'] ** 2)
    with use_triton(False):
        y, last = ssd_scan(**tensors, chunk_size=8, return_final_states=True, reverse=reverse)
    assert not y.any() and not last.any()


@pytest.mark.parametrize('limit,softplus', [((0, 0.4), False), ((0.5, inf), True), ((0.35, 0.4), False)], ids=str)
def test_limits_of_the_step(limit, softplus, dtype):
    """Beyond them dt and its bias have no gradient."""
    tensors = small(heads=1, dtype=dtype)
    compare(SCAN, tensors, dtype, dt_limit=limit, dt_softplus=softplus)


def test_negative_steps_are_zero(dtype):
    tensors = small(dtype=dtype)
    tensors['dt'] = tensors['dt'] - 0.6
    compare(SCAN, tensors, dtype, dt_softplus=False)


def packed(numbers):
    return torch.tensor([numbers], device=DEVICE)


PACKED = {
    'of-one': [0, 1, 2, 3, 4] + [5] * 8,
    'not-from-zero': [3] * 6 + [4] * 7,
    'numbers-that-return': [0] * 3 + [1] * 4 + [0] * 6,
    'across-chunks': [0] * 16 + [1] * 10 + [2] * 12,
    'one-for-many-chunks': [0] * 33 + [7],
    'ends-inside-a-chunk': [0] * 25 + [1] * 5 + [2] * 2 + [3] * 6,
}


@pytest.mark.parametrize('numbers', PACKED.values(), ids=PACKED)
def test_packed_sequences(numbers, dtype):
    tensors = small(seqlen=len(numbers), heads=1, dtype=dtype)
    expected = run(SCAN.definition, in_double(tensors), **SCAN.options, seq_idx=packed(numbers).cpu())
    actual = run(SCAN.function, tensors, **SCAN.options, seq_idx=packed(numbers).int())
    oracles.assert_all_match(actual, expected, dtype)


def test_packed_sequences_do_not_see_each_other(backend):
    tensors = small(seqlen=38, optional='D')
    bounds = [0, 10, 11, 38]
    y, last = ssd_scan(
        **tensors, chunk_size=8, cu_seqlens=torch.tensor(bounds, device=DEVICE), return_final_states=True
    )
    for begin, end in zip(bounds, bounds[1:]):
        part = {k: t[:, begin:end] if k in ('x', 'dt', 'B', 'C') else t for k, t in tensors.items()}
        alone, last_alone = ssd_scan(**part, chunk_size=8, return_final_states=True)
        oracles.assert_matches(y[:, begin:end], alone.double(), torch.float32)
    oracles.assert_matches(last, last_alone.double(), torch.float32)


def test_batches_of_packed_sequences(dtype):
    """Each with its own bounds."""
    tensors = small(batch=2, seqlen=18, heads=1, dtype=dtype)
    numbers = torch.tensor([[0] * 3 + [1] * 15, [0] * 16 + [2] * 2], device=DEVICE)
    expected = run(SCAN.definition, in_double(tensors), **SCAN.options, seq_idx=numbers.cpu())
    oracles.assert_all_match(run(SCAN.function, tensors, **SCAN.options, seq_idx=numbers), expected, dtype)


def test_bounds_stand_for_numbers(backend):
    tensors = small(heads=1)
    bounds, numbers = torch.tensor([0, 3, 3, 12, 19], device=DEVICE), packed([0] * 3 + [1] * 9 + [2] * 7)
    expected = run(SCAN.function, tensors, **SCAN.options, seq_idx=numbers)
    for given in (dict(cu_seqlens=bounds), dict(cu_seqlens=bounds.int(), seq_idx=numbers)):
        assert_equal(run(SCAN.function, tensors, **SCAN.options, **given), expected)


def test_halves_are_the_whole(dtype):
    """The last state of the first half is the state before the second."""
    tensors = small(seqlen=28, dtype=dtype)
    y, last = SCAN.function(**tensors, **SCAN.options)
    halves = [
        {k: t[:, part] if k in ('x', 'dt', 'B', 'C', 'z') else t for k, t in tensors.items()}
        for part in (slice(0, 11), slice(11, None))
    ]
    first, middle = SCAN.function(**halves[0], **SCAN.options)
    second, end = SCAN.function(**{**halves[1], 'initial_states': middle}, **SCAN.options)
    oracles.assert_matches(torch.cat([first, second], dim=1), y.double(), dtype)
    oracles.assert_matches(end, last.double(), dtype)


def test_it_is_the_selective_scan_of_shared_steps(dtype):
    tensors = small(heads=4, groups=2, dtype=dtype)
    x, dt, A, B, C, D, z, bias, initial = tensors.values()
    dim = x.shape[-1]
    per_channel = [None if t is None else t.repeat_interleave(dim, 0) for t in (A, D, bias)]
    y, last = selective_scan(
        x.flatten(2).mT,
        dt.mT,
        per_channel[0][:, None].expand(-1, B.shape[-1]),
        B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1),
        per_channel[1],
        z.flatten(2).mT,
        per_channel[2],
        delta_softplus=True,
        initial_state=initial.flatten(1, 2),
        return_last_state=True,
    )
    actual, actual_last = SCAN.function(**tensors, **SCAN.options)
    oracles.assert_matches(actual.flatten(2), y.mT.double(), dtype)
    oracles.assert_matches(actual_last.flatten(1, 2), last.double(), dtype)


@pytest.mark.parametrize('head_dims', [False, True], ids=['skip-a-head', 'skip-a-channel'])
def test_a_sequence_walked_step_by_step(head_dims, dtype):
    """By `selective_state_update`, whose parameters are expanded along the channels."""
    tensors = small(seqlen=5, heads=4, groups=2, head_dims=head_dims, dtype=dtype)
    expected, last = SCAN.function(**tensors, **SCAN.options)
    x, dt, A, B, C, D, z, bias, state = tensors.values()
    state, (heads, dim, dstate) = state.clone(), state.shape[1:]
    D = D if head_dims else D[:, None].expand(heads, dim)
    per_head = A[:, None, None].expand(heads, dim, dstate), bias[:, None].expand(heads, dim)
    steps = [
        selective_state_update(
            state,
            x[:, i],
            dt[:, i, :, None].expand(-1, -1, dim),
            per_head[0],
            B[:, i],
            C[:, i],
            D,
            z[:, i],
            per_head[1],
            dt_softplus=True,
        )
        for i in range(x.shape[1])
    ]
    oracles.assert_matches(torch.stack(steps, dim=1), expected.double(), dtype)
    oracles.assert_matches(state, last.double(), dtype)


@pytest.mark.parametrize('sizes', [dict(), dict(heads=3, groups=3, head_dims=True, optional='Db')], ids=str)
def test_the_definition_of_the_library_agrees(sizes):
    tensors = small(**sizes, dtype=torch.float64)
    numbers = packed([3] * 4 + [0] * 15)
    for options in (dict(), dict(seq_idx=numbers), dict(dt_limit=(0.1, 0.5))):
        expected = run(SCAN.definition, tensors, dt_softplus=True, **options)
        oracles.assert_all_match(run(naive.ssd_scan, tensors, dt_softplus=True, **options), expected, torch.float64)


@pytest.mark.parametrize('half', [torch.float16, torch.bfloat16], ids=str)
def test_large_inputs_in_half_precision_stay_finite(half, backend):
    if backend and DEVICE == 'cpu' and half == torch.bfloat16:
        pytest.skip('not interpreted')
    tensors = small(seqlen=18, dim=16, dstate=16, optional='Db', dtype=half)
    tensors.update({name: tensors[name] * 300 for name in ('B', 'C')}, x=tensors['x'] * 1e-3)
    y, last = ssd_scan(**tensors, chunk_size=8, return_final_states=True)
    expected, expected_last = oracles.ssd_scan(**in_double(tensors))
    oracles.assert_matches(y.cpu(), expected, half)
    oracles.assert_matches(last.cpu(), expected_last, half)


@pytest.mark.parametrize('dt', [1e-6, 50.0])
def test_extreme_steps(dt, dtype):
    """A state that hardly changes, and one that is forgotten at once: then A has no gradient but rounding errors."""
    tensors = small(seqlen=18, heads=1, optional='', dtype=dtype)
    tensors['dt'] = torch.full_like(tensors['dt'], dt)
    tensors['A'] = tensors['A'] - 1
    expected = run(SCAN.definition, in_double(tensors))
    actual = run(SCAN.function, tensors, chunk_size=8)
    if dt > 1:
        grad_A = actual.pop('grad_A'), expected.pop('grad_A')
        assert (grad_A[0] - grad_A[1]).abs().max() < 1e-3
    oracles.assert_all_match(actual, expected, dtype)


def test_parts_of_one_projection(backend):
    """As in a block, where x, B and C are views of one tensor."""
    tensors = small(seqlen=5)
    x, B, C = (tensors[name] for name in ('x', 'B', 'C'))
    sizes = x[0, 0].numel(), B[0, 0].numel(), C[0, 0].numel()
    projection = torch.cat([t.flatten(2) for t in (x, B, C)], dim=-1)
    views = [part.unflatten(2, t.shape[2:]) for part, t in zip(projection.split(sizes, dim=-1), (x, B, C))]
    expected = run(SCAN.function, tensors, **SCAN.options)
    actual = run(SCAN.function, {**tensors, **dict(zip(('x', 'B', 'C'), views))}, **SCAN.options)
    oracles.assert_all_match(actual, {k: t.double() for k, t in expected.items()}, torch.float32)


# --- how the kernels cut their work

CUTS = {
    'blocks-of-a-state': (dict(seqlen=18, heads=1, dim=18, dstate=19), dict(), dict(state_p=16, state_n=16)),
    'heads-apart': (dict(seqlen=5, heads=3), dict(), dict(splits=2)),
    'segments': (dict(seqlen=38, heads=1, optional='zs'), dict(), dict(segments=2)),
    'segments-of-one-chunk': (dict(seqlen=38, heads=1), dict(), dict(segments=9)),
    'segments-of-packed-sequences': (
        dict(seqlen=38, heads=1, optional='s'),
        dict(seq_idx=packed([0] * 25 + [1] * 5 + [2] * 8)),
        dict(segments=3),
    ),
    'segments-in-reverse': (dict(seqlen=38, heads=1, optional='b'), dict(reverse=True), dict(segments=3)),
}


@pytest.mark.parametrize('sizes,options,changes', CUTS.values(), ids=CUTS)
def test_cuts(sizes, options, changes, configure, triton_kernels):
    tensors = small(**sizes)
    expected = run(SCAN.function, tensors, **SCAN.options, **options)
    configure(**changes)
    actual = run(SCAN.function, tensors, **SCAN.options, **options)
    oracles.assert_all_match(actual, {k: t.double() for k, t in expected.items()}, torch.float32)


def test_offsets_of_64_bits(configure, monkeypatch, triton_kernels):
    """They are taken where a chunk spans 2^31 elements, and change nothing."""
    tensors = small(seqlen=18, heads=1)
    expected = run(SCAN.function, tensors, **SCAN.options)
    narrow = launch._flags(launch.Scan(*tensors.values(), None, True, 0.0, inf, False))
    for stride, wide in ((2**27 - 1, False), (2**27, True)):
        flags = launch._widened(narrow, ((0, stride, 0, 0), (5, 4, 3, 1)), launch.CONFIG)
        assert flags == narrow._replace(wide=wide)
    monkeypatch.setattr(launch, '_widened', lambda flags, *others: flags._replace(wide=True))
    configure(min_chunks=5)  # plans of its own
    assert_equal(run(SCAN.function, tensors, **SCAN.options), expected)


@needs_gpu
@pytest.mark.gpu
def test_steps_far_apart(configure):
    """In tensors of more than 2^31 elements."""
    configure(chunk=64)
    tensors = small(seqlen=66, heads=1, optional='', dtype=torch.float16)
    expected = run(SCAN.function, tensors, **SCAN.options)
    far = torch.zeros(1, 66, 2**25, dtype=torch.float16, device=DEVICE)[:, :, None, :3]
    actual = run(SCAN.function, {**tensors, 'x': far.copy_(tensors['x'])}, **SCAN.options)
    assert_equal(actual, expected)


def test_nothing_around_a_tensor_is_read(triton_kernels):
    """With a ragged last chunk, and fewer channels and states than blocks have."""
    tensors = small(seqlen=18, dim=18, dstate=17)
    around = {k: t.new_full((t.numel() + 2000,), float('nan')) for k, t in tensors.items()}
    inside = {k: around[k][1000:-1000].view(t.shape).copy_(t) for k, t in tensors.items()}
    assert_equal(run(SCAN.function, inside, **SCAN.options), run(SCAN.function, tensors, **SCAN.options))


@pytest.mark.parametrize(
    'dim,dstate,itemsize,kibibytes,expected',
    [
        (64, 64, 2, 227, (64, 3, 2)),
        (64, 128, 2, 99, (64, 2, 1)),
        (64, 64, 4, 99, (64, 1, 1)),
        (128, 128, 2, 64, (32, 1, 1)),
        (128, 128, 4, 64, (16, 1, 1)),
        (5, 3, 4, 64, (64, 3, 2)),
    ],
)
def test_tiles_fit_into_shared_memory(dim, dstate, itemsize, kibibytes, expected):
    config = launch.Config().fit(dim, dstate, itemsize, kibibytes * 1024)
    assert (config.chunk, config.output.stages, config.inputs.stages) == expected


# --- arguments

BAD_OPTIONS = [
    pytest.param(dict(chunk_size=0), 'chunk_size must be an integer of at least 1, got 0', id='chunk-size'),
    pytest.param(dict(chunk_size=2.5), 'chunk_size must be an integer of at least 1, got 2.5', id='half-a-chunk'),
    pytest.param(dict(dt_limit=(1, 0.5)), r'dt_limit .* got \(1, 0.5\)', id='limits'),
    pytest.param(dict(dt_limit=None), 'dt_limit .* got None', id='no-limits'),
    pytest.param(dict(seq_idx=[0] * 19), r'\[1, 19\], got list', id='list'),
    pytest.param(dict(reverse=True), 'reverse=True cannot be combined with initial_states', id='reverse'),
    pytest.param(dict(seq_idx=torch.zeros(1, 19)), r'seq_idx must be integers \[1, 19\], got .*float32', id='floats'),
    pytest.param(dict(seq_idx=torch.zeros(1, 18).int()), r'\[1, 19\], got \(1, 18\)', id='shape'),
    pytest.param(dict(cu_seqlens=torch.tensor([0, 20])), r'must ascend from 0 to 19, got \[0, 20\]', id='bounds'),
    pytest.param(dict(cu_seqlens=torch.tensor([0, 9, 5, 19])), r'ascend .* got \[0, 9, 5, 19\]', id='order'),
    pytest.param(dict(cu_seqlens=torch.tensor([[0, 19]])), r'\[sequences \+ 1\], got \(1, 2\)', id='rank'),
]


@pytest.mark.parametrize('options,message', BAD_OPTIONS)
def test_a_bad_option_is_an_error_that_shows_it(options, message):
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if 'ascend' in message and DEVICE != 'cpu':
        pytest.skip('not checked on a GPU')
    with pytest.raises(ValueError, match=f'ssd_scan: {message}' if 'must be' in message[:20] else message):
        ssd_scan(**small(), **{'chunk_size': 8, **options})


def test_reverse_excludes_packed_sequences():
    tensors = small(optional='')
    for name, given in (('seq_idx', packed([0] * 19)), ('cu_seqlens', torch.tensor([0, 19], device=DEVICE))):
        with pytest.raises(ValueError, match=f'reverse=True cannot be combined with {name}'):
            ssd_scan(**tensors, chunk_size=8, reverse=True, **{name: given})


def test_bounds_and_numbers_that_disagree_are_an_error():
    bounds = torch.tensor([0, 9, 19], device=DEVICE)
    with pytest.raises(ValueError, match=r'seq_idx must change where cu_seqlens does, got cu_seqlens \[0, 9, 19\]'):
        ssd_scan(**small(), chunk_size=8, cu_seqlens=bounds, seq_idx=packed([0] * 10 + [1] * 9))
    with pytest.raises(ValueError, match='cu_seqlens needs a batch of 1, got 2'):
        ssd_scan(**arguments(), chunk_size=8, cu_seqlens=bounds)


def test_bad_sizes_are_errors_that_show_them():
    with pytest.raises(ValueError, match='groups of B must divide the 3 heads, got 2'):
        ssd_scan(**arguments(heads=3), chunk_size=8)
    with pytest.raises(ValueError, match=r'x must be .*L>0.*, got \(1, 0, 2, 3\)'):
        ssd_scan(**small(seqlen=0), chunk_size=8)
    empty = {k: t for k, t in small(seqlen=0).items() if k not in ('z', 'initial_states')}
    with pytest.raises(ValueError, match=r'x must be .*L>0.*, got \(1, 0, 2, 3\)'):
        non_causal_ssd(**empty)


# --- without order


@pytest.mark.parametrize('sizes', [dict(), dict(head_dims=True, groups=1), dict(optional='')], ids=str)
def test_without_order(sizes):
    tensors = arguments(**sizes, dtype=torch.float64)
    tensors = {k: t for k, t in tensors.items() if k not in ('z', 'initial_states')}
    expected = run(oracles.non_causal_ssd, in_double(tensors), dt_softplus=True)
    oracles.assert_all_match(run(non_causal_ssd, tensors, dt_softplus=True), expected, torch.float64)


def test_without_order_half_precision_has_weights_in_fp32():
    tensors = arguments(dtype=torch.bfloat16, seqlen=50)
    tensors = {k: t for k, t in tensors.items() if k not in ('z', 'initial_states')}
    y = non_causal_ssd(**tensors)
    assert y.dtype == torch.bfloat16
    oracles.assert_matches(y.cpu(), oracles.non_causal_ssd(**in_double(tensors)), torch.bfloat16)
    with pytest.raises(ValueError, match='non_causal_ssd: groups of B must divide the 3 heads, got 2'):
        non_causal_ssd(**{k: t for k, t in arguments(heads=3).items() if k not in ('z', 'initial_states')})


# --- on a GPU

SHAPES = dict(vim=(2, 6144, 6, 64, 64, 1), stage_1=(4, 784, 8, 32, 48, 1), stage_2=(4, 196, 12, 32, 64, 1))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize('half', oracles.DTYPES[1:], ids=str)
@pytest.mark.parametrize('shape', [*SHAPES.values(), (2, 1000, 8, 64, 128, 2)], ids=str)
def test_sizes_of_models(shape, half, configure):
    """Against the plain path in float64: the loop takes its time.

    The gradients of A and dt_bias are sums of terms of both signs. No computation in half precision has them closer
    than another rounding of the sequences changes them.
    """
    configure(chunk=64)
    batch, seqlen, heads, dim, dstate, groups = shape
    tensors = arguments(batch, seqlen, heads, dim, dstate, groups, dtype=half)
    exact = {k: t.double() for k, t in tensors.items()}
    with use_triton(False):
        expected = run(SCAN.function, exact, **SCAN.options)
        others = run(SCAN.function, {k: rounded_again(exact[k], tensors[k].dtype) for k in exact}, **SCAN.options)
    actual = run(SCAN.function, tensors, **SCAN.options)
    for name in ('grad_A', 'grad_dt_bias'):
        other, sums, total = others.pop(name), actual.pop(name), expected.pop(name)
        bound, *_ = oracles.TOLERANCES[half]
        assert oracles.relative_error(sums, total) < max(bound, oracles.relative_error(other, total)), name
    oracles.assert_all_match(actual, expected, half, outliers=1e-3)


def rounded_again(t, dtype):
    return t * (1 + torch.finfo(dtype).eps * (2 * torch.rand_like(t) - 1))
