"""Names of the library that the pages mention exist."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import timm

import vmamba  # noqa: F401

ROOT = Path(__file__).parents[2]
NAMES = sorted(
    {
        name
        for path in (ROOT / 'README.md', *(ROOT / 'docs').rglob('*.md'))
        for name in re.findall(r'\bvmamba(?:\.\w+)+', path.read_text())
        if not re.search(r'\.(?:py|yaml|git|pth|safetensors|tools\.\w+)$', name)
    }
)

NEEDED = {'vmamba.mm': 'mmengine', 'vmamba.nnunet.': 'nnunetv2', 'vmamba.tools.segmentation': 'monai'}


@pytest.mark.parametrize('name', NAMES)
def test_a_mentioned_name_can_be_imported(name):
    for folder, package in NEEDED.items():
        if name.startswith(folder):
            pytest.importorskip(package)
    parent, _, last = name.rpartition('.')
    assert hasattr(import_module(parent), last) or import_module(name)


def test_the_official_names_of_models_are_registered():
    page = (ROOT / 'docs/migration.md').read_text()
    rows = re.findall(
        r'^\| `(vim_\w+|vmamba_\w+)(?:\(\))?`.* \| .*?`(?:timm\.create_model\(.)?(\w+)', page, re.MULTILINE
    )
    assert len(rows) >= 5
    for official, ours in rows:
        assert timm.is_model(official) and timm.is_model(ours)
        with pytest.warns(match=ours):
            timm.create_model(official, device='meta')
