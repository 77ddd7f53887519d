"""The models of this library as backbones of detectors and segmentors."""

from typing import Any, Iterable, Sequence, Tuple, Union

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import LayerNorm2d
from ..models import Vim, VMamba
from ..models import vim as vim_module
from ..models._hierarchical import HierarchicalModel
from ..models._isotropic import TokenModel
from .base import TimmBackbone
from .pyramid import make_resample


@MODELS.register_module()
class StageBackbone(TimmBackbone):
    """The stages of a model at strides 4, 8, 16 and 32, each followed by its own LayerNorm `outnorm{i}`.

    Args:
        variant: Registered name of any family of this library with stages, e.g. 'mambavision_t'.
        out_indices: Stages whose outputs are returned.
        **kwargs: See `TimmBackbone`. frozen_stages=0 freezes only the stem; the output norms are always trained.
    """

    family: type = HierarchicalModel

    def __init__(self, variant: str, out_indices: Sequence[int] = (0, 1, 2, 3), **kwargs: Any) -> None:
        super().__init__(variant, out_indices, **kwargs)
        self.out_channels = [self.model.feature_info[i]['num_chs'] for i in self.out_indices]
        for i, channels in zip(self.out_indices, self.out_channels):
            self.add_module(f'outnorm{i}', LayerNorm2d(channels, autocast=True))

    def _layers(self) -> nn.Sequential:
        return self.model.stages

    def _stem(self) -> Sequence[nn.Module]:
        return (self.model.stem,)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Images [B, 3, H, W] of any size -> one map [B, d_i, ceil(H / s_i), ceil(W / s_i)] per output"""
        maps = self.model.forward_intermediates(x, indices=self.out_indices, stop_early=True, intermediates_only=True)
        return tuple(getattr(self, f'outnorm{i}')(x) for i, x in zip(self.out_indices, maps))


@MODELS.register_module()
class VMambaBackbone(StageBackbone):
    """`StageBackbone` of VMamba only."""

    family = VMamba


@MODELS.register_module()
class TokenBackbone(TimmBackbone):
    """A simple feature pyramid of patch tokens after selected blocks, without the class token.

    Each block's map goes through its own LayerNorm `outnorm{block}`. Transposed convolutions or max pooling
    (`pyramid.{i}`) then resample it from the model's stride to output i's. Images are zero-padded on the right and
    bottom to whole patches, and the position embedding is resized to match.

    Args:
        variant: Registered name of any family of this library with patch tokens, e.g. 'vim_t'.
        out_indices: Blocks whose outputs are returned.
        out_strides: Stride of each output: the model's stride times or divided by a power of 2.
        **kwargs: See `TimmBackbone`. frozen_stages=n freezes the patch embedding and the first n blocks.
    """

    family: type = TokenModel

    def __init__(
        self,
        variant: str,
        out_indices: Sequence[int] = (5, 11, 17, 23),
        out_strides: Sequence[int] = (4, 8, 16, 32),
        **kwargs: Any,
    ) -> None:
        super().__init__(variant, out_indices, **kwargs)
        if len(out_strides) != len(self.out_indices):
            raise ValueError(f'{len(self.out_indices)} out_indices need as many out_strides, got {tuple(out_strides)}')
        self.model.patch_embed.dynamic_img_size = True
        dim = self.model.embed_dim
        self.out_channels = [dim] * len(self.out_indices)
        for i in self.out_indices:
            self.add_module(f'outnorm{i}', LayerNorm2d(dim, autocast=True))
        self.pyramid = nn.ModuleList(
            make_resample(dim, self.model.patch_embed.stride, stride) for stride in out_strides
        )

    def _layers(self) -> nn.Sequential:
        return self.model.blocks

    def _stem(self) -> Sequence[Union[nn.Module, nn.Parameter]]:
        return self.model.patch_embed, self.model.cls_token, self.model.pos_embed

    def _fresh(self, own: bool) -> Iterable[str]:
        return () if own else (f'pyramid.{name}' for name in self.pyramid.state_dict())

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Images [B, 3, H, W] of any size -> one map [B, d, h_i, w_i] per output"""
        maps = self.model.forward_intermediates(
            self._pad(x), indices=self.out_indices, stop_early=True, intermediates_only=True
        )
        norms = (getattr(self, f'outnorm{i}') for i in self.out_indices)
        return tuple(resample(norm(x)) for resample, norm, x in zip(self.pyramid, norms, maps))

    def _pad(self, x: Tensor) -> Tensor:
        """Pads to ceil(H / stride) x ceil(W / stride) patches."""
        patch, stride = self.model.patch_embed.patch_size, self.model.patch_embed.stride
        height, width = ((-(-side // stride) - 1) * stride + patch for side in x.shape[-2:])
        return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))


@MODELS.register_module()
class VimBackbone(TokenBackbone):
    """`TokenBackbone` of Vim only."""

    family = Vim
    rename_earlier = staticmethod(vim_module.rename_earlier)
