"""Imports go one way: tests -> vmamba.tools, configs -> mm -> sequence -> models -> layers -> kernels -> torch"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Folders, and the packages that they are. Each may import those before it: so vmamba itself does not import vmamba.mm.
LAYERS = {
    'kernels': 'vmamba.kernels',
    'vmamba/layers': 'vmamba.layers',
    'vmamba/models': 'vmamba.models',
    'vmamba': 'vmamba',
    'vmamba/sequence': 'vmamba.sequence',
    'vmamba/mm': 'vmamba.mm',
    'vmamba/nnunet': 'vmamba.nnunet',
    'configs': 'vmamba.configs',
    'tools': 'vmamba.tools',
    'tests': 'tests',
}
PACKAGES = list(LAYERS.values())


def innermost(name, packages):
    return max((package for package in packages if f'{name}.'.startswith(f'{package}.')), key=len, default=None)


def imports(path, package):
    """Dotted names of what a file of a package imports, in full."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split('.')[: package.count('.') + 2 - node.level] if node.level else []
            yield from ('.'.join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


@pytest.mark.parametrize('folder', LAYERS)
def test_imports_go_one_way(folder):
    layer, files = PACKAGES.index(LAYERS[folder]), (ROOT / folder).rglob('*.py')
    for path in files:
        package = '.'.join([LAYERS[folder], *path.relative_to(ROOT / folder).parts[:-1]])
        if innermost(package, PACKAGES) != LAYERS[folder]:
            continue  # of a layer inside this one
        for name in imports(path, package):
            target, top = innermost(name, PACKAGES), name.split('.')[0]
            where = f'{path.relative_to(ROOT)} imports {name}'
            assert target is None or PACKAGES.index(target) <= layer, where
            if folder == 'kernels':
                assert target or top in ('torch', 'triton') or top in sys.stdlib_module_names, where
            if layer < PACKAGES.index('vmamba.mm'):
                assert top not in ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'monai', 'nnunetv2'), where
            assert top != 'kernels' and not (folder == 'tests' and top.startswith('test_')), where
