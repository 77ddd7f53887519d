"""The training and validation split of the configured data, which share no image."""

import importlib.util
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset

from vmamba.tools.images.decoding import image_mode
from vmamba.tools.images.labelled_folders import LabelledFiles, read_csv, read_folder
from vmamba.tools.images.packaged_data import PREFIX, create_packaged_dataset
from vmamba.tools.user_errors import UserError, as_user_error, listed, nearest

from .config import Config, option_of

SYNTHETIC = 'synthetic'
NAMES_SHOWN = 10
WRONG = AssertionError, OSError, RuntimeError, TypeError, ValueError  # what timm raises
VAL_FRACTION = 0.2
_TORCH_FOLDERS = ('torch/folder', 'torch/image_folder')
_PREFIXES = ('hfds/', 'hfids/', 'tfds/', 'wds/', 'torch/')  # timm takes any other name for a folder's
_SYNONYMS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'))  # in timm's order
_PACKAGES = {'hfds': 'datasets', 'hfids': 'datasets', 'tfds': 'tensorflow_datasets', 'wds': 'webdataset'}


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
    if config.val_fraction is not None and config.data not in ('', *_TORCH_FOLDERS):
        raise UserError(
            f'val_fraction is for a folder or a CSV file, not for {config.data}; Hugging Face datasets take slices: '
            "--train-split 'train[:80%]' --val-split 'train[80%:]'"
        )
    if config.data.startswith(PREFIX):
        datasets = _packaged(config)
    elif config.data in ('', *_TORCH_FOLDERS):
        datasets = _files(config)
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
        f'data {name!r} is neither a folder nor a CSV file, nor one of '
        f'{", ".join(prefix + "..." for prefix in (PREFIX, *_PREFIXES))} and {SYNTHETIC}{guess}'
    )


def _packaged(config: Config) -> List[Dataset]:
    names = config.train_split, config.val_split
    with as_user_error():
        datasets = [create_packaged_dataset(config.data, name, image_mode(config.in_chans)) for name in names]
    if {*datasets[0].reader.indices} & {*datasets[1].reader.indices}:
        shared = '{!r} and {!r} of {} share images'.format(*names, config.data)
        raise UserError(f'images to validate on must not be trained on: {shared}; choose train and validation')
    return datasets


def _files(config: Config) -> List[Dataset]:
    """Images by class: in a folder (or tar file) for each split, in one folder without splits, or in a CSV file."""
    if config.data_dir is None:
        raise UserError('no data: give --data FOLDER, --data FILE.csv, --data packaged/mnist5k or --data synthetic')
    root = Path(config.data_dir)
    if not root.exists():
        raise UserError(f'there is no folder or CSV file {root}; --data names the data')
    if root.suffix.lower() == '.csv':
        parts = read_csv(root, [_names_of(split) for split in (config.train_split, config.val_split)])
        return _datasets(config, parts, root)
    if _is_whole(root, config):
        return _datasets(config, [_read_folder(config, root)], root)
    splits = [_find(root, 'train_split', config.train_split)]
    if config.val_fraction is None:
        splits.append(_find(root, 'val_split', config.val_split))
    if len(splits) == 2 and not all(split.is_dir() for split in splits):  # tar files
        return [_folder(config, split) for split in splits]
    return _datasets(config, [_read_folder(config, split) for split in splits], root)


def _is_whole(root: Path, config: Config) -> bool:
    """Whether a folder has class folders and no splits: no name of a split is in it, and none was given."""
    default = Config.train_split, Config.val_split
    names = {*_names_of(default[0]), *_names_of(default[1]), 'test'}
    entries = {path.name for path in root.iterdir()} if root.is_dir() else names
    return (config.train_split, config.val_split) == default and not entries & names and bool(entries)


def _datasets(config: Config, parts: List[LabelledFiles], source: Path) -> List[Dataset]:
    """Datasets of both splits; if there is one part, a share of it is held out for validation."""
    if len(parts) == 1:
        parts = list(parts[0].hold_out(config.val_fraction or VAL_FRACTION, config.seed))
    elif config.val_fraction is not None:
        raise UserError(f'{source} has a validation split already: leave val_fraction out')
    else:
        shared = set.intersection(*(set(part.real_paths()) for part in parts))
        if shared:
            raise UserError(f'images to validate on must not be trained on: {source} has {min(shared)} in both splits')
    return [ImageDataset(part.root, reader=part, input_img_mode=image_mode(config.in_chans)) for part in parts]


def _names_of(split: str) -> Sequence[str]:
    """A split and its synonyms."""
    return (split, *next((names for names in _SYNONYMS if split in names), ()))


def _find(root: Path, key: str, split: str) -> Path:
    """The folder of a split, which timm would look for in the same places before it took all of the data."""
    found = next((root / name for name in _names_of(split) if name and (root / name).exists()), None)
    if found:
        return found
    there = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    has = listed(there, NAMES_SHOWN) or 'nothing'
    way_out = f'{option_of(key)} names the folder in it{nearest(split, there)}'
    raise UserError(f'{root} has no {split!r}; it has {has}: {way_out}')


def _folder(config: Config, root: Path) -> Dataset:
    if root.is_dir():
        return ImageDataset(root, reader=_read_folder(config, root), input_img_mode=image_mode(config.in_chans))
    return _create(config, root.name, str(root))  # a tar file


def _read_folder(config: Config, root: Path) -> LabelledFiles:
    as_torchvision = dict(top=True, key=str) if config.data in _TORCH_FOLDERS else {}
    with as_user_error(f'data_args {config.data_args} do not fit the folder {root}', *WRONG):
        files = read_folder(root, **as_torchvision, **config.data_args)
    if files.empty:
        shown = listed(files.empty, NAMES_SHOWN)
        raise UserError(f'{len(files.empty)} class folder(s) without an image: {shown}; fill or remove them')
    return files


def _create(config: Config, split: str, root: Optional[str]) -> Dataset:
    """A dataset by timm."""
    prefix = config.data.lower().partition('/')[0]
    package = _PACKAGES.get(prefix)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f'{config.data} needs the package {package}: pip install {package.replace("_", "-")}')
    extra = dict(input_img_mode=image_mode(config.in_chans), seed=config.seed, batch_size=config.batch_size)
    args = {'is_training': split == config.train_split, **(extra if prefix != 'torch' else {}), **config.data_args}
    where = f'{config.data or "the folder"} {root or ""}'.strip()
    with as_user_error(f'cannot open {where}, split {split!r}', *WRONG, ImportError):
        return create_dataset(config.data, root=root, split=split, search_split=False, **args)


def _check_torchvision(config: Config, train: Dataset, validation: Dataset) -> None:
    """Torchvision's small datasets have two parts, and timm takes the one for tests at any name but two."""
    for key, dataset, expected in (('train_split', train, True), ('val_split', validation, False)):
        if getattr(dataset, 'train', expected) is not expected:
            part, right = ('test', 'train') if expected else ('training', 'test')
            raise UserError(f'{key} {getattr(config, key)!r} of {config.data} are the {part} images: choose {right!r}')


def _check_classes(train: Dataset, validation: Dataset) -> None:
    """Raises UserError for splits with different classes."""
    ours, theirs = class_names(train), class_names(validation)
    if ours and theirs and ours != theirs:
        differ = sorted(map(str, ours.keys() ^ theirs.keys())) or ['their order']
        raise UserError(f'training and validation have different classes: {", ".join(differ[:NAMES_SHOWN])}')
