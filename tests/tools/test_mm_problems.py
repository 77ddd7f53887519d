"""What the user can correct, said in one line by the tools for mmdet and mmseg."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from folders import in_use
from mm_runs import DETECTION, QUICK, SEGMENTATION, assert_one_line, unformatted  # noqa: F401 - the fixture

from vmamba.tools import make_scenes, mm_infer, mm_test, mm_train
from vmamba.tools.user_errors import UserError

IMAGE = 'data/scenes/images/training/training_00000.jpg'


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    """A folder with data/scenes of 3 + 1 scenes, and files that are no annotations."""
    folder = tmp_path_factory.mktemp('run')
    make_scenes.main(['--output', str(folder / 'data/scenes'), '--training', '3', '--validation', '1'])
    annotations = folder / 'data/scenes/annotations'
    text = (annotations / 'instances_training.json').read_text()
    contents = {'truncated': text[:99], 'list': '[]', 'other': '{"a": 1}'}
    contents['unannotated'] = json.dumps({**json.loads(text), 'annotations': []})
    for name, content in contents.items():
        (annotations / f'{name}.json').write_text(content)
    (folder / 'data/scenes/images/empty').mkdir()
    return folder


@pytest.fixture(autouse=True)
def in_scenes(scenes, monkeypatch):
    monkeypatch.chdir(scenes)


PROBLEMS = {
    'no images': (SEGMENTATION, ['train_dataloader.dataset.data_prefix.img_path=absent'], 'there is no', 'absent'),
    'head of other classes': (DETECTION, ['model.roi_head.bbox_head.num_classes=7'], 'has num_classes 7, but the data'),
    'segmentor of other classes': (
        SEGMENTATION,
        ['model.decode_head.num_classes=9', 'model.decode_head.loss_decode.class_weight=None'],
        'decode_head has num_classes 9, but the data have 4 classes',
    ),
    'labels of other classes': (
        SEGMENTATION,
        [
            "train_dataloader.dataset.metainfo.classes=('photograph','zero','one')",
            "val_dataloader.dataset.metainfo.classes=('photograph','zero','one')",
            *(f'model.{head}.num_classes=3' for head in ('decode_head', 'auxiliary_head')),
            *(f'model.{head}.loss_decode.class_weight=None' for head in ('decode_head', 'auxiliary_head')),
        ],
        'has label 3, but the config has 3 classes',
    ),
    'annotations of other classes': (
        DETECTION,
        ["train_dataloader.dataset.metainfo.classes=('zero','one','cat')"],
        'has 2 of the 3 classes',
    ),
    'no GPU': (DETECTION, ['optim_wrapper.type=AmpOptimWrapper'], 'needs a GPU'),
    'nothing to resume': (DETECTION, ['resume=True', 'load_from=absent.pth'], 'there is no checkpoint file absent.pth'),
    'no pretrained weights': (DETECTION, ['model.backbone.pretrained=absent.pth'], 'absent.pth'),
    'unknown model': (DETECTION, ['model.backbone.type=NoSuchBackbone'], 'NoSuchBackbone'),
    'unknown variant': (DETECTION, ['model.backbone.variant=vmamba_x'], 'vmamba_x'),
    'unknown argument': (DETECTION, ['model.backbone.drop_path=0.1'], 'model cannot be built', "'drop_path'"),
    'unknown option of the optimizer': (
        *(SEGMENTATION, ['optim_wrapper.paramwise_cfg.rate=0.9']),
        *('optim_wrapper cannot be built', 'unknown options of paramwise_cfg: rate'),
    ),
    'unknown loop': (DETECTION, ['train_cfg.max_iters=3'], 'train_cfg cannot be built', "'max_iters'"),
    'maps for the head': (
        SEGMENTATION,
        ['model.backbone.out_indices=(0,1,2)'],
        'decode_head takes maps [0, 1, 2, 3] of [32, 64, 128, 256] channels',
        'out_indices (0, 1, 2), gives 3 of [32, 64, 128]',
    ),
    'maps for the neck': (DETECTION, ['model.backbone.out_indices=(0,1,2)'], 'neck takes maps [0, 1, 2, 3]'),
    'misspelt key': (DETECTION, ['optim_wraper.lr=1e-9'], "has no 'optim_wraper'; did you mean optim_wrapper?"),
}


@pytest.mark.parametrize('case', PROBLEMS)
def test_what_the_user_can_correct_is_one_line(case, tmp_path, capsys):
    if case == 'no GPU' and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    config, options, *messages = PROBLEMS[case]
    arguments = [config, '--work-dir', str(tmp_path), '--cfg-options', *QUICK, *options]
    assert_one_line('mm_train.py', mm_train.main, arguments, messages, capsys)


def test_a_folder_that_another_training_writes_into_is_refused(tmp_path, capsys):
    message = f'another process is writing into {tmp_path}: wait until it ends, or choose another --output'
    with in_use(tmp_path):
        assert_one_line('mm_train.py', mm_train.main, [DETECTION, '--work-dir', str(tmp_path)], [message], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ['.lock']


def test_the_first_of_a_launchers_processes_is_known_before_mmengine_knows_it(monkeypatch):
    from vmamba.tools.openmmlab.configs import is_first_process

    for launcher, name in (('pytorch', 'RANK'), ('slurm', 'SLURM_PROCID'), ('mpi', 'OMPI_COMM_WORLD_RANK')):
        for rank in ('0', '3'):
            monkeypatch.setenv(name, rank)
            assert is_first_process(launcher) is (rank == '0')
    assert is_first_process('none')


@pytest.mark.parametrize(
    'name, message',
    [
        ('truncated', 'JSONDecodeError'),
        ('list', 'cannot be built'),
        ('other', "KeyError: 'categories'"),
        ('unannotated', 'there is no image, or none with annotations'),
        ('absent', 'there is no data/scenes/annotations/absent.json; correct the path'),
    ],
)
def test_a_file_that_has_no_annotations_is_named(name, message):
    assert_no_data(DETECTION, {'ann_file': f'annotations/{name}.json'}, f'data/scenes/annotations/{name}.json', message)


def test_a_folder_without_images_is_named():
    change = {'data_prefix.img_path': 'images/empty', 'data_prefix.seg_map_path': 'images/empty'}
    assert_no_data(SEGMENTATION, change, 'data/scenes/images/empty', 'there is no image')


def assert_no_data(config, change, *messages):
    from vmamba.tools.openmmlab.configs import load_config
    from vmamba.tools.openmmlab.runs import StrictRunner

    cfg = load_config(Path(config), {f'train_dataloader.dataset.{key}': value for key, value in change.items()})
    with pytest.raises(UserError) as error:
        StrictRunner.build_dataloader(cfg.train_dataloader)
    assert all(message in str(error.value) for message in messages)


def test_a_package_that_a_config_imports_is_named(tmp_path, capsys):
    config = tmp_path / 'config.py'
    config.write_text(f"_base_ = {DETECTION!r}\ncustom_imports = dict(imports=['no_such_package'])\n")
    assert_one_line('mm_train.py', mm_train.main, [str(config)], ['no_such_package is missing'], capsys)


@pytest.mark.parametrize(
    'ending, content, message',
    [
        ('py', b"model = 'caf\xe9'", "'utf-8' codec can't decode byte 0xe9"),
        ('yaml', b'model: caf\xe9', "'utf-8' codec can't decode byte 0xe9"),
        ('yaml', b'model: [', 'did not find expected node content'),
        ('json', b'{', 'Expecting property name'),
    ],
)
def test_a_config_that_cannot_be_parsed_is_named(tmp_path, capsys, ending, content, message):
    config = tmp_path / f'config.{ending}'
    config.write_bytes(content)
    assert_one_line('mm_train.py', mm_train.main, [str(config)], [f'{config} ', 'is no config', message], capsys)


@pytest.fixture(scope='module')
def other_checkpoint(scenes):
    """Random weights of a detector whose backbone is deeper than the config's."""
    from mmengine.registry import MODELS

    from vmamba.tools.openmmlab.configs import load_config

    cfg = load_config(Path(DETECTION), {'model.backbone.model_options': dict(depths=(1, 1, 3, 1))})
    path = scenes / 'other.pth'
    torch.save({'state_dict': MODELS.build(cfg.model).state_dict(), 'meta': {}}, path)
    return path


