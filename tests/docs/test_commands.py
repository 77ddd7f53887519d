"""The commands that the pages about evaluation and features, and the tools themselves, show."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = {
    'predict': 'predict',
    'validate': 'validate',
    'extract': 'extract_features',
    'knn': 'evaluate_features',
    'visualize': 'visualize',
}
PAGES = ROOT / 'README.md', *(ROOT / 'docs' / f'{name}.md' for name in ('evaluation', 'features'))
COMMAND = re.compile(rf'(?:^ *|`)vmamba ({"|".join(TOOLS)}) ([^`\n]+)', flags=re.MULTILINE)
COMMANDS = sorted(
    {
        found
        for path in (*PAGES, *(ROOT / f'tools/{module}.py' for module in TOOLS.values()))
        for found in COMMAND.findall(path.read_text())
    }
)


def test_every_tool_has_examples():
    assert {tool for tool, _ in COMMANDS} == set(TOOLS)


@pytest.mark.parametrize('tool, arguments', COMMANDS, ids=lambda text: text[:40])
def test_shown_commands_are_understood(tool, arguments):
    import_module(f'vmamba.tools.{TOOLS[tool]}').parse_args(shlex.split(arguments))


def test_the_published_figures_of_the_page_are_those_of_the_tool():
    from vmamba.tools.published import PUBLISHED

    rows = re.findall(
        r'^\| `(\w+)` \| ([\d.]+) \| ([\d.]*) ?\|$', (ROOT / 'docs/evaluation.md').read_text(), re.MULTILINE
    )
    found = {name: (float(top1), float(top5) if top5 else None) for name, top1, top5 in rows}
    assert found == {name: tuple(figures) for name, figures in PUBLISHED.items()}
