"""Image files below folders and in lists."""

import os
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Set, Tuple

from timm.data.readers.img_extensions import get_img_extensions, is_img_extension
from timm.utils.misc import natural_key

from vmamba.tools.user_errors import UserError

_FEATURES = {'settings.json', 'progress.npy'}  # in every folder that extract_features.py writes


def find_images(source: Path, also: Sequence[str] = (), without: Optional[Path] = None) -> List[Path]:
    """Image files of a folder and those below it in natural order, or the files that a text file lists, one a line.

    Links are followed. Folders of extracted features are left out.

    Args:
        source: Folder, text file with paths relative to its own folder, or one image.
        also: Endings of further files to take, such as .npy.
        without: Folder below the source to leave out.

    Raises:
        UserError: If there is nothing of the kind.
    """
    if not source.exists():
        raise UserError(f'there is no image, folder or list of images {source}')
    if source.is_file() and _is_image(source, also):
        return [source]
    endings = ', '.join([*get_img_extensions(), *also])
    if source.is_file():
        try:
            lines = source.read_text().splitlines()
        except UnicodeDecodeError:
            what = f'{source} is neither an image nor a text file with a path a line'
            raise UserError(f'{what}; names of images end in {endings}') from None
        paths = [source.parent / line.strip() for line in lines if line.strip()]
    else:
        found = (path for path in _files_below(source, without) if _is_image(path, also))
        paths = sorted(found, key=lambda path: natural_key(str(path)))
    if not paths:
        raise UserError(f'{source} holds no images; their names must end in {endings}')
    return paths


def walk(root: Path) -> Iterator[Tuple[str, str, List[str], List[str]]]:
    """A folder and those below it, links followed, each real folder once: path, real path, names of folders and files.

    A link to an ancestor, to a folder that is reached without links, or to one that was visited is skipped. As with
    os.walk, removing folders from the list leaves them out, and unreadable folders are skipped.
    """
    top = os.path.realpath(root)
    visited: Set[str] = set()
    direct: Set[str] = set()  # what is reached without links, if there are any
    for path, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(path)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        yield path, real, folders, sorted(files)
        for name in [name for name in folders if os.path.islink(os.path.join(path, name))]:
            target = os.path.realpath(os.path.join(path, name))
            direct = direct or {os.path.realpath(found) for found, _, _ in os.walk(root)}
            if target in direct or any(Path(below).is_relative_to(target) for below in (top, real)):
                folders.remove(name)


def _files_below(folder: Path, without: Optional[Path]) -> Iterator[Path]:
    """Files of a folder and those below it, except one folder and written features."""
    left_out = without and os.path.realpath(without)
    for path, real, folders, files in walk(folder):
        if real == left_out or _FEATURES <= {*files}:
            folders.clear()
        else:
            yield from (Path(path, name) for name in files)


def has_image_ending(name: str) -> bool:
    return is_img_extension(os.path.splitext(name)[1].lower())


def _is_image(path: Path, also: Sequence[str]) -> bool:
    return (has_image_ending(path.name) or path.suffix.lower() in also) and path.is_file()
