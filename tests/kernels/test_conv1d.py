"""The causal convolutions against float64 loops over positions and taps."""

import kernel_cases
import oracles
import pytest
import torch
from cases import DEVICE
from kernel_cases import CASES, Case, assert_equal, compare, in_double, run
from recorder import Recorder
from torch.utils.flop_counter import FlopCounterMode

from vmamba.kernels import bidirectional_conv1d, causal_conv1d, conv1d

BOTH, CAUSAL = CASES['bidirectional_conv1d'], CASES['causal_conv1d']
WITH_STATES = Case(
    lambda **arguments: causal_conv1d(**arguments, return_final_states=True),
    kernel_cases.causal_conv1d,
    oracles.causal_conv1d,
    dict(activation='silu'),
)
SEQUENCES = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2, 2], [3, 3, 5, 5, 5, 3, -1, -1, -1]], dtype=torch.int32)
PACKED = Case(
    lambda seq_idx, **arguments: causal_conv1d(**arguments, seq_idx=seq_idx.to(DEVICE)),
    kernel_cases.causal_conv1d,
    lambda **arguments: oracles.causal_conv1d(**arguments)[0],
    dict(seq_idx=SEQUENCES),
)

# What lies beyond the end of a tensor may be anything; arithmetic on it makes NaN now and then.
pytestmark = pytest.mark.filterwarnings('error:invalid value:RuntimeWarning')
linear_and_silu = pytest.mark.parametrize('silu', [False, True], ids=['linear', 'silu'])


@pytest.fixture
def small_tiles(fresh_launches, monkeypatch):
    """Several tiles in both dimensions of small maps, several steps of a walk, several tiles of a backward program."""
    for name in ('_FORWARD_TILES', '_BACKWARD_TILES'):
        tiles = dict(channels_last=conv1d._Tile(4, 4, walk=2), steps_last=conv1d._Tile(8, 2))
        monkeypatch.setattr(conv1d, name, tiles)
    monkeypatch.setattr(conv1d, '_PROGRAMS_PER_PROCESSOR', 8)


