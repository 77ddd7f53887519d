"""The tools for mmdet and mmseg, through their command lines."""

import json
import os
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from forked import Forked
from mm_runs import (  # noqa: F401 - the fixture
    DETECTION,
    QUICK,
    SEGMENTATION,
    TINY,
    in_two_processes,
    unformatted,
)
from PIL import Image

from vmamba.tools import make_scenes, mm_infer, mm_test, mm_train
from vmamba.tools.training.parallel import check_version
from vmamba.tools.user_errors import UserError


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    """A folder with data/scenes of 6 + 4 scenes, to run the tools in."""
    folder = tmp_path_factory.mktemp('run')
    counts = ['--training', '6', '--validation', '4', '--digits', '0', '1', '2']
    make_scenes.main(['--output', str(folder / 'data/scenes'), *counts])
    return folder


@pytest.fixture(autouse=True)
def in_scenes(scenes, monkeypatch):
    monkeypatch.chdir(scenes)


def weights(path):
    return torch.load(path, weights_only=False)['state_dict']  # the log in it is NumPy's


# Overfitting the training scenes: chance is a mAP of 0 and the mIoU of a photograph without digits, 21 %.
LEARNING = {
    'detection': (
        DETECTION,
        ['train_cfg.max_epochs=20', 'train_cfg.val_interval=20', 'default_hooks.checkpoint.interval=20'],
        'epoch_20.pth',
        {'coco/bbox_mAP_50': 0.1, 'coco/segm_mAP_50': 0.05},
    ),
    'segmentation': (
        SEGMENTATION,
        [
            *('train_cfg.max_iters=40', 'train_cfg.val_interval=40', 'default_hooks.checkpoint.interval=40'),
            'optim_wrapper.optimizer.lr=8e-3',
        ],
        'iter_40.pth',
        {'mIoU': 35.0},
    ),
}
TRAINING_SCENES = {
    'detection': ['ann_file=annotations/instances_training.json', 'data_prefix.img=images/training/'],
    'segmentation': ['data_prefix.img_path=images/training', 'data_prefix.seg_map_path=annotations/training'],
}
EVALUATOR = {
    'detection': ['test_evaluator.ann_file=data/scenes/annotations/instances_training.json'],
    'segmentation': [],
}


@pytest.fixture(scope='module')
def trained(scenes, tmp_path_factory):
    """Trains on first use, in data/scenes: the folder, config, checkpoint and options of a kind of model."""
    runs = {}

    def run(kind):
        if kind not in runs:
            config, options, checkpoint, _ = LEARNING[kind]
            folder, constant = tmp_path_factory.mktemp(kind), ['param_scheduler=[]', 'randomness.seed=0']
            overrides = [*options, *QUICK, *TINY[config], *constant, 'default_hooks.checkpoint.save_best=None']
            mm_train.main([config, '--work-dir', str(folder), '--cfg-options', *overrides])
            runs[kind] = folder, config, folder / checkpoint, TINY[config]
        return runs[kind]

    return run


@pytest.mark.parametrize('kind', LEARNING)
def test_training_learns_and_is_tested_and_drawn(kind, trained, tmp_path):
    folder, config, checkpoint, tiny = trained(kind)
    assert list(folder.glob('*/vis_data/events.out.tfevents.*'))
    overfitted = [f'test_dataloader.dataset.{key}' for key in TRAINING_SCENES[kind]]
    arguments = [config, checkpoint, '--work-dir', tmp_path, '--output', tmp_path / 'metrics.json']
    drawing = ['--draw', tmp_path / 'drawn', '--limit', '3', '--threshold', '0.05']
    options = [*overfitted, *QUICK, *EVALUATOR[kind], *tiny]
    mm_test.main([*map(str, arguments), *map(str, drawing), '--cfg-options', *options])
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert all(metrics[name] > value for name, value in LEARNING[kind][3].items()), metrics
    drawn = sorted((tmp_path / 'drawn').iterdir())
    assert [path.name for path in drawn] == [f'training_{number:05d}.png' for number in range(3)]
    assert all(Image.open(path).size == (192, 96) for path in drawn)  # the truth on the left


