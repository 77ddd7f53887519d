"""The causal convolutions on their Triton kernels, against the float64 loops of `test_conv`.

Without a GPU the kernels run in Triton's interpreter (see conftest.py), where raw bfloat16 is not computed as on a GPU.
"""

import oracles
import pytest
import torch
from recorder import Recorder
from test_conv import SEQUENCES, arguments, causal_arguments, causal_loop, loop, run, without_states
from vmamba.kernels import bidirectional_conv1d, causal_conv1d, use_triton

pytest.importorskip('triton')
from vmamba.kernels.fused import conv1d_plan  # noqa: E402
from vmamba.kernels.fused.conv1d_launch import conv_backward, conv_forward  # noqa: E402
from vmamba.kernels.fused.conv1d_plan import Tile, Tiles  # noqa: E402

HAS_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if HAS_GPU else 'cpu'


@pytest.fixture(autouse=True)
def triton_kernels():
    with use_triton(True):
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles in both dimensions of small maps, and several in a program of the backward pass."""
    for name in ('FORWARD', 'BACKWARD'):
        monkeypatch.setattr(conv1d_plan, name, Tiles(Tile(4, 4), Tile(8, 2)))
    monkeypatch.setattr(conv1d_plan, '_PROGRAMS', 8)


def on_device(tensors):
    return {k: t.to(DEVICE) for k, t in tensors.items()}


def doubles(tensors):
    return {k: t.cpu().double() for k, t in tensors.items()}


def assert_match(actual, expected, dtype):
    oracles.assert_all_match({k: t.cpu() for k, t in actual.items()}, expected, dtype)


def check(tensors, dtype=torch.float32, silu=True):
    expected = run(loop, doubles(tensors), silu=silu)
    actual = run(bidirectional_conv1d, on_device(tensors), silu=silu)
    assert actual['u0'].is_contiguous() and actual['u0'].dtype == dtype
    assert_match(actual, expected, dtype)


def check_causal(tensors, dtype=torch.float32, states=False, **options):
    expected = run(causal_loop if states else without_states(causal_loop), doubles(tensors), **options)
    options.update({'return_final_states': True} if states else {})
    actual = run(causal_conv1d, on_device(tensors), **options)
    assert all(tensor.dtype == dtype for tensor in actual.values())
    assert_match(actual, expected, dtype)


def runs(function, **arguments):
    with Recorder() as calls:
        function(**arguments)
    return calls.names


@pytest.mark.parametrize('silu', [False, True], ids=['linear', 'silu'])
@pytest.mark.parametrize('width', [1, 2, 3, 4])
@pytest.mark.parametrize('seqlen,dim', [(2, 3), (7, 5)])
def test_both_directions(seqlen, dim, width, silu, small_tiles):
    check(arguments(1, seqlen, dim, width, torch.float32), silu=silu)


@pytest.mark.parametrize('activation', [None, 'swish'])
@pytest.mark.parametrize('width', [1, 2, 3, 4])
@pytest.mark.parametrize('seqlen,bias', [(2, True), (13, False)])
def test_one_direction(seqlen, width, bias, activation, small_tiles):
    check_causal(causal_arguments(1, seqlen, 3, width, torch.float32, bias), activation=activation)


@pytest.mark.parametrize('silu', [False, True], ids=['linear', 'silu'])
@pytest.mark.parametrize('processors', [1, 100])
def test_parts_of_a_sequence(processors, silu, small_tiles, monkeypatch):
    """One program that walks a sequence, and one for each tile of it."""
    monkeypatch.setattr(conv1d_plan, '_PROGRAMS', processors)
    check(arguments(1, 14, 3, 4, torch.float32), silu=silu)


def test_tiles_as_on_a_gpu():
    check(arguments(2, 37, 70, dtype=torch.float32))
    check_causal(causal_arguments(2, 133, 9, dtype=torch.float32), activation='silu')


def test_half_precision(small_tiles):
    check(arguments(2, 5, 4, dtype=torch.float16), torch.float16)
    check_causal(causal_arguments(2, 9, 2, dtype=torch.float16), torch.float16, activation='silu')


def test_parameters_of_another_precision(small_tiles):
    """As under autocast: gradients are of the dtype of what they belong to."""
    tensors = arguments(dtype=torch.float32)
    tensors['x'] = tensors['x'].half()
    expected = run(loop, doubles(tensors), silu=True)
    actual = run(bidirectional_conv1d, on_device(tensors), silu=True)
    assert {k: t.dtype for k, t in actual.items()} == {
        **dict(u0=torch.float16, grad_x=torch.float16, grad_weight=torch.float32, grad_bias=torch.float32)
    }
    assert_match(actual, expected, torch.float16)


@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize('seqlen', [2, 9])
def test_initial_and_final_states(seqlen, activation, small_tiles):
    check_causal(causal_arguments(seqlen=seqlen, dtype=torch.float32, initial=True), states=True, activation=activation)


def test_sequences_within_a_row():
    tensors = causal_arguments(dtype=torch.float32)
    expected = run(without_states(causal_loop), doubles(tensors), seq_idx=SEQUENCES, activation='silu')
    actual = run(causal_conv1d, on_device(tensors), seq_idx=SEQUENCES.to(DEVICE), activation='silu')
    assert_match(actual, expected, torch.float32)


@pytest.mark.parametrize('batch,seqlen', [(0, 5), (2, 0)])
def test_nothing(batch, seqlen):
    actual = run(bidirectional_conv1d, on_device(arguments(batch, seqlen, dtype=torch.float32)), silu=True)
    assert actual['u0'].shape == (batch, seqlen, 2, 5) and actual['grad_x'].shape == (batch, seqlen, 5)
    assert not actual['grad_weight'].any() and not actual['grad_bias'].any()


def channels_within(x):
    """[B, L, D] as channels of a wider map, whose rows are not aligned."""
    wide = x.new_full((*x.shape[:2], 2 * x.shape[2] + 1), float('nan'))
    wide[..., 1 : x.shape[2] + 1] = x
    return wide[..., 1 : x.shape[2] + 1]


def steps_within(x):
    """[B, L, D] as steps of a longer sequence, one after the other in memory."""
    return channels_within(x.mT).mT


def neither(x):
    """[B, L, D] without a dimension whose entries are neighbours."""
    return torch.stack([x, x], dim=-1)[..., 0]


def shared(x):
    """[B, L, D], the same memory for each entry of the batch."""
    return x[:1].expand_as(x)


LAYOUTS = [channels_within, steps_within, neither, shared]


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda f: f.__name__)
def test_memory_layouts(layout, small_tiles):
    tensors = on_device(arguments(seqlen=5, dim=3, dtype=torch.float32))
    tensors['x'] = layout(tensors['x'])
    expected = run(bidirectional_conv1d, {k: t.contiguous() for k, t in tensors.items()}, silu=True)
    tensors['weight'] = tensors['weight'].mT.contiguous().mT
    actual = run(bidirectional_conv1d, tensors, silu=True)
    assert_match(actual, doubles(expected), torch.float32)
    causal = dict(x=tensors['x'].mT, weight=tensors['weight'][0], bias=tensors['bias'][0])
    expected = run(without_states(causal_loop), doubles(causal), activation='silu')
    assert_match(run(causal_conv1d, causal, activation='silu'), expected, torch.float32)


@pytest.mark.parametrize('channels_last', [False, True], ids=['channels-first', 'channels-last'])
def test_the_output_lies_as_the_input_does(channels_last):
    tensors = on_device(causal_arguments(dtype=torch.float32))
    if channels_last:
        tensors['x'] = tensors['x'].mT.contiguous().mT
    assert causal_conv1d(**tensors).stride() == tensors['x'].stride()


@pytest.mark.parametrize('layout,wide', [(channels_within, True), (steps_within, False), (neither, True)])
def test_results_are_written_where_they_shall_be(layout, wide, small_tiles, monkeypatch):
    """Also with the offsets of large sequences."""
    if wide:
        monkeypatch.setattr('vmamba.kernels.fused.conv1d_launch.is_wide', lambda *sizes: True)
    x, weight, bias = on_device(arguments(seqlen=5, dim=3, dtype=torch.float32)).values()
    u = conv_forward(x, weight, bias, True)
    u_T = torch.empty(2, 2, 3, 5, device=DEVICE).permute(0, 3, 1, 2)
    assert conv_forward(x, weight, bias, True, out=u_T) is u_T
    assert torch.equal(u_T, u)
    grad_u = torch.randn(u.shape, device=DEVICE)
    grad_x = torch.empty_like(x)
    expected = conv_backward(grad_u, x, weight, bias, True, grad_x)
    within = layout(torch.zeros_like(x))
    actual = conv_backward(torch.empty_like(u_T).copy_(grad_u), x, weight, bias, True, within)
    assert torch.equal(within, grad_x)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_what_lies_beside_a_slice_stays(small_tiles):
    x, weight, bias = on_device(arguments(dtype=torch.float32)).values()
    both = torch.full((2, 9, 10), 7.0, device=DEVICE)
    grad_weight, grad_bias = conv_backward(torch.ones(2, 9, 2, 5, device=DEVICE), x, weight, bias, False, both[..., :5])
    assert both[..., 5:].eq(7).all() and not both[..., :5].eq(7).any()
    assert grad_weight.dtype == grad_bias.dtype == torch.float32 and grad_bias.eq(18).all()


def test_what_is_not_a_number_stays_where_its_taps_reach(small_tiles):
    tensors = on_device(arguments(1, 9, 3, dtype=torch.float32))
    tensors['x'][0, 8, 1] = float('nan')
    expected = run(loop, {k: t.cpu() for k, t in tensors.items()}, silu=True)
    actual = run(bidirectional_conv1d, tensors, silu=True)
    for name in expected:
        assert torch.equal(actual[name].cpu().isnan(), expected[name].isnan()), name


@pytest.mark.filterwarnings('ignore:overflow')  # of the interpreter
def test_large_numbers_have_gradients(small_tiles):
    tensors = arguments(1, 6, 4, dtype=torch.float32)
    tensors['x'] = tensors['x'] * 1e4
    actual = run(bidirectional_conv1d, on_device(tensors), silu=True)
    assert all(t.isfinite().all() for t in actual.values())


def test_runs_are_equal_bit_by_bit(small_tiles):
    tensors = on_device(arguments(2, 9, 3, dtype=torch.float32))
    first, again = (run(bidirectional_conv1d, tensors, silu=True) for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_more_taps_than_the_kernels_have_run_in_plain_pytorch():
    for width, name in ((4, 'causal_conv1d_fused'), (5, 'causal_conv1d')):
        assert runs(bidirectional_conv1d, **on_device(arguments(width=width, dtype=torch.float32))) == [name]
        assert runs(causal_conv1d, **on_device(causal_arguments(width=width, dtype=torch.float32))) == [name]


@pytest.mark.parametrize('silu', [False, True])
@pytest.mark.parametrize('directions,bias', [(2, True), (1, True), (1, False)])
def test_registration_of_the_operators(directions, bias, silu, small_tiles):
    x, weight, bias_ = on_device(arguments(1, 5, 3, dtype=torch.float32)).values()
    inputs = channels_within(x), weight[:directions].clone(), bias_[:directions] if bias else None, silu
    leaves = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in inputs]
    torch.library.opcheck(torch.ops.vmamba.causal_conv1d_fused, leaves, **oracles.OPCHECK_TOLERANCE)
    grad = torch.randn(1, 5, directions, 3, device=DEVICE)
    torch.library.opcheck(torch.ops.vmamba.causal_conv1d_fused_backward, (grad, *inputs))


def test_frozen_parameters_and_results_changed_in_place(small_tiles):
    x, weight, bias = on_device(causal_arguments(dtype=torch.float32)).values()
    leaf = x.clone().requires_grad_()
    out = causal_conv1d(leaf, weight, bias, activation='silu')
    out += 1
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    expected = run(without_states(causal_loop), doubles(dict(x=x, weight=weight, bias=bias)), activation='silu')
    assert_match({'u': out - 1}, {'u': expected['u0']}, torch.float32)
    assert grad.shape == x.shape and grad.isfinite().all()


def test_a_function_of_them_compiles_in_one_graph(small_tiles):
    torch.compiler.reset()
    tensors = on_device(causal_arguments(1, 5, 2, dtype=torch.float32, initial=True))
    options = dict(activation='silu', return_final_states=True)
    expected = run(causal_conv1d, tensors, **options)
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend='aot_eager')
    actual = run(compiled, tensors, **options)
    assert all(torch.equal(actual[k], expected[k]) for k in expected)


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not HAS_GPU, reason='needs a CUDA device')(test))


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def compare_with_plain(function, tensors, dtype, **options):
    """With the plain path in float64, for sequences that the loops would take too long for."""
    with use_triton(False):
        expected = run(function, {k: t.double() for k, t in tensors.items()}, **options)
    oracles.assert_all_match(run(function, tensors, **options), expected, dtype)


@on_gpu
@pytest.mark.parametrize('silu', [False, True], ids=['linear', 'silu'])
@pytest.mark.parametrize('width', [1, 2, 3, 4])
@pytest.mark.parametrize('dtype', oracles.DTYPES[1:], ids=str)
@pytest.mark.parametrize('batch,seqlen,dim', [(3, 197, 384), (1, 6085, 384), (2, 730, 1536), (70, 49, 33), (1, 3, 768)])
def test_sequences_of_vim(batch, seqlen, dim, dtype, width, silu):
    """x as the first half of a projection, parameters in fp32."""
    x = randn(batch, seqlen, 2 * dim, dtype=dtype)[..., :dim]
    tensors = dict(zip(('x', 'weight', 'bias'), (x, randn(2, dim, width), randn(2, dim))))
    compare_with_plain(bidirectional_conv1d, tensors, dtype, silu=silu)


# Of causal_conv1d's own tests.
LENGTHS = [1, 2, 8, 16, 32, 64, 128, 129, 130, 151, 256, 372, 512, 784, 1024, 1134, 2048, 4096]
CLOSE = {torch.float32: (3e-4, 1e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (1e-2, 5e-2)}


def causal_on_gpu(dim, seqlen, width, bias, dtype, channels_last):
    """x is a slice of channels of a wider tensor."""
    wide = randn(2, seqlen, dim + 4160, dtype=dtype).mT if channels_last else randn(2, dim + 4160, seqlen, dtype=dtype)
    return {'x': wide[:, 4096 : 4096 + dim], 'weight': randn(dim, width), **({'bias': randn(dim)} if bias else {})}


def compare_as_causal_conv1d_does(tensors, dtype, **options):
    with use_triton(False):
        expected = run(causal_conv1d, {k: t.float() for k, t in tensors.items()}, **options)
    actual = run(causal_conv1d, tensors, **options)
    for name, theirs in expected.items():
        ours = actual[name]
        rtol, atol = (1e-3, 1e-3) if name in ('grad_weight', 'grad_bias') else CLOSE[dtype]
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=atol, msg=lambda m, n=name: f'{n}: {m}')


@on_gpu
@pytest.mark.parametrize('channels_last', [False, True], ids=['channels-first', 'channels-last'])
@pytest.mark.parametrize('dtype', CLOSE, ids=str)
@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize('bias', [False, True], ids=['', 'bias'])
@pytest.mark.parametrize('width', [2, 3, 4])
@pytest.mark.parametrize('dim,seqlen', [(64, n) for n in LENGTHS] + [(4096 + 32, n) for n in LENGTHS[::4]])
def test_as_causal_conv1d_is_tested(dim, seqlen, width, bias, activation, dtype, channels_last):
    tensors = causal_on_gpu(dim, seqlen, width, bias, dtype, channels_last)
    compare_as_causal_conv1d_does(tensors, dtype, activation=activation)


@on_gpu
@pytest.mark.parametrize('dtype', CLOSE, ids=str)
@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize('initial', [False, True], ids=['', 'initial'])
@pytest.mark.parametrize('width', [2, 3, 4])
@pytest.mark.parametrize('seqlen', LENGTHS[::3])
def test_states_as_causal_conv1d_is_tested(seqlen, width, initial, activation, dtype):
    tensors = causal_on_gpu(64, seqlen, width, True, dtype, True)
    if initial:
        tensors['initial_states'] = randn(2, width - 1, 64, dtype=dtype).mT
    compare_as_causal_conv1d_does(tensors, dtype, activation=activation, return_final_states=True)


@on_gpu
@pytest.mark.parametrize('dtype', CLOSE, ids=str)
@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize('width', [2, 3, 4])
@pytest.mark.parametrize('seqlen', [8, 63, 257, 1134, 4096])
def test_sequences_within_a_row_as_causal_conv1d_is_tested(seqlen, width, activation, dtype):
    """Each sequence by itself gives the same; what is behind the last is padding."""
    tensors = causal_on_gpu(64, seqlen, width, True, dtype, True)
    lengths = torch.diff(torch.tensor([0, 1, seqlen // 3, seqlen - 2, seqlen])).tolist()
    seq_idx = torch.repeat_interleave(torch.tensor([0, 1, 2, -1]), torch.tensor(lengths)).int().to(DEVICE).repeat(2, 1)

    def apart(x, weight, bias):
        pieces = [causal_conv1d(piece, weight, bias, activation=activation) for piece in x.split(lengths, dim=-1)]
        return torch.cat([*pieces[:-1], torch.zeros_like(pieces[-1])], dim=-1)

    expected = run(apart, tensors)
    actual = run(causal_conv1d, tensors, seq_idx=seq_idx, activation=activation)
    oracles.assert_all_match(actual, {k: t.double() for k, t in expected.items()}, dtype)


@on_gpu
@pytest.mark.parametrize('channels_last', [False, True], ids=['channels-first', 'channels-last'])
def test_many_runs_are_equal_bit_by_bit(channels_last):
    tensors = causal_on_gpu(4096 + 32, 2048, 4, True, torch.bfloat16, channels_last)
    first = run(causal_conv1d, tensors, activation='silu')
    for _ in range(20):
        again = run(causal_conv1d, tensors, activation='silu')
        assert all(torch.equal(first[k], again[k]) for k in first)


@on_gpu
@torch.no_grad()
def test_offsets_beyond_32_bits():
    """The end of a sequence of 2^31 numbers and more, whose channels lie far apart."""
    seqlen, dim = (1 << 30) + 40, 3
    x = torch.zeros(1, dim, seqlen, dtype=torch.float16, device=DEVICE)
    x[..., -40:] = randn(dim, 40, dtype=torch.float16)
    weight, bias = randn(dim, 4), randn(dim)
    out = causal_conv1d(x, weight, bias, activation='silu')
    expected = causal_conv1d(x[..., -43:].contiguous(), weight, bias, activation='silu')
    assert torch.equal(out[..., -40:], expected[..., -40:])
    grad_x = torch.empty_like(x)
    grad_weight, _ = conv_backward(x.mT.unsqueeze(2), x.mT, weight[None], bias[None], True, grad_x.mT)
    end = x[..., -43:].contiguous()
    grad_end = torch.empty_like(end)
    conv_backward(end.mT.unsqueeze(2), end.mT, weight[None], bias[None], True, grad_end.mT)
    assert torch.equal(grad_x[..., -40:], grad_end[..., -40:]) and grad_weight.isfinite().all()


@on_gpu
@torch.inference_mode()
def test_replays_in_a_cuda_graph():
    x, weight, bias = randn(2, 197, 384, dtype=torch.bfloat16), randn(2, 384, 4), randn(2, 384)
    bidirectional_conv1d(x, weight, bias, silu=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = bidirectional_conv1d(x, weight, bias, silu=True)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, bidirectional_conv1d(x, weight, bias, silu=True))


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices')
def test_a_device_that_is_not_the_current_one():
    tensors = on_device(arguments(2, 300, 40, dtype=torch.float32))
    expected = run(bidirectional_conv1d, tensors, silu=True)
    actual = run(bidirectional_conv1d, {k: t.to('cuda:1') for k, t in tensors.items()}, silu=True)
    assert all(torch.equal(actual[k].to(DEVICE), expected[k]) for k in expected)