def test_a_checkpoint_of_another_variant_is_refused_by_every_tool(other_checkpoint, tmp_path, capsys):
    messages = ['other.pth does not fit MaskRCNN', 'stages.2.blocks.2.']
    testing = [DETECTION, str(other_checkpoint), '--work-dir', str(tmp_path), '--cfg-options', *QUICK]
    assert_one_line('mm_test.py', mm_test.main, testing, messages, capsys)
    drawing = [IMAGE, '--config', DETECTION, '--checkpoint', str(other_checkpoint), '--device', 'cpu']
    assert_one_line('mm_infer.py', mm_infer.main, drawing, messages, capsys)
    training = [DETECTION, '--work-dir', str(tmp_path), '--cfg-options', *QUICK, f'load_from={other_checkpoint}']
    assert_one_line('mm_train.py', mm_train.main, training, [*messages, '--fresh MODULE'], capsys)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / 'text.pth').write_text('no weights')
    arguments = [DETECTION, str(tmp_path / 'text.pth'), '--work-dir', str(tmp_path), '--cfg-options', *QUICK]
    assert_one_line('mm_test.py', mm_test.main, arguments, ['text.pth is not a readable checkpoint'], capsys)


def test_a_damaged_checkpoint_is_refused_by_its_checksums(tmp_path):
    from vmamba.tools.openmmlab.checkpoints import read_checkpoint

    path = tmp_path / 'damaged.pth'
    torch.save({'state_dict': {'weight': torch.ones(5000)}}, path)
    assert read_checkpoint(str(path))['state_dict']['weight'].sum() == 5000
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match='damaged.pth is not a readable checkpoint: .*/data/0 is damaged'):
        read_checkpoint(str(path))


