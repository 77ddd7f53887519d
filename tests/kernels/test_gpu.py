"""The operators on a CUDA device, in the sizes of models and beyond.

Against the plain path in float64 there, for sizes that the loops of the definitions would take too long for. Scans of
sequences are tested in full in test_selective_scan.py.
"""

import kernel_cases
import oracles
import pytest
import torch
from cases import DEVICE, needs_triton
from kernel_cases import CASES, assert_equal, run

from vmamba.kernels import (
    NUM_ROUTES,
    causal_conv1d,
    conv1d,
    depthwise_conv2d,
    layer_norm,
    ss2d_core,
    ss2d_scan,
    use_triton,
)

if DEVICE != 'cuda':
    pytest.skip('needs a CUDA device', allow_module_level=True)  # thousands of tests take a while to skip one by one

pytestmark = [pytest.mark.gpu, needs_triton]
HALF_AND_SINGLE = oracles.DTYPES[1:]
FUSED = [name for name in CASES if name != 'bidirectional_scan']  # the others have no kernels
dtypes = pytest.mark.parametrize('dtype', HALF_AND_SINGLE, ids=str)


@pytest.fixture(params=FUSED)
def case(request):
    return CASES[request.param]


def in_plain_double(case, tensors, **options):
    with use_triton(False):
        return run(case.function, {k: None if t is None else t.double() for k, t in tensors.items()}, **options)


def compare_with_plain(name, tensors, dtype, outliers=0.0, **options):
    case = CASES[name]
    options = {**case.options, **options}
    actual, expected = run(case.function, tensors, **options), in_plain_double(case, tensors, **options)
    oracles.assert_all_match(actual, expected, dtype, outliers)


def of_a_model(name, batch, *sizes, dtype=torch.bfloat16, dim, **options):
    """x as the first half of a projection's channels, and parameters in fp32."""
    tensors = CASES[name].arguments(batch, *sizes, dim=dim, dtype=dtype, **options)
    x = tensors['x']
    tensors['x'] = torch.cat([x, torch.full_like(x, float('nan'))], dim=-1)[..., :dim]
    return tensors


STAGES = [
    dict(size=(56, 56), dim=96, dt_rank=6),
    dict(size=(28, 28), dim=192, dt_rank=12),
    dict(size=(14, 14), dim=384, dt_rank=24),
    dict(size=(7, 7), dim=768, dt_rank=48),
    dict(size=(28, 28), dim=96, dt_rank=6, dstate=16),
]
LARGE_MAPS = [
    dict(size=(4096, 1), dim=48),
    dict(size=(1, 4096), dim=33, dstate=2),
    dict(size=(512, 512), dim=32),
    dict(size=(200, 333), dim=40, dstate=3),
]


def ss2d_arguments(name, batch, dtype, size, dim, dt_rank=3, dstate=1):
    return CASES[name].arguments(batch, size, dim, dstate, dt_rank, dtype)


def compare_cores(tensors, dtype):
    """With a scan in float64 whose projections are rounded, as they are made in the dtype of the map."""

    def rounded(x):
        return x + (x.to(dtype) - x).detach()

    def definition(x, x_proj_weight, norm_weight, norm_bias, **parameters):
        x_dbl = rounded(x @ rounded(x_proj_weight).T).unflatten(-1, (NUM_ROUTES, -1))
        return oracles.layer_norm(ss2d_scan(x, x_dbl, **parameters), norm_weight, norm_bias, 1e-3)

    actual = run(ss2d_core, tensors, norm_eps=1e-3)
    with use_triton(False):
        expected = run(definition, {k: t.double() for k, t in tensors.items()})
    oracles.assert_all_match(actual, expected, dtype, 0.0 if dtype == torch.float32 else 1e-3)


@dtypes
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('sizes', STAGES, ids=str)
def test_stages_of_vmamba(sizes, batch, dtype):
    compare_cores(ss2d_arguments('ss2d_core', batch, dtype, **sizes), dtype)


@dtypes
@pytest.mark.parametrize('sizes', LARGE_MAPS, ids=str)
def test_large_maps(sizes, dtype):
    outliers = 0.0 if dtype == torch.float32 else 1e-3
    compare_with_plain('ss2d_scan', ss2d_arguments('ss2d_scan', 1, dtype, **sizes), dtype, outliers)


@pytest.mark.parametrize('dt_rank', [1, 2], ids=['apart', 'one-word'])
def test_coefficients_in_bfloat16(dt_rank):
    """B and C of a position are loaded as one word where they are one; the interpreter takes no products of bf16."""
    tensors = ss2d_arguments('ss2d_core', 1, torch.bfloat16, (7, 5), 13, dt_rank)
    compare_cores(tensors, torch.bfloat16)


