"""Batches of images, and what happens to images that cannot be read: the run stops with a name, or they are skipped."""

import argparse
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from PIL import Image
from timm.data import ImageDataset, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vmamba.tools.training.runtime import leave_stopping_to_main
from vmamba.tools.training.seeding import seeded
from vmamba.tools.user_errors import UserError, at_least, listed, positive

from .decoding import READ_ERRORS, image_mode, read_image, to_mode
from .labelled_folders import LabelledFiles

SKIPPED = -1  # label of an image that could not be read
_NAMES_SHOWN = 10
_PREPROCESSING = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')


class Samples(Dataset):
    """A dataset's transformed images by index, or by pairs of the augmentation's seed and the index.

    timm replaces an unreadable image by its neighbour without counting it. Here it is marked in `bad`, which loading
    processes share, and its label is SKIPPED; `check` stops the run unless such images are to be skipped.
    With `replace` the next readable image takes the place of a skipped one.
    """

    def __init__(
        self, dataset: Dataset, transform: Optional[Callable], mode: str, skip_bad: bool, replace: bool = False
    ) -> None:
        dataset.transform = None  # of torchvision's and timm's datasets alike
        self.dataset, self.transform, self.mode, self.skip_bad = dataset, transform, mode, skip_bad
        self.tries = len(dataset) if skip_bad and replace else 1
        self.bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self._reported = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Union[int, Tuple[int, int]]) -> Tuple[Any, int]:
        seed, index = key if isinstance(key, tuple) else (None, key)
        image, target = Image.new(self.mode, (1, 1)), SKIPPED
        for offset in range(self.tries):
            candidate = (index + offset) % len(self)
            try:
                image, target = self.read(candidate)
                break
            except READ_ERRORS:
                self.bad[candidate] = True
        with nullcontext() if seed is None else seeded(seed):
            return self.transform(image), target

    def read(self, index: int) -> Tuple[Image.Image, int]:
        """The decoded image and its label."""
        if isinstance(self.dataset, ImageDataset):
            file, target, *_ = self.dataset.reader[index]
            return read_image(file, self.mode), target
        image, target = self.dataset[index]
        return to_mode(image, self.mode), target

    def check(self) -> None:
        """Raises UserError if an unreadable image was found and they are not to be skipped, or if none is readable."""
        if self.skip_bad and self.bad.all():
            raise UserError(f'none of the {len(self)} images can be read, such as {self._name(0, absolute=True)}')
        if not self.skip_bad and self.bad.any():
            index = int(self.bad.nonzero()[0])
            raise UserError(
                f'cannot read the image {self._name(index, absolute=True)} ({self._reason(index)}); repair or remove '
                'it, or give --skip-bad-images'
            )

    def report(self, absolute: bool = False) -> str:
        """The number and names of the skipped images; nothing if there are no more than the last time."""
        indices = self.bad.nonzero().flatten().tolist()
        if len(indices) == self._reported:
            return ''
        self._reported = len(indices)
        names = listed([self._name(index, absolute=absolute) for index in indices], _NAMES_SHOWN)
        return f'skipped {len(indices)} unreadable image(s): {names}'

    def _name(self, index: int, **kwargs: bool) -> str:
        return self.dataset.filename(index, **kwargs) if hasattr(self.dataset, 'filename') else f'image {index}'

    def _reason(self, index: int) -> str:
        try:
            self.read(index)
        except READ_ERRORS as error:
            return ' '.join(str(error).split())
        return 'it was readable at the second try'


class Images:
    """Preprocessed batches of the readable images of a dataset, in order, on the device.

    No loading processes are started for a single batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: Dict[str, Any],
        batch_size: int,
        workers: int,
        device: torch.device,
        skip_bad: bool,
        indices: Optional[Sequence[int]] = None,
    ) -> None:
        mode = image_mode(config['input_size'][0])
        self.samples = Samples(dataset, eval_transform(config), mode, skip_bad)
        self.indices = range(len(dataset)) if indices is None else indices
        workers = useful_workers(workers) if len(self.indices) > batch_size else 0
        self.loader = prefetch(self.samples, config, device, workers, batch_size=batch_size, sampler=self.indices)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Tuple[List[int], Tensor, Tensor]]:
        """Yields indices, images [B, C, H, W] and labels [B]."""
        done = 0
        for images, targets in self.loader:
            self.samples.check()
            indices = self.indices[done : done + len(targets)]
            done += len(targets)
            if not self.samples.skip_bad:  # all are readable: no need to wait for the GPU
                yield list(indices), images, targets
                continue
            readable = targets != SKIPPED
            kept = [index for index, ok in zip(indices, readable.tolist()) if ok]
            if kept:
                yield kept, images[readable], targets[readable]


def useful_workers(wanted: int) -> int:
    """The wanted number of loading processes, but not more than processors: PyTorch warns of more."""
    return min(wanted, os.cpu_count() or 1)


def eval_transform(config: Dict[str, Any]) -> Callable:
    """timm's transform for evaluation; `prefetch` normalises."""
    known = {key: config[key] for key in _PREPROCESSING if key in config}
    return create_transform(**known, is_training=False, use_prefetcher=True)


def create_loader(dataset: Dataset, device: torch.device, workers: int, **options: Any) -> DataLoader:
    """PyTorch's loader, whose processes stay from epoch to epoch and leave signals to the main one."""
    own = dict(persistent_workers=workers > 0, worker_init_fn=leave_stopping_to_main)
    return DataLoader(dataset, num_workers=workers, pin_memory=device.type == 'cuda', **{**own, **options})


def prefetch(
    samples: Dataset, config: Dict[str, Any], device: torch.device, workers: int, **loader_args: Any
) -> PrefetchLoader:
    """Batches that are copied to the device and normalised there while the model works on the previous one."""
    loader = create_loader(samples, device, workers, collate_fn=fast_collate, **loader_args)
    normalisation = {name: config[name] for name in ('mean', 'std')}
    return PrefetchLoader(loader, channels=config['input_size'][0], device=device, **normalisation)


def load_images(
    paths: Sequence[Path], config: Dict[str, Any], args: argparse.Namespace, indices: Optional[Sequence[int]] = None
) -> Images:
    """Batches of image files, or of those with these indices, by the device and the options of `add_loader_options`."""
    dataset = ImageDataset('', reader=LabelledFiles([(str(path), 0) for path in paths], {}, Path()))
    return Images(dataset, config, args.batch_size, args.workers, args.device, args.skip_bad_images, indices)


def add_loader_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('images')
    group.add_argument('--batch-size', type=positive, default=64)
    group.add_argument('--workers', type=at_least(0), default=4, help='processes that read images; 0 for none')
    group.add_argument('--skip-bad-images', action='store_true', help='skip unreadable images instead of stopping')


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the first class and one of the first five are right [B, 2].

    Args:
        logits: [B, classes].
        labels: Class of each image [B], or whether each class is right [B, classes].
    """
    top = logits.topk(min(5, logits.shape[-1])).indices
    right = labels.gather(1, top) if labels.ndim == 2 else top == labels[:, None]
    return torch.stack([right[:, 0], right.any(dim=1)], dim=1)
