"""`selective_scan` against its definition, in plain PyTorch and on Triton. What holds for all operators is in
test_contract.py; how the plain path cuts its work, in test_chunked.py.
"""

import functools

import oracles
import pytest
import torch
from cases import DEVICE
from kernel_cases import CASES, assert_equal, compare, in_double, run
from kernel_cases import selective_scan as arguments
from recorder import Recorder

from vmamba.kernels import naive, selective_scan, use_triton
from vmamba.kernels.selective_scan import launch

SCAN = CASES['selective_scan']
SEQUENCES = ('u', 'delta', 'B', 'C', 'z')

both_ways = pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
needs_gpu = pytest.mark.skipif(DEVICE != 'cuda', reason='needs a CUDA device')


def small(**changes):
    """Arguments of a scan that is interpreted quickly: by one program, of less than a tile."""
    return arguments(**{**dict(batch=1, dim=4, seqlen=10, B=1, C=1), **changes})


@pytest.fixture(autouse=True)
def configure(monkeypatch):
    """Sets how the kernels cut their work. Interpreted, a program has 8 channels."""
    small = launch.CONFIG if DEVICE == 'cuda' else launch.CONFIG._replace(block_d=8)

    def set_config(**changes):
        monkeypatch.setattr(launch, 'CONFIG', small._replace(**changes))

    set_config()
    return set_config


@pytest.fixture
def precision(backend):
    """In which results are compared: the kernels have no float64."""
    return torch.float32 if backend else torch.float64


def compare_each(tensors, **options):
    """As `compare`, with each result in the tolerances of its own dtype."""
    options = {**SCAN.options, **options}
    expected = run(SCAN.definition, in_double(tensors), **options)
    actual = run(SCAN.function, tensors, **options)
    assert actual.keys() == expected.keys()
    for name in expected:
        oracles.assert_matches(actual[name], expected[name], actual[name].dtype, name)


def test_both_results_can_be_changed_in_place(backend):
    leaves = {name: None if t is None else t.requires_grad_() for name, t in small().items()}
    y, last_state = selective_scan(**leaves, return_last_state=True)
    (y.mul_(2).sum() + last_state.mul_(3).sum()).backward()
    assert leaves['u'].grad is not None


SIZES = {
    'one-step': dict(seqlen=1),
    'two-steps-of-one-channel': dict(seqlen=2, dim=1, B=0, C=0, reverse=True),
    'a-tile': dict(seqlen=16),
    'a-tile-and-one': dict(seqlen=17, dstate=1, B=0, C=0, reverse=True),
    'several-tiles': dict(seqlen=35),
    'more-groups-of-C': dict(B=1, C=2, dstate=1, reverse=True),
    'more-groups-of-B': dict(B=2, C=1),
    'a-group-a-channel': dict(dim=2, B=2, C=2, dstate=2, reverse=True),
    'constants': dict(dim=2, B=None, C=None),
    'constant-B': dict(dim=2, B=None, C=2, reverse=True),
    'constant-C': dict(dim=2, B=0, C=None, dstate=1),
    'steps-shared-by-2': dict(share=2),
    'steps-shared-by-all': dict(share=4, B=0, C=0, dstate=1, reverse=True),
}


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
def test_sizes_and_groups(sizes, precision):
    sizes = dict(sizes)
    reverse = sizes.pop('reverse', False)
    compare(SCAN, small(**sizes, dtype=precision), precision, reverse=reverse)


@pytest.mark.parametrize('dstate', [2, 16, 17, 64, 65])
def test_numbers_of_states(dstate, precision):
    compare(SCAN, small(dim=2, seqlen=5, dstate=dstate, dtype=precision), precision)


@pytest.mark.parametrize('dstate,expected', [(1, True), (64, True), (65, False)])
def test_triton_is_for_64_states_at_most(dstate, expected, triton_kernels):
    with Recorder() as calls:
        selective_scan(**small(dim=2, seqlen=2, dstate=dstate))
    *_, triton, _ = calls.arguments[0]
    assert triton is expected


