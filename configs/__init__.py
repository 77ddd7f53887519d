"""The configurations that are installed with the library, found by path or by name."""

from difflib import get_close_matches
from pathlib import Path
from typing import Dict

FOLDER = Path(__file__).parent
ENDINGS = ('.yaml', '.py')


def config_files() -> Dict[str, Path]:
    """Every configuration that can be run by its name; those whose names begin with _ only serve as a base."""
    files = FOLDER.glob('*/*')
    return {path.stem: path for path in sorted(files) if path.suffix in ENDINGS and path.stem[0] != '_'}


def find_config(path: Path) -> Path:
    """The file that a path names: where there is none, an installed configuration.

    Args:
        path: A file; or a path in this folder, with or without a leading configs/; or the name of a configuration.

    Raises:
        FileNotFoundError: If there is none; the message names the nearest.
    """
    installed = FOLDER.joinpath(*path.parts[path.parts[:1] == (FOLDER.name,) :])  # path itself if that is absolute
    files = config_files()
    name = path.stem if path.suffix in ENDINGS else path.name
    if name in files and path.parent == Path():
        installed = files[name]
    for found in (path, installed):
        if found.is_file():
            return found
    near = get_close_matches(name, files, n=3)
    hint = f'did you mean {" or ".join(near)}?' if near else '`vmamba configs list` shows the installed ones'
    raise FileNotFoundError(f'there is no configuration {path}; {hint}')
