"""Counting a model's operations as the official tables do."""

from math import prod
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from torch import nn

from .kernels.flops import (
    bimamba_core_macs,
    causal_conv1d_macs,
    depthwise_conv2d_macs,
    routed_scan_macs,
    selective_scan_macs,
    ss2d_core_macs,
)

Handle = Callable[[list, list], int]


def fvcore_handles() -> Dict[str, Handle]:
    """Handles of the operators of `vmamba.kernels`, for `fvcore.nn.FlopCountAnalysis.set_op_handle`."""
    return {
        'vmamba::selective_scan': _selective_scan,
        'vmamba::selective_scan_fused': _selective_scan,
        'vmamba::ss2d_scan': _routed_scan,
        'vmamba::ss2d_fused': _ss2d_fused,
        'vmamba::bidirectional_scan': _routed_scan,
        'vmamba::bimamba_fused': _bimamba_fused,
        'vmamba::causal_conv1d': _causal_conv1d,
        'vmamba::causal_conv1d_fused': _causal_conv1d,
        'vmamba::depthwise_conv2d_fused': _depthwise_conv2d,
    }


def count_macs(model: nn.Module, input_size: Tuple[int, int, int] = (3, 224, 224)) -> int:
    """Multiply-adds of one image, by the rules of the official tables (there called FLOPs).

    Convolutions and linear layers count their multiply-adds, a scan 9 * L * D * N, a LayerNorm 5 operations an element
    and pooling one. `torch.utils.flop_counter` also knows the operators; it counts a multiply-add as two and leaves
    out norms and pooling.

    Args:
        model: Model.
        input_size: (channels, height, width) of the image.

    Raises:
        ModuleNotFoundError: Without fvcore.
        ValueError: For a model on the meta device, which cannot be traced.
    """
    from fvcore.nn import FlopCountAnalysis

    parameter = next(model.parameters())
    image = torch.empty(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    if parameter.is_meta:
        raise ValueError('a model on the meta device cannot be traced: create it on a real one')
    modes = {module: module.training for module in model.modules()}  # some may be frozen in evaluation mode
    try:
        analysis = FlopCountAnalysis(model.eval(), image).set_op_handle(**fvcore_handles())
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return int(analysis.total())
    finally:
        for module, training in modes.items():
            module.training = training


def _shape(value: Any) -> Optional[Tuple[int, ...]]:
    """Shape of a traced tensor; None for an argument that was not given."""
    return tuple(value.type().sizes()) if value.type().kind() == 'TensorType' else None


def _causal_conv1d(inputs: list, outputs: list) -> int:
    return causal_conv1d_macs(*map(_shape, inputs[:2]))


def _bimamba_fused(inputs: list, outputs: list) -> int:
    xz, conv_weight, _, x_proj_weight, dt_weight, _, A, _ = map(_shape, inputs[:8])
    return bimamba_core_macs(xz, conv_weight, x_proj_weight, dt_weight, A)


def _depthwise_conv2d(inputs: list, outputs: list) -> int:
    return depthwise_conv2d_macs(*map(_shape, inputs[:2]))


def _routed_scan(inputs: list, outputs: list) -> int:
    _, x_dbl, dt_weight, _, A, _ = map(_shape, inputs)
    return routed_scan_macs(x_dbl, dt_weight, A)


def _ss2d_fused(inputs: list, outputs: list) -> int:
    """The LayerNorm at its end, if it has one, counts as one by itself."""
    x, _, x_proj_weight, dt_weight, _, A, _, norm_weight = map(_shape, inputs[:8])
    norm = 0 if norm_weight is None else 5 * prod(x)
    return norm + ss2d_core_macs(x, x_proj_weight is not None, dt_weight, A)


def _selective_scan(inputs: list, outputs: list) -> int:
    u, _, A, _, _, D, z = map(_shape, inputs[:7])
    return selective_scan_macs(u, A[1], D is not None, z is not None)