def test_without_states_the_skip_connection_remains(backend):
    tensors = arguments(dstate=0)
    y, state = selective_scan(**tensors, return_last_state=True)
    torch.testing.assert_close(y, tensors['D'][:, None] * tensors['u'] * torch.nn.functional.silu(tensors['z']))
    assert state.shape == (2, 6, 0)


@pytest.mark.parametrize('optional', ['', 'D', 'z', 'b', 's', 'zs'])
def test_every_optional_argument(optional, precision):
    tensors = small(optional=optional, dtype=precision)
    compare(SCAN, tensors, precision, delta_softplus='b' in optional, reverse='z' in optional)


@pytest.mark.parametrize('wide', ['delta', 'z'])
def test_sequences_of_two_dtypes(wide, backend):
    """As under autocast. What is in fp32 keeps its precision."""
    tensors = small(dtype=torch.float16)
    tensors[wide] = tensors[wide].float()
    compare_each(tensors)
    assert selective_scan(**tensors).dtype == torch.float16


@both_ways
def test_coefficients_in_bfloat16(reverse, backend):
    """The kernels pack them as words of two steps; what is computed with them keeps the precision of fp32."""
    tensors = small(dstate=5)
    tensors.update(B=tensors['B'].bfloat16(), C=tensors['C'].bfloat16())
    compare_each(tensors, reverse=reverse)


@pytest.mark.parametrize('wanted', [torch.float16, torch.float32, torch.float64], ids=str)
def test_the_dtype_of_the_output(wanted, backend):
    """It is rounded once, and takes a gradient of that dtype."""
    tensors = small(dtype=torch.float16)
    expected = run(SCAN.definition, in_double(tensors), **SCAN.options)
    actual = run(functools.partial(SCAN.function, out_dtype=wanted), tensors, **SCAN.options)
    assert actual['result_0'].dtype == wanted
    for name in expected:
        precision = torch.float16 if actual[name].dtype == torch.float16 else torch.float32
        oracles.assert_matches(actual[name], expected[name], precision, name)


def test_without_the_state_only_the_output_is_returned(backend):
    tensors = arguments()
    assert torch.equal(selective_scan(**tensors), selective_scan(**tensors, return_last_state=True)[0])


@pytest.mark.parametrize('result', [0, 1], ids=['output', 'last-state'])
def test_one_result_alone_has_gradients(result, precision):
    one = SCAN._replace(
        function=lambda **given: SCAN.function(**given)[result],
        definition=lambda **given: SCAN.definition(**given)[result],
    )
    compare(one, small(dtype=precision), precision)


# --- long sequences, and how they are cut


@pytest.mark.parametrize(
    'seqlen,chunks,subchunks,reverse',
    [(33, 2, 1, False), (66, 2, 2, True), (20, 100, 1, False)],
)
def test_parts_of_the_sequence_in_parallel(seqlen, chunks, subchunks, reverse, configure, triton_kernels):
    configure(chunks=chunks, subchunks=subchunks)
    compare(SCAN, small(seqlen=seqlen, dim=3), torch.float32, reverse=reverse)


@pytest.mark.parametrize('sizes', [dict(B=None), dict(dstate=5, B=1, C=2)], ids=str)
def test_parts_of_other_arguments(sizes, configure, triton_kernels):
    configure(chunks=2)
    tensors = small(**{**dict(dim=2, seqlen=17, optional='z'), **sizes})
    compare(SCAN, tensors, torch.float32, delta_softplus=False)


@torch.no_grad()
def test_more_parts_than_are_composed_at_once(configure, monkeypatch, triton_kernels):
    configure(chunks=5)
    tensors = small(seqlen=5 * 16)
    y, state = SCAN.function(**tensors)
    launch._summary_launches.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(launch, '_COMBINE_BLOCK', (2, 4))
        other_y, other_state = SCAN.function(**tensors)
    launch._summary_launches.cache_clear()
    oracles.assert_matches(other_y, y, torch.float32)
    oracles.assert_matches(other_state, state, torch.float32)


