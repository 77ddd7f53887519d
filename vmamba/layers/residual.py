"""Residual branches x + drop_path(module(norm(x))) of a block, and when `vmamba.kernels.branches` fuses them."""

from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from ..kernels import branches as kernels
from ..kernels._operator import is_watched
from .bimamba import BiMamba
from .norm import LayerNorm, RmsNorm
from .plain import apply_linear, apply_mlp, has_global_hooks, is_plain, is_plain_tensor
from .ss2d import SS2D

Branch = Tuple[nn.Module, nn.Module, nn.Module]

_SLICE_ELEMENTS = 2**20  # of the widest map within a branch


def residual_branches(x: Tensor, *branches: Branch) -> Tensor:
    """x = x + drop_path(module(norm(x))) for each branch (norm, module, drop_path): [B, ..., d] -> [B, ..., d]

    Branches run fused where `runs_fused`, and in slices in inference on a CPU, with the same result.
    """
    if runs_fused(x, branches):
        return _run_fused(x, branches)
    for branch in branches:
        if len(branches) > 1 and runs_fused(x, [branch]):
            x = _run_fused(x, [branch])
        elif _runs_sliced(x, branch):
            x = _run_sliced(x, branch)
        else:
            norm, module, drop_path = branch
            x = x + drop_path(apply_mlp(module, norm(x)) if type(module) is Mlp else module(norm(x)))
    return x


def runs_fused(x: Tensor, branches: Sequence[Branch]) -> bool:
    """Whether fused kernels may replace the modules of the branches.

    This needs Triton, a map in fp32 or in the dtype of the products, weights of at most fp32, and no tracing,
    compilation or transform. Every module must be exactly of the class that the kernels implement, without hooks or a
    replaced `forward`, with plain weight tensors. So adapters and quantised, pruned or parametrised layers are called
    as modules.
    """
    if not kernels.can_run(x) or has_global_hooks():
        return False
    for norm, module, drop_path in branches:
        stands_for = _STANDS_FOR.get(type(module))
        if (
            stands_for is None
            or not is_plain(module, type(module))
            or not (is_plain(drop_path, nn.Identity) or is_plain(drop_path, DropPath))
            or not stands_for(norm, module)
            or not _has_plain_tensors(x, norm, module)
        ):
            return False
    dtypes = {_first_weight(module).dtype for _, module, _ in branches}
    if len(dtypes) != 1 or torch.float64 in dtypes:
        return False
    # The sum would promote others.
    return x.dtype == torch.float32 or x.dtype == _products_dtype(x, branches)


def _runs_sliced(x: Tensor, branch: Branch) -> bool:
    """Whether a branch is a plain MLP or SS2D in one dtype, and nothing is dropped, in inference on a CPU."""
    norm, module, drop_path = branch
    if type(x) is not Tensor or x.device.type != 'cpu' or torch.is_grad_enabled() or has_global_hooks() or is_watched():
        return False
    drops = is_plain(drop_path, DropPath) and drop_path.training
    if drops or not (is_plain(drop_path, nn.Identity) or is_plain(drop_path, DropPath)):
        return False
    if is_plain(module, SS2D):
        stands_for = not module.gate and _stands_for_ss2d(norm, module)
    else:
        stands_for = is_plain(module, Mlp) and _stands_for_mlp(norm, module)
    return stands_for and x.dtype == norm.weight.dtype == _products_dtype(x, [branch])


def _run_sliced(x: Tensor, branch: Branch) -> Tensor:
    """x + module(norm(x)), where norms and linear layers take a slice of the rows at a time: maps between them stay in
    the caches and never stand whole."""
    norm, module, _ = branch
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(module, SS2D):
        # No name for the projected map, which the scan drops.
        inner = module.in_proj.out_features
        scanned = module.scan(_project_sliced(rows, norm, module.in_proj).view(*x.shape[:-1], inner)).flatten(0, -2)
        out = torch.empty_like(rows)
        for part in _slices(rows, inner):
            y = apply_linear(module.out_proj, module.out_norm(scanned[part]))
            torch.add(rows[part], y, out=out[part])
        return out.view(x.shape)
    out = torch.empty_like(rows)
    for part in _slices(rows, module.fc1.out_features):
        hidden = torch.ops.aten.gelu_(apply_linear(module.fc1, norm(rows[part])))
        torch.add(rows[part], apply_linear(module.fc2, hidden), out=out[part])
    return out.view(x.shape)


def _project_sliced(rows: Tensor, norm: nn.Module, proj: nn.Linear) -> Tensor:
    """proj(norm(rows))"""
    out = rows.new_empty(len(rows), proj.out_features)
    for part in _slices(rows, proj.out_features):
        out[part] = apply_linear(proj, norm(rows[part]))
    return out


