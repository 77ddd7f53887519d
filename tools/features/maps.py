"""Features of images by name, also of images in tiles."""

import math
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.models._isotropic import TokenModel
from vmamba.tools.user_errors import UserError, nearest

POOLED = 'pooled'
Allocate = Callable[[str, Sequence[int]], np.ndarray]


class Wanted(NamedTuple):
    """Features to extract.

    Attributes:
        pooled: The vector before the classifier, too.
        indices: Of the maps among the model's intermediates, rising.
        names: Of the maps, such as stages.2 or blocks.11.
        reductions: Image pixels per pixel of each map.
        norm: Apply the final norm to the maps, where the model can.
    """

    pooled: bool
    indices: List[int]
    names: List[str]
    reductions: List[int]
    norm: bool = False

    def all_names(self) -> List[str]:
        return [POOLED] * self.pooled + self.names


def parse_wanted(model: nn.Module, texts: Sequence[str], norm: bool) -> Wanted:
    """Reads names of features: pooled, names of stages or blocks, or their indices (negative ones from the end).

    Raises:
        UserError: If the model has no such feature.
    """
    info = [dict(entry) for entry in model.feature_info]
    known = [entry['module'] for entry in info]
    indices = set()
    for text in texts:
        if text.lstrip('-').isdigit() and -len(known) <= int(text) < len(known):
            indices.add(int(text) % len(known))
        elif text in known:
            indices.add(known.index(text))
        elif text != POOLED:
            names = f'{POOLED}, {known[0]} to {known[-1]}, or the indices 0 to {len(known) - 1}'
            raise UserError(f'{type(model).__name__} has no feature {text!r}{nearest(text, known)}; it has {names}')
    chosen = sorted(indices)
    names, reductions = [known[i] for i in chosen], [info[i]['reduction'] for i in chosen]
    return Wanted(POOLED in texts, chosen, names, reductions, norm)


def extract(model: nn.Module, images: Tensor, wanted: Wanted) -> Dict[str, Tensor]:
    """Features of images [B, C, H, W]: 'pooled' [B, d] and maps [B, d, h, w]."""
    options = dict(indices=wanted.indices, norm=wanted.norm)
    if not wanted.pooled:
        maps = model.forward_intermediates(images, **options, intermediates_only=True, stop_early=True)
        return dict(zip(wanted.names, maps))
    if not wanted.indices:
        return {POOLED: model.forward_head(model.forward_features(images), pre_logits=True)}
    final, maps = model.forward_intermediates(images, **options)
    return {POOLED: model.forward_head(final, pre_logits=True), **dict(zip(wanted.names, maps))}


def patch_layout(model: nn.Module) -> Tuple[int, int]:
    """(side of a patch, distance of patches) that must cover an image; (1, 1) where any size goes."""
    return (model.patch_embed.patch_size, model.patch_embed.stride) if isinstance(model, TokenModel) else (1, 1)


def covering(side: int, patch: int, stride: int) -> int:
    """The smallest side, not below this one, that patches cover exactly."""
    return patch + max(-(-(side - patch) // stride), 0) * stride


def pad_to_patches(image: Tensor, patch: int, stride: int) -> Tensor:
    """Repeats the last row and column of [B, C, H, W] until patches cover the image."""
    height, width = image.shape[-2:]
    padding = (0, covering(width, patch, stride) - width, 0, covering(height, patch, stride) - height)
    return F.pad(image, padding, mode='replicate') if any(padding) else image


def normalised(pixels: np.ndarray, config: Dict[str, Any], device: torch.device) -> Tensor:
    """Bytes [H, W, C] -> normalised image [1, C, H, W] on the device."""
    image = torch.from_numpy(np.array(pixels)).to(device).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(config[key], device=device).view(-1, 1, 1) for key in ('mean', 'std'))
    return (image - mean) / std


def check_tiles(tile: int, overlap: int, wanted: Wanted) -> None:
    """Raises UserError unless tiles begin at pixels of every map."""
    if wanted.pooled or not wanted.names:
        raise UserError('--tile gives maps, not pooled features, which need the whole image: name maps by --features')
    step = math.lcm(*wanted.reductions)
    if tile <= 0 or tile % step or overlap < 0 or overlap % step:
        raise UserError(f'--tile and --overlap must be multiples of {step} pixels, got {tile} and {overlap}')


def tiled_maps(
    model: nn.Module,
    pixels: np.ndarray,
    config: Dict[str, Any],
    wanted: Wanted,
    tile: int,
    overlap: int,
    allocate: Allocate,
    device: torch.device,
) -> Dict[str, np.ndarray]:
    """Maps of an image of any size, of which the device holds one tile at a time.

    A tile is computed with the overlap around it, which is discarded. The routes of a scan span the whole
    image, so tiles change the features; docs/large_images.md shows by how much.

    Args:
        model: Takes images of any size.
        pixels: Bytes [H, W, C], perhaps memory-mapped.
        config: Preprocessing, of which mean and std are used.
        wanted: Maps.
        tile: Side of the tiles without overlap.
        overlap: Pixels around a tile that are computed, too.
        allocate: Makes the array of a map from its name and shape.
        device: Where to compute.

    Returns:
        The arrays [d, h, w].
    """
    patch, stride = patch_layout(model)
    beyond = patch - stride  # of an overlapping patch, into the next tile
    height, width = pixels.shape[:2]
    channels = [model.feature_info[i]['num_chs'] for i in wanted.indices]
    sides = [[steps(side, patch, reduction) for side in (height, width)] for reduction in wanted.reductions]
    out = {name: allocate(name, (c, *side)) for name, c, side in zip(wanted.names, channels, sides)}
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            y, x = max(top - overlap, 0), max(left - overlap, 0)
            part = pixels[y : top + tile + overlap + beyond, x : left + tile + overlap + beyond]
            maps = extract(model, pad_to_patches(normalised(part, config, device), patch, stride), wanted)
            for name, reduction, (rows, columns) in zip(wanted.names, wanted.reductions, sides):
                i, j = top // reduction, left // reduction
                h, w = min(tile // reduction, rows - i), min(tile // reduction, columns - j)
                if h > 0 and w > 0:  # the last patch may be in the previous tile
                    a, b = (top - y) // reduction, (left - x) // reduction
                    core = maps[name][0, :, a : a + h, b : b + w].float().cpu().numpy()
                    if core.shape[1:] != (h, w):
                        raise UserError(f'{type(model).__name__} gives a map of another size for a tile: no --tile')
                    out[name][:, i : i + h, j : j + w] = core
    return out


def steps(side: int, patch: int, reduction: int) -> int:
    """Pixels of a map along this side of an image, rounded up."""
    return -(-max(side - patch, 0) // reduction) + 1 if patch > 1 else -(-side // reduction)