@pytest.mark.parametrize('splits,groups', [(1, 2), (2, 1), (3, 1)])
def test_blocks_of_channels(splits, groups, configure, triton_kernels):
    """Those of a group are shared among programs, of which the last one may have fewer."""
    block_d = 2 if DEVICE == 'cpu' else 32
    configure(block_d=block_d, splits=splits)
    tensors = small(dim=groups * (2 * block_d + 1), dstate=1, B=groups, C=groups)
    compare(SCAN, tensors, torch.float32)


@pytest.mark.parametrize('dstate,warps', [(5, 1), (3, 8)])
def test_states_of_a_warp(dstate, warps, configure, triton_kernels):
    configure(warps=warps)
    compare(SCAN, small(dstate=dstate), torch.float32)


def sizes_on(processors, seqlen):
    """Of a scan on a GPU."""
    sizes = dict(batch=1, directions=1, groups=1, dim=64, length=seqlen, dstate=16, softplus=True, reverse=False)
    return launch._Sizes(**sizes, exact=True, nvidia=True, processors=processors)


@pytest.mark.parametrize('programs,summary_programs', [(2, 2), (150, 40), (1000, 500)])
@pytest.mark.parametrize('processors', [1, 4, 132, 1000])
def test_parts_cover_the_sequence(processors, programs, summary_programs):
    """Without one that is empty, whatever the number of tiles. The subchunks of a chunk are of one size."""
    config, found = launch.Config().fit(16), []
    for tiles in range(1, 300):
        cut = launch._cut(config, sizes_on(processors, 16 * tiles), programs, summary_programs)
        assert (cut.chunks - 1) * cut.chunk_tiles < tiles <= cut.chunks * cut.chunk_tiles
        assert cut.chunk_tiles % cut.subchunks == 0
        found.append(cut)
    idle = config.slots(processors) // programs
    assert (max(cut.chunks for cut in found) > 1) == (idle > 1)
    if (processors, programs) == (132, 150):
        assert max(cut.subchunks for cut in found) > 1


@pytest.mark.parametrize('dstate', [1, 4, 16, 63, 64])
def test_programs_have_the_registers_that_they_ask_for(dstate):
    config = launch.Config().fit(dstate)
    registers = config.num_warps * config.programs_per_processor * 32 * config.registers
    assert registers <= 65536 and config.registers % 8 == config.registers // 255 * 7


@torch.no_grad()
@pytest.mark.parametrize('reverse,dstate', [(False, 1), (True, 2)])
def test_very_long_sequences(dstate, reverse):
    """Steps that remember thousands of them, in fp32 against a walk in double precision."""
    tensors = arguments(1, 2, 2**14, dstate, B=0, C=0, optional='s', steps=5e-3)
    y, state = selective_scan(**tensors, return_last_state=True, reverse=reverse)
    u, delta, A, B, C, h = (t[0] if t.ndim > 2 else t for t in in_double(tensors).values() if t is not None)
    decay = torch.exp(delta[:, None] * A[:, :, None]).numpy()
    drive = (delta[:, None] * B * u[:, None]).numpy()
    h, C, expected = h.numpy(), C.numpy(), torch.empty(u.shape, dtype=torch.float64)
    for step in reversed(range(u.shape[-1])) if reverse else range(u.shape[-1]):
        h = decay[:, :, step] * h + drive[:, :, step]
        expected[:, step] = torch.from_numpy((h * C[:, step]).sum(axis=-1))
    oracles.assert_matches(y[0].cpu(), expected, torch.float32, 'y')
    oracles.assert_matches(state[0].cpu(), torch.from_numpy(h), torch.float32, 'state')


# --- what a recurrence is


@pytest.mark.parametrize('seqlen,reverse', [(1, False), (7, True)])
def test_a_sequence_can_be_continued_from_its_state(seqlen, reverse, precision):
    """After `seqlen` of 12 positions, with gradients through the state."""

    def continued(initial_state, **given):
        ys, state = [], initial_state
        parts = [slice(0, seqlen), slice(seqlen, None)]
        for part in reversed(parts) if reverse else parts:
            pieces = {k: t[..., part] if k in SEQUENCES else t for k, t in given.items()}
            y, state = SCAN.function(**pieces, initial_state=state, reverse=reverse)
            ys.append(y)
        return torch.cat(ys[::-1] if reverse else ys, dim=-1), state

    tensors = small(seqlen=12, dtype=precision)
    expected = run(SCAN.function, tensors, reverse=reverse)
    oracles.assert_all_match(run(continued, tensors), expected, precision)


