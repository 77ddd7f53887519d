"""Tiny folders of real images for the tests of the tools, a disk that is full, and a folder that is in use."""

import multiprocessing
import os
import resource
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from vmamba.tools.output_files import lock_folder
from vmamba.tools.user_errors import UserError

from skimage import data
from sklearn.datasets import load_digits


def write_digits(root: Path, per_class: int, classes: int = 10, start: int = 0) -> Path:
    """scikit-learn's digits as 32x32 PNG files, root/CLASS/00.png."""
    images, labels = load_digits(return_X_y=True)
    for label in range(classes):
        folder = root / str(label)
        folder.mkdir(parents=True)
        for i, pixels in enumerate(images[labels == label][start : start + per_class]):
            image = Image.fromarray((pixels.reshape(8, 8) * 255 / 16).astype(np.uint8))
            image.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f'{i:02d}.png')
    return root


def write_photographs(root: Path, height: int = 70, width: int = 100) -> Path:
    """Two photographs of scikit-image of different sizes, root/astronaut.png and root/deep/coffee.png."""
    (root / 'deep').mkdir(parents=True)
    Image.fromarray(data.astronaut()).resize((width, height)).save(root / 'astronaut.png')
    Image.fromarray(data.coffee()).resize((height, width)).save(root / 'deep' / 'coffee.png')
    return root


def _hold(folder, answer):
    """Locks a folder and starts a child, as a loading process; answers with its id, or with the error."""
    try:
        with lock_folder(folder):
            child = os.fork()
            if child:
                answer.send(child)
            time.sleep(60)
    except UserError as error:
        answer.send(str(error))


@contextmanager
def in_use(folder):
    """Another process, which has locked a folder and started a child; ends without cleaning up, before its child."""
    context = multiprocessing.get_context('fork')  # importing the library again would take seconds
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_hold, args=(folder, sender))
    process.start()
    child = receiver.recv()
    try:
        if isinstance(child, str):
            raise ChildProcessError(child)
        yield process
    finally:
        process.kill()
        process.join()
        if not isinstance(child, str):
            os.kill(child, signal.SIGKILL)


@contextmanager
def full_disk(size):
    """Lets no file grow above a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def truncate(path: Path) -> Path:
    """Cuts an image file in the middle."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path
