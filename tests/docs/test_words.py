"""Texts keep to the word list of CONTRIBUTING.md."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / 'CONTRIBUTING.md').read_text().partition('| not | but |\n|---|---|\n')[2]
WORDS = [word for row in re.findall(r'^\| ([^|]+) \|', TABLE, re.MULTILINE) for word in row.split(', ')]
PATTERN = re.compile(r'\b(' + '|'.join(WORDS).replace(' ', r'[ \n#]+') + r')\b', re.IGNORECASE)
SUFFIXES = '.md', '.py', '.toml', '.yml', '.yaml', '.cff'
FOLDERS = 'configs', 'docs', 'kernels', 'tests', 'tools', 'vmamba'
FILES = [
    path
    for path in (*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob('*')))
    if (path.suffix in SUFFIXES or path.name == 'Makefile') and path.name not in ('CONTRIBUTING.md', 'test_words.py')
]


def test_the_list_is_read():
    assert {'mend', 'what there is'} <= set(WORDS)
    assert PATTERN.search('as long as it\ngoes  on') and not PATTERN.search('recommend, amended')


@pytest.mark.parametrize('part', sorted({path.relative_to(ROOT).parts[0] for path in FILES}))
def test_no_word_of_the_list_is_written(part):
    found = [
        f'{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}'
        for path in FILES
        if path.relative_to(ROOT).parts[0] == part
        for text in [path.read_text()]
        for match in PATTERN.finditer(text)
    ]
    assert found == []
