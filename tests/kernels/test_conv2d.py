"""The depthwise 2-D convolution, plain and on its Triton kernels, against a float64 loop over pixels and taps.

Without a GPU the kernels run in Triton's interpreter (see conftest.py), where raw bfloat16 is not computed as on a GPU.
"""

import oracles
import pytest
import torch
from recorder import Recorder
from test_conv import run
from torch.utils.flop_counter import FlopCounterMode
from vmamba.kernels import depthwise_conv2d, use_triton
from vmamba.kernels.backend import triton

if triton is not None:
    from vmamba.kernels.fused import conv2d_plan

    if not conv2d_plan.KERNELS:
        triton = None  # too old for these kernels
HAS_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if HAS_GPU else 'cpu'
needs_triton = pytest.mark.skipif(triton is None, reason='needs the package triton, 3.3 or newer')
BACKENDS = [pytest.param(False, id='plain'), pytest.param(True, id='triton', marks=needs_triton)]


def arguments(batch=2, height=3, width=4, dim=5, kernel=3, bias=True, dtype=torch.float32):
    shapes = {'x': (batch, height, width, dim), 'weight': (dim, kernel, kernel), **({'bias': (dim,)} if bias else {})}
    return {k: torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE) for k, shape in shapes.items()}


def loop(x, weight, bias=None, silu=False):
    _, height, width, dim = x.shape
    kernel = weight.shape[-1]
    rows = []
    for row in range(height):
        pixels = []
        for column in range(width):
            total = (x.new_zeros(dim) if bias is None else bias).expand(x.shape[0], dim)
            for i in range(kernel):
                for j in range(kernel):
                    h, w = row + i - kernel // 2, column + j - kernel // 2
                    if 0 <= h < height and 0 <= w < width:
                        total = total + weight[:, i, j] * x[:, h, w]
            pixels.append(oracles.silu(total) if silu else total)
        rows.append(torch.stack(pixels, dim=1))
    return torch.stack(rows, dim=1)


def check(tensors, dtype=torch.float32, silu=True, use=True):
    expected = run(loop, {k: t.cpu().double() for k, t in tensors.items()}, silu=silu)
    with use_triton(use):
        actual = run(depthwise_conv2d, tensors, silu=silu)
    assert actual['u0'].is_contiguous() and actual['u0'].dtype == dtype
    oracles.assert_all_match({k: t.cpu() for k, t in actual.items()}, expected, dtype)


@pytest.mark.parametrize('silu', [False, True], ids=['linear', 'silu'])
@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
@pytest.mark.parametrize('kernel,bias', [(1, True), (3, False), (5, True), (7, False)])
def test_plain(kernel, bias, dtype, silu):
    check(arguments(kernel=kernel, bias=bias, dtype=dtype), dtype, silu, use=False)


@needs_triton
@pytest.mark.parametrize('kernel,bias,silu', [(1, True, True), (3, False, False), (3, True, True), (5, False, True)])
@pytest.mark.parametrize('height,width', [(1, 1), (1, 6), (6, 1), (3, 4)])
def test_small_maps(height, width, kernel, bias, silu):
    check(arguments(1, height, width, 3, kernel, bias), silu=silu)


@needs_triton
@pytest.mark.parametrize('size,dim', [((17, 3), 2), ((2, 9), 33), ((2, 14), 1)], ids=str)
def test_several_strips(size, dim):
    """Below and beside each other, of several blocks of channels, and of sixteen pixels."""
    check(arguments(1, *size, dim))


@needs_triton
@pytest.mark.parametrize('programs', [1, 2, 100])
def test_parts_of_the_maps(programs, monkeypatch):
    """One program of the backward pass that walks all strips, two of unequal numbers, and one for each strip."""
    monkeypatch.setattr(conv2d_plan, '_PROGRAMS', programs)
    monkeypatch.setattr('vmamba.kernels.fused.conv2d_launch.processors_of', lambda tensor: 1)
    check(arguments(3, 2, 2, 2))


@needs_triton
def test_half_precision():
    check(arguments(dtype=torch.float16), torch.float16)


@pytest.mark.parametrize('use', BACKENDS)
def test_parameters_of_another_precision(use):
    """As under autocast: gradients are of the dtype of what they belong to."""
    tensors = arguments()
    tensors['x'] = tensors['x'].half()
    expected = run(loop, {k: t.cpu().double() for k, t in tensors.items()}, silu=True)
    with use_triton(use):
        actual = run(depthwise_conv2d, tensors, silu=True)
    dtypes = dict(u0=torch.float16, grad_x=torch.float16, grad_weight=torch.float32, grad_bias=torch.float32)
    assert {k: t.dtype for k, t in actual.items()} == dtypes
    oracles.assert_all_match({k: t.cpu() for k, t in actual.items()}, expected, torch.float16)


