"""The two splits of the configured data: found where they are said to be, and nothing of one in the other."""

import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple

from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset
from vmamba.tools.images.decoding import image_mode
from vmamba.tools.images.image_files import has_image_ending, walk
from vmamba.tools.images.labelled_folders import FolderReader, TorchFolder
from vmamba.tools.images.packaged_data import PREFIX, create_packaged_dataset
from vmamba.tools.user_errors import UserError, listed, nearest

from .config import Config, option_of

SYNTHETIC = 'synthetic'
NAMES_SHOWN = 10
_TORCH_FOLDERS = ('torch/folder', 'torch/image_folder')
_PREFIXES = ('hfds/', 'hfids/', 'tfds/', 'wds/', 'torch/')  # timm takes any other name for a folder's
_SYNONYMS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'))  # in timm's order
_ALL = 'all'  # split of the packaged images


def load_datasets(config: Config) -> List[Dataset]:
    """Training and validation split, none of synthetic data.

    Raises:
        UserError: If they are not there, or what would be validated on would also be trained on.
    """
    if config.data == SYNTHETIC:
        return []
    _check_name(config)
    if config.train_split == config.val_split:
        raise UserError(f'train_split and val_split are both {config.val_split!r}: choose another split to validate on')
    if config.data.startswith(PREFIX):
        datasets = [_packaged(config, split) for split in (config.train_split, config.val_split)]
    elif config.data in ('', *_TORCH_FOLDERS):
        datasets = _folders(config)
    else:
        datasets = [_create(config, split, config.data_dir) for split in (config.train_split, config.val_split)]
        _check_torchvision(config, *datasets)
    _check_classes(*datasets)
    return datasets


def class_names(dataset: Dataset) -> Optional[Dict[str, int]]:
    """Index of every class, where the dataset knows it."""
    return getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)


def _check_name(config: Config) -> None:
    name = config.data
    if not name or name.startswith(PREFIX) or name.lower().startswith(_PREFIXES):
        return
    known = (SYNTHETIC, PREFIX, *_PREFIXES)
    guess = nearest(name.partition('/')[0] + '/', known) or nearest(name, known)
    raise UserError(
        f"data {name!r} is none of {', '.join(prefix + '...' for prefix in (PREFIX, *_PREFIXES))}, {SYNTHETIC} and '' "
        f'for the folder data_dir{guess}'
    )


def _packaged(config: Config, split: str) -> Dataset:
    if split == _ALL:
        raise UserError(f'{config.data} has the images of both other splits in {_ALL!r}: choose train or validation')
    try:
        return create_packaged_dataset(config.data, split, image_mode(config.in_chans))
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error


def _folders(config: Config) -> List[Dataset]:
    """Images by class, in a folder (or tar file) for each split."""
    if config.data_dir is None:
        raise UserError('no data: give --data-dir FOLDER, or --data packaged/mnist5k, or --data synthetic')
    if not Path(config.data_dir).exists():
        raise UserError(f'there is no folder {config.data_dir}; --data-dir names the folder of the data')
    splits = {key: getattr(config, key) for key in ('train_split', 'val_split')}
    paths = [_find(Path(config.data_dir), key, split) for key, split in splits.items()]
    _check_apart(*paths)
    return [_create(config, split, str(path)) for split, path in zip(splits.values(), paths)]


def _check_apart(train: Path, validation: Path) -> None:
    """Raises UserError if an image is in both splits, directly or through links."""
    shared = {train.resolve()} & {validation.resolve()}
    (folders, linked), (other_folders, other_linked) = _real_paths(train), _real_paths(validation)
    shared |= (folders & other_folders) | (linked & other_linked)
    shared |= {path for path in linked if path.parent in other_folders}
    shared |= {path for path in other_linked if path.parent in folders}
    if shared:
        raise UserError(
            f'images to validate on must not be trained on: part {train} and {validation}, which share {min(shared)}'
        )


def _real_paths(root: Path) -> Tuple[Set[Path], Set[Path]]:
    """Of the images at and below a folder: the folders that they are in, and the files that links lead to."""
    folders, linked = set(), set()
    for _, real, _, files in walk(root):
        images = [entry for entry in files if has_image_ending(entry.name)]
        if images:
            folders.add(Path(real))
        linked.update(Path(os.path.realpath(entry.path)) for entry in images if entry.is_symlink())
    return folders, linked


def _find(root: Path, key: str, split: str) -> Path:
    """The folder of a split, which timm would look for in the same places before it took all of the data."""
    names = [split, *next((names for names in _SYNONYMS if split in names), ())]
    found = next((root / name for name in names if name and (root / name).exists()), None)
    if found:
        return found
    there = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    has = listed(there, NAMES_SHOWN) or 'nothing'
    way_out = f'{option_of(key)} names the folder in it{nearest(split, there)}'
    raise UserError(f'{root} has no {split!r}; it has {has}: {way_out}')


def _create(config: Config, split: str, root: Optional[str]) -> Dataset:
    mode = image_mode(config.in_chans)
    extra: Dict[str, Any] = dict(input_img_mode=mode, seed=config.seed, batch_size=config.batch_size)
    if config.data.lower().startswith('torch/'):
        extra = {}
    args = {'is_training': split == config.train_split, **extra, **config.data_args}
    try:
        if config.data in _TORCH_FOLDERS:
            return TorchFolder(root, **config.data_args)
        if not config.data and Path(root).is_dir():
            return ImageDataset(root, reader=FolderReader(root, **config.data_args), input_img_mode=mode)
        return create_dataset(config.data, root=root, split=split, search_split=False, **args)
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, ImportError) as error:
        where = f'{config.data or "the folder"} {root or ""}'.strip()
        raise UserError(f'cannot open {where}, split {split!r}: {" ".join(str(error).split())}') from error


def _check_torchvision(config: Config, train: Dataset, validation: Dataset) -> None:
    """Torchvision's small datasets have two parts, and timm takes the one for tests at any name but two."""
    for key, dataset, expected in (('train_split', train, True), ('val_split', validation, False)):
        if getattr(dataset, 'train', expected) is not expected:
            part, right = ('test', 'train') if expected else ('training', 'test')
            raise UserError(f'{key} {getattr(config, key)!r} of {config.data} are the {part} images: choose {right!r}')


def _check_classes(train: Dataset, validation: Dataset) -> None:
    """Raises UserError for folders of classes without images, and for splits with different classes."""
    for dataset in (train, validation):
        reader = getattr(dataset, 'reader', None)
        if isinstance(reader, FolderReader):
            _check_filled(Path(reader.root), reader.class_to_idx)
    ours, theirs = class_names(train), class_names(validation)
    if ours and theirs and ours != theirs:
        differ = sorted(map(str, ours.keys() ^ theirs.keys())) or ['their order']
        raise UserError(f'training and validation have different classes: {", ".join(differ[:NAMES_SHOWN])}')


def _check_filled(root: Path, classes: Dict[str, int]) -> None:
    leaves = [path for path in root.rglob('*') if path.is_dir() and path.name not in classes]
    empty = [str(path) for path in leaves if not any(child.is_dir() for child in path.iterdir())]
    if empty:
        shown = ', '.join(sorted(empty)[:NAMES_SHOWN])
        raise UserError(f'{len(empty)} class folder(s) without an image: {shown}; fill or remove them')