@pytest.mark.parametrize('config', [DETECTION, SEGMENTATION])
def test_the_library_of_a_config_is_named_when_it_is_missing(config, monkeypatch, capsys):
    library = 'mmseg' if config == SEGMENTATION else 'mmdet'
    monkeypatch.setitem(sys.modules, library, None)
    assert_one_line('mm_train.py', mm_train.main, [config], [library, 'install it by'], capsys)


def test_inference_with_another_number_of_classes_is_refused(capsys):
    options = ['test_dataloader.dataset.metainfo.classes=(zero,one)']
    arguments = [IMAGE, '--config', DETECTION, '--checkpoint', 'absent.pth', '--device', 'cpu', '--cfg-options']
    message = 'bbox_head has num_classes 3, but the data have 2 classes: zero, one'
    assert_one_line('mm_infer.py', mm_infer.main, [*arguments, *options], [message], capsys)


def test_a_file_that_is_no_image_is_refused():
    with pytest.raises(UserError, match='list.json is no image that can be read'):
        next(mm_infer.frames_of('list', Path('data/scenes/annotations/list.json')))


@pytest.mark.parametrize('part', ['train', 'val', 'test'])
def test_labels_that_the_data_do_not_have_are_refused_wherever_they_are_read(part):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    from vmamba.tools.openmmlab.checks import CheckHook

    dataset = SimpleNamespace(metainfo={'classes': ('photograph', 'zero', 'one')})
    runner = SimpleNamespace(**{f'{part}_loop': SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset))})
    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.tensor([[[0, 255, 2]]])))
    sample.set_metainfo({'seg_map_path': 'map.png'})
    check = getattr(CheckHook(), f'before_{part}_iter')
    for samples in ([sample], [[sample], [sample]]):  # also in variants for test-time augmentation
        check(runner, 0, {'data_samples': samples})
    sample.gt_sem_seg.data[0, 0, 0] = 3
    for samples in ([sample], [[sample], [sample]]):
        with pytest.raises(UserError, match='map.png has label 3, but the config has 3 classes'):
            check(runner, 0, {'data_samples': samples})


