"""Convolutions with BatchNorm and what follows it, and when one kernel replaces all but the convolution."""

from typing import List, NamedTuple, Optional, Sequence

import torch
from timm.layers import BatchNormAct2d, DropPath
from torch import Tensor, nn

from ..kernels import linear
from ..kernels._operator import can_replace_modules
from ..kernels.batch_norm import batch_norm_
from .image import ImageConv2d
from .plain import has_global_hooks, is_plain, is_plain_tensor

_SLICE_BYTES = 20 * 2**20  # of the largest map of a slice: two maps then fit into the cache of a large GPU


class ConvNorm(NamedTuple):
    """Modules that run one after another: a convolution, its BatchNorm, an activation and DropPath."""

    conv: nn.Conv2d
    norm: Optional[nn.BatchNorm2d] = None
    act: Optional[nn.Module] = None
    drop_path: Optional[nn.Module] = None


def conv_norms(x: Tensor, *layers: ConvNorm, residual: bool = False) -> Tensor:
    """x = drop_path(act(norm(conv(x)))) for each layer: [B, d, H, W] -> [B, d', H', W']

    In inference on Triton one kernel computes, in fp32 and in place, what follows a convolution, its bias included; a
    batch with large maps is cut into slices, which keeps memory low and maps in the cache. This needs modules without
    hooks or a replaced `forward`, and no tracing, compilation or transform. Otherwise the modules run.

    Args:
        x: Map.
        layers: The modules.
        residual: Add x to the result.
    """
    if _runs_fused(x, layers, residual):
        return _run_fused(x, layers, residual)
    out = x
    for layer in layers:
        for module in layer:
            out = out if module is None else _call(module, out)
    return x + out if residual else out


def _runs_fused(x: Tensor, layers: Sequence[ConvNorm], residual: bool) -> bool:
    if torch.is_grad_enabled() or not can_replace_modules(x) or has_global_hooks():
        return False
    if residual and x.dtype != _products_dtype(x):
        return False
    return all(
        _is_foldable(layer) and all(is_plain_tensor(x, tensor) for tensor in _tensors(layer)) for layer in layers
    )


def _run_fused(x: Tensor, layers: Sequence[ConvNorm], residual: bool) -> Tensor:
    slices = x.split(_slice_size(x, layers))
    out: Optional[Tensor] = None  # [B, H', W', d']
    for i, part in enumerate(slices):
        y = part
        for layer in layers[:-1]:
            y = _normalise(_convolve(y, layer), layer).permute(0, 3, 1, 2)
        y = _convolve(y, layers[-1])
        shortcut = part if residual else None
        if len(slices) == 1:
            return _normalise(y, layers[-1], shortcut).permute(0, 3, 1, 2)
        if out is None:
            out = y.new_empty((x.shape[0], *y.shape[1:]))
        start = i * len(slices[0])
        _normalise(y, layers[-1], shortcut, out[start : start + len(part)])
        del y
    assert out is not None
    return out.permute(0, 3, 1, 2)


def _convolve(x: Tensor, layer: ConvNorm) -> Tensor:
    """The convolution without its bias: [B, d, H, W] -> [B, H', W', d'], contiguous"""
    conv = layer.conv
    if _is_product(conv):
        return linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1)).contiguous()
    return conv._conv_forward(x, conv.weight, None).permute(0, 2, 3, 1).contiguous()


def _call(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), of a 1x1 convolution by a matrix product: [B, d, H, W] -> [B, d', H', W'] in channels-last memory"""
    if not has_global_hooks() and _is_product(module):
        return linear(x.permute(0, 2, 3, 1), module.weight.flatten(1), module.bias).permute(0, 3, 1, 2)
    return module(x)


def _is_product(module: nn.Module) -> bool:
    return (
        is_plain(module, nn.Conv2d)
        and (module.kernel_size == module.stride == (1, 1))
        and (module.padding == (0, 0) and module.groups == 1)
    )


def _normalise(y: Tensor, layer: ConvNorm, residual: Optional[Tensor] = None, out: Optional[Tensor] = None) -> Tensor:
    conv, norm, act, _ = layer
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1).expand_as(y).contiguous()
    options = dict(act=_name_of(act) or _name_of(getattr(norm, 'act', None)), residual=residual, out=out)
    if norm is None:
        return batch_norm_(y, conv.bias, **options)
    parameters = norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    return batch_norm_(y, conv.bias, *parameters, **options)


def _slice_size(x: Tensor, layers: Sequence[ConvNorm]) -> int:
    """Images of a slice of the batch."""
    pixels, most = x.shape[2] * x.shape[3], 0
    for conv, *_ in layers:
        pixels = -(-pixels // (conv.stride[0] * conv.stride[1]))
        most = max(most, pixels * conv.out_channels)
    slices = -(-most * x.shape[0] * _products_dtype(x).itemsize // _SLICE_BYTES)
    return -(-x.shape[0] // slices)


def _is_foldable(layer: ConvNorm) -> bool:
    conv, norm, act, drop_path = layer
    return (
        (is_plain(conv, nn.Conv2d) or is_plain(conv, ImageConv2d))
        and (norm is None or _is_foldable_norm(norm, conv.out_channels))
        and (_is_idle(act) or _name_of(act) is not None)
        and (_is_idle(act) or _is_idle(getattr(norm, 'act', None)))
        and (drop_path is None or _is_idle(drop_path) or (is_plain(drop_path, DropPath) and not drop_path.training))
    )


def _is_foldable_norm(norm: nn.Module, channels: int) -> bool:
    if is_plain(norm, BatchNormAct2d):
        folds = is_plain(norm.drop, nn.Identity) and (_is_idle(norm.act) or _name_of(norm.act) is not None)
    else:
        folds = is_plain(norm, nn.BatchNorm2d)
    return folds and not norm.training and norm.running_mean is not None and norm.num_features == channels


def _is_idle(module: Optional[nn.Module]) -> bool:
    return module is None or is_plain(module, nn.Identity)


def _name_of(act: Optional[nn.Module]) -> Optional[str]:
    """An activation as `batch_norm_` calls it; None for another one, and for none."""
    if act is not None and is_plain(act, nn.ReLU):
        return 'relu'
    return 'gelu_tanh' if act is not None and is_plain(act, nn.GELU) and act.approximate == 'tanh' else None


def _tensors(layer: ConvNorm) -> List[Tensor]:
    """What the kernel reads of the modules."""
    conv, norm, *_ = layer
    tensors = [conv.bias]
    if norm is not None:
        tensors += [norm.running_mean, norm.running_var, norm.weight, norm.bias]
    return [tensor for tensor in tensors if tensor is not None]


def _products_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
