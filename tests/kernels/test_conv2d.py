"""The depthwise 2-D convolution against a float64 loop over pixels and taps."""

import kernel_cases
import oracles
import pytest
import torch
from cases import DEVICE
from kernel_cases import CASES, assert_equal, compare, run
from recorder import Recorder
from torch.utils.flop_counter import FlopCounterMode

from vmamba.kernels import conv2d, depthwise_conv2d

CASE = CASES['depthwise_conv2d']

# What lies beyond the end of a tensor may be anything; arithmetic on it makes NaN now and then.
pytestmark = pytest.mark.filterwarnings('error:invalid value:RuntimeWarning')


@pytest.mark.parametrize('silu', [False, True], ids=['linear', 'silu'])
@pytest.mark.parametrize('kernel,bias', [(1, True), (3, False), (3, True), (5, True), (7, False)])
@pytest.mark.parametrize('height,width', [(1, 1), (1, 6), (6, 1), (3, 4)])
def test_windows_and_small_maps(height, width, kernel, bias, silu, dtype):
    """Of maps smaller than the window too, and of windows larger than the kernels take."""
    compare(CASE, kernel_cases.depthwise_conv2d(1, height, width, 3, kernel, bias, dtype), dtype, silu=silu)


@pytest.mark.parametrize('kernel,bias', [(1, False), (3, True), (7, True)])
def test_a_residual_is_added(kernel, bias, dtype):
    """To small weights, which x's precision would lose beside 1, and with the gradients of the weights alone."""
    tensors = kernel_cases.depthwise_conv2d(2, 3, 4, 5, kernel, bias, dtype)
    tensors['weight'] *= 1e-2
    case = CASE._replace(options={}, definition=lambda residual, **kw: kw['x'] + oracles.depthwise_conv2d(**kw))
    compare(case, tensors, dtype, residual=True)


def test_a_residual_and_weights_in_half_precision(triton_kernels):
    """The middle tap keeps what 1 + weight would lose in the weight's dtype."""
    tensors = kernel_cases.depthwise_conv2d(1, 5, 4, 3)
    tensors['weight'] = (tensors['weight'] * 1e-3).bfloat16()
    expected = tensors['x'] + oracles.depthwise_conv2d(**tensors)
    torch.testing.assert_close(depthwise_conv2d(**tensors, residual=True), expected)


@pytest.mark.parametrize(
    'size,dim,kernel', [((17, 3), 2, 3), ((2, 9), 33, 3), ((2, 15), 1, 3), ((5, 3), 1, 5)], ids=str
)
def test_several_tiles(size, dim, kernel, triton_kernels):
    """Below each other; of eight pixels beside each other, and of several blocks of channels; and of sixteen pixels."""
    compare(CASE, kernel_cases.depthwise_conv2d(1, *size, dim, kernel), torch.float32)


