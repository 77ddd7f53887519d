"""The residual branches of blocks, x + drop_path(f(norm(x))), by the fused functions of `vmamba.kernels.branches`.

`runs_fused` alone decides where these stand in for a branch's modules.
"""

from typing import Any, Callable, Dict, Iterator, Optional

import torch
from timm.layers import DropPath, Mlp
from timm.models import register_notrace_function
from torch import Tensor, nn

from ..kernels import branches
from .bimamba import BiMamba
from .norm import LayerNorm, RmsNorm
from .plain import has_global_hooks, is_plain
from .ss2d import SS2D


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
    if stands_for is None or not is_plain(module, type(module)) or not stands_for(norm, module):
        return False
    if not is_plain(drop_path, DropPath) and not is_plain(drop_path, nn.Identity):
        return False
    return all(_is_plain_tensor(parameter, x) for parameter in _parameters(norm, module))


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


def _parameters(*modules: nn.Module) -> Iterator[Optional[Tensor]]:
    for module in modules:
        yield from module._parameters.values()
        for child in module._modules.values():
            yield from child._parameters.values()


def _is_plain_tensor(parameter: Optional[Tensor], x: Tensor) -> bool:
    """Whether a parameter is no subclass of a tensor, as quantised and distributed ones are, and is where x is."""
    return parameter is None or (type(parameter) in (nn.Parameter, Tensor) and parameter.device == x.device)


def _is_linear(module: nn.Module, bias: bool) -> bool:
    return is_plain(module, nn.Linear) and (module.bias is not None) == bias


def _products_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _stands_for_ss2d(norm: nn.Module, mixer: SS2D) -> bool:
    linears = all(_is_linear(linear, bias=False) for linear in (mixer.in_proj, mixer.out_proj))
    return linears and mixer.is_plain() and is_plain(norm, LayerNorm) and mixer.d_conv <= branches.MAX_WINDOW


def _ss2d(x: Tensor, norm: LayerNorm, mixer: SS2D, scale: Optional[Tensor]) -> Tensor:
    return branches.ss2d_branch(
        *(x, norm.weight, norm.bias, norm.eps, mixer.in_proj.weight),
        *(mixer.conv2d.weight.squeeze(1), mixer.conv2d.bias, mixer.x_proj.weight),
        *(mixer.dt_proj_weight, mixer.dt_proj_bias, mixer.A_log, mixer.D),
        *(mixer.out_norm.weight, mixer.out_norm.bias, mixer.out_norm.eps, mixer.out_proj.weight),
        *(scale, _products_dtype(mixer.in_proj.weight)),
    )


def _stands_for_bimamba(norm: nn.Module, mixer: BiMamba) -> bool:
    linears = all(_is_linear(linear, bias=False) for linear in (mixer.in_proj, mixer.out_proj))
    return linears and is_plain(norm, RmsNorm) and mixer.has_kernels()


def _bimamba(x: Tensor, norm: RmsNorm, mixer: BiMamba, scale: Optional[Tensor]) -> Tensor:
    return branches.bimamba_branch(
        *(x, norm.weight, norm.eps, mixer.in_proj.weight, mixer.conv1d_weight, mixer.conv1d_bias),
        *(mixer.x_proj_weight, mixer.dt_proj_weight, mixer.dt_proj_bias, mixer.A_log, mixer.D),
        *(mixer.out_proj.weight, scale, _products_dtype(mixer.in_proj.weight)),
    )


def _stands_for_mlp(norm: nn.Module, mlp: Mlp) -> bool:
    linears = all(_is_linear(linear, bias=True) for linear in (mlp.fc1, mlp.fc2))
    drops = all(is_plain(drop, nn.Dropout) and (drop.p == 0 or not drop.training) for drop in (mlp.drop1, mlp.drop2))
    gelu = is_plain(mlp.act, nn.GELU) and mlp.act.approximate == 'none'
    return linears and drops and gelu and is_plain(mlp.norm, nn.Identity) and is_plain(norm, LayerNorm)


def _mlp(x: Tensor, norm: LayerNorm, mlp: Mlp, scale: Optional[Tensor]) -> Tensor:
    return branches.mlp_branch(
        *(x, norm.weight, norm.bias, norm.eps, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias),
        *(scale, _products_dtype(mlp.fc1.weight)),
    )


_STANDS_FOR: Dict[type, Callable[[nn.Module, Any], bool]] = {
    SS2D: _stands_for_ss2d,
    BiMamba: _stands_for_bimamba,
    Mlp: _stands_for_mlp,
}
_BRANCHES: Dict[type, Callable[..., Tensor]] = {SS2D: _ss2d, BiMamba: _bimamba, Mlp: _mlp}
