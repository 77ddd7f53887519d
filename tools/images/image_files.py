"""Image files below folders and in lists."""

import os
from collections import deque
from pathlib import Path
from typing import Deque, Iterator, List, Optional, Sequence, Tuple

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
        raise UserError(f'there is no folder or list of images {source}')
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


def walk(root: Path) -> Iterator[Tuple[str, str, List[os.DirEntry], List[os.DirEntry]]]:
    """A folder and those below it, links followed, each real folder once: path, real path, folders in it and files.

    Links to folders come after all that is reached without them. One to an ancestor, or to a folder that was visited,
    is skipped. As with os.walk, removing folders from the list leaves them out, and unreadable folders have no entries.
    """
    top = os.path.realpath(root)
    places: Deque[Tuple[str, str]] = deque([(os.fspath(root), top)])
    links: Deque[Tuple[str, str]] = deque()
    visited = set()
    while places or links:
        path, real = (places or links).popleft()
        if real in visited:
            continue
        visited.add(real)
        folders, files = _entries(path)
        yield path, real, folders, files
        for entry in folders:
            if not entry.is_symlink():
                places.append((entry.path, os.path.join(real, entry.name)))
                continue
            target = os.path.realpath(entry.path)
            if not any(Path(below).is_relative_to(target) for below in (top, real)):
                links.append((entry.path, target))


def _entries(path: str) -> Tuple[List[os.DirEntry], List[os.DirEntry]]:
    """The folders and the files in a folder, by name."""
    folders: List[os.DirEntry] = []
    files: List[os.DirEntry] = []
    try:
        with os.scandir(path) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError:
        entries = []
    for entry in entries:  # entry.is_dir() raises an error for a link to itself
        is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
        (folders if is_folder else files).append(entry)
    return folders, files


def _files_below(folder: Path, without: Optional[Path]) -> Iterator[Path]:
    """Files of a folder and those below it, except one folder and written features."""
    left_out = without and os.path.realpath(without)
    for _, real, folders, files in walk(folder):
        if real == left_out or _FEATURES <= {entry.name for entry in files}:
            folders.clear()
        else:
            yield from (Path(entry.path) for entry in files)


def has_image_ending(name: str) -> bool:
    return is_img_extension(os.path.splitext(name)[1].lower())


def _is_image(path: Path, also: Sequence[str]) -> bool:
    return (has_image_ending(path.name) or path.suffix.lower() in also) and path.is_file()