@both_ways
def test_reverse_is_forward_on_the_flipped_sequence(reverse, precision):
    tensors = small(seqlen=20, dtype=precision)
    flipped = {k: t.flip(-1) if k in SEQUENCES else t for k, t in tensors.items()}
    y, state = SCAN.function(**tensors, reverse=reverse)
    other_y, other_state = SCAN.function(**flipped, reverse=not reverse)
    oracles.assert_matches(other_y.flip(-1), y, precision)
    oracles.assert_matches(other_state, state, precision)


@both_ways
def test_later_steps_do_not_change_earlier_ones(reverse, configure, backend):
    """Bit by bit, even where they are NaN."""
    configure(chunks=2)
    tensors = small(seqlen=40)
    before, after = (slice(21, None), slice(0, 21)) if reverse else (slice(0, 21), slice(21, None))
    changed = {k: t.clone() for k, t in tensors.items()}
    for name in ('u', 'B', 'C', 'z'):
        changed[name][..., after] = float('nan')
    expected, actual = (selective_scan(**given, reverse=reverse)[..., before] for given in (tensors, changed))
    assert torch.equal(actual, expected)


def test_entries_of_a_batch_do_not_mix(backend):
    tensors = small(batch=2)
    changed = {k: t.clone() for k, t in tensors.items()}
    for name in ('u', 'B', 'C', 'z', 'initial_state'):
        changed[name][1] = float('nan')
    expected, actual = (run(SCAN.function, given, **SCAN.options) for given in (tensors, changed))
    for name in ('result_0', 'result_1', *(f'grad_{k}' for k in (*SEQUENCES, 'initial_state'))):
        assert torch.equal(actual[name][0], expected[name][0]), name
        assert actual[name][1].isnan().any(), name


EXTREMES = {
    # exp(delta * A) is zero in any dtype
    'underflow': lambda delta, A: (delta * 100 + 50, A * 1e3 - 100),
    # no step's decay is, but their product over a tile
    'products-underflow': lambda delta, A: (torch.full_like(delta, 4), torch.full_like(A, -2)),
    # the state hardly decays over the whole sequence
    'tiny-steps': lambda delta, A: (delta * 1e-7, A * 1e-3),
    # decays of 1 and of 0 side by side
    'wide-range': lambda delta, A: (10 ** (delta * 18 - 7), -(10 ** (-A * 2 - 2))),
    'zero-steps': lambda delta, A: (delta * 0, A),
    'growth': lambda delta, A: (delta, -A),
    'steps-back': lambda delta, A: (delta - 0.25, A),
}


@pytest.mark.parametrize('extreme', EXTREMES)
def test_extreme_steps_and_decays(extreme, configure, backend):
    configure(chunks=2)
    tensors = small(seqlen=40 if not backend else 24, optional='Ds')
    tensors['delta'], tensors['A'] = EXTREMES[extreme](tensors['delta'], tensors['A'])
    compare(SCAN, tensors, torch.float32, delta_softplus=False)


def test_softplus_of_extreme_steps(backend):
    """Which is the step itself, or nothing."""
    tensors = small(optional='Ds')
    tensors['delta'] = tensors['delta'] * 200 - 50
    compare(SCAN, tensors, torch.float32)


@pytest.mark.parametrize('chunks,reverse', [(1, False), (3, True)])
def test_growth_leaves_zeros_alone(chunks, reverse, configure, backend):
    """Where the product of all decays overflows, states and adjoint states that are zero stay zero."""
    configure(chunks=chunks)
    tensors = small(seqlen=48, optional='z')
    tensors.update(u=0 * tensors['u'], delta=0 * tensors['delta'] + 0.5, A=0 * tensors['A'] + 100)
    leaves = {k: t.requires_grad_() for k, t in tensors.items() if t is not None}
    results = selective_scan(**leaves, return_last_state=True, reverse=reverse)
    assert not any(result.any() for result in results)
    zeros = [torch.zeros_like(result) for result in results]
    assert not any(grad.any() for grad in torch.autograd.grad(results, list(leaves.values()), zeros))


