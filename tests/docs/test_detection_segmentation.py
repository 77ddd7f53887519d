"""What the pages on detection and segmentation name is there."""

import re
from pathlib import Path

import pytest
import yaml

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
    names = re.findall(r'(?:configs/\w+/|`)((?:mask|cascade|vim|vmamba|mambavision|vssd|dino)[\w{},-]*\.py)', text)
    configs = {path.name for path in (ROOT / 'configs').rglob('*.py')}
    assert names
    assert {full for name in names for full in expand(name)} <= configs
    assert all((ROOT / path).is_file() for path in re.findall(r'(?<!\w)(?:configs|tools)/[\w/-]+\.py', text))


def test_the_tables_have_the_figures_of_the_metafiles():
    metafiles = [yaml.safe_load(path.read_text()) for path in (ROOT / 'configs').glob('*/metafile.yml')]
    figures = {
        f'{model["Name"]}.py': [value for result in model['Results'] for value in result['Metrics'].values()]
        for metafile in metafiles
        for model in metafile['Models']
        if 'Results' in model
    }
    page, listed = (ROOT / PAGES[0]).read_text(), set()
    for name, cells in re.findall(r'^\| [^|]+ \| `([^`]+\.py)` \|(.*)', page, re.MULTILINE):
        expected = [value for config in expand(name) for value in figures.get(config, [])]
        assert [float(value) for value in re.findall(r'[\d.]+', cells)] == expected, name
        listed.update(expand(name))
    assert {name for name in figures if 'vim-' not in name} <= listed  # Vim's are in sentences
