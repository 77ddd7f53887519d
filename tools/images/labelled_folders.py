"""Folders of labelled images: which class of the model each image is."""

import json
import os
import pkgutil
import re
from pathlib import Path
from typing import Any, Callable, Dict, FrozenSet, List, NamedTuple, Optional, Sequence, Tuple, Union

from timm.data import ImageNetInfo
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key
from torchvision.datasets import ImageFolder
from vmamba.tools.user_errors import UserError

from .image_files import has_image_ending, walk

Sample = Tuple[Path, int]
_SEVERITIES = {'1', '2', '3', '4', '5'}
_NAMES_SHOWN = 5


class Folder(NamedTuple):
    """Labelled images.

    Attributes:
        name: What to call it in the report.
        samples: Files and their class folders, as indices of classes.
        classes: Names of the class folders, in natural order.
        empty: Those that hold no images.
    """

    name: str
    samples: List[Sample]
    classes: List[str]
    empty: List[str]


class FolderReader(ReaderImageFolder):
    """timm's reader of images labelled by the folder that they lie in, with links followed by `walk`."""

    def __init__(self, root: str, class_map: Any = None, input_key: Optional[str] = None) -> None:
        Reader.__init__(self)  # that of the parent follows links in circles
        self.root = root
        endings = set(input_key.split(';')) if input_key else get_img_extensions(as_set=True)
        found = [
            (entry.path, '' if path == root else os.path.basename(path))
            for path, _, _, files in walk(root)
            for entry in files
            if os.path.splitext(entry.name)[1].lower() in endings
        ]
        if class_map:
            self.class_to_idx = load_class_map(class_map, root)
        else:
            labels = sorted({label for _, label in found}, key=natural_key)
            self.class_to_idx = {label: index for index, label in enumerate(labels)}
        samples = [(path, self.class_to_idx[label]) for path, label in found if label in self.class_to_idx]
        if not samples:
            raise RuntimeError(f'it holds no images; their names must end in {", ".join(sorted(endings))}')
        self.samples = sorted(samples, key=lambda sample: natural_key(sample[0]))


class TorchFolder(ImageFolder):
    """torchvision's dataset of class folders, with links followed by `walk`."""

    @staticmethod
    def make_dataset(
        directory: str,
        class_to_idx: Dict[str, int],
        extensions: Optional[Tuple[str, ...]] = None,
        is_valid_file: Optional[Callable[[str], bool]] = None,
        allow_empty: bool = False,
    ) -> List[Tuple[str, int]]:
        is_image = is_valid_file or (lambda path: path.lower().endswith(extensions))
        found = [
            (_label(path, directory), path, entry.name)
            for path, _, _, files in walk(directory)
            for entry in files
            if path != directory and is_image(entry.path)
        ]
        empty = sorted(class_to_idx.keys() - {label for label, _, _ in found})
        if empty and not allow_empty:
            raise FileNotFoundError(f'there are no images in the class folders {", ".join(empty)}')
        return [(os.path.join(path, name), class_to_idx[label]) for label, path, name in sorted(found)]


def _label(path: str, root: Union[str, Path]) -> str:
    """The class folder of a folder below a root."""
    return Path(path).relative_to(root).parts[0]


def folder_names(roots: Sequence[Path]) -> List[str]:
    """What to call each folder: its own name, or where several have it the path as it was given."""
    names = [root.resolve().name for root in roots]
    return [name if name and names.count(name) == 1 else str(root) for name, root in zip(names, roots)]


def read_folder(root: Path, name: str) -> Folder:
    """Images of a folder of class folders. Classes are all its folders, those without images included.

    Raises:
        UserError: If there is no such folder, no class folder, or an image outside of them.
    """
    if not root.is_dir():
        raise UserError(f'there is no folder {root}')
    images: Dict[str, List[Path]] = {}
    for path, _, _, files in walk(root):
        if path != str(root):
            found = [Path(entry.path) for entry in files if has_image_ending(entry.name)]
            images.setdefault(_label(path, root), []).extend(found)
    if not images:
        raise UserError(f'{root} has no class folders: expected {root}/CLASS/IMAGE')
    classes = sorted(images, key=natural_key)
    samples = [
        (path, index)
        for index, label in enumerate(classes)
        for path in sorted(images[label], key=lambda path: natural_key(str(path)))
    ]
    empty = [label for label in classes if not images[label]]
    if not samples:
        endings = ', '.join(get_img_extensions())
        raise UserError(
            f'{root} holds no images in its {len(classes)} class folders; their names must end in {endings}'
        )
    return Folder(name, samples, classes, empty)


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


def class_indices(folder: Folder, num_classes: int, class_map: Optional[Dict[str, int]] = None) -> List[int]:
    """The model's class of every class folder.

    By the class map if there is one. Else by ImageNet-1K's synsets, or by the folders' names where those are numbers
    (as ImageNet-V2's), for a model of 1000 classes; else in natural order, for as many folders as classes.

    Raises:
        UserError: If folders and classes do not fit together.
    """
    if class_map is None and num_classes == 1000:
        synsets = {name: index for index, name in enumerate(ImageNetInfo('imagenet-1k').label_names())}
        numbers = {str(index): index for index in range(num_classes)}
        class_map = next((names for names in (synsets, numbers) if names.keys() >= set(folder.classes)), None)
    if class_map is not None:
        unknown = [name for name in folder.classes if class_map.get(name, num_classes) >= num_classes]
        if unknown:
            raise UserError(
                f"{folder.name}: the class map gives none of the model's {num_classes} classes to the folders "
                f'{", ".join(unknown[:_NAMES_SHOWN])}'
            )
        return [class_map[name] for name in folder.classes]
    if len(folder.classes) != num_classes:
        raise UserError(
            f'{folder.name} has {len(folder.classes)} class folders, but the model has {num_classes} classes: give a '
            f"checkpoint of these classes, or --class-map FILE with the names of the model's classes in their order"
        )
    return list(range(num_classes))


def read_real_labels(path: Optional[Path], paths: Sequence[Path]) -> List[FrozenSet[int]]:
    """ReaL's labels of images of ImageNet's validation set, found by the number in their names.

    "Are we done with ImageNet?", https://arxiv.org/abs/2006.07159. An image may have several labels, or none: such a
    one does not count.

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
    try:
        labels = [frozenset(found) for found in json.loads(text)]
    except (ValueError, TypeError) as error:
        raise UserError(f'{path} is not a JSON list of lists of labels: {error}') from error
    numbers = [re.fullmatch(r'ILSVRC2012_val_(\d{8})', image.stem) for image in paths]
    for image, number in zip(paths, numbers):
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise UserError(f'{image} has no real labels: names must be ILSVRC2012_val_00000001 to {len(labels):08d}')
    return [labels[int(number[1]) - 1] for number in numbers]
