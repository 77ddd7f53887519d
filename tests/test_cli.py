"""The command `vmamba`."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

import vmamba_cli

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; returns its exit code, output and errors."""
    monkeypatch.setattr(sys, 'argv', ['vmamba'])

    def call(*arguments):
        code = 0
        try:
            vmamba_cli.main(list(arguments))
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize('name', vmamba_cli.COMMANDS)
def test_every_command_shows_its_own_help(run, name):
    code, out, _ = run(*name.split(), '--help')
    assert code == 0 and out.startswith(f'usage: vmamba {name} ')


def test_help_lists_every_command_without_importing_torch():
    code = 'import sys, vmamba_cli; vmamba_cli.main(["--help"]); assert "torch" not in sys.modules'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert all(f'\n  {name} ' in done.stdout for name in vmamba_cli.COMMANDS)


def test_a_group_lists_its_commands(run):
    code, out, _ = run('bench', '--help')
    assert code == 0 and '\n  bench kernels ' in out and '\n  train ' not in out


@pytest.mark.parametrize(
    'arguments, message',
    [
        (('trian', 'x.yaml'), "unknown command 'trian'; did you mean train?"),
        (('qqq',), "unknown command 'qqq'; `vmamba --help` lists them"),
        (('bench',), 'bench is followed by one of kernels, scaling, generation, export, plan, medical, mm'),
        (('compare', 'hires'), 'compare is followed by one of highres, sequences, training; did you mean highres?'),
    ],
)
def test_an_unknown_command_is_one_line(run, arguments, message):
    assert run(*arguments) == (2, '', f'vmamba: error: {message}\n')


@pytest.mark.parametrize(
    'package, module, arguments, extras',
    [
        ('rich', 'validate', ('validate', '.', '--models', 'vmamba_nano=untrained'), 'tools'),
        (
            'matplotlib',
            'figures.plots',
            ('predict', '.', '--model', 'vmamba_nano=untrained', '--draw', 'out.png'),
            'tools',
        ),
        ('mmengine', 'openmmlab.configs', ('mm-train', 'mask-rcnn_vmamba-nano_fpn_scenes'), 'mm,tools'),
        ('mmengine', 'openmmlab.configs', ('mm-test', 'mask-rcnn_vmamba-nano_fpn_scenes', 'last.pth'), 'mm,tools'),
        ('mmengine', 'openmmlab.configs', ('mm-infer', 'a.jpg'), 'mm,tools'),
    ],
)
def test_a_missing_extra_is_one_line(run, monkeypatch, tmp_path, package, module, arguments, extras):
    Image.new('RGB', (40, 40)).save(tmp_path / 'black.png')
    monkeypatch.chdir(tmp_path)
    for name in (module, arguments[0].replace('-', '_')):
        monkeypatch.delitem(sys.modules, f'vmamba.tools.{name}', raising=False)
    for name in [name for name in sys.modules if name.startswith(f'{package}.')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, error = run(*arguments)
    what = f"the package {package} is missing; install it by `pip install 'vmamba[{extras}]'`"
    assert (code, error) == (2, f'vmamba {arguments[0]}: error: {what}\n')


@pytest.mark.parametrize(
    'tool, package, extras',
    [('compare_highres', 'rich', 'tools'), ('bench_mm', 'mmengine', 'mm,tools'), ('mm_infer', 'cv2', 'mm,tools')],
)
def test_a_missing_extra_is_one_line_of_a_script_too(tmp_path, tool, package, extras):
    (tmp_path / package).mkdir()
    (tmp_path / package / '__init__.py').write_text(f"raise ModuleNotFoundError('none', name='{package}')")
    env = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    script = [sys.executable, f'tools/{tool}.py']
    done = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True)
    what = f"the package {package} is missing; install it by `pip install 'vmamba[{extras}]'`"
    assert (done.returncode, done.stderr) == (2, f'{tool}.py: error: {what}\n')


def test_errors_name_the_command(run):
    code, _, error = run('train', 'absent.yaml')
    assert code == 2 and error.startswith('vmamba train: error: there is no configuration absent.yaml; ')
    assert error.count('\n') == 1


def test_the_folder_of_trainers_is_printed_if_nnunet_is_installed(run, monkeypatch):
    from vmamba.nnunet import FOLDER
    from vmamba.tools import nnunet_trainers

    monkeypatch.setattr(nnunet_trainers, 'find_spec', lambda name: name)
    assert run('nnunet-trainers') == (0, f'{FOLDER}\n', '')
    monkeypatch.setattr(nnunet_trainers, 'find_spec', lambda name: None)
    code, _, err = run('nnunet-trainers')
    assert code == 2 and "the package nnunetv2 is missing; install it by `pip install 'vmamba[medical]'`" in err


def test_the_trainers_name_the_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'nnunetv2', None)
    monkeypatch.delitem(sys.modules, 'vmamba.nnunet.umamba_trainers', raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"nnunetv2.*: pip install 'vmamba\[medical\]'"):
        import_module('vmamba.nnunet.umamba_trainers')
