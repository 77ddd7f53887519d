"""The wheel and the source distribution, and the command that they install, away from the repository."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('build')

ROOT = Path(__file__).parents[1]
FOLDERS = ('configs', 'docs', 'kernels', 'tests', 'tools', 'vmamba')
WITHOUT_TRITON = """
import sys
sys.modules['triton'] = None
from vmamba_cli import main
import vmamba
print(vmamba.__file__)
main()
"""


def call(*command, cwd, code=0):
    """Runs a command without the environment variables of the tests; returns its output and its errors."""
    env = {key: value for key, value in os.environ.items() if key not in ('TRITON_INTERPRET', 'PYTHONPATH')}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """Both artefacts, the wheel from the source distribution."""
    folder = tmp_path_factory.mktemp('dist')
    call(sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder, ROOT, cwd=folder)
    (wheel,), (sdist,) = folder.glob('*.whl'), folder.glob('*.tar.gz')
    return SimpleNamespace(wheel=wheel, sdist=sdist)


@pytest.fixture(scope='module')
def installed(built, tmp_path_factory):
    """The wheel in a fresh environment that sees the packages of this one, and an empty folder."""
    folder = tmp_path_factory.mktemp('installed')
    call(sys.executable, '-m', 'venv', '--without-pip', folder / 'env', cwd=folder)
    python = next((folder / 'env').glob('*/python'))
    call(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-index', built.wheel, cwd=folder)
    site, _ = call(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=folder)
    others = [path for path in sys.path if path.endswith('site-packages')]
    Path(site.strip(), 'others.pth').write_text('\n'.join(others))
    (folder / 'empty').mkdir()
    return SimpleNamespace(python=python, command=python.with_name('vmamba'), folder=folder / 'empty')


def test_the_wheel_is_small_and_holds_tools_and_configurations(built):
    assert built.wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(built.wheel) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(name for name in names if name.endswith('/METADATA'))).decode()
    for folder, package in (('configs', 'vmamba/configs'), ('tools', 'vmamba/tools'), ('kernels', 'vmamba/kernels')):
        files = {path.relative_to(ROOT / folder) for ending in ('py', 'yaml') for path in files_of(folder, ending)}
        assert files and {f'{package}/{path.as_posix()}' for path in files} <= names
    assert 'vmamba/py.typed' in names
    assert 'License-Expression: MIT' in metadata


def test_the_source_distribution_holds_everything(built):
    with tarfile.open(built.sdist) as sdist:
        names = {name.partition('/')[2] for name in sdist.getnames()}
    expected = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in files_of(folder)}
    assert expected <= names
    texts = {'CHANGELOG.md', 'CITATION.cff', 'CONTRIBUTING.md', 'LICENSE', 'README.md'}
    assert {*texts, 'Makefile', 'mkdocs.yml', 'pyproject.toml', 'setup.py', 'vmamba_cli.py'} <= names


def files_of(folder, ending='*'):
    return [path for path in (ROOT / folder).rglob(f'*.{ending}') if path.is_file() and path.suffix != '.pyc']


def test_a_first_user_fine_tunes_predicts_and_extracts_in_an_empty_folder(installed):
    """Own images of two classes, the command of the wheel, and no triton for the second and third step."""
    for color, (low, high) in {'dark': (0, 100), 'bright': (156, 256)}.items():
        (installed.folder / 'photos' / color).mkdir(parents=True)
        for i in range(20):
            pixels = np.random.default_rng(i).integers(low, high, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(installed.folder / f'photos/{color}/{i}.png')
    small = ('--model', 'vmamba_nano', '--no-pretrained', '--img-size', 32, '--epochs', 2, '--warmup-epochs', 0)
    on_cpu = ('--workers', 0, '--device', 'cpu')
    train = ('train', 'finetune', '--data', 'photos', '--output', 'runs/mine', *small, *on_cpu)
    call(installed.command, *train, cwd=installed.folder)

    predict = ('predict', 'photos/dark/0.png', '--checkpoint', 'runs/mine/best.pt', *on_cpu)
    out, _ = call(installed.python, '-c', WITHOUT_TRITON, *predict, cwd=installed.folder)
    package, image, *classes = out.splitlines()
    assert Path(package).is_relative_to(installed.python.parents[1])
    assert image == 'photos/dark/0.png'
    assert {line.split()[1] for line in classes} == {'dark', 'bright'}

    extract = ('extract', 'photos', '--model', 'vmamba_nano=runs/mine/best.pt', *on_cpu)
    call(installed.python, '-c', WITHOUT_TRITON, *extract, cwd=installed.folder)
    assert np.load(installed.folder / 'features/pooled.npy').shape == (40, 256)
