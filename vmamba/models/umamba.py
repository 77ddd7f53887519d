"""U-Mamba: a U-Net with residual convolutional blocks and Mamba, for biomedical segmentation in 2-D and 3-D.

U-Mamba: Enhancing Long-range Dependency for Biomedical Image Segmentation, https://arxiv.org/abs/2401.04722

Modules, parameters and their names are those of the official networks, whose checkpoints load.
"""

import math
from collections import defaultdict
from numbers import Integral
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from timm.models import clean_state_dict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import LayerNorm, Mamba, Mamba2
from ..layers.options import check_choice, check_counts
from ._pretrained import check_fit, read_checkpoint, reset_parameters

KINDS = 'bot', 'enc'
MIXERS = 'mamba', 'mamba2', 'none'
NORM_EPS = 1e-5
SLOPE = 0.01  # of LeakyReLU
MAX_HEADDIM = 64
_CONVS = {2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}

Size = Tuple[int, ...]


def conv(dim: int, out_dim: int, kernel_size: Size, stride: Union[int, Size] = 1, **dd: Any) -> nn.Module:
    """A convolution that keeps the size at stride 1; 2-D or 3-D by the length of kernel_size."""
    padding = tuple(side // 2 for side in kernel_size)
    return _CONVS[len(kernel_size)](dim, out_dim, kernel_size, stride, padding, **dd)


def instance_norm(dim: int, ndim: int, **dd: Any) -> nn.Module:
    return _NORMS[ndim](dim, eps=NORM_EPS, affine=True, **dd)


def activate(x: Tensor) -> Tensor:
    """LeakyReLU in place."""
    return F.leaky_relu_(x, SLOPE)


class BasicResBlock(nn.Module):
    """Residual block whose shortcut is always a 1x1 convolution, without a norm.

    act(norm(conv2(act(norm(conv1(x))))) + conv3(x))
    """

    def __init__(self, dim: int, out_dim: int, kernel_size: Size, stride: Union[int, Size] = 1, **dd: Any) -> None:
        super().__init__()
        ndim = len(kernel_size)
        self.conv1 = conv(dim, out_dim, kernel_size, stride, **dd)
        self.norm1 = instance_norm(out_dim, ndim, **dd)
        self.conv2 = conv(out_dim, out_dim, kernel_size, **dd)
        self.norm2 = instance_norm(out_dim, ndim, **dd)
        self.conv3 = conv(dim, out_dim, (1,) * ndim, stride, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, d, ...] -> [B, d', ...]"""
        y = activate(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return activate(y + self.conv3(x))


class ConvNorm(nn.Module):
    """Convolution and norm. `all_modules` are the same two again: official files have both names."""

    def __init__(self, dim: int, kernel_size: Size, **dd: Any) -> None:
        super().__init__()
        self.conv = conv(dim, dim, kernel_size, **dd)
        self.norm = instance_norm(dim, len(kernel_size), **dd)
        self.all_modules = nn.Sequential(self.conv, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, d, ...] -> [B, d, ...]"""
        return self.norm(self.conv(x))


class BasicBlockD(nn.Module):
    """Residual block of nnU-Net: act(norm(conv(act(norm(conv(x))))) + x)."""

    def __init__(self, dim: int, kernel_size: Size, **dd: Any) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, kernel_size, **dd)
        self.conv2 = ConvNorm(dim, kernel_size, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, d, ...] -> [B, d, ...]"""
        return activate(self.conv2(activate(self.conv1(x))) + x)


def res_blocks(
    dim: int, out_dim: int, kernel_size: Size, stride: Union[int, Size], blocks: int, **dd: Any
) -> nn.Sequential:
    """A `BasicResBlock`, which changes channels and size, and `BasicBlockD` after it."""
    first = BasicResBlock(dim, out_dim, kernel_size, stride, **dd)
    return nn.Sequential(first, *(BasicBlockD(out_dim, kernel_size, **dd) for _ in range(blocks - 1)))


class MambaLayer(nn.Module):
    """Mamba(LayerNorm(tokens)) in place of a map, without a residual.

    Tokens are the positions of the map in row-major order, or its channels. Step sizes, convolution and scan are in
    fp32 under autocast, projections in its dtype.

    Args:
        dim: Size of a token: channels of the map, or its number of positions with `channel_tokens`.
        mixer: 'mamba' or 'mamba2'.
        channel_tokens: Whether the tokens are the channels.
        recompute: Whether the backward pass recomputes the layer, whose tensors are several times as large as the map.
    """

    def __init__(
        self, dim: int, mixer: str = 'mamba', channel_tokens: bool = False, recompute: bool = False, **dd: Any
    ) -> None:
        super().__init__()
        self.channel_tokens = channel_tokens
        self.recompute = recompute
        self.norm = LayerNorm(dim, eps=NORM_EPS, autocast=True, **dd)
        options: Dict[str, Any] = dict(d_state=16, d_conv=4, expand=2, fp32_scan=True, **dd)
        if mixer == 'mamba':
            self.mamba = Mamba(dim, **options)
        else:
            self.mamba = Mamba2(dim, headdim=headdim(2 * dim), **options)

    def forward(self, x: Tensor) -> Tensor:
        """[B, d, ...] -> [B, d, ...]"""
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self._mix, x, use_reentrant=False, preserve_rng_state=False)
        return self._mix(x)

    def _mix(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)  # [B, d, ...] -> [B, d, L]
        if self.channel_tokens:
            return self.mamba(self.norm(tokens)).view(x.shape)
        return self.mamba(self.norm(tokens.mT)).mT.reshape(x.shape).contiguous()


def headdim(inner: int) -> int:
    """Channels of a head of Mamba-2: the largest divisor of the inner channels up to 64."""
    return max(divisor for divisor in range(1, min(inner, MAX_HEADDIM) + 1) if inner % divisor == 0)


class Encoder(nn.Module):
    """Stem and stages; a stage is followed by its Mamba layer, or by an identity.

    Args:
        in_chans: Channels of the images.
        features: Channels of each stage.
        kernel_sizes: Of each stage.
        strides: Of each stage.
        blocks: Of each stage.
        mamba_layers: After each stage; None for an encoder without any.
    """

    def __init__(
        self,
        in_chans: int,
        features: Sequence[int],
        kernel_sizes: Sequence[Size],
        strides: Sequence[Size],
        blocks: Sequence[int],
        mamba_layers: Optional[Sequence[nn.Module]] = None,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.stem = res_blocks(in_chans, features[0], kernel_sizes[0], 1, blocks[0], **dd)
        dims = features[0], *features[:-1]
        self.stages = nn.ModuleList(
            res_blocks(*sizes, **dd) for sizes in zip(dims, features, kernel_sizes, strides, blocks)
        )
        self.mamba_layers = nn.ModuleList(mamba_layers or (nn.Identity() for _ in features))

    def forward(self, x: Tensor) -> List[Tensor]:
        """Images [B, C, ...] -> a map of each stage [B, d, ...]"""
        x, skips = self.stem(x), []
        for stage, mamba_layer in zip(self.stages, self.mamba_layers):
            x = mamba_layer(stage(x))
            skips.append(x)
        return skips


class Upsample(nn.Module):
    """1x1 convolution and nearest interpolation, which commute: official networks convolve the larger map.

    Args:
        dim: Channels d.
        out_dim: Channels d' of the result.
        scale: Factor of each axis.
    """

    def __init__(self, dim: int, out_dim: int, scale: Size, **dd: Any) -> None:
        super().__init__()
        self.scale = tuple(map(float, scale))
        self.conv = conv(dim, out_dim, (1,) * len(scale), **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, d, ...] -> [B, d', ...]"""
        return F.interpolate(self.conv(x), scale_factor=self.scale, mode='nearest')


class Decoder(nn.Module):
    """Steps of upsampling, a skip connection, blocks and a head each, the deepest first.

    Attributes:
        deep_supervision: Whether all heads run, not only that of the last step. nnU-Net sets it.

    Args:
        encoder: Registered again here, as in the official networks: files have its weights under both names.
        features: Channels of each stage of the encoder.
        kernel_sizes: Of each stage of the encoder.
        strides: Of each stage of the encoder.
        blocks: Of each step.
        num_classes: Channels of the results.
        deep_supervision: The attribute.
    """

    def __init__(
        self,
        encoder: Encoder,
        features: Sequence[int],
        kernel_sizes: Sequence[Size],
        strides: Sequence[Size],
        blocks: Sequence[int],
        num_classes: int,
        deep_supervision: bool,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.encoder = encoder
        ndim, stages = len(strides[0]), range(len(features) - 1)[::-1]
        # Official 2-D networks have no skip connection at full resolution.
        self.concatenates = [ndim == 3 or s > 0 for s in stages]
        self.upsample_layers = nn.ModuleList(
            Upsample(features[s + 1], features[s], strides[s + 1], **dd) for s in stages
        )
        self.stages = nn.ModuleList(
            res_blocks(features[s] * (1 + joins), features[s], kernel_sizes[s], 1, count, **dd)
            for s, joins, count in zip(stages, self.concatenates, blocks)
        )
        self.seg_layers = nn.ModuleList(conv(features[s], num_classes, (1,) * ndim, **dd) for s in stages)

    def forward(self, skips: List[Tensor]) -> Union[Tensor, List[Tensor]]:
        """Maps of the encoder -> logits [B, classes, ...], with deep supervision a list, full resolution first"""
        *skips, x = skips
        outputs: List[Tensor] = []
        for i, (upsample, stage) in enumerate(zip(self.upsample_layers, self.stages)):
            x, skip = upsample(x), skips.pop()
            x = stage(torch.cat([x, skip], dim=1) if self.concatenates[i] else x)
            if self.deep_supervision or not skips:
                outputs.insert(0, self.seg_layers[i](x))
        return outputs if self.deep_supervision else outputs[0]


class UMamba(nn.Module):
    """U-Mamba, in 2-D or 3-D by the length of `patch_size`.

    The encoder's maps of n stages are skip connections of a decoder with n - 1 steps. Mamba layers replace the deepest
    map ('bot'), or maps of the encoder after their stage ('enc'): of every stage in 3-D, of every second stage in 2-D,
    counted back from the last.

    In 'enc', a stage whose map has no more positions than channels takes the channels as tokens. Such a network takes
    images of `patch_size` only. All others take sizes that the product of the strides divides, if the deepest map has
    more than one position.

    Args:
        kind: 'bot' or 'enc'.
        in_chans: Channels of the images.
        num_classes: Channels of the logits.
        patch_size: Size of the images, (H, W) or (depth, H, W).
        features: Channels of each of the n stages.
        kernel_sizes: Odd sides of the windows of each stage, an int or one per axis.
        strides: Of each stage, an int or one per axis; of the first stage 1.
        encoder_blocks: Of each stage, an int or a list of n. As in the official networks, stages from ceil(n / 2) on
            have one block whatever is given.
        decoder_blocks: Of each step, an int or a list of n - 1. Steps from ceil(n / 2) on have one block.
        deep_supervision: Return the logits of all steps of the decoder, see `forward`. `decoder.deep_supervision` can
            be set later.
        mixer: 'mamba', 'mamba2', or 'none' for the same network without Mamba layers. Mamba-2 has as channels of a head
            the largest divisor of its inner channels up to 64.

    Raises:
        ValueError: If an option is invalid or patch_size is not divisible.
    """

    def __init__(
        self,
        kind: str,
        in_chans: int,
        num_classes: int,
        patch_size: Sequence[int],
        features: Sequence[int],
        kernel_sizes: Sequence[Union[int, Sequence[int]]],
        strides: Sequence[Union[int, Sequence[int]]],
        encoder_blocks: Union[int, Sequence[int]] = 2,
        decoder_blocks: Union[int, Sequence[int]] = 2,
        deep_supervision: bool = False,
        mixer: str = 'mamba',
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_choice(KINDS, kind=kind)
        check_choice(MIXERS, mixer=mixer)
        check_counts(in_chans=in_chans, num_classes=num_classes)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.patch_size = _numbers('patch_size', patch_size)
        features, ndim = _numbers('features', features), len(self.patch_size)
        if ndim not in _CONVS:
            raise ValueError(f'patch_size must have 2 or 3 numbers, got {self.patch_size}')
        n = len(features)
        if n < 2:
            raise ValueError(f'features must have at least 2 stages, got {features}')
        kernels, steps = _per_axis('kernel_sizes', kernel_sizes, n, ndim), _per_axis('strides', strides, n, ndim)
        if any(side % 2 == 0 for kernel in kernels for side in kernel):
            raise ValueError(f'kernel_sizes must be odd, got {kernels}')
        if math.prod(steps[0]) != 1:
            raise ValueError(f'strides of the first stage must be 1, got {steps[0]}')
        self.divisors = tuple(math.prod(axis) for axis in zip(*steps))
        _check_divisible('patch_size', self.patch_size, self.divisors)
        half = math.ceil(n / 2)
        encoder_counts = _block_counts('encoder_blocks', encoder_blocks, n, half)
        decoder_counts = _block_counts('decoder_blocks', decoder_blocks, n - 1, half)

        layers = None
        if kind == 'enc' and mixer != 'none':
            layers = _encoder_layers(mixer, self.patch_size, features, steps, **dd)
        self.fixed_size = any(getattr(layer, 'channel_tokens', False) for layer in layers or ())
        self.encoder = Encoder(in_chans, features, kernels, steps, encoder_counts, layers, **dd)
        mixes = kind == 'bot' and mixer != 'none'
        self.mamba_layer = MambaLayer(features[-1], mixer, **dd) if mixes else nn.Identity()
        sizes = features, kernels, steps, decoder_counts
        self.decoder = Decoder(self.encoder, *sizes, num_classes, deep_supervision, **dd)
        self._init_convs()

    def init_weights(self) -> None:
        """Re-initialises all weights as at construction."""
        reset_parameters(self)
        self._init_convs()

    def _init_convs(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Union[Tensor, List[Tensor]]:
        """Images [B, C, ...] -> logits [B, classes, ...] of the same size

        With deep supervision a list of the logits of all n - 1 steps of the decoder, full resolution first.

        Raises:
            ValueError: If the images have another number of axes or channels, or a size that the network does not take.
        """
        self._check(x)
        x = x.as_tensor() if hasattr(x, 'as_tensor') else x  # MONAI's MetaTensor, which the kernels do not take
        skips = self.encoder(x)
        skips[-1] = self.mamba_layer(skips[-1])
        return self.decoder(skips)

    def _check(self, x: Tensor) -> None:
        ndim = len(self.patch_size)
        if x.ndim != ndim + 2 or x.shape[1] != self.in_chans:
            raise ValueError(f'images must be [B, {self.in_chans}] with {ndim} axes of positions, got {tuple(x.shape)}')
        self.check_size(tuple(x.shape[2:]))

    def check_size(self, size: Size) -> None:
        """Raises ValueError unless the network takes images of this size."""
        if self.fixed_size and size != self.patch_size:
            raise ValueError(
                f'this network takes images of {self.patch_size} only, got {size}: a Mamba layer has the channels of '
                f'its map as tokens, whose size depends on that of the image'
            )
        _check_divisible('size of the images', size, self.divisors)
        if math.prod(side // divisor for side, divisor in zip(size, self.divisors)) < 2:
            raise ValueError(
                f'images must be larger than the product of the strides {self.divisors}, got {size}: the norm of the '
                f'deepest stage needs more than one position'
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in PyTorch; also takes weights of compiled and parallel networks, and nnU-Net checkpoints.

        The weights of an nnU-Net checkpoint are its `network_weights`.
        """
        weights = clean_state_dict(state_dict.get('network_weights', state_dict))
        return super().load_state_dict(weights, strict, assign)

    def load_pretrained(self, path: Union[str, Path]) -> None:
        """Loads a file with weights or a checkpoint of nnU-Net; every weight must be present, under one name at least.

        Raises:
            FileNotFoundError: If there is no such file.
            RuntimeError: If the file is corrupt or its weights are those of another network; the message names them.
        """
        state_dict = self._with_aliases(read_checkpoint(path))
        advice = 'Build the network from the plans with which the checkpoint was trained'
        check_fit(state_dict, self, path, advice=advice)
        self.load_state_dict(state_dict)

    def _with_aliases(self, state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Weights under all their names; safetensors' `save_model` writes one of each."""
        filled, names = dict(state_dict), defaultdict(list)
        for name, parameter in self.named_parameters(remove_duplicate=False):
            names[parameter].append(name)
        for aliases in names.values():
            found = next((name for name in aliases if name in state_dict), None)
            if found is not None:
                filled.update({name: state_dict.get(name, state_dict[found]) for name in aliases})
        return filled


def _encoder_layers(
    mixer: str, patch_size: Size, features: Sequence[int], strides: Sequence[Size], **dd: Any
) -> List[nn.Module]:
    """The Mamba layer or identity after each stage of an encoder."""
    layers: List[nn.Module] = []
    size, n = patch_size, len(features)
    for s, (dim, stride) in enumerate(zip(features, strides)):
        size = tuple(side // step for side, step in zip(size, stride))
        if len(size) == 2 and (n - 1 - s) % 2:  # every second stage, counted back from the last
            layers.append(nn.Identity())
            continue
        positions = math.prod(size)
        by_channel = positions <= dim
        layers.append(MambaLayer(positions if by_channel else dim, mixer, by_channel, recompute=True, **dd))
    return layers


def _numbers(name: str, values: Any) -> Size:
    """A sequence of positive integers as a tuple."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ValueError(f'{name} must be a list of numbers, got {values!r}')
    check_counts(**{f'{name}[{i}]': value for i, value in enumerate(values)})
    return tuple(map(int, values))


def _per_axis(name: str, values: Any, stages: int, ndim: int) -> List[Size]:
    """A number or one per axis for each stage, as tuples with one per axis."""
    if not isinstance(values, Sequence) or len(values) != stages:
        raise ValueError(f'{name} must have an entry for each of the {stages} stages, got {values!r}')
    sizes = [_numbers(name, [value] * ndim if isinstance(value, Integral) else value) for value in values]
    if any(len(size) != ndim for size in sizes):
        raise ValueError(f'{name} must have {ndim} numbers per stage, like patch_size, got {values!r}')
    return sizes


def _block_counts(name: str, blocks: Any, length: int, half: int) -> Size:
    """Blocks of each stage or step; one from `half` on."""
    counts = _numbers(name, [blocks] * length if isinstance(blocks, Integral) else blocks)
    if len(counts) != length:
        raise ValueError(f'{name} must be a number or a list of {length}, got {blocks!r}')
    return *counts[:half], *(1,) * (length - half)


def _check_divisible(name: str, size: Size, divisors: Size) -> None:
    if any(side % divisor for side, divisor in zip(size, divisors)):
        raise ValueError(f'{name} must be divisible by the product of the strides {divisors}, got {size}')