def test_projections_that_begin_between_words():
    tensors = ss2d_arguments('ss2d_scan', 1, torch.bfloat16, (7, 5), 13, dt_rank=2)
    x_dbl = tensors['x_dbl']
    shifted = x_dbl.new_empty(x_dbl.numel() + 1)[1:].view(x_dbl.shape).copy_(x_dbl)
    assert_equal(run(ss2d_scan, {**tensors, 'x_dbl': shifted}), run(ss2d_scan, tensors))


@torch.no_grad()
def test_states_of_maps_beyond_32_bits():
    """2^33 numbers of states, which only the pass that keeps them writes."""
    tensors = ss2d_arguments('ss2d_scan', 1, torch.bfloat16, (1, 1), 128, dt_rank=1, dstate=16)
    tensors['x'] = torch.randn(1, 4096, 4096, 128, dtype=torch.bfloat16, device=DEVICE)
    tensors['x_dbl'] = torch.randn(1, 4096, 4096, 4, 33, dtype=torch.bfloat16, device=DEVICE)
    forgetting = ss2d_scan(**tensors)
    with torch.enable_grad():
        keeping = ss2d_scan(**{**tensors, 'x': tensors['x'].requires_grad_()})
    assert keeping.requires_grad and torch.equal(keeping, forgetting)


@dtypes
@pytest.mark.parametrize(
    'sizes',
    [
        dict(batch=1, seqlen=1, dim=16, dstate=4),  # Triton makes constants of sizes that are 1
        dict(batch=2, seqlen=197, dim=384, dstate=16, dt_rank=12),
        dict(batch=1, seqlen=1025, dim=40, dstate=5, dt_rank=7),
        dict(batch=1, seqlen=6085, dim=96, dstate=16, dt_rank=12),
        dict(batch=3, seqlen=64, dim=256, dstate=64, dt_rank=24, width=3),
    ],
    ids=str,
)
def test_cores_of_vim(sizes, dtype):
    """Half precision rounds what lies between the projections and the scans: as much as on the plain path."""
    case, tensors = CASES['bimamba_core'], kernel_cases.bimamba_core(**sizes, dtype=dtype)
    scale = dict(grad_scale=2**-4)  # long sums would exceed fp16
    expected, actual = in_plain_double(case, tensors, **scale), run(case.function, tensors, **scale)
    if dtype == torch.float32:
        oracles.assert_all_match(actual, expected, dtype)
    with use_triton(False):
        plain = run(case.function, tensors, **scale)
    for name, value in expected.items():
        error, of_plain = (oracles.relative_error(results[name], value) for results in (actual, plain))
        assert error < max(2 * of_plain, 1e-5), name


@pytest.mark.parametrize('silu', [False, True], ids=['linear', 'silu'])
@pytest.mark.parametrize('width', [1, 2, 3, 4])
@dtypes
@pytest.mark.parametrize('batch,seqlen,dim', [(3, 197, 384), (1, 6085, 384), (2, 730, 1536), (70, 49, 33), (1, 3, 768)])
def test_sequences_of_vim(batch, seqlen, dim, dtype, width, silu):
    tensors = of_a_model('bidirectional_conv1d', batch, seqlen, dim=dim, width=width, dtype=dtype)
    compare_with_plain('bidirectional_conv1d', tensors, dtype, silu=silu)


# The lengths of causal_conv1d's own tests, and how close its results are to those of PyTorch in fp32.
LENGTHS = [1, 2, 8, 16, 32, 64, 128, 129, 130, 151, 256, 372, 512, 784, 1024, 1134, 2048, 4096]
CLOSE = {torch.float32: (3e-4, 1e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (1e-2, 5e-2)}
layouts = pytest.mark.parametrize('channels_last', [False, True], ids=['channels-first', 'channels-last'])


def causal_arguments(dim, seqlen, width, dtype, channels_last, bias=True):
    """x is a slice of channels of a wider tensor."""
    shape = (2, seqlen, dim + 4160) if channels_last else (2, dim + 4160, seqlen)
    wide = torch.randn(shape, device=DEVICE).to(dtype)
    x = (wide.mT if channels_last else wide)[:, 4096 : 4096 + dim]
    return {**kernel_cases.causal_conv1d(2, seqlen, dim, width, bias, dtype=dtype), 'x': x}


def compare_as_causal_conv1d_does(tensors, dtype, **options):
    with use_triton(False):
        expected = run(causal_conv1d, {k: None if t is None else t.float() for k, t in tensors.items()}, **options)
    actual = run(causal_conv1d, tensors, **options)
    for name, theirs in expected.items():
        ours = actual[name]
        rtol, atol = (1e-3, 1e-3) if name in ('grad_weight', 'grad_bias') else CLOSE[dtype]
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=atol, msg=lambda m, n=name: f'{n}: {m}')


