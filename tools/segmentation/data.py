"""Images with masks from folders, by MONAI's data sets and transforms."""

from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import torch
from monai.data import CacheDataset, DataLoader, NibabelReader, PILReader, set_track_meta
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    NormalizeIntensityd,
    RandAdjustContrastd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
    Transform,
)
from PIL import Image
from torch import Tensor
from torch.utils.data import RandomSampler

from vmamba.tools.images.decoding import to_mode
from vmamba.tools.training.seeding import derive_seed
from vmamba.tools.user_errors import UserError, listed

from .config import Config

SUFFIXES = {2: ('.png', '.tif', '.tiff', '.jpg', '.jpeg', '.bmp'), 3: ('.nii', '.nii.gz')}
BOTH = ['image', 'label']
Case = Dict[str, Any]


def find_cases(folder: Path, ndim: int) -> List[Case]:
    """Files `image` and `label` and the `name` of every case of a folder, in the order of names.

    Raises:
        UserError: If the folder has another layout, or an image has no mask.
    """
    images, labels = (_files(folder / name, ndim) for name in ('images', 'labels'))
    missing = sorted(images.keys() - labels.keys())
    if missing:
        raise UserError(f'{folder / "labels"} has no mask for {listed(missing, 5)}')
    return [dict(image=str(path), label=str(labels[name]), name=name) for name, path in sorted(images.items())]


def _files(folder: Path, ndim: int) -> Dict[str, Path]:
    """Files by their names without suffix."""
    if not folder.is_dir():
        raise UserError(f'there is no folder {folder}: the data must have images/ and labels/')
    found = {}
    for path in folder.iterdir():
        suffix = next((end for end in SUFFIXES[ndim] if path.name.lower().endswith(end)), None)
        if suffix and not path.name.startswith('.'):
            found[path.name[: -len(suffix)]] = path
    if not found:
        raise UserError(f'{folder} has no files with {", ".join(SUFFIXES[ndim])} for patches in {ndim}-D')
    return found


def split(config: Config) -> Tuple[List[Case], List[Case]]:
    """The cases to train and to validate on."""
    ndim = len(config.patch_size)
    cases = find_cases(Path(config.data), ndim)
    if config.val_data:
        return cases, find_cases(Path(config.val_data), ndim)
    count = max(round(config.val_fraction * len(cases)), 1)
    if count >= len(cases):
        raise UserError(f'{config.data} has {len(cases)} images, too few to validate on {count}: give val_data')
    order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(config.seed)).tolist()
    held_out = set(order[:count])
    return [c for i, c in enumerate(cases) if i not in held_out], [c for i, c in enumerate(cases) if i in held_out]


def loading(config: Config) -> List[Transform]:
    """Reads and normalises a case."""
    flat = len(config.patch_size) == 2
    image_reader = dict(reader=PILReader, reverse_indexing=False, converter=partial(_with_channels, config.in_chans))
    label_reader = dict(reader=PILReader, reverse_indexing=False)
    steps = [
        LoadImaged('image', **(image_reader if flat else dict(reader=NibabelReader))),
        LoadImaged('label', **(label_reader if flat else dict(reader=NibabelReader))),
        EnsureChannelFirstd(BOTH),
        CheckCase(config),
    ]
    if config.spacing:
        steps.append(Spacingd(BOTH, config.spacing, mode=('bilinear', 'nearest')))
    if config.window:
        low, high = config.window
        steps.append(ScaleIntensityRanged('image', low, high, low, high, clip=True))
    return [*steps, NormalizeIntensityd('image', channel_wise=True)]


def _with_channels(in_chans: int, image: Image.Image) -> Image.Image:
    channels = len(image.getbands())
    return image if channels == in_chans or in_chans not in (1, 3) else to_mode(image, 'L' if in_chans == 1 else 'RGB')


class CheckCase(Transform):
    """Raises UserError for a case that does not fit the configuration.

    A transform, not a function: MONAI caches the result of the transforms before the first other callable.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, case: Case) -> Case:
        image, label, in_chans, ndim = case['image'], case['label'], self.config.in_chans, len(self.config.patch_size)
        if image.ndim != ndim + 1 or image.shape[0] != in_chans:
            raise UserError(f'{case["name"]} is {tuple(image.shape)}, not {in_chans} channels in {ndim}-D')
        if label.shape != (1, *image.shape[1:]):
            raise UserError(f'the mask of {case["name"]} is {tuple(label.shape)}, its image {tuple(image.shape)}')
        highest = int(label.max())
        if highest >= self.config.num_classes or label.min() < 0:
            raise UserError(
                f'the mask of {case["name"]} has the label {highest}, but num_classes is {self.config.num_classes}: '
                f'masks hold the numbers of the classes, 0 for the background'
            )
        return case


def augmenting(config: Config) -> List[Transform]:
    """Cuts a patch, and changes it at random."""
    size, share = config.patch_size, config.foreground
    steps = [
        EnsureTyped(BOTH, track_meta=False),
        SpatialPadd(BOTH, size),
        RandCropByPosNegLabeld(BOTH, 'label', size, pos=share, neg=1 - share),
    ]
    if config.augment:
        steps += [RandFlipd(BOTH, prob=0.5, spatial_axis=axis) for axis in range(len(size))]
        steps += [
            RandGaussianNoised('image', prob=0.15, std=0.3),
            RandScaleIntensityd('image', factors=0.25, prob=0.15),
            RandAdjustContrastd('image', prob=0.15, gamma=(0.7, 1.5)),
        ]
    return steps


class Patches:
    """Batches of random patches; those of an epoch depend on the seed and its number only."""

    def __init__(self, config: Config, cases: List[Case]) -> None:
        self.config = config
        self.dataset = _cached(config, cases, [*loading(config), *augmenting(config)])

    def epoch(self, number: int) -> Iterator[Dict[str, Tensor]]:
        """Dictionaries with `image` [B, C, ...] and `label` [B, 1, ...]."""
        config = self.config
        generator = torch.Generator().manual_seed(derive_seed(config.seed, number))
        count = config.iterations * config.batch_size
        sampler = RandomSampler(self.dataset, replacement=True, num_samples=count, generator=generator)
        options = dict(num_workers=config.workers, pin_memory=torch.cuda.is_available(), generator=generator)
        set_track_meta(False)  # random transforms take half the time
        try:
            yield from DataLoader(self.dataset, batch_size=config.batch_size, sampler=sampler, **options)
        finally:
            set_track_meta(True)


def whole_cases(config: Config, cases: List[Case]) -> DataLoader:
    """The cases one by one, whole."""
    return DataLoader(_cached(config, cases, loading(config)), batch_size=1, num_workers=config.workers)


def _cached(config: Config, cases: List[Case], steps: List[Transform]) -> CacheDataset:
    """A data set that holds the cases in memory, as they are before the first random step."""
    try:
        return CacheDataset(cases, Compose(steps), cache_rate=config.cache, num_workers=1, progress=False)
    except RuntimeError as error:  # MONAI's, around that of a step
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f'cannot read the data: {cause}') from error
