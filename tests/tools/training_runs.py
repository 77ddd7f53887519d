"""What the tests of train.py share: its command line in this process or in one of its own, and its results."""

import csv
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPT = 'tools/train.py'
CONFIGS = 'configs/classification'

# A run of a small model on 160 images of 32x32.
SMALL = (
    *(f'{CONFIGS}/lfw_vmamba_nano.yaml', '--model', 'test_vit', '--workers', '0', '--epochs', '2', '--device', 'cpu'),
    *('--warmup-epochs', '0.5'),
)
TORCHRUN = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2')


def start(*args, launcher=(sys.executable,), **kwargs):
    """Starts train.py in a process of its own, as a person would, with the kernels as they are without tests."""
    env = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    env['OMP_NUM_THREADS'] = '1'
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*launcher, SCRIPT, *map(str, args)], cwd=ROOT, env=env, **{**pipes, **kwargs})


def finish(process, code=0):
    """Waits for a process; returns what it said."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f'{process.returncode}\n{out}\n{err}'
    return out, err


def wait_for(process, text):
    """Reads the output up to a line with this text."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f'{text!r} did not come: {process.stderr.read()}')


def rows(output):
    """The epochs of a run, without what depends on the machine."""
    with (output / 'epochs.csv').open() as file:
        table = list(csv.DictReader(file))
    return [{key: float(row[key]) for key in row if key not in ('images_per_second', 'memory_mib')} for row in table]


def newest(output):
    """Content of the newest checkpoint."""
    return torch.load(max(output.glob('checkpoint-*.pt')), weights_only=True)


def image_folder(root, classes=('cat', 'dog'), count=6):
    """A folder of train/ and validation/ with a few images of every class."""
    for split in ('train', 'validation'):
        for index, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new('RGB', (40, 40), (40 * number, 100 * index, 99)).save(folder / f'{number}.png')
    return root


@contextmanager
def signals_kept():
    """Puts the handlers of signals back, which a run in this process replaces."""
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def assert_same(ours, theirs):
    """Compares nested states bit by bit."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs):
            assert_same(*pair)
    else:
        assert ours == theirs
