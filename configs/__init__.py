"""The configurations that are installed with the library, found by path or by name."""

import logging
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Dict

FOLDER = Path(__file__).parent
ENDINGS = ('.yaml', '.py')
# Earlier names, which the next version will drop, and those by the patterns of mmdet and mmseg.
RENAMED = {
    r'(mask-rcnn_vmamba-.+_fpn)_1x_coco': r'\1_amp-1x_coco',
    r'(mask-rcnn_vmamba-.+_fpn)_ms-3x_coco': r'\1_amp-ms-crop-3x_coco',
    r'(cascade-mask-rcnn_vim-._fpn)_lsj-100e_coco': r'\1_amp-lsj-100e_coco',
    r'dino-4scale_vmamba-t_12e_coco': r'dino-4scale_vmamba-t_8xb2-12e_coco',
    r'upernet_(vim-.)_60k_(ade20k-.+)': r'\1_upernet_4xb8-amp-60k_\2',
    r'upernet_(v.+)_160k_(ade20k-.+)': r'\1_upernet_8xb2-amp-160k_\2',
    r'mask2former_vmamba-t_160k_(ade20k-.+)': r'mask2former_vmamba-t_8xb2-160k_\1',
    r'upernet_(vmamba-nano)_scenes': r'\1_upernet_scenes',
}


def config_files() -> Dict[str, Path]:
    """Every configuration that can be run by its name; those whose names begin with _ only serve as a base."""
    files = FOLDER.glob('*/*')
    return {path.stem: path for path in sorted(files) if path.suffix in ENDINGS and path.stem[0] != '_'}


def find_config(path: Path) -> Path:
    """The file that a path names: where there is none, an installed configuration.

    A configuration is also found by its earlier name, which logs the new one.

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
    if (renamed := current_name(name)) and installed.parent in (FOLDER, files[renamed].parent):
        logging.getLogger('vmamba').warning('the configuration %s is now named %s', name, renamed)
        return files[renamed]
    near = get_close_matches(name, files, n=3)
    hint = f'did you mean {" or ".join(near)}?' if near else '`vmamba configs list` shows the installed ones'
    raise FileNotFoundError(f'there is no configuration {path}; {hint}')


def current_name(name: str) -> str:
    """The present name of a configuration by an earlier one, or '' if it is none."""
    found = [re.sub(pattern, new, name) for pattern, new in RENAMED.items() if re.fullmatch(pattern, name)]
    return next((new for new in found if new in config_files()), '')
