"""What the pages on detection and segmentation name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ('docs/detection_segmentation.md',)


def expand(name):
    """The names that braces stand for: a{b,c} is ab and ac."""
    found = re.search(r'\{([^{}]*)\}', name)
    if found is None:
        return [name]
    return [full for part in found[1].split(',') for full in expand(name[: found.start()] + part + name[found.end() :])]


@pytest.mark.parametrize('page', PAGES)
def test_configs_and_tools_exist(page):
    text = (ROOT / page).read_text()
    names = re.findall(r'(?:configs/\w+/|`)((?:mask|cascade|vim|vmamba|dino)[\w{},-]*\.py)', text)
    configs = {path.name for path in (ROOT / 'configs').rglob('*.py')}
    assert names
    assert {full for name in names for full in expand(name)} <= configs
    assert all((ROOT / path).is_file() for path in re.findall(r'(?<!\w)(?:configs|tools)/[\w/-]+\.py', text))
