import errno
import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from folders import full_disk, in_use, truncate, write_digits, write_photographs
from forked import Forked, two_processes
from PIL import Image
from timm.data import create_transform, resolve_data_config
from training_runs import TORCHRUN

from vmamba.tools import extract_features
from vmamba.tools.features import store
from vmamba.tools.features.maps import covering
from vmamba.tools.features.store import Table, read_features
from vmamba.tools.user_errors import UserError

TOOL = Path(extract_features.__file__)
NANO = '--model', 'vmamba_nano=untrained'


def read_index(folder):
    return store.read_index(folder).to_dict('records')


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp('digits') / 'images', per_class=2)


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp('photographs') / 'images')


def run(*arguments):
    extract_features.main([*map(str, arguments), '--workers', '0', '--device', 'cpu'])


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith('extract_features.py: error: ') and message.count('\n') == 1
    return message


def build(name='vmamba_nano', **kwargs):
    """The untrained model that the tool makes."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **kwargs).eval()


def normalise(path):
    """[1, 3, H, W] of an image file by timm's constants."""
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg('vmamba_nano').to_dict())
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ('mean', 'std'))
    pixels = torch.from_numpy(np.array(Image.open(path).convert('RGB'))).permute(2, 0, 1)
    return ((pixels / 255 - mean) / std)[None]


@torch.inference_mode()
def test_pooled_features_and_maps_in_memory_mapped_arrays(digits, tmp_path, capsys):
    run(digits, *NANO, '--features', 'pooled', 'stages.1', '-1', '--batch-size', 8, '--output', tmp_path / 'f')
    index = read_index(tmp_path / 'f')
    assert [row['label'] for row in index] == [str(label) for label in range(10) for _ in range(2)]
    assert {row['state'] for row in index} == {'done'}
    pooled = np.load(tmp_path / 'f' / 'pooled.npy', mmap_mode='r')
    maps = np.load(tmp_path / 'f' / 'stages.1.npy', mmap_mode='r')
    assert (pooled.shape, maps.shape) == ((20, 256), (20, 64, 4, 4))
    assert np.load(tmp_path / 'f' / 'stages.3.npy').shape == (20, 256, 1, 1)
    model = build()
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    transform = create_transform(**config)
    images = torch.stack([transform(Image.open(row['image']).convert('RGB')) for row in index])
    np.testing.assert_allclose(pooled, model(images), rtol=1e-4, atol=1e-5)
    expected = model.forward_intermediates(images, indices=[1], intermediates_only=True)[0]
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-5)
    assert 'images/s' in capsys.readouterr().out
    assert json.loads((tmp_path / 'f' / 'run.json').read_text())['images'] == 20