WRONG_OPTIONS = {
    'images to draw': (mm_test, ['config.py', 'last.pth', '--limit', '-1'], "got '-1'"),
    'folder of metrics': (mm_test, ['config.py', 'last.pth', '--output', 'data'], "ends with .json, got 'data'"),
    'file for a folder': (
        *(mm_infer, ['--config', 'c.py', '--checkpoint', 'l.pth', 'i.jpg', '--output', 'drawn.png']),
        "--output is a folder, got 'drawn.png'",
    ),
    'option without value': (mm_train, ['c.py', '--cfg-options', 'model'], "expected KEY=VALUE, got 'model'"),
    'open bracket': (mm_train, ['c.py', '--cfg-options', 'a=[1,(2]'], 'Imbalanced brackets'),
}


@pytest.mark.parametrize('case', WRONG_OPTIONS)
def test_wrong_options_are_refused(case, capsys):
    tool, arguments, message = WRONG_OPTIONS[case]
    with pytest.raises(SystemExit) as error:
        tool.parse_args(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    'text, value',
    [
        *[('false', False), ('True', True), ('None', None), ('[true,x]', [True, 'x']), ('(a, b)', ('a', 'b'))],
        *[("'false'", 'false'), ('1e-4', 1e-4), ('data/none', 'data/none'), ('my data/', 'my data/')],
        *[("[{'type': 'A', 'p': 0.5}]", [{'type': 'A', 'p': 0.5}]), ("('polar bear',)", ('polar bear',))],
    ],
)
def test_values_of_options_are_read_as_mmengines_tools_read_them(text, value):
    assert mm_train.parse_args(['c.py', '--cfg-options', 'x=1', f'a.b={text}']).cfg_options == {'x': 1, 'a.b': value}


def test_keys_that_may_be_misspelt_are_pointed_at(capsys):
    from vmamba.tools.openmmlab.configs import load_config

    options = {
        'model.test_cfg.rcnn.score_th': 0.1,
        'data_root': 'data/other/',
        'param_scheduler.0.end': 3,
        'model.backbone.model_options': {},
        'randomness.seed': 1,
    }
    assert load_config(Path(DETECTION), options).model.test_cfg.rcnn.score_th == 0.1
    first, second = capsys.readouterr().err.splitlines()
    assert first == '--cfg-options model.test_cfg.rcnn.score_th is new in the config; did you mean score_thr?'
    assert second.startswith('--cfg-options data_root has no effect where the config file has used data_root already')


def test_a_rate_to_scale_without_its_batch_size_is_refused(tmp_path, capsys):
    arguments = [DETECTION, '--work-dir', str(tmp_path), '--auto-scale-lr', '--cfg-options', 'auto_scale_lr=None']
    message = 'has no auto_scale_lr.base_batch_size'
    assert_one_line('mm_train.py', mm_train.main, arguments, [message], capsys)


@pytest.mark.parametrize(
    'inputs, message',
    [
        (['absent.jpg'], 'there is no image, folder or list of images absent.jpg'),
        (['data/scenes/images/empty'], 'data/scenes/images/empty holds no images; their names must end in'),
        ([IMAGE, 'data/scenes/images/training'], 'would both be written as training_00000'),
    ],
)
def test_inputs_without_images_and_of_the_same_name_are_refused(inputs, message, capsys):
    arguments = [*inputs, '--config', DETECTION, '--checkpoint', 'absent.pth']
    assert_one_line('mm_infer.py', mm_infer.main, arguments, [message], capsys)


def test_a_video_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / 'a.mp4').write_text('no video')
    with pytest.raises(UserError, match='a.mp4 is no video that OpenCV can read'):
        next(mm_infer.frames_of('a', tmp_path / 'a.mp4'))


def test_variants_of_images_need_a_config_that_says_which(capsys):
    arguments = [DETECTION, 'absent.pth', '--tta']
    assert_one_line('mm_test.py', mm_test.main, arguments, ['has no tta_model, which --tta needs'], capsys)
    merged = ['--cfg-options', "tta_model={'type': 'DetTTAModel'}", 'tta_pipeline=[]']
    assert_one_line('mm_test.py', mm_test.main, [*arguments, *merged], ['merges boxes, not masks'], capsys)
