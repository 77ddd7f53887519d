"""Image files for timm's loader: an unreadable one is counted and named instead of being replaced by its neighbour."""

import argparse
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from timm.data.readers.img_extensions import get_img_extensions, is_img_extension
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader
from user_errors import UserError, at_least, listed, positive

from .decoding import READ_ERRORS, image_mode, read_image, why_unreadable

UNREADABLE = -1
_FEATURES = {'settings.json', 'progress.npy'}  # in every folder that extract_features.py writes
_NAMES_SHOWN = 5


class FileList:
    """Reader in timm's sense: files and the number that comes with each."""

    def __init__(self, samples: Sequence[Tuple[Path, int]]) -> None:
        self.samples = list(samples)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        path, target = self.samples[index]
        return open(path, 'rb'), target

    def __len__(self) -> int:
        return len(self.samples)


class CheckedImages(ImageDataset):
    """timm's dataset but for unreadable files: their target is UNREADABLE and their image is black.

    timm's own gives the next readable image in the place of a broken one, so that some images count twice.
    """

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, int]:
        path, target = self.reader.samples[index]
        try:
            image = read_image(path, self.input_img_mode)
        except READ_ERRORS:
            image, target = Image.new(self.input_img_mode, (8, 8)), UNREADABLE
        return self.transform(image), target


def make_loader(samples: Sequence[Tuple[Path, int]], config: Dict[str, Any], args: argparse.Namespace) -> DataLoader:
    """timm's loader of (images, targets), in order.

    Args:
        samples: Files and targets.
        config: Preprocessing, see `weights.data_config`.
        args: With the options of `add_loader_options`.
    """
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    return create_loader(
        CheckedImages('', reader=FileList(samples), input_img_mode=image_mode(config['input_size'][0])),
        batch_size=args.batch_size,
        use_prefetcher=False,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=args.device == 'cuda',
        **{key: config[key] for key in keys},
    )


def add_loader_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('images')
    group.add_argument('--batch-size', type=positive, default=64)
    group.add_argument('--workers', type=at_least(0), default=4, help='processes that read images; 0 for none')
    group.add_argument(
        '--skip-bad-images', action='store_true', help='leave unreadable images out and name them, instead of stopping'
    )


class Unreadable:
    """Keeps the names of unreadable images, or stops at the first.

    Args:
        skip: Leave them out instead of stopping.
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.paths: List[Path] = []

    def add(self, path: Path) -> None:
        self.paths.append(path)
        if not self.skip:
            why = why_unreadable(path)
            raise UserError(
                f'cannot read the image {path}{f" ({why})" if why else ""}; repair or remove it, or leave such out: '
                '--skip-bad-images'
            )

    def summary(self) -> str:
        """'2 unreadable images left out: a.png, b.png', or nothing."""
        if not self.paths:
            return ''
        names = listed(self.paths, _NAMES_SHOWN)
        return f'{len(self.paths)} unreadable image{"s" * (len(self.paths) > 1)} left out: {names}'


def find_images(source: Path, arrays: bool = False, without: Optional[Path] = None) -> List[Path]:
    """Image files of a folder and those below it in natural order, or the files that a text file lists, one a line.

    Links are followed. Folders of features that lie among the images are left out.

    Args:
        source: Folder, text file with paths relative to its own folder, or one image.
        arrays: Take .npy files, too.
        without: Folder below the source to leave out.

    Raises:
        UserError: If there is nothing of the kind.
    """
    if not source.exists():
        raise UserError(f'there is no folder or list of images {source}')
    if source.is_file() and _is_image(source, arrays):
        return [source]
    if source.is_file():
        try:
            lines = source.read_text().splitlines()
        except UnicodeDecodeError:
            with_arrays = '' if arrays else ' (one of .npy is read with --native)'
            raise UserError(f'{source} is neither an image{with_arrays} nor a text file with a path a line') from None
        paths = [source.parent / line.strip() for line in lines if line.strip()]
    else:
        found = (path for path in _files_below(source, without) if _is_image(path, arrays))
        paths = sorted(found, key=lambda path: natural_key(str(path)))
    if not paths:
        endings = ', '.join([*get_img_extensions(), *(['.npy'] if arrays else [])])
        raise UserError(f'{source} holds no images; their names must end in {endings}')
    return paths


def _files_below(folder: Path, without: Optional[Path]) -> Iterator[Path]:
    """Files of a folder and those below it, behind links too, but for one folder and for written features."""
    left_out = without and os.path.realpath(without)
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(parent)
        leads_up = os.path.islink(parent) and Path(here) in Path(os.path.realpath(os.path.dirname(parent)), '_').parents
        if here == left_out or leads_up or _FEATURES <= set(names):
            folders.clear()
        else:
            yield from (Path(parent, name) for name in names)


def _is_image(path: Path, arrays: bool) -> bool:
    return (is_img_extension(path.suffix.lower()) or (arrays and path.suffix == '.npy')) and path.is_file()