@pytest.mark.parametrize('form', ['npy', 'safetensors', 'npz'])
@torch.inference_mode()
def test_native_sizes_in_files_of_their_own(photographs, tmp_path, form):
    run(photographs, *NANO, '--features', 'pooled', 'stages.2', '--native', '--format', form, '--output', tmp_path)
    index = read_index(tmp_path)
    assert [row['label'] for row in index] == ['', 'deep']
    maps = read_features(tmp_path, 'stages.2', [0, 1])
    assert [f.shape for f in maps] == [(128, 5, 7), (128, 7, 5)]  # of 70 x 100 and 100 x 70 pixels
    model = build()
    for row, found, pooled in zip(index, maps, read_features(tmp_path, 'pooled', [0, 1])):
        images = normalise(row['image'])
        expected = model.forward_intermediates(images, indices=[2], intermediates_only=True)[0][0]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(pooled, model(images)[0], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_vim_at_native_sizes_gets_whole_patches(photographs, tmp_path):
    run(photographs, '--model', 'vim_nano=untrained', '--features', 'blocks.1', '--native', '--output', tmp_path)
    found = read_features(tmp_path, 'blocks.1', [0])[0]
    images = torch.nn.functional.pad(normalise(photographs / 'astronaut.png'), (0, 0, 0, 2), mode='replicate')
    model = build('vim_nano', dynamic_img_size=True)
    expected = model.forward_intermediates(images, indices=[1], intermediates_only=True)[0][0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('model, feature', [('vmamba_nano', 'stages.2'), ('vim_nano', 'blocks.0')])
def test_tiles_with_an_overlap_over_all_are_the_whole_image(photographs, tmp_path, model, feature):
    common = photographs, '--model', f'{model}=untrained', '--features', feature
    run(*common, '--native', '--output', tmp_path / 'whole')
    for overlap in (0, 128):
        run(*common, '--tile', 32, '--overlap', overlap, '--output', tmp_path / str(overlap))
    for row in range(2):
        whole, cut, covered = (read_features(tmp_path / name, feature, [row])[0] for name in ('whole', '0', '128'))
        np.testing.assert_allclose(covered, whole, rtol=1e-4, atol=1e-4)
        assert cut.shape == whole.shape and np.isfinite(cut).all() and not np.allclose(cut, whole, atol=1e-4)


def test_tiles_of_a_memory_mapped_image_in_half_precision(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (96, 80, 3), dtype=np.uint8)
    (tmp_path / 'images').mkdir()
    np.save(tmp_path / 'images' / 'large.npy', pixels)
    tiles = '--tile', 64, '--overlap', 32, '--features', 'stages.3', '--save-dtype', 'float16'
    run(tmp_path / 'images', *NANO, *tiles, '--output', tmp_path / 'f')
    (found,) = read_features(tmp_path / 'f', 'stages.3', [0])
    assert isinstance(found, np.memmap) and (found.shape, found.dtype) == ((256, 3, 3), np.float16)


def test_features_may_lie_among_the_images(tmp_path):
    images = write_photographs(tmp_path / 'images')
    for _ in range(2):
        run(images, *NANO, '--features', 'stages.0', '--native', '--output', images / 'features')
    assert len(read_index(images / 'features')) == 2


def test_workers_read_the_images(photographs, tmp_path):
    extract_features.main([str(photographs), *NANO, '--workers', '1', '--device', 'cpu', '--output', str(tmp_path)])
    assert {row['state'] for row in read_index(tmp_path)} == {'done'}


def test_an_output_that_is_a_file_is_one_line(photographs, tmp_path, capsys):
    (tmp_path / 'file').write_text('precious')
    assert 'file' in failure(capsys, photographs, *NANO, '--output', tmp_path / 'file')


def test_running_out_of_memory_names_the_way_out(photographs, tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(extract_features, 'extract', fail)
    for options, way_out in (((), '--batch-size'), (('--native',), '--tile')):
        assert way_out in failure(capsys, photographs, *NANO, *options, '--output', tmp_path / f'f{len(options)}')


def test_a_list_of_images(photographs, tmp_path):
    (photographs / 'list.txt').write_text('deep/coffee.png\nastronaut.png\n')
    run(photographs / 'list.txt', *NANO, '--output', tmp_path)
    assert [Path(row['image']).name for row in read_index(tmp_path)] == ['coffee.png', 'astronaut.png']


def test_a_killed_run_goes_on(tmp_path):
    images = write_digits(tmp_path / 'images', per_class=10)
    arguments = [images, *NANO, '--features', 'pooled', 'stages.3', '--batch-size', '1']
    process = Forked(lambda argv: run(*argv), *arguments, '--output', tmp_path / 'killed')
    progress = tmp_path / 'killed' / 'progress.npy'
    while process.poll() is None and not (progress.is_file() and progress.stat().st_size and done_in(progress) >= 5):
        time.sleep(0.01)
    process.kill()
    process.wait()
    written = done_in(progress)
    assert 5 <= written < 100
    before = np.load(tmp_path / 'killed' / 'pooled.npy')
    assert before[:written].any(axis=1).all() and not before[written + 1 :].any()  # a row may wait for its mark
    states = [row['state'] for row in read_index(tmp_path / 'killed')]
    assert states == ['done'] * written + ['todo'] * (100 - written)
    run(*arguments, '--output', tmp_path / 'killed')
    assert json.loads((tmp_path / 'killed' / 'run.json').read_text())['images'] == 100 - written
    run(*arguments, '--output', tmp_path / 'whole')
    for name in ('pooled', 'stages.3'):
        one, other = (np.load(tmp_path / folder / f'{name}.npy') for folder in ('killed', 'whole'))
        np.testing.assert_array_equal(one, other)
    run(*arguments, '--output', tmp_path / 'whole')  # nothing is left to do
    assert json.loads((tmp_path / 'whole' / 'run.json').read_text())['images'] == 0


def test_processes_of_torchrun_share_the_images_and_any_number_of_them_continues(tmp_path):
    images = write_digits(tmp_path / 'images', per_class=10)
    arguments = [images, *NANO, '--features', 'pooled', 'stages.3', '--batch-size', '1', '--output']
    command = [*TORCHRUN, '-m', 'vmamba.tools.extract_features', *arguments, tmp_path / 'shared', '--workers', '0']
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen([*map(str, command), '--device', 'cpu'], env=env)
    progress = tmp_path / 'shared' / 'progress.npy'
    try:
        while not (progress.is_file() and all((np.load(progress)[rank::2] == 1).sum() > 1 for rank in range(2))):
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.terminate()  # torchrun sends the signal on, which ends its processes at once
        process.wait()
    written = done_in(progress)
    assert 4 <= written < 100
    with two_processes(lambda argv: run(*argv), *arguments, tmp_path / 'shared') as processes:
        said = [process.communicate() for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
    figures = json.loads((tmp_path / 'shared' / 'run.json').read_text())
    assert (figures['images'], figures['processes']) == (100 - written, 2)
    run(*arguments, tmp_path / 'alone')
    for name in ('pooled', 'stages.3'):
        shared, alone = (np.load(tmp_path / folder / f'{name}.npy') for folder in ('shared', 'alone'))
        np.testing.assert_array_equal(shared, alone)
    assert read_index(tmp_path / 'shared') == read_index(tmp_path / 'alone')
    run(*arguments, tmp_path / 'shared')  # one process finds nothing left
    assert json.loads((tmp_path / 'shared' / 'run.json').read_text())['images'] == 0


def test_processes_name_every_skipped_image_and_stop_at_one_that_is_not_skipped(tmp_path):
    images = write_digits(tmp_path / 'images', per_class=1, classes=4)
    broken = [truncate(images / name / '00.png') for name in '03']
    arguments = images, *NANO, '--format', 'npz', '--output', tmp_path / 'f'
    with two_processes(lambda argv: run(*argv), *arguments) as processes:
        said = [process.communicate() for process in processes]
    for process, (_, err), path in zip(processes, said, broken):
        assert process.returncode and f'cannot read the image {path}' in err
    with two_processes(lambda argv: run(*argv), *arguments, '--skip-bad-images') as processes:
        (out, _), _ = [process.communicate() for process in processes]
    assert f'skipped 2 unreadable image(s): {broken[0]}, {broken[1]}' in out
    assert [row['state'] for row in read_index(tmp_path / 'f')] == ['unreadable', 'done', 'done', 'unreadable']


def test_processes_refuse_what_another_run_writes(photographs, tmp_path):
    with (
        in_use(tmp_path / 'f'),
        two_processes(lambda argv: run(*argv), photographs, *NANO, '--output', tmp_path / 'f') as processes,
    ):
        said = [process.communicate()[1] for process in processes]
        assert [process.returncode for process in processes] == [2, 2]
    assert 'error: [process 0] another process is writing into' in said[0] and 'Traceback' not in ''.join(said)


def test_processes_are_on_one_host_and_have_a_gpu_each(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    with pytest.raises(UserError, match='run torchrun --standalone on every host'):
        extract_features.join(torch.device('cpu'))
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(UserError, match='4 processes need as many GPUs, and there are 2'):
        extract_features.join(torch.device('cuda'))


def done_in(progress):
    """How many images a progress file counts as done."""
    try:
        return int((np.load(progress, mmap_mode='r') == 1).sum())
    except ValueError:  # it is being made
        return 0


def test_maps_have_their_room_on_the_disk_before_they_are_written(tmp_path, capsys, monkeypatch):
    images = write_photographs(tmp_path / 'images')
    common = images, *NANO, '--img-size', 512, '--features', 'stages.0'
    with monkeypatch.context() as patch:
        patch.setattr(Table, 'write', lambda self, rows, features: self.array('stages.0', features['stages.0']))
        run(*common, '--output', tmp_path / 'table')
        patch.delattr(os, 'posix_fallocate')  # as on macOS
        run(*common, '--output', tmp_path / 'other')
    for name in ('table', 'other'):
        path = tmp_path / name / 'stages.0.npy'
        assert np.load(path).shape == (2, 32, 128, 128)
        assert path.stat().st_blocks * 512 >= path.stat().st_size > 2**22

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'posix_fallocate', full)
    for options in ((), ('--native',)):
        message = failure(capsys, images, *NANO, *options, '--output', tmp_path / f'full{len(options)}')
        assert '.tmp: No space left on device; make room' in message
        assert not list((tmp_path / f'full{len(options)}').rglob('*.npy.tmp'))


@pytest.mark.parametrize('form', ['safetensors', 'npz'])
def test_a_full_disk_is_one_line(photographs, tmp_path, capsys, form):
    options = '--features', 'stages.0', '--img-size', 64, '--format', form, '--output', tmp_path
    with full_disk(10_000):
        assert '00000000.tmp: File too large; make room' in failure(capsys, photographs, *NANO, *options)


@pytest.mark.parametrize('name, size, images', [('settings.json', 100, 1), ('index.csv', 10_000, 300)])
def test_a_full_disk_names_the_file_and_leaves_no_part_of_it(photographs, tmp_path, capsys, name, size, images):
    (tmp_path / 'list.txt').write_text(f'{photographs / "astronaut.png"}\n' * images)
    output = tmp_path / 'f'
    with full_disk(size):
        message = failure(capsys, tmp_path / 'list.txt', *NANO, '--output', output)
    assert message.endswith(f'cannot write {output / name}: File too large; what was saved before is intact\n')
    assert not (output / name).exists()
    assert not [path for path in output.iterdir() if path.name.endswith(('.tmp', '.part'))]


def test_a_run_that_was_killed_at_its_start_goes_on(photographs, tmp_path):
    (tmp_path / '.settings.json.part').write_text('{"model": "vma')
    run(photographs, *NANO, '--output', tmp_path)
    assert {row['state'] for row in read_index(tmp_path)} == {'done'}


def test_unreadable_images_are_named_and_left_out_only_by_the_flag(tmp_path, capsys):
    images = write_digits(tmp_path / 'images', per_class=1, classes=3)
    broken = truncate(images / '1' / '00.png')
    for options in ((), ('--native',)):
        common = images, *NANO, *options, '--output', tmp_path / f'f{len(options)}'
        assert str(broken) in failure(capsys, *common)
        run(*common, '--skip-bad-images')
        assert f'skipped 1 unreadable image(s): {broken}' in capsys.readouterr().out.replace('\n', '')
        assert [row['state'] for row in read_index(common[-1])] == ['done', 'unreadable', 'done']


def test_a_folder_that_another_run_writes_into_is_refused(photographs, tmp_path, capsys):
    output = tmp_path / 'f'
    with in_use(output):
        for options in ((), ('--overwrite',)):
            message = failure(capsys, photographs, *NANO, *options, '--output', output)
            assert f'another process is writing into {output}: wait until it ends' in message
    assert [path.name for path in output.iterdir()] == ['.lock']
    run(photographs, *NANO, '--output', output)
    assert {row['state'] for row in read_index(output)} == {'done'}


def test_other_features_need_another_folder(digits, tmp_path, capsys):
    common = digits, *NANO, '--output', tmp_path / 'f'
    run(*common)
    message = failure(capsys, *common, '--img-size', 64)
    assert 'img_size 32, now 64' in message and '--overwrite' in message
    (tmp_path / 'f' / 'notes.txt').write_text('precious')
    run(*common, '--img-size', 64, '--features', 'stages.0', '--overwrite')
    assert (tmp_path / 'f' / 'notes.txt').exists()
    assert np.load(tmp_path / 'f' / 'stages.0.npy').shape == (20, 32, 16, 16)
    assert not (tmp_path / 'f' / 'pooled.npy').exists()
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('precious')
    assert 'holds something other than features' in failure(capsys, *common[:-1], tmp_path / 'mine', '--overwrite')
    assert [path.name for path in (tmp_path / 'mine').iterdir()] == ['thesis.txt']


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['absent', *NANO], 'there is no image, folder or list of images absent'),
        (['.', *NANO, '--features', 'stages.4'], "no feature 'stages.4'; did you mean stages."),
        (['.', *NANO, '--features', '4'], 'it has pooled, stages.0 to stages.3, or the indices 0 to 3'),
        (['.', *NANO, '--tile', '64'], '--tile gives maps, not pooled features'),
        (['.', *NANO, '--tile', '48', '--features', '3'], 'must be multiples of 32 pixels, got 48 and 256'),
        (['.', '--model', 'vim_nano=untrained', '--img-size', '33'], '--img-size 33: image size 33x33 is not covered'),
        (['.', '--model', 'vim_nan=untrained'], "unknown model 'vim_nan'; did you mean vim_nano"),
        (['.', '--model', 'deit_tiny_patch16_224=untrained', '--native'], 'takes images of 224 pixels only'),
    ],
)
def test_failures_are_one_line(digits, tmp_path, capsys, arguments, message):
    arguments = [str(digits) if text == '.' else text for text in arguments]
    assert message in failure(capsys, *arguments, '--output', tmp_path / 'f')


def test_a_file_that_is_no_list_of_images(tmp_path, capsys):
    np.save(tmp_path / 'x.npy', np.full((8, 8, 3), 200, np.uint8))
    message = failure(capsys, tmp_path / 'x.npy', *NANO, '--output', tmp_path / 'f')
    assert 'x.npy is neither an image nor a text file with a path' in message


def test_what_covers_an_image():
    assert [covering(side, 8, 4) for side in (1, 8, 9, 12, 13)] == [8, 8, 12, 12, 16]
    assert covering(17, 1, 1) == 17
