"""Convolutions of images, and what is no image."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vmamba.layers import ImageConv2d, check_images


def convolution(in_chans, device='cpu'):
    torch.manual_seed(0)
    return ImageConv2d(in_chans, 6, 3, stride=2, padding=1).to(device)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_convolution_of_images_is_an_ordinary_one_in_channels_last_memory(memory_format):
    conv = convolution(3)
    x = torch.randn(2, 3, 9, 12)
    expected = nn.functional.conv2d(x, conv.weight, conv.bias, 2, 1)
    actual = conv(x.contiguous(memory_format=memory_format))
    torch.testing.assert_close(actual, expected)
    assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def cuda_autocast():
    """fp16 on GPUs, also where torch.autocast finds none."""
    before = torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')
    torch.set_autocast_enabled('cuda', True)
    torch.set_autocast_dtype('cuda', torch.float16)
    yield
    torch.set_autocast_enabled('cuda', before[0])
    torch.set_autocast_dtype('cuda', before[1])


def test_autocast_leaves_double_alone(cuda_autocast):
    with FakeTensorMode(allow_non_fake_inputs=True):
        for dtype, expected in ((torch.float64, torch.float64), (torch.float32, torch.float16)):
            conv = ImageConv2d(3, 16, 3, device='cuda', dtype=dtype)
            assert conv(torch.empty(2, 3, 32, 32, device='cuda', dtype=dtype)).dtype == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('autocast', [False, True], ids=['bf16', 'autocast'])
@pytest.mark.parametrize('in_chans', [1, 3, 8, 13])
def test_channels_of_zeros_change_nothing(in_chans, autocast):
    conv = convolution(in_chans, 'cuda')
    x = torch.randn(2, in_chans, 9, 12, device='cuda').bfloat16()
    exact = nn.Conv2d(in_chans, 6, 3, stride=2, padding=1).to('cuda', torch.float64)
    exact.load_state_dict({name: tensor.bfloat16() for name, tensor in conv.state_dict().items()})
    if not autocast:
        conv.bfloat16()
    with torch.autocast('cuda', torch.bfloat16, enabled=autocast):
        actual = conv(x.float() if autocast else x)
    expected = exact(x.double())
    assert actual.dtype == torch.bfloat16 and actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2)
    weights = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((y * weights.to(y)).sum(), module.weight)
        for y, module in ((actual, conv), (expected, exact))
    ]
    assert gradients[0][0].shape == conv.weight.shape
    torch.testing.assert_close(gradients[0][0].double(), gradients[1][0], rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize('image,error,message', [
    pytest.param([[0.0]], TypeError, r'\[B, 3, H, W\], got list', id='list'),
    pytest.param(torch.zeros(3, 8, 8), ValueError, r'got shape \(3, 8, 8\)', id='rank'),
    pytest.param(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ValueError, 'torch.uint8', id='integers'),
    pytest.param(torch.zeros(1, 4, 8, 8), ValueError, 'got 4: create it with in_chans=4', id='channels'),
    pytest.param(torch.zeros(1, 3, 3, 8), ValueError, 'at least 4x4, got 3x8', id='rows'),
    pytest.param(torch.zeros(1, 3, 8, 3), ValueError, 'at least 4x4, got 8x3', id='columns'),
])  # fmt: skip
def test_what_is_no_image_is_an_error_that_shows_it(image, error, message):
    with pytest.raises(error, match=message):
        check_images(image, 3, 4)


def test_images_of_any_batch_dtype_and_size_pass():
    for shape, dtype in (((0, 3, 4, 4), torch.float32), ((2, 3, 5, 99), torch.bfloat16), ((1, 3, 4, 4), torch.double)):
        check_images(torch.zeros(shape, dtype=dtype), 3, 4)
