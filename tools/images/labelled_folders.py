"""Image files with labels: class folders, CSV files, and which class of a model each label is."""

import hashlib
import json
import os
import pkgutil
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from timm.data import ImageNetInfo
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key
from torch import Tensor

from vmamba.tools.user_errors import UserError, as_user_error, listed

from .image_files import walk

Sample = Tuple[str, int]
_SEVERITIES = {'1', '2', '3', '4', '5'}
_NAMES_SHOWN = 5


class LabelledFiles(ReaderImageFolder):
    """timm's reader of image files with class indices, and the class folders without images."""

    def __init__(
        self, samples: Sequence[Sample], class_to_idx: Dict[str, int], root: Path, empty: Sequence[str] = ()
    ) -> None:
        Reader.__init__(self)  # timm's own reader follows links in circles
        self.samples, self.class_to_idx, self.root, self.empty = list(samples), class_to_idx, str(root), list(empty)

    def real_paths(self) -> List[str]:
        """Where the files are, behind links."""
        folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path, _ in self.samples}}
        return [
            os.path.realpath(path) if os.path.islink(path) else os.path.join(folders[head], tail)
            for path, (head, tail) in ((path, os.path.split(path)) for path, _ in self.samples)
        ]

    def hold_out(self, fraction: float, seed: int) -> Tuple['LabelledFiles', 'LabelledFiles']:
        """Splits the files into those to train on and a share of each class to validate on.

        A file's place depends on its path and the seed, so the split does not depend on the order of the files. A
        class of several images has at least one in each part. Links to a file of the first part stay in it.

        Raises:
            UserError: If no class has two images.
        """
        members: Dict[int, List[Tuple[bytes, str]]] = {}
        for path, label in self.samples:
            key = hashlib.blake2b(f'{seed} {Path(os.path.relpath(path, self.root)).as_posix()}'.encode()).digest()
            members.setdefault(label, []).append((key, path))
        held = set()
        for paths in members.values():
            count = min(max(round(fraction * len(paths)), 1), len(paths) - 1)
            held.update(path for _, path in sorted(paths)[:count])
        real = dict(zip((path for path, _ in self.samples), self.real_paths()))
        kept = {real[path] for path in real.keys() - held}
        held = {path for path in held if real[path] not in kept}
        if not held:
            raise UserError(f'{self.root} has no class of two images, so none can be held out for validation')
        parts = [[s for s in self.samples if (s[0] in held) is chosen] for chosen in (False, True)]
        train, validation = (LabelledFiles(part, self.class_to_idx, Path(self.root)) for part in parts)
        return train, validation


def read_folder(
    root: Path,
    class_map: Any = None,
    input_key: Optional[str] = None,
    top: bool = False,
    key: Callable[[str], Any] = natural_key,
) -> LabelledFiles:
    """Images of a folder of class folders; links are followed by `walk`.

    Args:
        root: Folder.
        class_map: timm's map from class to index (a file or a dictionary); images of other classes are left out.
        input_key: Endings of the image files, separated by ';'; default: timm's.
        top: The class of an image is the folder directly below the root, as in torchvision. By default it is the folder
            that holds the image, as in timm.
        key: Sorts the classes.

    Raises:
        UserError: If there is no such folder, no class folder or no image, or an image outside of the class folders.
    """
    if not root.is_dir():
        raise UserError(f'there is no folder {root}')
    endings = input_key.split(';') if input_key else get_img_extensions()
    images: Dict[str, List[str]] = {}
    folders_of: Dict[str, str] = {}
    for path, _, folders, files in walk(root):
        found = [os.path.join(path, name) for name in files if os.path.splitext(name)[1].lower() in endings]
        if path == str(root):
            if found:
                raise UserError(f'{found[0]} is in no class folder: expected {root}/CLASS/IMAGE')
        elif top or found or not folders:
            label = Path(path).relative_to(root).parts[0] if top else os.path.basename(path)
            images.setdefault(label, []).extend(found)
            folders_of.setdefault(label, path)
    if not images:
        raise UserError(f'{root} has no class folders: expected {root}/CLASS/IMAGE')
    class_to_idx = load_class_map(class_map, str(root)) if class_map else None
    if class_to_idx is None:
        class_to_idx = {label: index for index, label in enumerate(sorted(images, key=key))}
    pairs = [(path, label) for label, paths in images.items() for path in paths if label in class_to_idx]
    if not pairs:
        raise UserError(
            f'{root} holds no images in its {len(images)} class folders; their names must end in {", ".join(endings)}'
        )
    samples = sorted(((path, class_to_idx[label]) for path, label in pairs), key=lambda sample: key(sample[0]))
    empty = [folders_of[label] for label, paths in images.items() if not paths and label in class_to_idx]
    return LabelledFiles(samples, class_to_idx, root, sorted(empty))


