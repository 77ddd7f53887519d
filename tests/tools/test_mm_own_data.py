"""The templates for own data, on composed scenes: copied, two lines edited, and trained and tested for a step."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mm_runs import BACKBONE, QUICK, unformatted  # noqa: F401 - the fixture
from PIL import Image

from vmamba.tools import configurations, make_scenes, mm_test, mm_train

SMALL = [*QUICK, *BACKBONE, 'model.backbone.variant=vmamba_nano', 'model.backbone.pretrained=False']
SMALL += ['train_dataloader.batch_size=2', 'default_hooks.checkpoint.save_best=None']
ONCE = ['val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('own') / 'scenes'
    make_scenes.main(['--output', str(folder), '--training', '2', '--validation', '2', '--digits', '0', '1', '2'])
    return folder


def edited(name, folder, classes):
    """A copy of a template in the present folder, for the data in another."""
    configurations.main(['copy', name, '--output', '.'])
    lines = Path(f'{name}.py').read_text().splitlines()
    for key, value in (('data_root', f'{folder}/'), ('classes', classes)):
        (number,) = (i for i, line in enumerate(lines) if line.startswith(f'{key} = '))
        lines[number] = f'{key} = {value!r}'
    Path(f'{name}.py').write_text('\n'.join(lines))
    return f'{name}.py'


def train_and_test(config, checkpoint, training, both):
    options = ['--precision', 'fp32', '--cfg-options', *SMALL, *ONCE, *training, *both]
    mm_train.main([config, '--work-dir', 'run', *options])
    mm_test.main([config, f'run/{checkpoint}', '--work-dir', 'run', '--cfg-options', *SMALL, *both])
    return json.loads(Path('metrics.json').read_text())


def test_own_images_with_annotations_in_cocos_format(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'own/annotations').mkdir(parents=True)
    for part, earlier in (('train', 'training'), ('val', 'validation')):
        shutil.copytree(scenes / 'images' / earlier, tmp_path / 'own' / part)
        shutil.copy(scenes / f'annotations/instances_{earlier}.json', tmp_path / f'own/annotations/{part}.json')
    config = edited('mask-rcnn_vmamba-t_fpn_own-dataset', 'own', ('zero', 'one', 'two'))
    training = ['train_cfg.max_epochs=1', 'train_dataloader.dataset.pipeline.2.scale=(96,96)']
    both = ['model.neck.in_channels=[8,16,32,64]', 'model.roi_head.bbox_head.fc_out_channels=16']
    both += ['test_dataloader.dataset.pipeline.1.scale=(96,96)']
    metrics = train_and_test(config, 'epoch_1.pth', training, both)
    assert 'coco/bbox_mAP' in metrics and 'coco/segm_mAP' in metrics


def test_own_images_with_masks_in_folders(scenes, tmp_path, monkeypatch):
    from mmengine.registry import DATASETS

    from vmamba.tools.openmmlab.configs import load_config

    monkeypatch.chdir(tmp_path)
    for part, earlier in (('train', 'training'), ('val', 'validation')):
        shutil.copytree(scenes / 'images' / earlier, tmp_path / 'own/images' / part)
        (tmp_path / 'own/masks' / part).mkdir(parents=True)
        for path in (scenes / 'annotations' / earlier).iterdir():  # numbered from 1; 0 is unlabelled
            Image.fromarray(np.asarray(Image.open(path)) - 1).save(tmp_path / 'own/masks' / part / path.name)
    config = edited('vmamba-t_upernet_own-dataset', 'own', ('photograph', 'zero', 'one', 'two'))
    training = ['train_cfg.max_iters=1', 'default_hooks.checkpoint.interval=1']
    training += [f'train_dataloader.dataset.pipeline.{key}' for key in ('2.scale=(96,96)', '3.crop_size=(64,64)')]
    both = ['model.data_preprocessor.size=(64,64)', 'test_dataloader.dataset.pipeline.1.scale=(96,96)']
    both += ['model.decode_head.in_channels=[8,16,32,64]', 'model.decode_head.channels=8']
    both += ['model.auxiliary_head.in_channels=32', 'model.auxiliary_head.channels=8']
    assert 'mIoU' in train_and_test(config, 'iter_1.pth', training, both)
    cfg = load_config(Path(config))
    for loader, part in ((cfg.train_dataloader, 'train'), (cfg.test_dataloader, 'val')):
        steps = [step for step in loader.dataset.pipeline if step.type in ('LoadImageFromFile', 'LoadAnnotations')]
        sample = DATASETS.build({**loader.dataset, 'pipeline': steps})[0]
        mask = Path('own/masks', part, Path(sample['img_path']).stem).with_suffix('.png')
        assert (sample['gt_seg_map'] == np.asarray(Image.open(mask))).all()