@linear_and_silu
@pytest.mark.parametrize('width', [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize('seqlen,dim', [(1, 3), (2, 3), (7, 5)])
def test_both_directions(seqlen, dim, width, silu, dtype, small_tiles):
    """Of sequences shorter than the taps too, and of more taps than the kernels have."""
    compare(BOTH, kernel_cases.bidirectional_conv1d(1, seqlen, dim, width, dtype), dtype, silu=silu)


@pytest.mark.parametrize('activation', [None, 'swish'])
@pytest.mark.parametrize('width', [1, 2, 3, 4, 6])
@pytest.mark.parametrize('seqlen,bias', [(1, False), (2, True), (13, False)])
def test_one_direction(seqlen, width, bias, activation, dtype, small_tiles):
    tensors = kernel_cases.causal_conv1d(1, seqlen, 3, width, bias, dtype=dtype)
    compare(CAUSAL, tensors, dtype, activation=activation)


@linear_and_silu
@pytest.mark.parametrize('programs', [1, 3, 100])
def test_parts_of_a_sequence(programs, silu, triton_kernels, small_tiles, monkeypatch):
    """One program of the backward pass that walks a sequence, some, and one for each tile of it."""
    monkeypatch.setattr(conv1d, '_PROGRAMS_PER_PROCESSOR', programs)
    compare(BOTH, kernel_cases.bidirectional_conv1d(1, 14, 3), torch.float32, silu=silu)


def test_tiles_as_on_a_gpu(triton_kernels):
    """Several in both dimensions, where channels are neighbours in memory, and where steps are."""
    compare(BOTH, kernel_cases.bidirectional_conv1d(2, 37, 70), torch.float32)
    compare(CAUSAL, kernel_cases.causal_conv1d(2, 133, 9), torch.float32)


@pytest.mark.parametrize('width,on_triton', [(4, True), (5, False)])
def test_more_than_four_taps_run_in_plain_pytorch(width, on_triton, triton_kernels):
    with Recorder() as calls:
        bidirectional_conv1d(**kernel_cases.bidirectional_conv1d(width=width))
        causal_conv1d(**kernel_cases.causal_conv1d(width=width))
    assert calls.names == ['causal_conv1d', 'causal_conv1d']
    for *_, triton, save in calls.arguments:
        assert triton is on_triton and not save


@pytest.mark.parametrize('channels_last', [False, True], ids=['channels-first', 'channels-last'])
@pytest.mark.parametrize('initial', [False, True], ids=['', 'initial'])
@pytest.mark.parametrize('seqlen,width', [(9, 4), (2, 4), (3, 4), (1, 2), (4, 1), (3, 6)])
def test_initial_and_final_states(seqlen, width, initial, channels_last, dtype, small_tiles):
    """Of sequences shorter than the states too, which then hold what there was before."""
    tensors = kernel_cases.causal_conv1d(seqlen=seqlen, width=width, initial=initial, dtype=dtype)
    if channels_last:
        tensors['x'] = tensors['x'].mT.contiguous().mT
    compare(WITH_STATES, tensors, dtype)


def test_final_states_are_written_where_they_shall_be(backend):
    tensors = kernel_cases.causal_conv1d()
    given = torch.full((3, 2, 5), float('nan'), device=DEVICE).permute(1, 2, 0)
    out, states = causal_conv1d(**tensors, return_final_states=True, final_states_out=given)
    assert states is given and torch.equal(states, tensors['x'][..., -3:])
    given.fill_(7)
    assert torch.equal(causal_conv1d(**tensors, final_states_out=given), out)
    assert given.eq(7).all()


def test_final_states_are_their_own_memory(backend):
    tensors = kernel_cases.causal_conv1d()
    _, states = causal_conv1d(**tensors, return_final_states=True)
    before = tensors['x'].clone()
    states.zero_()
    assert torch.equal(tensors['x'], before)


@pytest.mark.parametrize('first', [1, 2, 7])
def test_a_sequence_in_two_pieces_is_the_sequence(first, dtype):
    """Whether the first piece is shorter than the states or longer."""
    tensors = kernel_cases.causal_conv1d(seqlen=11, dtype=dtype)
    whole = causal_conv1d(**tensors, activation='silu')
    x, weight, bias = tensors['x'], tensors['weight'], tensors['bias']
    early, states = causal_conv1d(x[..., :first], weight, bias, activation='silu', return_final_states=True)
    late = causal_conv1d(x[..., first:], weight, bias, activation='silu', initial_states=states)
    oracles.assert_matches(torch.cat([early, late], dim=-1).cpu(), whole.cpu().double(), dtype)


@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize('bias', [False, True], ids=['', 'bias'])
@pytest.mark.parametrize('index', [torch.int32, torch.int64], ids=str)
def test_sequences_within_a_row(index, bias, activation, dtype):
    tensors = kernel_cases.causal_conv1d(bias=bias, dtype=dtype)
    compare(PACKED, tensors, dtype, activation=activation, seq_idx=SEQUENCES.to(index))


@pytest.mark.parametrize('dtype', oracles.DTYPES[2:], ids=str)
def test_sequences_within_a_row_in_half_precision(dtype):
    compare(PACKED, kernel_cases.causal_conv1d(dtype=dtype), dtype, activation='silu')


@pytest.mark.parametrize('width', [1, 4])
def test_a_row_shorter_than_the_taps_with_sequences(width, dtype):
    compare(PACKED, kernel_cases.causal_conv1d(seqlen=2, width=width, dtype=dtype), dtype, seq_idx=SEQUENCES[:, 4:6])


def test_each_sequence_within_a_row_is_as_by_itself(backend):
    """And padding, whose numbers are negative, is zero."""
    tensors = kernel_cases.causal_conv1d(batch=1)
    x, weight, bias = tensors['x'], tensors['weight'], tensors['bias']
    seq_idx = torch.tensor([[4, 4, 4, 4, 0, 7, 7, -1, -1]], device=DEVICE)
    out = causal_conv1d(x, weight, bias, seq_idx=seq_idx, activation='silu')
    pieces = [causal_conv1d(piece, weight, bias, activation='silu') for piece in x[..., :7].split([4, 1, 2], dim=-1)]
    torch.testing.assert_close(out, torch.cat([*pieces, torch.zeros_like(x[..., 7:])], dim=-1))


@pytest.mark.parametrize('case', [BOTH, CAUSAL], ids=['both-directions', 'one-direction'])
def test_empty_sequences(case, backend):
    tensors = case.arguments(seqlen=0)
    actual = run(case.function, tensors, **case.options)
    assert not actual['result_0'].numel() and actual['grad_x'].shape == tensors['x'].shape
    assert not actual['grad_weight'].any() and not actual['grad_bias'].any()


def channels_within(x):
    """[B, L, D] as channels of a wider map, whose rows are not aligned."""
    wide = x.new_full((*x.shape[:2], 2 * x.shape[2] + 1), float('nan'))
    return wide[..., 1 : x.shape[2] + 1].copy_(x)


def steps_within(x):
    """[B, L, D] as steps of a longer sequence, one after the other in memory."""
    return channels_within(x.mT).mT


def neither(x):
    """[B, L, D] without a dimension whose entries are neighbours."""
    return torch.stack([x, x], dim=-1)[..., 0]


def shared(x):
    """[B, L, D], the same memory for each entry of the batch."""
    return x[:1].expand_as(x)


@pytest.mark.parametrize('layout', [channels_within, steps_within, neither, shared], ids=lambda f: f.__name__)
def test_memory_layouts(layout, dtype, small_tiles):
    tensors = kernel_cases.bidirectional_conv1d(seqlen=5, dim=3, dtype=dtype)
    tensors['x'] = layout(tensors['x'])
    compare(BOTH, tensors, dtype)
    assert bidirectional_conv1d(**tensors).is_contiguous()
    compare(CAUSAL, dict(x=tensors['x'].mT, weight=tensors['weight'][0], bias=tensors['bias'][0]), dtype)


@pytest.mark.parametrize('option', ['', 'initial_states', 'seq_idx'])
@pytest.mark.parametrize('channels_last', [False, True], ids=['channels-first', 'channels-last'])
def test_the_output_lies_as_the_input_does(channels_last, option, backend):
    tensors = kernel_cases.causal_conv1d(initial=option == 'initial_states')
    x = tensors['x'] = tensors['x'].mT.contiguous().mT if channels_last else tensors['x']
    out = causal_conv1d(**tensors, seq_idx=SEQUENCES.to(DEVICE) if option == 'seq_idx' else None)
    assert out.stride(1 if channels_last else 2) == 1
    assert option == 'initial_states' or out.stride() == x.stride()


@pytest.mark.parametrize('layout,wide', [(channels_within, True), (steps_within, False), (neither, True)])
def test_results_are_written_where_they_shall_be(layout, wide, triton_kernels, small_tiles, monkeypatch):
    """Also with the offsets of large sequences."""
    if wide:
        monkeypatch.setattr(conv1d, '_is_wide', lambda *sizes: True)
    x, weight, bias = kernel_cases.bidirectional_conv1d(seqlen=5, dim=3).values()
    u = conv1d.conv1d_forward(x, weight, bias, True)
    u_T = torch.empty(2, 2, 3, 5, device=DEVICE).permute(0, 3, 1, 2)
    assert conv1d.conv1d_forward(x, weight, bias, True, out=u_T) is u_T
    assert torch.equal(u_T, u)
    expected = BOTH.definition(**in_double(dict(x=x, weight=weight, bias=bias)), silu=True)
    oracles.assert_matches(u.cpu(), expected, torch.float32)
    grad_u, grad_x = torch.randn_like(u), torch.empty_like(x)
    expected = conv1d.conv1d_backward(grad_u, x, weight, bias, True, grad_x)
    within = layout(torch.zeros_like(x))
    actual = conv1d.conv1d_backward(torch.empty_like(u_T).copy_(grad_u), x, weight, bias, True, within)
    assert torch.equal(within, grad_x) and torch.equal(actual, expected)


def test_what_lies_beside_a_slice_stays(triton_kernels, small_tiles):
    x, weight, bias = kernel_cases.bidirectional_conv1d().values()
    both = torch.full((2, 9, 10), 7.0, device=DEVICE)
    grad_u = torch.ones(2, 9, 2, 5, device=DEVICE)
    sums = conv1d.conv1d_backward(grad_u, x, weight, bias, False, both[..., :5])
    assert both[..., 5:].eq(7).all() and not both[..., :5].eq(7).any()
    assert sums.dtype == torch.float32 and sums.sum(dim=0)[weight.numel() :].eq(18).all()


def test_offsets_of_64_bits_where_32_bits_do_not_suffice():
    tile = conv1d._FORWARD_TILES['channels_last']
    assert not conv1d._is_wide(tile, 2**20, 2**10, (2**30, 2**10, 1))
    assert conv1d._is_wide(tile, 2**21, 2**10, (2**31, 2**10, 1))
    assert conv1d._is_wide(tile, 2**10, 2, (2**31, 1, 2**30))
    near, far = (2**20, 2**10, 1), (2**31, 2**21, 1)
    assert not conv1d._is_wide(tile, 2**10, 2**10, near) and conv1d._is_wide(tile, 2**10, 2**10, near, far)


def test_what_is_not_a_number_stays_where_its_taps_reach(backend, small_tiles):
    tensors = kernel_cases.bidirectional_conv1d(1, 9, 3)
    tensors['x'][0, 8, 1] = float('nan')
    expected = run(BOTH.definition, in_double(tensors), silu=True)
    actual = run(bidirectional_conv1d, tensors, silu=True)
    for name in expected:
        assert torch.equal(actual[name].isnan(), expected[name].isnan()), name


@pytest.mark.filterwarnings('ignore:overflow')  # of the interpreter
def test_large_numbers_have_gradients(backend, small_tiles):
    tensors = kernel_cases.bidirectional_conv1d(1, 6, 4)
    tensors['x'] *= 1e4
    assert all(t.isfinite().all() for t in run(bidirectional_conv1d, tensors, silu=True).values())


def test_frozen_parameters_and_results_changed_in_place(backend, small_tiles):
    tensors = kernel_cases.causal_conv1d()
    expected = run(causal_conv1d, tensors, ['x'], activation='silu')

    def changed(**arguments):
        out = causal_conv1d(**arguments)
        out += 1
        return out

    actual = run(changed, tensors, ['x'], activation='silu')
    assert torch.equal(actual.pop('result_0'), expected.pop('result_0') + 1)
    assert_equal(actual, expected)


@pytest.mark.slow
def test_states_are_captured_in_one_graph(backend):
    torch.compiler.reset()
    tensors = kernel_cases.causal_conv1d(1, 5, 2, initial=True)
    captured = torch.compile(WITH_STATES.function, fullgraph=True, backend='aot_eager')
    expected = run(WITH_STATES.function, tensors, activation='silu')
    assert_equal(run(captured, tensors, activation='silu'), expected)


def test_only_the_arguments_are_kept_for_the_backward_pass(backend):
    leaves = {k: t.requires_grad_() for k, t in kernel_cases.bidirectional_conv1d().items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        bidirectional_conv1d(**leaves, silu=True)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in leaves.values()}


@pytest.mark.parametrize('function,shape', [(bidirectional_conv1d, (9, 5)), (causal_conv1d, (5, 9))])
def test_a_sequence_without_a_batch_is_an_error_that_shows_it(function, shape):
    tensors = CASES[function.__name__].arguments()
    with pytest.raises(ValueError, match=rf'{function.__name__}: x must be .*\({shape[0]}, {shape[1]}\)'):
        function(**{**tensors, 'x': torch.randn(shape, device=DEVICE)})


@pytest.mark.parametrize(
    'options,shown',
    [
        (dict(activation='gelu'), "'gelu'"),
        (dict(seq_idx=SEQUENCES.long()[:, 1:]), '2, 8'),
        (dict(seq_idx=SEQUENCES.double()), 'float64'),
        (dict(seq_idx=SEQUENCES.to('meta')), 'meta'),
        (dict(seq_idx=SEQUENCES, return_final_states=True), 'return_final_states'),
        (dict(seq_idx=SEQUENCES, initial_states=torch.zeros(2, 5, 3)), 'initial_states'),
        (dict(initial_states=torch.zeros(2, 5, 3, dtype=torch.float64)), 'initial_states must be torch.float32'),
        (dict(initial_states=torch.zeros(2, 5, 4)), r'initial_states must be .*\(2, 5, 4\)'),
        (dict(final_states_out=torch.zeros(2, 3, 5)), r'final_states_out must be .*\(2, 3, 5\)'),
        (dict(final_states_out=torch.zeros(2, 5, 3).half()), 'final_states_out must be torch.float32'),
    ],
)
def test_options_that_do_not_fit_are_an_error_that_shows_them(options, shown):
    x, weight, bias = (kernel_cases.causal_conv1d()[name].cpu() for name in ('x', 'weight', 'bias'))
    with pytest.raises(ValueError, match=shown):
        causal_conv1d(x, weight, bias, **options)


@pytest.mark.parametrize('function,shape', [(bidirectional_conv1d, (2, 5, 0)), (causal_conv1d, (5, 0))])
def test_a_convolution_without_taps_is_an_error(function, shape):
    tensors = CASES[function.__name__].arguments()
    with pytest.raises(ValueError, match=f'weight must be .*{str(shape)[1:-1]}'):
        function(**{**tensors, 'weight': torch.zeros(shape, device=DEVICE)})


def test_operations_are_counted(backend):
    """A multiply-add for each tap, and twice as many in the backward pass."""
    leaves = {k: t.requires_grad_() for k, t in kernel_cases.bidirectional_conv1d(2, 9, 5, 4).items()}
    with FlopCounterMode(display=False) as counter:
        out = bidirectional_conv1d(**leaves, silu=True)
        assert counter.get_total_flops() == 2 * 2 * 9 * 2 * 5 * 4
        out.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 9 * 2 * 5 * 4
