"""Blocks that leave the sum of their residual connection to the norm that reads it next.

Between such blocks a ResidualStream takes the place of a tensor. Its sum is taken where it is looked at (by hooks, by
FX, by what stands in a block's place), and where it is kept for recomputation and should be small.
"""

from typing import Callable, Iterable, Optional, Union

import torch
from timm.layers import DropPath
from timm.models import checkpoint
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .norm import AddLayerNorm, AddRmsNorm, ResidualStream

TensorOrStream = Union[Tensor, ResidualStream]


def add_branch(
    x: TensorOrStream, norm: nn.Module, branch: Callable[[Tensor], Tensor], drop_path: nn.Module
) -> TensorOrStream:
    """x + drop_path(branch(norm(x))) in the dtype of x; of a ResidualStream the stream of which that is the sum:

    residual = the sum of x,    hidden = branch(norm(residual)),    scale = drop_path's
    """
    is_stream = isinstance(x, ResidualStream)
    normalised, residual = norm(x) if is_stream else (norm(x), x)
    hidden, scale = branch(normalised), None
    if is_plain(drop_path, DropPath):
        scale = drop_path_scale(drop_path, hidden)
    else:
        hidden = drop_path(hidden)
    stream = ResidualStream(hidden, residual, scale)
    return stream if is_stream else stream.total().to(x.dtype)


def drop_path_scale(drop_path: nn.Module, x: Tensor) -> Optional[Tensor]:
    """Draws the factor of each sample by which timm's DropPath multiplies: [B, ...] -> [B] in fp32.

    None stands for 1: outside of training, at a rate of 0, and for another module than DropPath.
    """
    if not isinstance(drop_path, DropPath) or not drop_path.training or drop_path.drop_prob == 0:
        return None
    keep = 1 - drop_path.drop_prob
    scale = x.new_empty((x.shape[0],), dtype=torch.float32).bernoulli_(keep)
    return scale / keep if drop_path.scale_by_keep and keep > 0 else scale


def start_stream(x: Tensor, blocks: Iterable[nn.Module], kind: type, recomputed: bool) -> TensorOrStream:
    """A ResidualStream of x where that can be passed through the blocks, which saves passes over memory; else x.

    Args:
        x: What the first block takes, [B, ..., d].
        blocks: Modules, of which those of the class `kind` take streams and have the method `norms`.
        kind: Class.
        recomputed: Whether x is kept between blocks, and the blocks are recomputed.
    """
    if recomputed or not isinstance(x, Tensor):
        return x
    takes_streams = all(is_plain(block, kind) and all(map(adds, block.norms())) for block in blocks)
    return ResidualStream(x) if takes_streams else x


def run_blocks(blocks: nn.Sequential, x: Tensor, kind: type, recomputed: bool) -> TensorOrStream:
    """What the blocks make of x, [B, ..., d], each recomputed in the backward pass if asked for.

    The container is not called where it is plain, nor where its blocks are recomputed; see `start_stream`.
    """
    if not recomputed and not is_plain(blocks, nn.Sequential):
        return blocks(x)
    x = start_stream(x, blocks, kind, recomputed)
    for block in blocks:
        x = run_block(block, x, recomputed)
    return x


def run_block(block: nn.Module, x: TensorOrStream, recomputed: bool) -> TensorOrStream:
    """block(x), recomputed in the backward pass if asked for."""
    return checkpoint(block, x) if recomputed and not torch.jit.is_scripting() else block(x)


def total(x: TensorOrStream) -> Tensor:
    """The sum of a ResidualStream; a tensor as it is."""
    return x.total() if isinstance(x, ResidualStream) else x


def adds(norm: nn.Module) -> bool:
    """Whether a norm takes a ResidualStream and nothing looks at what it takes."""
    return is_plain(norm, AddLayerNorm) or is_plain(norm, AddRmsNorm)


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether a module is just of that class and computes as such, and nothing looks at its calls.

    Not plain are modules with hooks, a `forward` of their own (as some libraries put in its place) or parametrised
    weights, whose class is another, and all modules while there are hooks of all modules.
    """
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    hooks_of_all = (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    )
    return type(module) is kind and 'forward' not in module.__dict__ and not any(hooks) and not any(hooks_of_all)