@pytest.mark.parametrize('kind', LEARNING)
def test_images_of_folders_and_frames_of_videos_are_predicted(kind, trained, tmp_path, capsys):
    _, config, checkpoint, tiny = trained(kind)
    images = Path('data/scenes/images')
    (tmp_path / 'many/deep').mkdir(parents=True)
    pixels = cv2.imread(str(images / 'training/training_00005.jpg'))
    cv2.imwrite(str(tmp_path / 'many/deep/a.png'), pixels)
    film = cv2.VideoWriter(str(tmp_path / 'film.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 5, (96, 96))
    for frame in (pixels, pixels[:, ::-1]):
        film.write(np.ascontiguousarray(frame))
    film.release()
    inputs = [images / 'training/training_00005.jpg', tmp_path / 'many', tmp_path / 'film.avi']
    options = ['--config', config, '--checkpoint', checkpoint, '--output', tmp_path / 'out', '--device', 'cpu']
    capsys.readouterr()  # the training's log
    mm_infer.main([*map(str, [*inputs, *options]), '--threshold', '0.05', '--cfg-options', *tiny])
    names = ['training_00005', 'deep/a', 'film_000000', 'film_000001']
    assert [line.partition(': ')[0] for line in capsys.readouterr().out.splitlines() if ': ' in line] == names
    for name in names:
        drawn = cv2.imread(str(tmp_path / f'out/vis/{name}.png'))
        assert drawn.shape == pixels.shape and (drawn != pixels).any()
    check = {'detection': check_detections, 'segmentation': check_maps}[kind]
    check(tmp_path / 'out/preds', names)


def check_detections(folder, names):
    found = [json.loads((folder / f'{name}.json').read_text()) for name in names]
    assert found[0] == found[1]  # the same pixels, from a file and from a folder
    assert found[2]['bboxes'] != found[3]['bboxes']  # mirrored
    first = found[0]
    assert len(first['labels']) == len(first['scores']) == len(first['bboxes']) == len(first['masks']) > 0
    assert first['names'] == [('zero', 'one', 'two')[label] for label in first['labels']]
    assert all(mask['size'] == [96, 96] for mask in first['masks'])


def check_maps(folder, names):
    maps = [np.asarray(Image.open(folder / f'{name}.png')) for name in names]
    assert (maps[0] == maps[1]).all() and (maps[2] != maps[3]).any()
    truth = np.asarray(Image.open('data/scenes/annotations/training/training_00005.png')) - 1  # 0 is unlabelled
    assert maps[0].shape == truth.shape and (maps[0] == truth).mean() > 0.75  # without digits 0.69


# Few steps, without validation, whose images a worker augments.
STEPS = ['val_cfg=None', 'val_dataloader=None', 'val_evaluator=None', 'model.backbone.drop_path_rate=0.2']
STEPS += ['train_dataloader.batch_size=2', 'default_hooks.checkpoint.save_best=None']
STEPS += ['default_hooks.checkpoint.max_keep_ckpts=3']
LOADING = "train_dataloader.dataset.pipeline=[{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations', %s: True}, "
AUGMENTED = LOADING + "{'type': 'PhotoMetricDistortion'}, {'type': '%s'}]"
MAPS = [*TINY[SEGMENTATION], *STEPS, AUGMENTED % ("'reduce_zero_label'", 'PackSegInputs')]
MAPS += ['train_cfg.max_iters=6', 'default_hooks.checkpoint.interval=2', 'param_scheduler=[]']
BOXES = [*TINY[DETECTION], *STEPS, AUGMENTED % ("'with_bbox': True, 'with_mask'", 'PackDetInputs')]


def assert_resumed(whole, resumed, early):
    """Two checkpoints have the same weights, others than an earlier one."""
    whole, resumed, early = map(weights, (whole, resumed, early))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], early[name]) for name in whole)


def test_a_killed_training_resumes_to_the_same_weights(tmp_path):
    arguments, killed = [SEGMENTATION, '--work-dir'], tmp_path / 'killed'
    mm_train.main([*arguments, str(tmp_path / 'whole'), '--cfg-options', *MAPS, 'randomness.seed=3'])
    kill_after(killed / 'iter_2.pth', *arguments, killed, '--cfg-options', *MAPS, 'randomness.seed=3')
    assert not (killed / 'iter_6.pth').exists()
    replaced = 'model.backbone.pretrained=absent.pth'  # which a resumed training does not need
    mm_train.main([*arguments, str(killed), '--resume', '--cfg-options', *MAPS, replaced])  # with the seed that it had
    assert_resumed(*(tmp_path / path for path in ('whole/iter_6.pth', 'killed/iter_6.pth', 'whole/iter_2.pth')))


def test_a_training_by_epochs_resumes_to_the_same_weights(tmp_path):
    arguments = [DETECTION, '--work-dir', str(tmp_path), '--cfg-options', *QUICK, *BOXES]
    mm_train.main([*arguments, 'train_cfg.max_epochs=2'])
    (tmp_path / 'epoch_2.pth').rename(tmp_path / 'whole.pth')
    mm_train.main([*arguments, 'train_cfg.max_epochs=2', '--resume', str(tmp_path / 'epoch_1.pth')])
    assert_resumed(*(tmp_path / f'{name}.pth' for name in ('whole', 'epoch_2', 'epoch_1')))


