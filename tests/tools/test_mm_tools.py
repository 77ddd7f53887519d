"""The tools for mmdet and mmseg, through their command lines."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mm_runs import DETECTION, QUICK, ROOT, SEGMENTATION, command, environment
from PIL import Image
from vmamba.tools import make_scenes, mm_infer, mm_test, mm_train
from vmamba.tools.training.parallel import check_version
from vmamba.tools.user_errors import UserError

pytestmark = pytest.mark.skipif(
    find_spec('mmdet') is None or find_spec('mmseg') is None, reason='needs mmdet and mmseg'
)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    """A folder with data/scenes of 16 + 8 scenes, to run the tools in."""
    folder = tmp_path_factory.mktemp('run')
    counts = ['--training', '16', '--validation', '8']
    make_scenes.main(['--output', str(folder / 'data/scenes'), *counts])
    return folder


@pytest.fixture(autouse=True)
def in_scenes(scenes, monkeypatch):
    monkeypatch.chdir(scenes)


def weights(path):
    return torch.load(path, weights_only=False)['state_dict']  # the log in it is NumPy's


# Learning the training scenes by heart: chance is a mAP of 0 and the mIoU of a photograph without digits, 21 %.
LEARNING = {
    'detection': (
        DETECTION,
        ['train_cfg.max_epochs=20', 'train_cfg.val_interval=20', 'default_hooks.checkpoint.interval=20'],
        'epoch_20.pth',
        {'coco/bbox_mAP_50': 0.1, 'coco/segm_mAP_50': 0.05},
    ),
    'segmentation': (
        SEGMENTATION,
        ['train_cfg.max_iters=60', 'train_cfg.val_interval=60', 'default_hooks.checkpoint.interval=60'],
        'iter_60.pth',
        {'mIoU': 35.0},
    ),
}


@pytest.mark.parametrize('kind', LEARNING)
def test_training_learns_and_is_tested_and_drawn(kind, tmp_path):
    config, options, checkpoint, chance = LEARNING[kind]
    overrides = [*options, *QUICK, 'default_hooks.checkpoint.save_best=None', 'param_scheduler=[]']
    mm_train.main([config, '--work-dir', str(tmp_path), '--cfg-options', *overrides])
    assert list(tmp_path.glob('*/vis_data/events.out.tfevents.*'))
    by_heart = [f'test_dataloader.dataset.{key}' for key in TRAINING_SCENES[kind]]
    arguments = [config, tmp_path / checkpoint, '--work-dir', tmp_path, '--output', tmp_path / 'metrics.json']
    drawing = ['--draw', tmp_path / 'drawn', '--limit', '3', '--threshold', '0.05']
    mm_test.main([*map(str, arguments), *map(str, drawing), '--cfg-options', *by_heart, *QUICK, *EVALUATOR[kind]])
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert all(metrics[name] > value for name, value in chance.items()), metrics
    drawn = sorted((tmp_path / 'drawn').iterdir())
    assert [path.name for path in drawn] == [f'training_{number:05d}.png' for number in range(3)]
    assert all(Image.open(path).size == (192, 96) for path in drawn)  # the truth on the left
    check_inference(config, tmp_path / checkpoint, tmp_path / 'one.png')


def check_inference(config, checkpoint, output):
    image = Path('data/scenes/images/training/training_00000.jpg')
    options = ['--config', config, '--checkpoint', checkpoint, '--output', output, '--device', 'cpu']
    mm_infer.main([str(image), *map(str, options), '--threshold', '0.05'])
    drawn, plain = Image.open(output), Image.open(image)
    assert drawn.format == 'PNG'
    assert drawn.size == plain.size
    assert drawn.tobytes() != plain.tobytes()


TRAINING_SCENES = {
    'detection': ['ann_file=annotations/instances_training.json', 'data_prefix.img=images/training/'],
    'segmentation': ['data_prefix.img_path=images/training', 'data_prefix.seg_map_path=annotations/training'],
}
EVALUATOR = {
    'detection': ['test_evaluator.ann_file=data/scenes/annotations/instances_training.json'],
    'segmentation': [],
}


# Few steps, without validation, whose images a worker augments.
STEPS = ['val_cfg=None', 'val_dataloader=None', 'val_evaluator=None', 'model.backbone.drop_path_rate=0.2']
STEPS += ['train_dataloader.batch_size=2', 'default_hooks.checkpoint.save_best=None']
STEPS += ['default_hooks.checkpoint.max_keep_ckpts=3']
LOADING = "train_dataloader.dataset.pipeline=[{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations', %s: True}, "
AUGMENTED = LOADING + "{'type': 'PhotoMetricDistortion'}, {'type': '%s'}]"
RESUMED = {
    'epochs': (
        DETECTION,
        ['train_cfg.max_epochs=2', AUGMENTED % ("'with_bbox': True, 'with_mask'", 'PackDetInputs')],
        'epoch_1',
        'epoch_2',
    ),
    'iterations': (
        SEGMENTATION,
        [
            'train_cfg.max_iters=8',
            'default_hooks.checkpoint.interval=3',
            AUGMENTED % ("'reduce_zero_label'", 'PackSegInputs'),
        ],
        'iter_3',
        'iter_8',
    ),
}


@pytest.mark.parametrize('kind', RESUMED)
def test_a_killed_training_resumes_to_the_same_weights(kind, tmp_path):
    config, options, first, last = RESUMED[kind]
    overrides = ['--cfg-options', *options, *STEPS]
    mm_train.main([config, '--work-dir', str(tmp_path / 'whole'), *overrides])
    kill_behind(tmp_path / 'killed' / f'{first}.pth', config, '--work-dir', tmp_path / 'killed', *overrides)
    assert not (tmp_path / 'killed' / f'{last}.pth').exists()
    replaced = 'model.backbone.pretrained=absent.pth'  # which a resumed training does not need
    mm_train.main([config, '--work-dir', str(tmp_path / 'killed'), '--resume', *overrides, replaced])
    whole, resumed = (weights(tmp_path / name / f'{last}.pth') for name in ('whole', 'killed'))
    early = weights(tmp_path / 'whole' / f'{first}.pth')
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], early[name]) for name in whole)


def kill_behind(checkpoint, *arguments):
    """Starts a training and kills it, workers and all, as soon as it names this checkpoint as its last."""
    process = subprocess.Popen(
        command('mm_train.py', *arguments), env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        named = checkpoint.with_name('last_checkpoint')
        deadline = time.monotonic() + 120
        while not (named.exists() and named.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert Path(named.read_text()).name == checkpoint.name


def run_two(work_dir, *arguments):
    """What two processes say that train together four steps, with a checkpoint after two."""
    options = [*QUICK, *STEPS, 'train_cfg.max_iters=4', 'default_hooks.checkpoint.interval=2', 'param_scheduler=[]']
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    tool = [str(ROOT / 'tools/mm_train.py'), SEGMENTATION, '--work-dir', str(work_dir), '--launcher', 'pytorch']
    command = [*launch, *tool, '--auto-scale-lr', *map(str, arguments), '--cfg-options', *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_two_processes_train_together_and_with_shards_as_with_copies(tmp_path):
    said = run_two(tmp_path / 'copies')
    assert 'Scaling the original LR by 0.5' in said  # 2 x 2 images instead of 8
    if sharding_runs():
        run_two(tmp_path / 'shards', '--fsdp', '--resume', tmp_path / 'copies/iter_2.pth')
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

    path = scenes / 'segmentor.pth'
    torch.save({'state_dict': MODELS.build(load_config(Path(SEGMENTATION)).model).state_dict()}, path)
    return path


@pytest.fixture
def tested(segmentor, tmp_path):
    """The metrics that mm_test.py writes in a process like this or in two of them."""

    def metrics(*arguments, launch=()):
        output = tmp_path / 'metrics.json'
        options = [SEGMENTATION, segmentor, '--work-dir', tmp_path, '--output', output, *arguments]
        if launch:
            done = subprocess.run([*launch, ROOT / 'tools/mm_test.py', *options], env=environment(), timeout=120)
            assert done.returncode == 0
        else:
            mm_test.main(list(map(str, options)))
        return json.loads(output.read_text())

    return metrics


def test_two_processes_measure_what_one_does(tested):
    alone = tested('--cfg-options', *QUICK)
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    assert tested('--launcher', 'pytorch', '--cfg-options', *QUICK, launch=launch) == pytest.approx(alone)


VARIANTS = "tta_pipeline=[{'type': 'LoadImageFromFile'}, {'type': 'TestTimeAug', 'transforms': [[%s], [%s], [%s]]}]"
FLIP = "{'type': 'RandomFlip', 'direction': 'horizontal', 'prob': %s}"
LOAD = "{'type': 'LoadAnnotations', 'reduce_zero_label': True}"
PACK = "{'type': 'PackSegInputs'}"


def test_variants_of_an_image_are_merged(tested):
    plain = tested('--cfg-options', *QUICK)
    same, mirrored = (
        tested('--tta', '--cfg-options', *QUICK, VARIANTS % (f'{FLIP % 0.0}, {FLIP % flip}', LOAD, PACK))
        for flip in (0.0, 1.0)
    )
    assert same == pytest.approx(plain)
    assert mirrored != pytest.approx(plain)