def read_csv(path: Path, splits: Sequence[Sequence[str]]) -> List[LabelledFiles]:
    """The images that a CSV file lists in its columns `path` (relative to the file) and `label`.

    Args:
        path: CSV file with a header.
        splits: Names of each split in the optional column `split`. Rows of the split 'test' are left out.

    Returns:
        The files of each split; without the column, or where all rows have the first split, one reader of all files.

    Raises:
        UserError: If a column, a label or a file is missing, or a split is unknown.
    """
    import pandas as pd  # here: only this needs it

    with as_user_error(f'cannot read {path} as CSV'):
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, encoding='utf-8-sig').fillna('')
    if not {'path', 'label'} <= {*rows}:
        raise UserError(f'{path} must begin with the header path,label; its columns are {", ".join(rows)}')
    rows = rows.apply(lambda column: column.str.strip())
    rows['split'] = rows['split'].replace('', splits[0][0]) if 'split' in rows else splits[0][0]
    parts = {name: i for i, names in enumerate(splits) for name in names}
    for number, row in zip(rows.index + 2, rows.itertuples()):
        if not row.path or not row.label:
            raise UserError(f'{path}, line {number}: the path or the label is empty')
        if row.split not in parts and row.split != 'test':
            raise UserError(f'{path}, line {number}: split {row.split!r} is not train, val or test')
    rows = rows[rows.split.isin(parts)]
    if rows.empty:
        raise UserError(f'{path} lists no images')
    files = [str(path.parent / name) for name in rows.path]
    absent = [file for file in files if not os.path.isfile(file)]
    if absent:
        raise UserError(f'{path} lists {len(absent)} files that do not exist: {listed(absent, _NAMES_SHOWN)}')
    class_to_idx = {label: index for index, label in enumerate(sorted(rows.label.unique(), key=natural_key))}
    samples: List[List[Sample]] = [[] for _ in splits]
    for file, label, split in zip(files, rows.label, rows.split):
        samples[parts[split]].append((file, class_to_idx[label]))
    return [LabelledFiles(part, class_to_idx, path.parent) for part in samples if part]


def folder_names(roots: Sequence[Path]) -> List[str]:
    """What to call each folder: its own name, or where several have it the path as it was given."""
    names = [root.resolve().name for root in roots]
    return [name if name and names.count(name) == 1 else str(root) for name, root in zip(names, roots)]


def corruption_folders(root: Path) -> List[Path]:
    """The folders CORRUPTION/SEVERITY of ImageNet-C, also those of its parts: GROUP/CORRUPTION/SEVERITY.

    Raises:
        UserError: If there are none.
    """
    if not root.is_dir():
        raise UserError(f'there is no folder {root}')
    found = []
    for path, _, folders, _ in walk(root):
        depth, is_severity = len(Path(path).relative_to(root).parts), Path(path).name in _SEVERITIES
        if depth in (2, 3) and is_severity and folders:
            found.append(Path(path))
        if depth == 3 or (depth == 2 and is_severity):
            folders.clear()
    if not found:
        raise UserError(f'{root} has no folders CORRUPTION/SEVERITY with severities 1 to 5, as ImageNet-C has')
    return sorted(found)


def read_class_map(path: Path) -> Dict[str, int]:
    """Index of each class of a text file with the names of the model's classes, one a line."""
    if not path.is_file():
        raise UserError(f'there is no class map {path}: a text file with the names of class folders, one a line')
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        raise UserError(f'the class map {path} is no text file with the names of class folders, one a line') from None
    return {line.strip(): index for index, line in enumerate(lines) if line.strip()}


def class_indices(
    name: str, classes: Sequence[str], num_classes: int, class_map: Optional[Dict[str, int]] = None
) -> List[int]:
    """The model's class of every class folder of a folder of this name.

    By the class map if there is one. Else by ImageNet-1K's synsets, or by the folders' names where those are numbers
    (as ImageNet-V2's), for a model of 1000 classes; else in natural order, for as many folders as classes.

    Raises:
        UserError: If folders and classes do not fit together.
    """
    if class_map is None and num_classes == 1000:
        synsets = {name: index for index, name in enumerate(ImageNetInfo('imagenet-1k').label_names())}
        numbers = {str(index): index for index in range(num_classes)}
        class_map = next((known for known in (synsets, numbers) if known.keys() >= set(classes)), None)
    if class_map is not None:
        unknown = [label for label in classes if class_map.get(label, num_classes) >= num_classes]
        if unknown:
            raise UserError(
                f"{name}: the class map or the checkpoint has none of the model's {num_classes} classes for the "
                f'folders {", ".join(unknown[:_NAMES_SHOWN])}'
            )
        return [class_map[label] for label in classes]
    if len(classes) != num_classes:
        raise UserError(
            f'{name} has {len(classes)} class folders, but the model has {num_classes} classes: give a '
            f"checkpoint of these classes, or --class-map FILE with the names of the model's classes in their order"
        )
    return list(range(num_classes))


def read_real_labels(path: Optional[Path], paths: Sequence[Path]) -> Tensor:
    """Whether each of ImageNet's classes is right [n, 1000] by ReaL's labels, https://arxiv.org/abs/2006.07159.

    An image may have several labels or none. timm's RealLabelsImagenet needs all 50,000 images in order; here any of
    them are found by the number in their names.

    Args:
        path: The file real.json, a list of lists; None for the copy in timm.
        paths: Images, named ILSVRC2012_val_00000001 and so on.
    """
    if path is None:
        text = pkgutil.get_data('timm.data', '_info/imagenet_real_labels.json').decode()
    elif path.is_file():
        text = path.read_bytes()
    else:
        raise UserError(f'there is no file of real labels {path}')
    with as_user_error(f'{path} is not a JSON list of lists of labels'):
        labels = [[int(label) for label in found] for found in json.loads(text)]
    numbers = [re.fullmatch(r'ILSVRC2012_val_(\d{8})', image.stem) for image in paths]
    for image, number in zip(paths, numbers):
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise UserError(f'{image} has no real labels: names must be ILSVRC2012_val_00000001 to {len(labels):08d}')
    right = torch.zeros(len(paths), 1000, dtype=torch.bool)
    for row, number in zip(right, numbers):
        row[labels[int(number[1]) - 1]] = True
    return right
