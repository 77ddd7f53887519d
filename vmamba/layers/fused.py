"""The residual branches of blocks, x + drop_path(f(norm(x))), by the fused functions of `vmamba.kernels.branches`.

`runs_fused` alone decides where these stand in for a branch's modules.
"""

from typing import Any, Callable, Dict, Optional

import torch
from timm.layers import DropPath, Mlp
from timm.models import register_notrace_function
from torch import Tensor, nn

from ..kernels import branches
from .bimamba import BiMamba
from .norm import LayerNorm, RmsNorm
from .plain import has_global_hooks, is_plain
from .ss2d import SS2D

_TENSORS = nn.Parameter, Tensor


@register_notrace_function
def runs_fused(x: Tensor, norm: nn.Module, module: nn.Module, drop_path: nn.Module) -> bool:
    """Whether `fused_branch` may compute x + drop_path(module(norm(x))) in place of the modules.

    Only on Triton, of an fp32 map; where nothing is traced, compiled or transformed; and where every module of the
    branch is the one that the function stands for: of that very class, without hooks and a `forward` of its own, with
    weights that are plain tensors. So adapters, quantised, pruned and parametrised layers are called.
    """
    if not branches.can_run(x) or has_global_hooks():
        return False
    stands_for = _STANDS_FOR.get(type(module))
    return (
        stands_for is not None
        and is_plain(module, type(module))
        and (is_plain(drop_path, nn.Identity) or is_plain(drop_path, DropPath))
        and stands_for(norm, module)
        and _has_plain_tensors(x, norm, module)
    )


def fused_branch(x: Tensor, norm: nn.Module, module: nn.Module, drop_path: nn.Module) -> Tensor:
    """x + drop_path(module(norm(x))), where `runs_fused`: [B, ..., d] -> [B, ..., d] in fp32"""
    return _BRANCHES[type(module)](x, norm, module, _drop_path_scale(x, drop_path))


def _drop_path_scale(x: Tensor, drop_path: nn.Module) -> Optional[Tensor]:
    """Draws the factor of each sample by which timm's DropPath multiplies: [B, ...] -> [B] in fp32; None stands for 1."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or drop_path.drop_prob == 0:
        return None
    keep = 1 - drop_path.drop_prob
    scale = x.new_empty((x.shape[0],)).bernoulli_(keep)
    return scale.div_(keep) if drop_path.scale_by_keep and keep > 0 else scale


def _has_plain_tensors(x: Tensor, norm: nn.Module, module: nn.Module) -> bool:
    """Whether all parameters are where x is, contiguous, and of no subclass, as quantised and distributed tensors are."""
    device = x.device
    for owner in (norm, module, *module._modules.values()):
        for parameter in owner._parameters.values():
            if parameter is not None and (
                type(parameter) not in _TENSORS or parameter.device != device or not parameter.is_contiguous()
            ):
                return False
    return True


def _is_linear(module: nn.Module, bias: bool) -> bool:
    return is_plain(module, nn.Linear) and (module._parameters['bias'] is not None) == bias


def _is_idle(module: nn.Module) -> bool:
    return is_plain(module, nn.Dropout) and (module.p == 0 or not module.training)


def _products_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


# Attributes of a module that are parameters or modules take Python long to find: these functions look them up where
# they are.


def _stands_for_ss2d(norm: nn.Module, mixer: SS2D) -> bool:
    modules = mixer._modules
    return (
        is_plain(norm, LayerNorm)
        and _is_linear(modules['in_proj'], bias=False)
        and _is_linear(modules['out_proj'], bias=False)
        and mixer.is_plain()
        and mixer.d_conv <= branches.MAX_WINDOW
    )


def _ss2d(x: Tensor, norm: LayerNorm, mixer: SS2D, scale: Optional[Tensor]) -> Tensor:
    own, modules = mixer._parameters, mixer._modules
    before, after = norm._parameters, modules['out_norm']._parameters
    in_proj, out_proj = modules['in_proj']._parameters['weight'], modules['out_proj']._parameters['weight']
    conv, x_proj = modules['conv2d']._parameters, modules['x_proj']._parameters['weight']
    return branches.ss2d_branch(
        *(x, before['weight'], before['bias'], norm.eps, in_proj, conv['weight'], conv['bias'], x_proj),
        *(own['dt_proj_weight'], own['dt_proj_bias'], own['A_log'], own['D']),
        *(after['weight'], after['bias'], modules['out_norm'].eps, out_proj, scale, _products_dtype(x, in_proj)),
    )


def _stands_for_bimamba(norm: nn.Module, mixer: BiMamba) -> bool:
    modules = mixer._modules
    return (
        is_plain(norm, RmsNorm)
        and _is_linear(modules['in_proj'], bias=False)
        and _is_linear(modules['out_proj'], bias=False)
        and mixer.has_kernels()
    )


def _bimamba(x: Tensor, norm: RmsNorm, mixer: BiMamba, scale: Optional[Tensor]) -> Tensor:
    own, modules = mixer._parameters, mixer._modules
    in_proj, out_proj = modules['in_proj']._parameters['weight'], modules['out_proj']._parameters['weight']
    return branches.bimamba_branch(
        *(x, norm._parameters['weight'], norm.eps, in_proj, own['conv1d_weight'], own['conv1d_bias']),
        *(own['x_proj_weight'], own['dt_proj_weight'], own['dt_proj_bias'], own['A_log'], own['D']),
        *(out_proj, scale, _products_dtype(x, in_proj)),
    )


def _stands_for_mlp(norm: nn.Module, mlp: Mlp) -> bool:
    modules = mlp._modules
    act = modules['act']
    return (
        is_plain(norm, LayerNorm)
        and is_plain(act, nn.GELU)
        and act.approximate == 'none'
        and is_plain(modules['norm'], nn.Identity)
        and _is_linear(modules['fc1'], bias=True)
        and _is_linear(modules['fc2'], bias=True)
        and _is_idle(modules['drop1'])
        and _is_idle(modules['drop2'])
    )


def _mlp(x: Tensor, norm: LayerNorm, mlp: Mlp, scale: Optional[Tensor]) -> Tensor:
    before, fc1, fc2 = norm._parameters, mlp._modules['fc1']._parameters, mlp._modules['fc2']._parameters
    return branches.mlp_branch(
        *(x, before['weight'], before['bias'], norm.eps, fc1['weight'], fc1['bias'], fc2['weight'], fc2['bias']),
        *(scale, _products_dtype(x, fc1['weight'])),
    )


_STANDS_FOR: Dict[type, Callable[[nn.Module, Any], bool]] = {
    SS2D: _stands_for_ss2d,
    BiMamba: _stands_for_bimamba,
    Mlp: _stands_for_mlp,
}
_BRANCHES: Dict[type, Callable[..., Tensor]] = {SS2D: _ss2d, BiMamba: _bimamba, Mlp: _mlp}