def _slices(rows: Tensor, width: int) -> Iterator[slice]:
    """Slices of rows that become maps of this width."""
    length = max(_SLICE_ELEMENTS // width, 1)
    return (slice(start, start + length) for start in range(0, len(rows), length))


def _run_fused(x: Tensor, branches: Sequence[Branch]) -> Tensor:
    links = [_LINKS[type(module)](norm, module, _drop_path_scale(x, drop)) for norm, module, drop in branches]
    return kernels.run_chain(x, links, _products_dtype(x, branches))


def _drop_path_scale(x: Tensor, drop_path: nn.Module) -> Optional[Tensor]:
    """Draws the per-sample factor of timm's DropPath: [B, ...] -> [B] in fp32; None for 1."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or drop_path.drop_prob == 0:
        return None
    keep = 1 - drop_path.drop_prob
    scale = x.new_empty((x.shape[0],)).bernoulli_(keep)
    return scale.div_(keep) if drop_path.scale_by_keep and keep > 0 else scale


def _has_plain_tensors(x: Tensor, norm: nn.Module, module: nn.Module) -> bool:
    for owner in (norm, module, *module._modules.values()):
        for parameter in owner._parameters.values():
            if parameter is not None and not is_plain_tensor(x, parameter):
                return False
    return True


def _is_linear(module: nn.Module, bias: bool) -> bool:
    return is_plain(module, nn.Linear) and (module._parameters['bias'] is not None) == bias


def _is_idle(module: nn.Module) -> bool:
    return is_plain(module, nn.Dropout) and (module.p == 0 or not module.training)


def _products_dtype(x: Tensor, branches: Sequence[Branch]) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return _first_weight(branches[0][1]).dtype


def _first_weight(module: nn.Module) -> Tensor:
    return next(iter(module._modules.values()))._parameters['weight']


# nn.Module's attribute lookup is slow in Python: these functions read `_parameters` and `_modules` directly.


def _stands_for_ss2d(norm: nn.Module, mixer: SS2D) -> bool:
    modules = mixer._modules
    return (
        is_plain(norm, LayerNorm)
        and _is_linear(modules['in_proj'], bias=False)
        and _is_linear(modules['out_proj'], bias=False)
        and mixer.is_plain()
        and mixer.d_conv <= kernels.MAX_WINDOW
    )


def _ss2d(norm: LayerNorm, mixer: SS2D, scale: Optional[Tensor]) -> kernels.Link:
    own, modules = mixer._parameters, mixer._modules
    before, after, conv = norm._parameters, modules['out_norm']._parameters, modules['conv2d']._parameters
    in_proj, x_proj, out_proj = (modules[name]._parameters['weight'] for name in ('in_proj', 'x_proj', 'out_proj'))
    parameters = kernels.SS2DParameters(
        *(before['weight'], before['bias'], in_proj, conv['weight'], conv['bias'], x_proj),
        *(own['dt_proj_weight'], own['dt_proj_bias'], own['A_log'], own['D']),
        *(after['weight'], after['bias'], out_proj),
    )
    return kernels.Link(kernels.SS2DBranch(norm.eps, modules['out_norm'].eps), parameters, scale)


def _stands_for_bimamba(norm: nn.Module, mixer: BiMamba) -> bool:
    modules = mixer._modules
    return (
        is_plain(norm, RmsNorm)
        and _is_linear(modules['in_proj'], bias=False)
        and _is_linear(modules['out_proj'], bias=False)
        and mixer.has_kernels()
    )


def _bimamba(norm: RmsNorm, mixer: BiMamba, scale: Optional[Tensor]) -> kernels.Link:
    own, modules = mixer._parameters, mixer._modules
    in_proj, out_proj = (modules[name]._parameters['weight'] for name in ('in_proj', 'out_proj'))
    parameters = kernels.BiMambaParameters(
        *(norm._parameters['weight'], in_proj, own['conv1d_weight'], own['conv1d_bias'], own['x_proj_weight']),
        *(own['dt_proj_weight'], own['dt_proj_bias'], own['A_log'], own['D'], out_proj),
    )
    return kernels.Link(kernels.BiMambaBranch(norm.eps), parameters, scale)


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


def _mlp(norm: LayerNorm, mlp: Mlp, scale: Optional[Tensor]) -> kernels.Link:
    before, fc1, fc2 = (module._parameters for module in (norm, mlp._modules['fc1'], mlp._modules['fc2']))
    parameters = kernels.MlpParameters(
        before['weight'], before['bias'], fc1['weight'], fc1['bias'], fc2['weight'], fc2['bias']
    )
    return kernels.Link(kernels.MlpBranch(norm.eps), parameters, scale)


_STANDS_FOR: Dict[type, Callable[[nn.Module, Any], bool]] = {
    SS2D: _stands_for_ss2d,
    BiMamba: _stands_for_bimamba,
    Mlp: _stands_for_mlp,
}
_LINKS: Dict[type, Callable[..., kernels.Link]] = {SS2D: _ss2d, BiMamba: _bimamba, Mlp: _mlp}
