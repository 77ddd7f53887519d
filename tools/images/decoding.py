"""Image files as pixels of 8 bits."""

from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Iterator, Union

import numpy as np
from PIL import Image

from vmamba.tools.user_errors import UserError

READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on broken files

_SIXTEEN_BITS = ('PNG', 'PPM')  # formats of at most that, which Pillow may open as 32 bits


def read_image(file: Union[Path, BinaryIO], mode: str = 'RGB') -> Image.Image:
    """Decodes an image of any size wholly, see `to_mode`."""
    with _images_of_any_size(), Image.open(file) as image:
        return to_mode(image, mode)


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in Pillow's mode L or RGB; of 16 bits a pixel, which Pillow would cut off above 255, in proportion.

    Raises:
        ValueError: If the pixels have 32 bits, of which nobody knows what is white.
    """
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in _SIXTEEN_BITS):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    elif image.mode in ('I', 'F'):
        raise ValueError(f'its pixels have 32 bits (mode {image.mode} of Pillow); convert it to 8 or 16')
    return image.convert(mode)


def image_mode(chans: int) -> str:
    """Pillow's mode for a model of 1 or 3 channels.

    Raises:
        UserError: If it takes others.
    """
    if chans not in (1, 3):
        raise UserError(f'images have 1 or 3 channels, the model takes {chans}')
    return 'L' if chans == 1 else 'RGB'


@contextmanager
def _images_of_any_size() -> Iterator[None]:
    """Lifts Pillow's limit, which guards servers against strangers' files: large images are what the models are for."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def read_pixels(path: Path, mode: str) -> np.ndarray:
    """Bytes [H, W, C] of an image, memory-mapped if it is an .npy file of such bytes.

    Raises:
        UserError: If an .npy file holds something else.
    """
    chans = len(mode)  # L or RGB
    if path.suffix != '.npy':
        pixels = np.asarray(read_image(path, mode))
        return pixels if pixels.ndim == 3 else pixels[..., None]
    pixels = np.load(path, mmap_mode='r')
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != chans:
        raise UserError(f'{path} must hold bytes [H, W, {chans}], got {pixels.dtype} {list(pixels.shape)}')
    return pixels