def kill_after(checkpoint, *arguments):
    """Starts a training and kills it, workers and all, as soon as it names this checkpoint as its last."""
    process = Forked(mm_train.main, *arguments, start_new_session=True)
    try:
        named = checkpoint.with_name('last_checkpoint')
        deadline = time.monotonic() + 120
        while not (named.exists() and named.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert Path(named.read_text()).name == checkpoint.name


def test_without_a_seed_each_training_draws_its_own(tmp_path):
    for name in ('a', 'b'):
        once = [*QUICK, *MAPS, 'train_cfg.max_iters=1', 'default_hooks.checkpoint.interval=1']
        mm_train.main([SEGMENTATION, '--work-dir', str(tmp_path / name), '--cfg-options', *once])
    a, b = (weights(tmp_path / name / 'iter_1.pth') for name in ('a', 'b'))
    assert any(not torch.equal(a[key], b[key]) for key in a)


def train_in_two(work_dir, *arguments):
    """Two processes train four steps together, with a checkpoint after two; returns the first one's log."""
    # mmengine finds loggers by the experiment's name and second, also that of a test that has just ended.
    options = [*QUICK, *MAPS, 'train_cfg.max_iters=4', 'randomness.seed=0', f'experiment_name={work_dir.name}']
    launch = [SEGMENTATION, '--work-dir', work_dir, '--launcher', 'pytorch', '--auto-scale-lr', *arguments]
    in_two_processes(mm_train.main, [*launch, '--cfg-options', *options])
    return next(work_dir.glob('*/*.log')).read_text()


def test_two_processes_train_together_and_with_shards_as_with_copies(tmp_path):
    assert 'Scaling the original LR by 0.5' in train_in_two(tmp_path / 'copies')  # 2 x 2 images instead of 8
    if sharding_runs():
        train_in_two(tmp_path / 'shards', '--fsdp', '--resume', tmp_path / 'copies/iter_2.pth')
        paths = 'copies/iter_2.pth', 'copies/iter_4.pth', 'shards/iter_4.pth'
        early, copies, shards = (whole_state(tmp_path / path) for path in paths)
        assert shards.keys() == copies.keys()
        for name, tensor in shards.items():
            assert torch.allclose(tensor.float(), copies[name].float(), rtol=1e-3, atol=1e-6), name
        assert not all(torch.equal(tensor, early[name]) for name, tensor in copies.items())


def whole_state(path):
    """Weights and moments of a checkpoint by name, and what decides how they change."""
    content = torch.load(path, weights_only=False)
    state, groups = content['optimizer']['state'], content['optimizer']['param_groups']
    moments = {f'{number} {key}': value for number, own in state.items() for key, value in own.items()}
    rates = {f'{i} {key}': torch.tensor(group[key]) for i, group in enumerate(groups) for key in ('lr', 'weight_decay')}
    return {**content['state_dict'], **moments, **rates}


def sharding_runs():
    try:
        check_version('cpu')
    except UserError:
        return False
    return True


@pytest.fixture(scope='module')
def segmentor(scenes):
    """A checkpoint of random weights."""
    from mmengine.registry import MODELS

    from vmamba.tools.openmmlab.configs import load_config

    args = mm_train.parse_args([SEGMENTATION, '--cfg-options', *TINY[SEGMENTATION]])
    path = scenes / 'segmentor.pth'
    torch.save({'state_dict': MODELS.build(load_config(args.config, args.cfg_options).model).state_dict()}, path)
    return path


@pytest.fixture
def tested(segmentor, tmp_path):
    """The metrics that mm-test writes in this process or in two others."""

    def metrics(*arguments, call=mm_test.main):
        output = tmp_path / 'metrics.json'
        options = [SEGMENTATION, segmentor, '--work-dir', tmp_path, '--output', output, *arguments]
        call([*map(str, options), '--cfg-options', *TINY[SEGMENTATION], *QUICK])
        return json.loads(output.read_text())

    return metrics


def test_two_processes_measure_what_one_does(tested):
    alone = tested()
    together = tested('--launcher', 'pytorch', call=lambda arguments: in_two_processes(mm_test.main, arguments))
    assert together == pytest.approx(alone)


VARIANTS = "tta_pipeline=[{'type': 'LoadImageFromFile'}, {'type': 'TestTimeAug', 'transforms': [[%s], [%s], [%s]]}]"
FLIP = "{'type': 'RandomFlip', 'direction': 'horizontal', 'prob': %s}"
LOAD = "{'type': 'LoadAnnotations', 'reduce_zero_label': True}"
PACK = "{'type': 'PackSegInputs'}"


def test_variants_of_an_image_are_merged(tested):
    plain = tested()
    same, mirrored = (
        tested('--tta', '--cfg-options', VARIANTS % (f'{FLIP % 0.0}, {FLIP % flip}', LOAD, PACK)) for flip in (0.0, 1.0)
    )
    assert same == pytest.approx(plain)
    assert mirrored != pytest.approx(plain)
