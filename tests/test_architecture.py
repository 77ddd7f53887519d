"""Imports go one way; files stay small; nothing prints."""

import ast
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import vmamba.kernels

import vmamba

ROOT = Path(__file__).resolve().parents[1]
# Package -> the first-party packages that it may import, itself aside.
ALLOWED = {
    'vmamba.kernels': set(),
    'vmamba.layers': {'vmamba.kernels'},
    'vmamba.models': {'vmamba.kernels', 'vmamba.layers'},
    'vmamba.mm': {'vmamba.kernels', 'vmamba.layers', 'vmamba.models', 'vmamba'},
}
MM = {'mmengine', 'mmcv', 'mmdet', 'mmseg'}
LIBRARY = {
    **{
        '.'.join(['vmamba', *path.relative_to(ROOT).with_suffix('').parts]): path
        for path in (ROOT / 'kernels').rglob('*.py')
    },
    **{
        '.'.join(path.relative_to(ROOT).with_suffix('').parts): path
        for path in (ROOT / 'vmamba').rglob('*.py')
        if 'kernels' not in path.relative_to(ROOT).parts
    },
}
LIBRARY_PACKAGES = [module.removesuffix('.__init__') for module in LIBRARY if module.endswith('.__init__')]
SCRIPTS = {str(path.relative_to(ROOT)): path for folder in ('tools', 'tests') for path in (ROOT / folder).rglob('*.py')}


def imports(module, path):
    """Absolute names of what a file imports, and whether each was relative."""
    is_package = path.name == '__init__.py'
    package = module.removesuffix('.__init__').split('.')
    package = package if is_package else package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            yield from (('.'.join([*base, alias.name]), bool(node.level)) for alias in node.names)


def package_of(module):
    """vmamba.layers.ss2d -> vmamba.layers; what lies directly in vmamba is vmamba."""
    return next((package for package in ALLOWED if module == package or module.startswith(f'{package}.')), 'vmamba')


def test_the_kernels_are_installed_inside_the_library():
    assert Path(vmamba.kernels.__file__).resolve().parent == ROOT / 'kernels'
    assert len(LIBRARY) > 10
    assert vmamba.kernels.__name__ in LIBRARY_PACKAGES and 'vmamba.kernels.fused' in LIBRARY_PACKAGES
    for package in LIBRARY_PACKAGES:
        spec = find_spec(package)
        assert Path(spec.origin).resolve() == LIBRARY[f'{package}.__init__'], package


@pytest.mark.parametrize('module', LIBRARY)
def test_imports_go_one_way(module):
    package = package_of(module)
    for name, _ in imports(module, LIBRARY[module]):
        if name == 'vmamba' or name.startswith('vmamba.'):
            target = package_of(name)
            assert package in ('vmamba', target) or target in ALLOWED[package], f'{module} imports {name}'
            if package == 'vmamba':
                assert target != 'vmamba.mm', f'{module} imports {name}, which needs mmengine'
        if name.split('.')[0] in MM:
            assert package == 'vmamba.mm', f'{module} imports {name}'
        assert name.split('.')[0] not in ('kernels', 'tools', 'tests'), f'{module} imports {name}'


@pytest.mark.parametrize('module', [module for module in LIBRARY if package_of(module) == 'vmamba.kernels'])
def test_kernels_import_torch_and_triton_only(module):
    for name, relative in imports(module, LIBRARY[module]):
        top = name.split('.')[0]
        assert relative or top in ('torch', 'triton') or top in sys.stdlib_module_names, f'{module} imports {name}'


@pytest.mark.parametrize('module', [module for module in LIBRARY if module.startswith('vmamba.kernels.fused.')])
def test_the_triton_kernels_know_only_each_other_and_where_they_run(module):
    for name, relative in imports(module, LIBRARY[module]):
        if relative:
            known = name.startswith(('vmamba.kernels.backend.', 'vmamba.kernels.fused.'))
            assert known, f'{module} imports {name}'


@pytest.mark.parametrize(
    'module',
    [*(m for m in LIBRARY if package_of(m) != 'vmamba.kernels'), *(s for s in SCRIPTS if s.startswith('tools'))],
)
def test_only_the_kernels_decide_when_triton_runs(module):
    for name, _ in imports(module, LIBRARY.get(module) or SCRIPTS[module]):
        assert not name.startswith('vmamba.kernels.fused'), f'{module} imports {name}'


@pytest.mark.parametrize('script', SCRIPTS)
def test_scripts_and_tests_use_the_installed_kernels(script):
    for name, _ in imports(script, SCRIPTS[script]):
        assert name.split('.')[0] != 'kernels', f'{script} imports {name}'


@pytest.mark.parametrize('module', LIBRARY)
def test_files_stay_small_and_silent(module):
    source = LIBRARY[module].read_text()
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = {func.id for func in calls if isinstance(func, ast.Name)}
    assert not names & {'print', 'breakpoint'}, f'{module} calls {names & {"print", "breakpoint"}}'
    assert len(source.splitlines()) <= 450, f'{module} has {len(source.splitlines())} lines'


def test_there_is_no_package_of_tests():
    assert not list((ROOT / 'tests').rglob('__init__.py'))
