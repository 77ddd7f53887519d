"""Runs of the tools for mmdet and mmseg on a few composed scenes, with tiny models."""

import functools
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DETECTION = str(ROOT / 'configs/detection/mask-rcnn_vmamba-nano_fpn_scenes.py')
SEGMENTATION = str(ROOT / 'configs/segmentation/vmamba-nano_upernet_scenes.py')
QUICK = ['train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False']
QUICK += [option.replace('train', part) for part in ('val', 'test') for option in QUICK[:2]]
BACKBONE = ["model.backbone.model_options={'embed_dim': 8, 'depths': (1, 1, 1, 1)}"]
TINY = {
    DETECTION: [*BACKBONE, 'model.neck.in_channels=[8,16,32,64]', 'model.roi_head.bbox_head.fc_out_channels=32'],
    SEGMENTATION: [
        *BACKBONE,
        'model.decode_head.in_channels=[8,16,32,64]',
        'model.decode_head.channels=16',
        'model.auxiliary_head.in_channels=32',
        'model.auxiliary_head.channels=8',
    ],
}


@pytest.fixture(autouse=True, scope='module')
def unformatted():
    """mmengine formats each run's config six times by yapf, and reads all metafiles of mmdet for each base of a config:
    both take longer than the trainings of the tests."""
    utils = pytest.importorskip('mmengine.config.utils')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, '_get_cfg_metainfo', functools.cache(utils._get_cfg_metainfo))
        patch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))
        yield


def command(tool, *arguments):
    return [sys.executable, str(ROOT / 'tools' / tool), *map(str, arguments)]


def environment():
    return dict(os.environ, OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', PYTHONPATH=str(ROOT))


def in_two_processes(main, arguments):
    """Calls a tool in two processes with the environment that torchrun gives them; forks, which saves the imports."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        common = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free.getsockname()[1]), 'WORLD_SIZE': '2'}

    def run(rank):
        os.environ.update(common, RANK=str(rank), LOCAL_RANK=str(rank))
        main([*map(str, arguments)])

    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=run, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


def assert_one_line(tool, main, arguments, messages, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f'{tool}: ')]
    assert len(lines) == 1
    assert all(message in lines[0] for message in messages), lines
    assert len(lines[0]) < 1200