# --- memory


def transposed(tensor):
    return tensor.mT.contiguous().mT


def moved(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def within(tensor):
    """A part of a larger tensor whose rows are not aligned."""
    larger = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), float('nan'))
    return larger[..., 1:-2].copy_(tensor)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('layout', [torch.clone, transposed, moved], ids=['plain', 'channels-last', 'batch'])
def test_the_output_is_laid_out_like_u(layout, dtype, backend):
    if backend and dtype == torch.float64:
        pytest.skip('not on Triton')
    tensors = small(batch=2, dtype=dtype)
    tensors['u'] = layout(tensors['u'])
    y, state = SCAN.function(**tensors)
    assert (y.dtype, y.stride()) == (dtype, tensors['u'].stride())
    assert state.dtype == torch.promote_types(dtype, torch.float32) and state.is_contiguous()


def test_channels_last_sequences_have_gradients_like_them(configure, triton_kernels):
    """They are walked where they lie."""
    configure(chunks=2)
    tensors = small(seqlen=20, optional='z')
    tensors.update({k: transposed(tensors[k]) for k in ('u', 'delta', 'z')})
    compare(SCAN, tensors, torch.float32)
    leaves = {k: None if t is None else t.requires_grad_() for k, t in tensors.items()}
    grads = torch.autograd.grad(selective_scan(**leaves).sum(), [leaves[k] for k in ('u', 'delta', 'z')])
    assert all(grad.stride() == leaves['u'].stride() for grad in grads)


LAYOUTS = {
    'unaligned': dict.fromkeys(('u', 'delta', 'z', 'B', 'C', 'initial_state', 'A'), within),
    'u-channels-last': dict(u=transposed, z=within, B=transposed, C=moved),
}


@pytest.mark.parametrize('layouts', LAYOUTS.values(), ids=LAYOUTS)
def test_each_tensor_may_have_a_layout_of_its_own(layouts, precision):
    tensors = small(batch=2, dtype=precision)
    laid_out = {k: layouts[k](t) if k in layouts else t for k, t in tensors.items()}
    expected = run(SCAN.function, tensors, **SCAN.options)
    oracles.assert_all_match(run(SCAN.function, laid_out, **SCAN.options), expected, precision)


def test_expanded_tensors(precision):
    tensors = small(batch=2, dtype=precision)
    for name in ('u', 'delta', 'B', 'C', 'z', 'initial_state'):
        tensors[name] = tensors[name][:1].expand_as(tensors[name])
    tensors.update(D=tensors['D'][:1].expand(4), A=tensors['A'][:, :1].expand(4, 3))
    compare(SCAN, tensors, precision)


def spread(tensor, axis, file):
    """A copy whose entries along an axis lie 2^30 elements apart; on a CPU in a file that is sparse."""
    strides = list(tensor.stride())
    strides[axis] = 2**30
    size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides))
    if DEVICE == 'cpu':
        memory = torch.from_file(str(file), shared=True, size=size, dtype=tensor.dtype)
    else:
        memory = torch.empty(size, dtype=tensor.dtype, device=DEVICE)
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize(
    'axis,sizes,reverse',
    [
        (0, dict(batch=3, dim=2), False),
        (1, dict(dim=3, B=3, C=3), False),  # channels, and groups
        (-2, dict(dim=3), False),  # channels, and states
        (-1, dict(dim=2), False),
        (-1, dict(dim=2), True),
    ],
    ids=['batch', 'groups', 'states', 'steps', 'reverse'],
)
def test_offsets_beyond_32_bits(axis, sizes, reverse, tmp_path, triton_kernels):
    tensors = small(**{**dict(seqlen=3, B=1, C=1), **sizes}, dtype=torch.float16)
    far = {k: spread(t, axis, tmp_path / k) if k in SEQUENCES else t for k, t in tensors.items()}
    expected = run(SCAN.function, tensors, **SCAN.options, reverse=reverse)
    assert_equal(run(SCAN.function, far, **SCAN.options, reverse=reverse), expected)


