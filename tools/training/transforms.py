"""Augmentation: timm's transforms for training."""

from typing import Any, Callable, Dict, Iterator

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize

from vmamba.tools.user_errors import UserError

from .config import Config


def create_train_transform(config: Config, data_config: Dict[str, Any]) -> Callable:
    """timm's transform without random erasing, which comes after the transfer to the device.

    Raises:
        UserError: If timm knows no such policy.
    """
    names = ('scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'auto_augment')
    augmentation = {name: getattr(config, name) for name in names}
    own = {**data_config, 'interpolation': config.interpolation, **augmentation, 'is_training': True}
    chosen = own if config.augment else {**data_config, 'is_training': False}
    try:
        transform = create_transform(**chosen, use_prefetcher=True)
    except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"auto_augment {config.auto_augment!r} is none of timm's policies: {error}; take one such as "
            f'rand-m9-mstd0.5-inc1, augmix-m3 or original, or null for none'
        ) from error
    for operation in _operations(transform):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return transform


def _operations(transform: Any) -> Iterator[AugmentOp]:
    """Those of a policy within a transform: of RandAugment and AugMix in a list, of AutoAugment in a list of lists."""
    if isinstance(transform, AugmentOp):
        yield transform
    elif isinstance(transform, (list, tuple)):
        for part in transform:
            yield from _operations(part)
    else:
        for name in ('transforms', 'ops', 'policy'):
            yield from _operations(getattr(transform, name, ()))


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """As timm's. At the highest level it leaves no bits, which Pillow refuses from version 13 on: a black image."""
    return posterize(image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)
