"""Runs of the tools for mmdet and mmseg on a few composed scenes."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DETECTION = str(ROOT / 'configs/detection/mask-rcnn_vmamba-nano_fpn_scenes.py')
SEGMENTATION = str(ROOT / 'configs/segmentation/upernet_vmamba-nano_scenes.py')
QUICK = ['train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False']
QUICK += [option.replace('train', part) for part in ('val', 'test') for option in QUICK[:2]]


def command(tool, *arguments):
    return [sys.executable, str(ROOT / 'tools' / tool), *map(str, arguments)]


def environment():
    return dict(os.environ, OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', PYTHONPATH=str(ROOT))


def assert_one_line(tool, main, arguments, messages, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f'{tool}: ')]
    assert len(lines) == 1
    assert all(message in lines[0] for message in messages), lines
    assert len(lines[0]) < 1200
