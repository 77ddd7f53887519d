"""Runs of the tools for mmdet and mmseg on a few composed scenes, with tiny models."""

import functools
from pathlib import Path

import pytest
from forked import two_processes

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

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
    from mmengine.config import utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, '_get_cfg_metainfo', functools.cache(utils._get_cfg_metainfo))
        patch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))
        yield


def in_two_processes(main, arguments):
    """Calls a tool in two processes with the environment that torchrun gives them."""
    with two_processes(main, *arguments) as processes:
        for process in processes:
            out, err = process.communicate()
            assert process.returncode == 0, f'{out}\n{err}'


def assert_one_line(tool, main, arguments, messages, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f'{tool}: ')]
    assert len(lines) == 1
    assert all(message in lines[0] for message in messages), lines
    assert len(lines[0]) < 1200
