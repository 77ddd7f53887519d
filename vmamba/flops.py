"""Counting a model's operations as the official tables do."""

from math import prod
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from torch import nn

from .kernels import OPERATORS

Handle = Callable[[list, list], int]


def fvcore_handles() -> Dict[str, Handle]:
    """Handles of the operators of `vmamba.kernels`, for `fvcore.nn.FlopCountAnalysis.set_op_handle`."""
    handles = {f'vmamba::{name}': _handle(op.macs) for name, op in OPERATORS.items() if op.macs is not None}
    core = handles['vmamba::ss2d_core']
    # The LayerNorm at its end counts as one by itself.
    handles['vmamba::ss2d_core'] = lambda inputs, outputs: core(inputs, outputs) + 5 * prod(_shape(inputs[0]))
    return handles


def count_macs(model: nn.Module, input_size: Tuple[int, int, int] = (3, 224, 224)) -> int:
    """Multiply-adds of one image, by the rules of the official tables (there called FLOPs).

    Convolutions and linear layers count their multiply-adds, a scan 9 * L * D * N, a LayerNorm 5 operations per element
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


def _handle(macs: Callable[..., int]) -> Handle:
    return lambda inputs, outputs: macs(*map(_shape, inputs))


def _shape(value: Any) -> Optional[Tuple[int, ...]]:
    """Sizes of a traced tensor; None for what is no tensor."""
    return tuple(value.type().sizes()) if value.isCompleteTensor() else None
