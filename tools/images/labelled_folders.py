"""Folders of labelled images: which class of the model each image is."""

import json
import pkgutil
import re
from pathlib import Path
from typing import Dict, FrozenSet, List, NamedTuple, Optional, Sequence, Tuple

from timm.data import ImageNetInfo
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key
from user_errors import UserError

Sample = Tuple[Path, int]
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
    classes = sorted((path.name for path in root.iterdir() if path.is_dir()), key=natural_key)
    if not classes:
        raise UserError(f'{root} has no class folders: expected {root}/CLASS/IMAGE')
    samples: List[Sample] = []
    empty = []
    for index, label in enumerate(classes):
        found, _ = find_images_and_targets(str(root / label))
        samples += [(Path(path), index) for path, _ in found]
        if not found:
            empty.append(label)
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
    found = [path for pattern in ('*/[1-5]', '*/*/[1-5]') for path in root.glob(pattern) if path.is_dir()]
    found = [path for path in found if any(child.is_dir() for child in path.iterdir())]
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