@pytest.mark.parametrize('use', BACKENDS)
def test_autocast_does_not_change_the_dtype(use):
    tensors = arguments()
    with use_triton(use), torch.autocast(DEVICE, torch.bfloat16):
        assert depthwise_conv2d(**tensors, silu=True).dtype == torch.float32
        tensors['x'] = tensors['x'].half()
        assert depthwise_conv2d(**tensors, silu=True).dtype == torch.float16


def half(x):
    """[B, H, W, D] as the first half of a projection's channels."""
    return torch.cat([x, torch.full_like(x, float('nan'))], dim=-1)[..., : x.shape[-1]]


def unaligned(x):
    """As a part of a larger map in all dimensions."""
    return torch.nn.functional.pad(x, (1, 2, 3, 1, 2, 1), value=float('nan'))[:, 2:-1, 3:-1, 1:-2]


def channels_first(x):
    return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def shared(x):
    """The same memory for each entry of the batch."""
    return x[:1].expand_as(x)


@pytest.mark.parametrize('use', BACKENDS)
@pytest.mark.parametrize('layout', [half, unaligned, channels_first, shared], ids=lambda f: f.__name__)
def test_memory_layouts(layout, use):
    tensors = arguments()
    tensors['x'] = layout(tensors['x'])
    tensors['weight'] = tensors['weight'].mT.contiguous().mT
    check(tensors, use=use)


@needs_triton
@pytest.mark.parametrize('layout', [half, channels_first], ids=lambda f: f.__name__)
def test_gradients_in_any_layout(layout):
    tensors = arguments(bias=False)
    leaves = [t.clone().requires_grad_() for t in tensors.values()]
    with use_triton(True):
        out = depthwise_conv2d(*leaves)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    actual = torch.autograd.grad(out, leaves, layout(grad))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@needs_triton
def test_64_bit_offsets_give_the_same(monkeypatch):
    tensors = arguments(1, 9, 3, 3)
    with use_triton(True):
        expected = run(depthwise_conv2d, tensors, silu=True)
        monkeypatch.setattr('vmamba.kernels.fused.conv2d_launch.is_wide', lambda *sizes: True)
        actual = run(depthwise_conv2d, tensors, silu=True)
    assert all(torch.equal(actual[k], expected[k]) for k in expected)


@needs_triton
def test_64_bit_offsets_where_32_bits_do_not_suffice():
    def wide(*shape):
        x = torch.empty(1, device='meta').expand(shape)
        return conv2d_plan.is_wide(conv2d_plan.strip_of(x, 3, 2), x)

    assert not wide(64, 312, 312, 192) and wide(1, 4000, 4000, 192)
    far = torch.empty(1, 2**24, 2, 128, device='meta')[:, :: 2**20]
    near = far.contiguous()
    strip = conv2d_plan.strip_of(near, 3, 2)
    assert not conv2d_plan.is_wide(strip, near) and conv2d_plan.is_wide(strip, near, far)


@needs_triton
@pytest.mark.filterwarnings('ignore:overflow')  # of the interpreter
def test_large_numbers_have_gradients():
    tensors = arguments()
    tensors['x'] = tensors['x'] * 1e4
    with use_triton(True):
        actual = run(depthwise_conv2d, tensors, silu=True)
    assert all(t.isfinite().all() for t in actual.values())


@pytest.mark.parametrize('use', BACKENDS)
def test_no_batch(use):
    with use_triton(use):
        actual = run(depthwise_conv2d, arguments(batch=0), silu=True)
    assert actual['u0'].shape == actual['grad_x'].shape == (0, 3, 4, 5)
    assert not actual['grad_weight'].any() and not actual['grad_bias'].any()


@needs_triton
def test_what_runs():
    """One operator each way, PyTorch's convolution for kernels too large, and nothing kept but the arguments."""
    for kernel, names in ((3, ['depthwise_conv2d_fused', 'depthwise_conv2d_fused_backward']), (7, [])):
        with use_triton(True), Recorder() as calls:
            run(depthwise_conv2d, arguments(kernel=kernel), silu=True)
        assert calls.names == names
    leaves = {k: t.requires_grad_() for k, t in arguments().items()}
    kept = []
    with use_triton(True), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        depthwise_conv2d(**leaves, silu=True)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in leaves.values()}


@needs_triton
@pytest.mark.parametrize('kernel,bias,silu', [(3, True, True), (1, False, False)])
def test_registration_of_the_operators(kernel, bias, silu):
    x, weight, *bias_ = arguments(1, 2, 3, 2, kernel, bias).values()
    inputs = half(x), weight, bias_[0] if bias else None, silu
    leaves = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in inputs]
    torch.library.opcheck(torch.ops.vmamba.depthwise_conv2d_fused, leaves, **oracles.OPCHECK_TOLERANCE)
    torch.library.opcheck(torch.ops.vmamba.depthwise_conv2d_fused_backward, (torch.randn_like(x), *inputs))


