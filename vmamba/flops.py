"""Operation counts as in the official tables."""

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
    # The fused LayerNorm counts like a separate one.
    handles['vmamba::ss2d_core'] = lambda inputs, outputs: core(inputs, outputs) + 5 * prod(_shape(inputs[0]) or ())
    return handles


def count_macs(model: nn.Module, input_size: Tuple[int, int, int] = (3, 224, 224)) -> int:
    """Multiply-adds for one image, counted as in the official tables (which call them FLOPs).

    A scan counts as 9 * L * D * N, a LayerNorm as 5 operations per element, and pooling as 1.
    `torch.utils.flop_counter` supports the operators too; it counts a multiply-add as two and skips norms and pooling.

    Args:
        model: Model.
        input_size: (channels, height, width) of the image.

    Returns:
        Number of multiply-adds.

    Raises:
        ModuleNotFoundError: If fvcore is not installed.
        ValueError: If the model is on the meta device, which cannot be traced.
    """
    from fvcore.nn import FlopCountAnalysis

    parameter = next(model.parameters())
    image = torch.empty(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    if parameter.is_meta:
        raise ValueError('cannot trace a model on the meta device: create it on a real device')
    modes = {module: module.training for module in model.modules()}  # some may be frozen in eval mode
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
    """Shape of a traced tensor; None for other values."""
    return tuple(value.type().sizes()) if value.isCompleteTensor() else None