def test_memory_for_the_backward_pass_does_not_hold_all_states(backend):
    """But the inputs, and on Triton one state of 16 and the last."""
    tensors = small(batch=2, dim=6, seqlen=33, dstate=16)
    saved = {}

    def save(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        selective_scan(**{k: t.requires_grad_() for k, t in tensors.items()})
    inputs = sum(t.numel() for t in tensors.values())
    assert 0 < sum(saved.values()) <= inputs + (2 * 6 * 16 * 4 if backend else 0)


def test_inference_keeps_no_states(backend):
    with Recorder() as calls, torch.no_grad():
        selective_scan(**small())
    assert calls.outputs[0][2].numel() == 0


# --- arguments


BAD_ARGUMENTS = [
    pytest.param('u', (2, 6, 0), torch.float32, 'L>0', id='u-empty'),
    pytest.param('delta', (2, 4, 19), torch.float32, '6 channels, got 4', id='delta-no-divisor'),
    pytest.param('delta', (2, 0, 19), torch.float32, '6 channels, got 0', id='delta-no-channels'),
    pytest.param('delta', (2, 6, 19), torch.complex64, 'complex64', id='delta-complex'),
    pytest.param('B', (2, 4, 3, 19), torch.float32, '6 channels, got 4', id='B-groups'),
    pytest.param('B', (2, 0, 3, 19), torch.float32, '6 channels, got 0', id='B-no-groups'),
    pytest.param('C', (2, 3, 3, 19), torch.float32, r'B and C .* \[2, 3\]', id='C-groups-unlike-those-of-B'),
    pytest.param('B', (6, 4), torch.float32, r'\(6, 4\)', id='B-constant'),
]


@pytest.mark.parametrize('name,shape,dtype,message', BAD_ARGUMENTS)
def test_a_bad_argument_is_an_error_that_shows_it(name, shape, dtype, message):
    tensors = {**arguments(), name: torch.zeros(shape, dtype=dtype, device=DEVICE)}
    with pytest.raises(ValueError, match=message) as caught:
        selective_scan(**tensors)
    assert name in str(caught.value)


def test_an_integer_dtype_of_the_output_is_an_error():
    with pytest.raises(ValueError, match='out_dtype must be a floating dtype, got torch.int32'):
        selective_scan(**arguments(), out_dtype=torch.int32)


def test_registration_of_other_arguments(backend):
    """Of absent ones, in another layout, and without gradients."""
    tensors = small(optional='', share=2)
    laid_out = {k: t if t is None else transposed(t) for k, t in tensors.items()}
    with Recorder() as calls:
        run(SCAN.function, laid_out, reverse=True)
        selective_scan(**tensors)
    assert calls.names == ['selective_scan', 'selective_scan_backward', 'selective_scan']
    checks = 'test_schema', 'test_autograd_registration', 'test_faketensor'
    for operator, given in zip(calls.operators, calls.arguments):
        torch.library.opcheck(operator, given, test_utils=checks, **oracles.OPCHECK_TOLERANCE)


@both_ways
def test_the_naive_scan_agrees(reverse):
    """It is what the tools compare with."""
    tensors = in_double(arguments())
    expected = run(oracles.selective_scan, tensors, reverse=reverse, delta_softplus=True)
    actual = run(naive.selective_scan, tensors, reverse=reverse, delta_softplus=True)
    oracles.assert_all_match(actual, expected, torch.float64)


# --- on a GPU


def compare_with_plain(tensors, dtype, **options):
    """With the plain path in float64, for sizes that the definition would take too long for."""
    with use_triton(False):
        doubled = {k: None if t is None else t.double() for k, t in tensors.items()}
        expected = run(SCAN.function, doubled, **SCAN.options, **options)
    oracles.assert_all_match(run(SCAN.function, tensors, **SCAN.options, **options), expected, dtype)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize('dtype', oracles.DTYPES[1:], ids=str)
@both_ways
@pytest.mark.parametrize(
    'sizes',
    [
        dict(batch=2, dim=96, seqlen=784, dstate=1, B=4, C=4),
        dict(batch=2, dim=40, seqlen=197, dstate=16, B=0, C=0),
        dict(batch=1, dim=24, seqlen=1023, dstate=5, B=2, C=1),
        dict(batch=1, dim=24, seqlen=100, dstate=16, B=0, C=None),
        dict(batch=1, dim=24, seqlen=100, dstate=4, B=None, C=2),
        dict(batch=2, dim=8, seqlen=100, dstate=64, B=0, C=0),
        dict(batch=2, dim=8, seqlen=100, dstate=256, B=0, C=0),
        dict(batch=1, dim=8, seqlen=65536, dstate=2, B=0, C=0),
    ],
    ids=str,
)
def test_sizes_on_a_gpu(sizes, dtype, reverse):
    compare_with_plain(arguments(**sizes, dtype=dtype), dtype, reverse=reverse)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize('seqlen', [8, 16, 32, 64, 128, 256, 372, 512, 784, 1024, 1134, 2048, 4096])
@pytest.mark.parametrize('groups', [0, 2])
@pytest.mark.parametrize('optional', ['Dzb', ''])
@pytest.mark.parametrize('dtype', oracles.DTYPES[1:], ids=str)
def test_the_cases_of_mamba_ssm(dtype, optional, groups, seqlen):
    tensors = arguments(batch=2, dim=4, seqlen=seqlen, dstate=8, B=groups, C=groups, optional=optional, dtype=dtype)
    compare_with_plain(tensors, dtype)


@needs_gpu
@pytest.mark.gpu
@torch.no_grad()
def test_a_million_steps():
    tensors = arguments(batch=1, dim=2, seqlen=1_000_000, dstate=2, B=0, C=0, optional='Ds', steps=5e-3)
    with use_triton(False):
        expected = SCAN.function(**{k: None if t is None else t.double() for k, t in tensors.items()})
    for actual, other in zip(SCAN.function(**tensors), expected):
        oracles.assert_matches(actual, other, torch.float32)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize('chunks', [1, 8])
def test_repeated_runs_agree_bit_by_bit(chunks, configure):
    """While thousands of programs run at the same time."""
    configure(chunks=chunks)
    tensors = arguments(batch=4, dim=192, seqlen=3136, dstate=4, B=2, C=2, dtype=torch.bfloat16)
    first = run(SCAN.function, tensors, **SCAN.options)
    for _ in range(5):
        assert_equal(run(SCAN.function, tensors, **SCAN.options), first)


@needs_gpu
@pytest.mark.gpu
@torch.no_grad()
def test_sequences_of_more_than_32_bits():
    """2^32 elements, of which the last ones are computed again by themselves."""
    u = torch.zeros(2, 8, 2**28, dtype=torch.float16, device=DEVICE)
    u[-1, -1, -1000:] = 1
    delta = torch.full((2, 8, 2**28), 0.5, dtype=torch.float16, device=DEVICE)
    A, B = -torch.ones(8, 1, device=DEVICE), torch.ones(8, 1, device=DEVICE)
    y, last = selective_scan(u, delta, A, B, B, return_last_state=True)
    u, delta = (t[-1:, :, -4096:].contiguous() for t in (u, delta))
    expected, expected_last = selective_scan(u, delta, A, B, B, return_last_state=True)
    torch.testing.assert_close(y[-1:, :, -4096:], expected)
    torch.testing.assert_close(last[-1:], expected_last)
    assert last[-1, -1].item() > 0.5 and not y[0].any()


@needs_gpu
@pytest.mark.gpu
def test_compiled_for_a_gpu():
    tensors = arguments(batch=2, dim=8, seqlen=100)
    expected = run(SCAN.function, tensors, **SCAN.options)
    assert_equal(run(torch.compile(SCAN.function, fullgraph=True), tensors, **SCAN.options), expected)


@needs_gpu
@pytest.mark.gpu
@torch.no_grad()
def test_replayed_in_a_cuda_graph():
    tensors = arguments(batch=1, dim=64, seqlen=4096, dtype=torch.bfloat16)
    expected = SCAN.function(**tensors, **SCAN.options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = SCAN.function(**tensors, **SCAN.options)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))