def test_tiles_of_maps():
    """Even ones, so that they leave little at the end, of as many pixels as leave little empty."""
    for kernel, most in ((1, 8), (3, 8), (5, 4)):
        for height in range(1, 60):
            tile = conv2d._tile_of((1, height, 7, 4), kernel, ahead=2)
            tiles = -(-height // tile.rows)
            assert tile.rows <= most and tiles * tile.rows - height < tiles and 1 <= tile.ahead <= min(tile.rows, 2)
    pixels = {width: conv2d._tile_of((1, 8, width, 4), 3, ahead=2).block_w for width in (1, 7, 8, 15, 16, 17, 56)}
    assert pixels == {1: 8, 7: 8, 8: 8, 15: 16, 16: 16, 17: 8, 56: 8}


@pytest.mark.parametrize('programs', [1, 2, 100])
def test_parts_of_the_maps(programs, triton_kernels, fresh_launches, monkeypatch):
    """One program of the backward pass that walks all tiles, two of unequal numbers, and one for each tile."""
    monkeypatch.setattr(conv2d, '_PROGRAMS_PER_PROCESSOR', programs)
    monkeypatch.setattr(conv2d, 'num_processors', lambda tensor: 1)
    compare(CASE, kernel_cases.depthwise_conv2d(3, 2, 2, 2), torch.float32)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_autocast_does_not_change_the_dtype(dtype, backend):
    tensors = kernel_cases.depthwise_conv2d(dtype=dtype)
    expected = depthwise_conv2d(**tensors, silu=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = depthwise_conv2d(**tensors, silu=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.05, atol=0.05)


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


@pytest.mark.parametrize('layout', [half, unaligned, channels_first, shared], ids=lambda f: f.__name__)
def test_memory_layouts(layout, dtype):
    tensors = kernel_cases.depthwise_conv2d(dtype=dtype)
    tensors['x'] = layout(tensors['x'])
    compare(CASE, tensors, dtype)
    assert depthwise_conv2d(**tensors, silu=True).is_contiguous()


@pytest.mark.parametrize('silu', [False, True], ids=['linear', 'silu'])
@pytest.mark.parametrize('layout', [half, unaligned, channels_first], ids=lambda f: f.__name__)
def test_gradients_in_any_layout(layout, silu, backend):
    leaves = [t.requires_grad_() for t in kernel_cases.depthwise_conv2d().values()]
    out = depthwise_conv2d(*leaves, silu=silu)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    actual = torch.autograd.grad(out, leaves, layout(grad))
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours, theirs)


def test_offsets_of_64_bits_give_the_same(triton_kernels, fresh_launches, monkeypatch):
    tensors = kernel_cases.depthwise_conv2d(1, 9, 3, 3)
    expected = run(depthwise_conv2d, tensors, silu=True)
    monkeypatch.setattr(conv2d, '_is_wide', lambda *sizes: True)
    assert_equal(run(depthwise_conv2d, tensors, silu=True), expected)


def test_offsets_of_64_bits_where_32_bits_do_not_suffice():
    def is_wide(shape, *tensors):
        strides = [tensor.stride() for tensor in tensors]
        return conv2d._is_wide(conv2d._tile_of(shape, 3, ahead=2), shape, *strides)

    def empty(*shape):
        return torch.empty(1, device='meta').expand(shape).new_empty(shape)

    assert not is_wide((64, 312, 312, 192), empty(64, 312, 312, 192))
    assert is_wide((1, 4000, 4000, 192), empty(1, 4000, 4000, 192))
    far = empty(1, 2**24, 2, 128)[:, :: 2**20]
    near = empty(*far.shape)
    assert not is_wide(near.shape, near) and is_wide(near.shape, near, far)


@pytest.mark.filterwarnings('ignore:overflow')  # of the interpreter
def test_large_numbers_have_gradients(backend):
    tensors = kernel_cases.depthwise_conv2d()
    tensors['x'] *= 1e4
    assert all(t.isfinite().all() for t in run(depthwise_conv2d, tensors, silu=True).values())


def test_frozen_parameters_and_results_changed_in_place(backend):
    tensors = kernel_cases.depthwise_conv2d()
    expected = run(depthwise_conv2d, tensors, ['x'])

    def changed(**arguments):
        out = depthwise_conv2d(**arguments)
        out += 1
        return out

    actual = run(changed, tensors, ['x'])
    assert torch.equal(actual.pop('result_0'), expected.pop('result_0') + 1)
    assert_equal(actual, expected)


def test_what_runs(triton_kernels):
    """One operator each way, and PyTorch's convolution for windows too large."""
    for kernel, names in ((5, ['depthwise_conv2d', 'depthwise_conv2d_backward']), (7, [])):
        with Recorder() as calls:
            run(depthwise_conv2d, kernel_cases.depthwise_conv2d(kernel=kernel), silu=True)
        assert calls.names == names


def test_only_the_arguments_are_kept_for_the_backward_pass(triton_kernels):
    leaves = {k: t.requires_grad_() for k, t in kernel_cases.depthwise_conv2d().items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        depthwise_conv2d(**leaves, silu=True)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in leaves.values()}


def test_operations_are_counted(backend):
    """A multiply-add for each tap, and, on Triton, twice as many in the backward pass."""
    leaves = {k: t.requires_grad_() for k, t in kernel_cases.depthwise_conv2d(2, 3, 4, 5).items()}
    with FlopCounterMode(display=False) as counter:
        out = depthwise_conv2d(**leaves, silu=True)
        assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 5 * 9
        out.sum().backward()
    if backend:
        assert counter.get_total_flops() == 3 * 2 * 2 * 3 * 4 * 5 * 9


@pytest.mark.parametrize(
    'name,shape', [('x', (3, 4, 5)), ('weight', (5, 1, 3, 3)), ('weight', (5, 2, 2)), ('weight', (5, 0, 0))]
)
def test_a_bad_shape_is_an_error_that_shows_it(name, shape):
    tensors = kernel_cases.depthwise_conv2d()
    with pytest.raises(ValueError, match=f'depthwise_conv2d: {name} must be .*{str(shape)[1:-1]}'):
        depthwise_conv2d(**{**tensors, name: torch.randn(shape, device=DEVICE)})


def test_silu_and_residual_exclude_each_other():
    with pytest.raises(ValueError, match='silu and residual cannot be combined'):
        depthwise_conv2d(**kernel_cases.depthwise_conv2d(), silu=True, residual=True)
