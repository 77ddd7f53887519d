"""Runs of train.py that are killed and resumed, in processes of their own; test_train_sharded.py stops torchrun."""

import os
import random
import signal
import time

import pytest
import torch
from folders import in_use, write_digits
from forked import Forked, two_processes
from training_runs import CONFIGS, SMALL, TORCHRUN, assert_same, finish, image_folder, newest, rows, start, wait_for

from vmamba.tools import train
from vmamba.tools.output_files import lock_folder
from vmamba.tools.user_errors import UserError

import psutil

# Everything that draws random numbers or has a state.
STATEFUL = (
    *(f'{CONFIGS}/lfw_vmamba_nano.yaml', '--epochs', 3, '--batch-size', 8, '--accumulate', 2, '--workers', 1),
    *('--drop-last', '--mixup', 0.8, '--cutmix', 1.0, '--reprob', 0.5, '--aug-repeats', 2, '--hflip', 0.5),
    *('--auto-augment', 'rand-m9-mstd0.5-inc1', '--drop-path', 0.2, '--ema-decay', 0.9, '--checkpoint-every', 2),
    *('--log-every', 1, '--device', 'cpu', '--model-args', '{depths: [1, 1], embed_dim: 16}'),
)


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(run_alone, tmp_path):
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    run_alone(*STATEFUL, '--output', whole)
    chance = random.Random(0)
    for number, kill in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
        options = '--output', broken, '--resume', '--workers', number % 2
        process = Forked(train.main, *STATEFUL, *options, start_new_session=True)
        wait_for(process, f'epoch {number + 1} update {chance.randint(3, 7)}/10')
        time.sleep(chance.random() / 20)
        workers = psutil.Process(process.pid).children()
        assert len(workers) >= number % 2
        with pytest.raises(UserError, match=f'another process is writing into {broken}'):
            lock_folder(broken)
        if kill == signal.SIGTERM:
            os.killpg(process.pid, kill)  # the loading processes too, as torchrun and job schedulers do
            out, _ = finish(process, 128 + kill)
            assert 'stopped by signal 15' in out
        else:
            process.send_signal(kill)
            process.wait()
            lock_folder(broken).close()  # at once, although loading processes end later
            finish(process, -kill)
        assert not psutil.wait_procs(workers, timeout=30)[1]
    damaged = max(broken.glob('checkpoint-*.pt'))
    damaged.write_bytes(damaged.read_bytes()[:100_000])
    out, err = finish(Forked(train.main, *STATEFUL, '--output', broken, '--resume'))
    assert f'skipped the broken checkpoint {damaged}' in err
    assert 'resumed from' in out
    assert rows(broken) == rows(whole)
    ours, theirs = newest(broken), newest(whole)
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'scaler', 'best', 'update', 'epoch'):
        assert_same(ours[key], theirs[key])


def test_two_processes_stopped_and_resumed_learn_as_one_with_the_joined_batch(run_alone, tmp_path):
    # 199 images are 7 updates of 28 and one of 3, which the two processes share as 2 and 1.
    data = tmp_path / 'data'
    write_digits(data / 'train', per_class=20)
    write_digits(data / 'validation', per_class=6, start=20)
    (data / 'train/0/00.png').unlink()
    args = f'{CONFIGS}/digits_vmamba_nano.yaml', '--model', 'test_vit', '--device', 'cpu', '--workers', 1
    args = *args, '--data', '', '--data-dir', data
    args = *args, '--epochs', 2, '--opt', 'sgd', '--lr', 0.02, '--log-every', 1, '--auto-augment', 'rand-m5'
    one, two = tmp_path / 'one', tmp_path / 'two'
    with two_processes(train.main, *args, '--batch-size', 14, '--output', two) as processes:
        wait_for(processes[0], 'epoch 1 update 4/8')
        for process in processes:
            process.send_signal(signal.SIGTERM)
        finish(processes[0], 128 + signal.SIGTERM)
    with two_processes(train.main, *args, '--batch-size', 14, '--output', two, '--resume') as processes:
        assert 'resumed from' in [finish(process) for process in processes][0][0]
    run_alone(*args, '--batch-size', 28, '--output', one)
    for ours, theirs in zip(rows(two), rows(one), strict=True):
        for key in ('updates', 'lr', 'val_top1', 'val_top5', 'val_loss'):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
    assert rows(two)[1]['train_loss'] == pytest.approx(rows(one)[1]['train_loss'], rel=1e-4)
    for ours, theirs in zip(newest(two)['state_dict'].values(), newest(one)['state_dict'].values(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_an_error_of_one_process_ends_the_others(tmp_path):
    folder = image_folder(tmp_path / 'data')
    broken = folder / 'train/dog/3.png'
    broken.write_bytes(broken.read_bytes()[:60])
    args = f'{CONFIGS}/lfw_vmamba_nano.yaml', '--data', '', '--data-dir', folder, '--model', 'test_vit'
    args = *args, '--batch-size', 2, '--workers', 0, '--device', 'cpu', '--output', tmp_path / 'run'
    _, err = finish(start(*args, launcher=TORCHRUN), 1)
    assert f'cannot read the image {broken}' in err
    assert 'error: [process' in err


def test_processes_that_share_a_run_end_where_another_run_writes(run_alone, tmp_path):
    with in_use(tmp_path):
        with two_processes(train.main, *SMALL, '--output', tmp_path) as processes:
            _, err = finish(processes[0], 2)
    message = f'train.py: error: [process 0] another process is writing into {tmp_path}: wait until it ends'
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ['.lock']
