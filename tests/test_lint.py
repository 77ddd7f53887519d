"""What `make lint` checks, as tests."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = (('ruff', 'check', '.'), ('ruff', 'format', '--check', '.'), ('mypy',))


@pytest.mark.parametrize('command', COMMANDS, ids=' '.join)
def test_lint(command):
    pytest.importorskip(command[0])
    done = subprocess.run([sys.executable, '-m', *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_lint_runs_the_same():
    recipe = (ROOT / 'Makefile').read_text().partition('\nlint:')[2].partition('\n\n')[0]
    assert [line.strip() for line in recipe.splitlines()[1:]] == [f'$(BIN)/{" ".join(command)}' for command in COMMANDS]
