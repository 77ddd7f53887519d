"""Whether kernels may use a module's parameters instead of calling the module."""

from typing import Sequence

import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..kernels import linear
from ..kernels._operator import is_watched


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether a module is exactly of class `kind`, with its original `forward` and no hooks.

    Not plain are modules with hooks, a replaced `forward` (as some libraries do), parametrised weights (which change
    the class), modules compiled separately, and replicas of DataParallel (whose parameters are plain attributes).
    """
    state = module.__dict__
    hooks = (
        state['_forward_hooks']
        or state['_forward_pre_hooks']
        or state['_backward_hooks']
        or state['_backward_pre_hooks']
    )
    called = 'forward' in state or '_compiled_call_impl' in state or '_is_replica' in state
    return type(module) is kind and not hooks and not called


def has_global_hooks() -> bool:
    """Whether global module hooks are registered, which makes no module plain."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def is_plain_tensor(x: Tensor, tensor: Tensor) -> bool:
    """Whether a tensor is on x's device, contiguous, and no subclass (as quantised and distributed tensors are)."""
    return type(tensor) in (nn.Parameter, Tensor) and tensor.device == x.device and tensor.is_contiguous()


def in_turn(container: nn.Sequential) -> Sequence[nn.Module]:
    """Modules to call one after another instead of a container, whose call would keep its input to the end."""
    return [container] if has_global_hooks() or not is_plain(container, nn.Sequential) else list(container)


def apply_mlp(mlp: Mlp, x: Tensor) -> Tensor:
    """mlp(x) with its linear layers in the fastest way: [..., d] -> [..., d]"""
    if not isinstance(x, Tensor) or x.device.type != 'cpu' or has_global_hooks() or not is_plain(mlp, Mlp):
        return mlp(x)
    x = mlp.drop1(mlp.act(apply_linear(mlp.fc1, x)))
    return mlp.drop2(apply_linear(mlp.fc2, mlp.norm(x)))


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) in the fastest way: [..., in] -> [..., out].

    On a GPU the rows of the result begin at multiples of 16 numbers: other widths make cuBLAS choose slow products, and
    Triton load the result number by number. On a CPU see `vmamba.kernels.linear`.
    """
    if not isinstance(x, Tensor) or has_global_hooks() or not is_plain(module, nn.Linear):
        return module(x)
    weight, bias = module._parameters['weight'], module._parameters['bias']
    if x.device.type == 'cpu' and not is_watched():
        return linear(x, weight, bias)
    padding = -module.out_features % 16
    if padding == 0 or not x.is_cuda:
        return module(x)
    bias = None if bias is None else F.pad(bias, (0, padding))
    return F.linear(x, F.pad(weight, (0, 0, 0, padding)), bias)[..., : module.out_features]