@pytest.mark.parametrize('use', BACKENDS)
def test_compiles_in_one_graph_for_any_size(use):
    torch.compiler.reset()
    compiled = torch.compile(depthwise_conv2d, fullgraph=True, backend='aot_eager', dynamic=True)
    for size in ((2, 3, 4), (3, 2, 5)):
        tensors = arguments(*size, 2)
        with use_triton(use):
            expected, actual = (run(function, tensors, silu=True) for function in (depthwise_conv2d, compiled))
        oracles.assert_all_match(actual, {k: t.double() for k, t in expected.items()}, torch.float32)


@pytest.mark.parametrize('use', BACKENDS)
def test_pytorchs_counter_knows_it(use):
    """And, on the Triton kernels, two more of them in the backward pass."""
    tensors = arguments(2, 3, 4, 5)
    with use_triton(use), FlopCounterMode(display=False) as counter:
        out = depthwise_conv2d(**{k: t.requires_grad_() for k, t in tensors.items()}, silu=True)
        assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 5 * 9
        out.sum().backward()
    if use:
        assert counter.get_total_flops() == 3 * 2 * 2 * 3 * 4 * 5 * 9


@pytest.mark.parametrize(
    'name,shape',
    [
        ('x', (3, 4, 5)),
        ('weight', (5, 1, 3, 3)),
        ('weight', (4, 3, 3)),
        ('weight', (5, 3, 5)),
        ('weight', (5, 2, 2)),
        ('weight', (5, 0, 0)),
        ('bias', (4,)),
    ],
)
def test_a_bad_shape_is_an_error_that_shows_it(name, shape):
    with pytest.raises(ValueError, match=f'^{name} must be .*{str(shape)[1:-1]}'):
        depthwise_conv2d(**{**arguments(), name: torch.randn(shape)})


def test_integers_are_an_error():
    with pytest.raises(ValueError, match='int64'):
        depthwise_conv2d(**{**arguments(), 'x': torch.ones(2, 3, 4, 5, dtype=torch.int64)})


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not HAS_GPU, reason='needs a CUDA device')(test))


def of_a_model(batch, height, width, dim, kernel=3, dtype=torch.bfloat16):
    """x as the first half of a projection, parameters in fp32."""
    tensors = arguments(1, 1, 1, dim, kernel)
    tensors['x'] = torch.randn(batch, height, width, 2 * dim, device=DEVICE).to(dtype)[..., :dim]
    return tensors


@on_gpu
@pytest.mark.parametrize('silu', [False, True], ids=['linear', 'silu'])
@pytest.mark.parametrize('kernel', [1, 3, 5])
@pytest.mark.parametrize('dtype', oracles.DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    'shape', [(4, 56, 56, 96), (3, 28, 28, 192), (2, 14, 14, 384), (16, 7, 7, 768), (1, 312, 311, 33), (70, 5, 1, 40)]
)
def test_maps_of_vmamba(shape, dtype, kernel, silu):
    tensors = of_a_model(*shape, kernel, dtype)
    with use_triton(False):
        expected = run(depthwise_conv2d, {k: t.double() for k, t in tensors.items()}, silu=silu)
    oracles.assert_all_match(run(depthwise_conv2d, tensors, silu=silu), expected, dtype)


@on_gpu
def test_many_runs_are_equal_bit_by_bit():
    tensors = of_a_model(64, 56, 56, 96)
    first = run(depthwise_conv2d, tensors, silu=True)
    for _ in range(20):
        again = run(depthwise_conv2d, tensors, silu=True)
        assert all(torch.equal(first[k], again[k]) for k in first)


@on_gpu
def test_compiled_to_native_code_for_any_size():
    torch.compiler.reset()
    compiled = torch.compile(depthwise_conv2d, fullgraph=True, dynamic=True)
    for size in ((2, 14, 14, 64), (3, 20, 12, 64), (5, 7, 9, 96)):
        tensors = of_a_model(*size)
        expected, actual = (run(function, tensors, silu=True) for function in (depthwise_conv2d, compiled))
        oracles.assert_all_match(actual, {k: t.double() for k, t in expected.items()}, torch.bfloat16)


@on_gpu
@torch.no_grad()
def test_offsets_beyond_32_bits():
    """The last rows of a map of more than 2^31 numbers."""
    tensors = arguments(1, 1, 1, 64)
    x = torch.zeros(1, 8200, 4100, 64, dtype=torch.float16, device=DEVICE)
    x[:, -20:] = torch.randn(20, 4100, 64, device=DEVICE)
    end = x[:, -21:].clone()
    out = depthwise_conv2d(**{**tensors, 'x': x}, silu=True)
    assert torch.equal(out[:, -20:], depthwise_conv2d(**{**tensors, 'x': end}, silu=True)[:, -20:])


@on_gpu
@torch.inference_mode()
def test_replays_in_a_cuda_graph():
    tensors = of_a_model(2, 14, 14, 96)
    depthwise_conv2d(**tensors, silu=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = depthwise_conv2d(**tensors, silu=True)
    tensors['x'].copy_(torch.randn_like(tensors['x']))
    graph.replay()
    assert torch.equal(captured, depthwise_conv2d(**tensors, silu=True))
