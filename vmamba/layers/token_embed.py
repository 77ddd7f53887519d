"""Vim's front end: patches, a class token among them, position embedding."""

from typing import Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import lecun_normal_, to_2tuple, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from .image import check_images
from .options import check_counts
from .residual import is_plain

_is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)  # torch 2.6 has only the latter


def split_class_token(tokens: Tensor) -> Tuple[Tensor, Tensor]:
    """Takes the class token out of the middle: [B, M + 1, d] -> patch tokens [B, M, d] and class token [B, d]."""
    middle = (tokens.shape[1] - 1) // 2
    patches = torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)
    return patches, tokens[:, middle]


def insert_class_token(patches: Tensor, class_token: Tensor) -> Tensor:
    """Inverse of `split_class_token`: [B, M, d] and [B, d] -> [B, M + 1, d]."""
    middle = patches.shape[1] // 2
    return torch.cat([patches[:, :middle], class_token.unsqueeze(1), patches[:, middle:]], dim=1)


def resize_pos_embed(pos_embed: Tensor, old_grid: Tuple[int, int], new_grid: Tuple[int, int]) -> Tensor:
    """Resizes a position embedding whose class token's entry is in the middle.

    Args:
        pos_embed: [1, h * w + 1, d] for the old grid.
        old_grid: (h, w) of the embedding.
        new_grid: (h, w) wanted.

    Returns:
        [1, h * w + 1, d] for the new grid: the patches' entries resized bicubically as a map, the class token's entry
        in the new middle.
    """
    # Resizing to the same grid changes nothing, but an export with this shortcut would refuse images of that grid.
    if not _is_exporting() and old_grid == new_grid:
        return pos_embed
    grid, class_token = split_class_token(pos_embed)
    grid = grid.unflatten(1, old_grid).permute(0, 3, 1, 2)  # [1, h * w, d] -> [1, d, h, w]
    resized = F.interpolate(grid.float(), size=new_grid, mode='bicubic', align_corners=False).to(grid.dtype)
    return insert_class_token(resized.flatten(2).transpose(1, 2), class_token)


@register_notrace_module
class TokenEmbed(nn.Module):
    """Embeds (overlapping) patches, inserts a class token in the middle and adds the position embedding.

    Where patches touch without overlap the module `proj` is not called, unless it has hooks, is parametrised or is
    another module than a convolution of just these patches: its parameters are those of a matrix product.

    Args:
        img_size: Image size that the position embedding is made for.
        patch_size: Side of a patch.
        stride: Distance between patches; smaller than patch_size for overlapping ones, larger for gaps between them.
        in_chans: Image channels.
        embed_dim: Token channels d.
        dynamic_img_size: Accept any image size and resize the position embedding to it at each call.
    """

    def __init__(
        self,
        img_size: Union[int, Tuple[int, int]] = 224,
        patch_size: int = 16,
        stride: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        dynamic_img_size: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_counts(patch_size=patch_size, stride=stride, in_chans=in_chans, embed_dim=embed_dim)
        self.img_size = to_2tuple(img_size)
        self.patch_size = patch_size
        self.stride = stride
        self.in_chans = in_chans
        self.dynamic_img_size = dynamic_img_size
        self.grid_size = self.dynamic_feat_size(self.img_size)
        tokens = self.grid_size[0] * self.grid_size[1] + 1
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=stride, **dd)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        lecun_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)

    def dynamic_feat_size(self, img_size: Tuple[int, int]) -> Tuple[int, int]:
        """Grid of patches (h, w) of an image size; ValueError if patches do not tile it exactly."""
        for side in img_size:
            if side < self.patch_size or (side - self.patch_size) % self.stride:
                raise ValueError(
                    f'image size {img_size[0]}x{img_size[1]} is not covered by patches of {self.patch_size} with '
                    f'stride {self.stride}: each side must be {self.patch_size} plus a multiple of {self.stride}'
                )
        return tuple((side - self.patch_size) // self.stride + 1 for side in img_size)

    def set_input_size(self, img_size: Union[int, Tuple[int, int]]) -> None:
        """Changes the image size, resizing the position embedding in place of the old one."""
        img_size = to_2tuple(img_size)
        grid_size = self.dynamic_feat_size(img_size)
        resized = resize_pos_embed(self.pos_embed.detach(), self.grid_size, grid_size)
        self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        self.img_size, self.grid_size = img_size, grid_size

    def forward(self, images: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, h * w + 1, d] in at least fp32: the start of the residual stream"""
        check_images(images, self.in_chans, 1)
        size = tuple(images.shape[-2:])
        if not self.dynamic_img_size and size != self.img_size:
            raise ValueError(
                f'the model takes {self.img_size[0]}x{self.img_size[1]} images, got {size[0]}x{size[1]}: create it '
                f'with img_size={size} or with dynamic_img_size=True'
            )
        grid_size = self.dynamic_feat_size(size)
        patches = self._embed(images, grid_size)
        class_token = self.cls_token.expand(patches.shape[0], -1, -1).squeeze(1)
        tokens = insert_class_token(patches, class_token)
        pos_embed = self.pos_embed
        if self.dynamic_img_size:
            pos_embed = resize_pos_embed(pos_embed, self.grid_size, grid_size)
        tokens = tokens + pos_embed
        return tokens.to(torch.promote_types(tokens.dtype, torch.float32))

    def _embed(self, images: Tensor, grid_size: Tuple[int, int]) -> Tensor:
        """[B, in_chans, H, W] -> [B, h * w, d]"""
        if not is_plain(self.proj, nn.Conv2d) or not self._is_tiling(self.proj):
            return self.proj(images).flatten(2).transpose(1, 2)  # [B, d, h, w] -> [B, h * w, d]
        # Patches that just touch are rows of a matrix, whose product is faster than convolutions of 3 channels.
        batch, side, (height, width) = images.shape[0], self.patch_size, grid_size
        x = images.reshape(batch, self.in_chans, height, side, width, side).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(batch, height * width, self.in_chans * side**2)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)

    def _is_tiling(self, conv: nn.Conv2d) -> bool:
        """Whether a convolution takes patches of the model's that touch without overlap, with all channels of each."""
        side = self.patch_size, self.patch_size
        whole = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding == (0, 0)
        return whole and conv.kernel_size == conv.stride == side
