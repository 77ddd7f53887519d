"""What backbones of four stages have in common: stages, features, classifier, parameter groups."""

from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
from timm.layers import ClassifierHead, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers.norm import widen
from ..layers.options import check_counts, check_indices, check_rates
from ..layers.plain import in_turn
from ._pretrained import load_pretrained, reset_parameters, split_backbone

# Of the parameters of state-space layers, those without weight decay.
_STATE_SPACE = ('.A_log', '.D', '.dt_proj_bias', '.dt_bias')


def check_heads(dim: int, num_heads: int) -> None:
    """Raises ValueError unless attention heads share the channels of their stage equally."""
    if dim % num_heads:
        raise ValueError(f'num_heads must divide the channels of its stage, {dim}, got {num_heads}')


class Stage(nn.Module):
    """Optional downsampling, then blocks: [B, d, H, W] -> [B, d', H', W'], in channels-last memory throughout.

    Args:
        downsample: [B, d, H, W] -> [B, d', H', W'].
        blocks: [B, H, W, d'] -> [B, H, W, d'].
        wide: Give the blocks maps in at least fp32, as LayerNorms leave them under autocast; the result is cast back.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], wide: bool = True) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.wide = wide
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        dtype = x.dtype
        x = x.permute(0, 2, 3, 1)  # [B, d, H, W] -> [B, H, W, d]
        if self.wide:
            x = widen(x)
        for run in self._block_calls():
            x = run(x)
        return x.to(dtype).permute(0, 3, 1, 2)  # [B, H, W, d] -> [B, d, H, W]

    def _block_calls(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """What to call in turn for the blocks."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return [partial(checkpoint_seq, self.blocks)]
        return in_turn(self.blocks)


class HierarchicalModel(nn.Module):
    """A stem, stages at strides 4, 8, 16, ..., a norm and a classifier; images of any size.

    A family defines `filter_checkpoint` and builds the parts.

    Args:
        stem: [B, in_chans, H, W] -> [B, d, H/4, W/4].
        stages: Modules with `downsample`, `blocks` and `grad_checkpointing`.
        dims: Channels of each stage.
        norm: Norm of the last map [B, d, h, w].
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling of the last map; '' for none, so that the classifier returns a map of logits.
        drop_rate: Dropout before the classifier.
    """

    # Linear layers that initialise themselves; all others start from a truncated normal.
    self_initialised: Tuple[str, ...] = ()

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        dims: Sequence[int],
        norm: nn.Module,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.feature_info = [dict(num_chs=dim, reduction=4 * 2**i, module=f'stages.{i}') for i, dim in enumerate(dims)]
        self.num_features = dims[-1]
        self.norm = norm
        self.drop_rate = drop_rate
        self._set_head(num_classes, global_pool, device=device, dtype=dtype)
        self._init_linear(self)

    def filter_checkpoint(self, state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Weights in any known layout with the model's names and shapes."""
        raise NotImplementedError

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Re-initialises all weights: linear layers except `self_initialised` from a truncated normal of std 0.02, all
        others as at construction."""
        reset_parameters(self)
        self._init_linear(self)

    def _init_linear(self, parent: nn.Module) -> None:
        for name, module in parent.named_modules():
            pixelwise = isinstance(module, nn.Conv2d) and name.endswith('fc')  # a classifier without pooling
            if pixelwise or isinstance(module, nn.Linear) and name.split('.')[-1] not in self.self_initialised:
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def load_pretrained(self, path: str) -> None:
        """Loads a checkpoint in any known layout; see `filter_checkpoint`."""
        load_pretrained(self, path, use_ema=self._prefers_ema())

    def _prefers_ema(self) -> bool:
        """Whether the published accuracy is of a checkpoint's EMA weights."""
        return False

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """A_log, D and biases of the step size; official runs decayed those that are 2-D there."""
        return {name for name, _ in self.named_parameters() if name.endswith(_STATE_SPACE)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns of the layer groups for layer-wise learning-rate decay."""
        if coarse:
            return dict(stem=r'^stem', blocks=r'^stages\.(\d+)')
        downsample, blocks = (r'^stages\.(\d+)\.downsample', (0,)), (r'^stages\.(\d+)\.blocks\.(\d+)', None)
        return dict(stem=r'^stem', blocks=[downsample, blocks, (r'^norm', (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Sets whether to recompute each block's activations in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Re-initialises the classifier for num_classes (0 for none), and sets the pooling if given."""
        check_counts(0, num_classes=num_classes)
        parameter = next(self.stem.parameters())
        pool_type = self.head.global_pool.pool_type if global_pool is None else global_pool
        self._set_head(num_classes, pool_type, parameter.device, parameter.dtype)
        self._init_linear(self.head)

    def _set_head(self, num_classes: int, pool_type: str, device=None, dtype=None) -> None:
        options = dict(pool_type=pool_type, use_conv=not pool_type, drop_rate=self.drop_rate)
        head = ClassifierHead(self.num_features, num_classes, **options, device=device, dtype=dtype)
        self.head = head.train(self.training)
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * head.global_pool.feat_mult()  # some pool types concatenate

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Outputs of the chosen stages, before the next downsampling.

        Args:
            x: Images [B, C, H, W].
            indices: Stages to return: the last n for an int, all for None, else those with these indices.
            norm: Apply the final norm to the last stage's output.
            stop_early: Stop after the last chosen stage.
            output_fmt: 'NCHW' only.
            intermediates_only: Return only the intermediates, without the final features.

        Returns:
            The intermediates [B, d, h, w], or (final features, intermediates).
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        check_indices(indices=indices)
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        return self.norm(x) if i == last else x, intermediates

    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Removes layers that the intermediates of these stages do not need; returns the stages' indices."""
        check_indices(indices=indices)
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        pruned = max_index < len(self.stages) - 1
        del self.stages[max_index + 1 :]
        if prune_norm or pruned:
            self.norm = nn.Identity().train(self.training)
        if pruned:
            self.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or pruned:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> normalised map of the last stage [B, d, h, w]"""
        x = self.stem(x)
        for stage in in_turn(self.stages):
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map [B, d, h, w] -> logits [B, num_classes] ([B, num_classes, h, w] without pooling)"""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, num_classes]"""
        return self.forward_head(self.forward_features(x))


def check_stages(depths: Any, in_chans: int, num_classes: int, **rates: float) -> None:
    """Raises ValueError with the offending value unless these options make a model."""
    if not isinstance(depths, (tuple, list)) or not depths:
        raise ValueError(f'depths must be a tuple or list with the number of blocks of each stage, got {depths!r}')
    check_counts(0, num_classes=num_classes, **{f'depths[{i}]': depth for i, depth in enumerate(depths)})
    check_counts(in_chans=in_chans)
    check_rates(**rates)


def split_norms(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Weights of a classifier, a detector, a segmentor or a backbone; the last output norm becomes `norm`.

    See `split_backbone`. The output norms of the other stages are dropped.
    """
    weights, norms = split_backbone(state_dict)
    last = {key.replace('outnorm3.', 'norm.'): value for key, value in norms.items() if key.startswith('outnorm3.')}
    return {**last, **weights}