@layouts
@dtypes
@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize('bias', [False, True], ids=['', 'bias'])
@pytest.mark.parametrize('width', [2, 3, 4])
@pytest.mark.parametrize('dim,seqlen', [(64, n) for n in LENGTHS] + [(4096 + 32, n) for n in LENGTHS[::4]])
def test_convolutions_as_causal_conv1d_is_tested(dim, seqlen, width, bias, activation, dtype, channels_last):
    tensors = causal_arguments(dim, seqlen, width, dtype, channels_last, bias)
    compare_as_causal_conv1d_does(tensors, dtype, activation=activation)


@dtypes
@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize('initial', [False, True], ids=['', 'initial'])
@pytest.mark.parametrize('width', [2, 3, 4])
@pytest.mark.parametrize('seqlen', LENGTHS[::3])
def test_states_as_causal_conv1d_is_tested(seqlen, width, initial, activation, dtype):
    tensors = causal_arguments(64, seqlen, width, dtype, channels_last=True)
    if initial:
        tensors['initial_states'] = torch.randn(2, width - 1, 64, device=DEVICE).to(dtype).mT
    compare_as_causal_conv1d_does(tensors, dtype, activation=activation, return_final_states=True)


@dtypes
@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize('width', [2, 3, 4])
@pytest.mark.parametrize('seqlen', [8, 63, 257, 1134, 4096])
def test_sequences_within_a_row_as_causal_conv1d_is_tested(seqlen, width, activation, dtype):
    """Each sequence by itself gives the same; what is behind the last is padding."""
    tensors = causal_arguments(64, seqlen, width, dtype, channels_last=True)
    lengths = torch.diff(torch.tensor([0, 1, seqlen // 3, seqlen - 2, seqlen]))
    seq_idx = torch.repeat_interleave(torch.tensor([0, 1, 2, -1]), lengths).int().to(DEVICE).repeat(2, 1)

    def apart(x, weight, bias, initial_states):
        pieces = [causal_conv1d(piece, weight, bias, activation=activation) for piece in x.split(lengths.tolist(), -1)]
        return torch.cat([*pieces[:-1], torch.zeros_like(pieces[-1])], dim=-1)

    expected = run(apart, tensors)
    actual = run(causal_conv1d, tensors, seq_idx=seq_idx, activation=activation)
    oracles.assert_all_match(actual, {k: t.double() for k, t in expected.items()}, dtype)


@torch.no_grad()
def test_offsets_of_sequences_beyond_32_bits():
    """The end of a sequence of 2^31 numbers and more, whose channels lie far apart."""
    seqlen, dim = (1 << 30) + 40, 3
    x = torch.zeros(1, dim, seqlen, dtype=torch.float16, device=DEVICE)
    x[..., -40:] = torch.randn(dim, 40, device=DEVICE)
    weight, bias = torch.randn(dim, 4, device=DEVICE), torch.randn(dim, device=DEVICE)
    end = x[..., -43:].contiguous()
    out = causal_conv1d(x, weight, bias, activation='silu')
    assert torch.equal(out[..., -40:], causal_conv1d(end, weight, bias, activation='silu')[..., -40:])
    grads = {}
    for name, part in (('whole', x), ('end', end)):
        grads[name] = torch.empty_like(part)
        sums = conv1d.conv1d_backward(part.mT.unsqueeze(2), part.mT, weight[None], bias[None], True, grads[name].mT)
        assert sums.isfinite().all()
    assert torch.equal(grads['whole'][..., -40:], grads['end'][..., -40:])


@pytest.mark.parametrize('silu', [False, True], ids=['linear', 'silu'])
@pytest.mark.parametrize('kernel', [1, 3, 5])
@dtypes
@pytest.mark.parametrize(
    'batch,height,width,dim',
    [(4, 56, 56, 96), (3, 28, 28, 192), (2, 14, 14, 384), (16, 7, 7, 768), (1, 312, 311, 33), (70, 5, 1, 40)],
)
def test_maps_of_vmamba(batch, height, width, dim, dtype, kernel, silu):
    tensors = of_a_model('depthwise_conv2d', batch, height, width, dim=dim, kernel=kernel, dtype=dtype)
    compare_with_plain('depthwise_conv2d', tensors, dtype, silu=silu)


@torch.no_grad()
def test_offsets_of_maps_beyond_32_bits():
    """The last rows of a map of more than 2^31 numbers."""
    _, weight, bias = kernel_cases.depthwise_conv2d(1, 1, 1, 64).values()
    x = torch.zeros(1, 8200, 4100, 64, dtype=torch.float16, device=DEVICE)
    x[:, -20:] = torch.randn(20, 4100, 64, device=DEVICE)
    end = depthwise_conv2d(x[:, -21:].clone(), weight, bias, silu=True)
    assert torch.equal(depthwise_conv2d(x, weight, bias, silu=True)[:, -20:], end[:, -20:])


@dtypes
@pytest.mark.parametrize('name', ['rms_norm', 'layer_norm'])
@pytest.mark.parametrize(
    'shape', [(64, 197, 192), (8, 730, 384), (5, 197, 768), (3, 333, 1000), (2, 65, 5000), (2, 33, 8192)], ids=str
)
def test_norms_of_large_tensors(shape, name, dtype):
    compare_with_plain(name, CASES[name].arguments(shape, dtype=dtype), dtype, out_dtype=dtype)


def test_norms_of_more_numbers_than_32_bits_count():
    weight, bias = torch.ones(768, device=DEVICE), torch.zeros(768, device=DEVICE)
    x = torch.randn(2, 1_500_000, 768, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    out = layer_norm(x, weight, bias, out_dtype=torch.bfloat16)
    out.backward(out.detach())
    for rows in (slice(0, 5), slice(-5, None)):
        few = x[1:, rows].detach().requires_grad_()
        expected = layer_norm(few, weight, bias, out_dtype=torch.bfloat16)
        expected.backward(expected.detach())
        assert torch.equal(out[1:, rows], expected) and torch.equal(x.grad[1:, rows], few.grad)


LARGE = {
    'selective_scan': lambda dtype: kernel_cases.selective_scan(2, 192, 3136, 4, dtype=dtype),
    'ss2d_scan': lambda dtype: ss2d_arguments('ss2d_scan', 2, dtype, **LARGE_MAPS[2]),
    'ss2d_core': lambda dtype: ss2d_arguments('ss2d_core', 2, dtype, **STAGES[0]),
    'bimamba_core': lambda dtype: kernel_cases.bimamba_core(2, 1025, 384, 16, 12, dtype=dtype),
    'bidirectional_conv1d': lambda dtype: of_a_model('bidirectional_conv1d', 2, 2048, dim=1536, dtype=dtype),
    'causal_conv1d': lambda dtype: causal_arguments(4096 + 32, 2048, 4, dtype, channels_last=False),
    'depthwise_conv2d': lambda dtype: of_a_model('depthwise_conv2d', 64, 56, 56, dim=96, dtype=dtype),
    'rms_norm': lambda dtype: kernel_cases.rms_norm((64, 197, 192), dtype),
    'layer_norm': lambda dtype: kernel_cases.layer_norm((64, 197, 192), dtype),
}


def test_repeated_runs_are_equal_bit_by_bit(case):
    """While thousands of programs run at the same time."""
    name = next(name for name in FUSED if CASES[name] is case)
    tensors = LARGE[name](torch.bfloat16)
    first = run(case.function, tensors, **case.options)
    for _ in range(5):
        assert_equal(run(case.function, tensors, **case.options), first)


@layouts
def test_convolutions_in_either_layout_are_equal_bit_by_bit_at_every_run(channels_last):
    tensors = causal_arguments(4096 + 32, 2048, 4, torch.bfloat16, channels_last)
    first = run(causal_conv1d, tensors, activation='silu')
    for _ in range(20):
        assert_equal(run(causal_conv1d, tensors, activation='silu'), first)


@torch.inference_mode()
def test_replays_in_a_cuda_graph(case):
    """Of what the first tensor holds then."""
    tensors = case.arguments(dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        case.function(**tensors, **case.options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.function(**tensors, **case.options)
    first = next(iter(tensors.values()))
    first.copy_(torch.randn_like(first))
    graph.replay()
    expected = case.function(**tensors, **case.options)
    pairs = zip(captured, expected) if isinstance(captured, tuple) else [(captured, expected)]
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize('dynamic', [False, True], ids=['static', 'dynamic'])
def test_compiled_with_inductor(case, dynamic):
    torch.compiler.reset()
    tensors = case.arguments()
    compiled = torch.compile(case.function, fullgraph=True, dynamic=dynamic)
    expected = {k: t.double() for k, t in run(case.function, tensors, **case.options).items()}
    oracles.assert_all_match(run(compiled, tensors, **case.options), expected, torch.float32)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices')
def test_a_device_that_is_not_the_current_one(case):
    tensors = case.arguments()
    expected = run(case.function, tensors, **case.options)
    assert torch.cuda.current_device() == 0
    there = {k: None if t is None else t.to('cuda:1') for k, t in tensors.items()}
    assert_equal(run(case.function, there, **case.options), expected)
