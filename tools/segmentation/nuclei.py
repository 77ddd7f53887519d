"""Two annotated fluorescence images of nuclei, as data for short trainings: quadrants are folds.

They are files of the package stardist (BSD-3-Clause), of which nothing is imported.
"""

from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import List, NamedTuple, Tuple

import nibabel
import numpy as np
import tifffile
import torch
from monai.metrics import compute_panoptic_quality
from PIL import Image
from scipy import ndimage

from vmamba.tools.user_errors import UserError

from skimage.segmentation import clear_border, expand_labels, find_boundaries

BACKGROUND, INTERIOR, BOUNDARY = range(3)
BORDER = 2  # nuclei this near to the border of an image are not counted, as in the challenge of cells
Region = Tuple[slice, ...]


class Nuclei(NamedTuple):
    """An image or a volume, and the number of the nucleus at each position, 0 for none; the last two axes are y, x."""

    image: np.ndarray
    instances: np.ndarray

    def labels(self) -> np.ndarray:
        """Background, interior and boundary, which keeps touching nuclei apart."""
        boundary = find_boundaries(self.instances, mode='inner')
        return np.where(boundary, BOUNDARY, np.where(self.instances > 0, INTERIOR, BACKGROUND)).astype(np.uint8)


def folder_of_stardist() -> Path:
    """The folder of the images.

    Raises:
        UserError: If the package is not installed.
    """
    spec = find_spec('stardist')
    if spec is None:
        raise UserError('the images are those of stardist: pip install --no-deps stardist, or give --images FOLDER')
    return Path(spec.submodule_search_locations[0]) / 'data/images'


def read_nuclei(folder: Path, rank: str) -> Nuclei:
    """The image ('2d') or the volume ('3d') of a folder."""
    return Nuclei(*(tifffile.imread(folder / f'{name}{rank}.tif') for name in ('img', 'mask')))


def quadrant(shape: Tuple[int, ...], fold: int) -> Region:
    """The quadrant of y and x that is held out in a fold of 0 to 3."""
    height, width = shape[-2:]
    rows, columns = divmod(fold, 2)
    halves = [(slice(0, side // 2), slice(side // 2, side)) for side in (height, width)]
    return (*[slice(None)] * (len(shape) - 2), halves[0][rows], halves[1][columns])


def training_regions(shape: Tuple[int, ...], fold: int, margin: int) -> List[Region]:
    """The other quadrants, at a distance of the margin from the one held out."""
    held_out, regions = quadrant(shape, fold)[-2:], []
    for other in range(4):
        region = list(quadrant(shape, other))
        if other == fold:
            continue
        for axis in (-2, -1):
            ours, theirs = region[axis], held_out[axis]
            if ours == theirs:
                continue
            low, high = (ours.start + margin, ours.stop) if ours.start else (ours.start, ours.stop - margin)
            region[axis] = slice(low, high)
            break  # one axis is enough to keep the distance
        regions.append(tuple(region))
    return regions


def write_fold(nuclei: Nuclei, fold: int, margin: int, folder: Path) -> Tuple[Path, Path]:
    """Writes the folders of a fold, to train and to test on."""
    regions = dict(train=training_regions(nuclei.image.shape, fold, margin), test=[quadrant(nuclei.image.shape, fold)])
    arrays = dict(images=nuclei.image, labels=nuclei.labels())
    for (part, pieces), (name, array) in product(regions.items(), arrays.items()):
        (folder / part / name).mkdir(parents=True, exist_ok=True)
        for i, region in enumerate(pieces):
            _write(array[region], folder / part / name / str(i))
    return folder / 'train', folder / 'test'


def _write(array: np.ndarray, path: Path) -> None:
    if array.ndim == 2:
        Image.fromarray(array.astype(np.uint8)).save(path.with_suffix('.png'))
    else:
        nibabel.save(nibabel.Nifti1Image(array.astype(np.int16), np.eye(4)), f'{path}.nii.gz')


def instances_of(labels: np.ndarray) -> np.ndarray:
    """Nuclei from predicted labels: connected interiors, grown into the boundary around them."""
    seeds, _ = ndimage.label(labels == INTERIOR)
    return np.where(labels != BACKGROUND, expand_labels(seeds, distance=3), 0)


def count_matches(predicted: np.ndarray, instances: np.ndarray) -> Tuple[int, int, int]:
    """Numbers of nuclei found at an IoU above 0.5, of wrong and of missed ones.

    Of an image without those near the border; most of a volume's are near it.
    """
    pair = [array.astype(np.int64) for array in (predicted, instances)]
    if predicted.ndim == 2:
        pair = [clear_border(array, buffer_size=BORDER) for array in pair]
    counts = compute_panoptic_quality(*map(torch.from_numpy, pair), output_confusion_matrix=True)
    hits, wrong, missed = counts[:3].int().tolist()
    return hits, wrong, missed


def dice(predicted: np.ndarray, instances: np.ndarray) -> float:
    """Dice of all nuclei together."""
    a, b = predicted != BACKGROUND, instances > 0
    return float(2 * (a & b).sum() / max(a.sum() + b.sum(), 1))
