"""The documentation as a site, and its notebook."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / 'docs/quickstart.ipynb'
CONSTANTS = '__version__', 'NUM_DIRECTIONS', 'NUM_ROUTES', 'OPERATORS', 'FEED_FORWARDS', 'MIXERS', 'PRESETS'
EXTERNAL = re.compile(r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//|<link[^>]+stylesheet[^>]+href="(?:https?:)?//')


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The pages as a strict build makes them: a broken link or an unknown name is an error."""
    nbconvert = pytest.importorskip('nbconvert')
    for package in ('material', 'mkdocstrings', 'mkdocs_jupyter'):
        pytest.importorskip(package)
    templates = Path(nbconvert.__file__).parents[4] / 'share/jupyter'  # not found from an environment on top of another
    folder = tmp_path_factory.mktemp('site')
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', folder]
    env = {**os.environ, 'JUPYTER_PATH': str(templates), 'NO_MKDOCS_2_WARNING': '1'}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_nothing_is_fetched_from_other_servers(site):
    pages = {page: page.read_text() for page in site.rglob('*.html')}
    assert pages and [page for page, text in pages.items() if EXTERNAL.search(text)] == []


@pytest.mark.parametrize(
    'page, package',
    [('kernels', 'kernels'), ('layers', 'layers'), ('mm', 'mm'), ('models', ''), ('sequence', 'sequence')],
)
def test_the_reference_shows_every_public_function_and_class(site, page, package):
    source = ROOT / ('kernels' if package == 'kernels' else f'vmamba/{package}') / '__init__.py'
    listed = re.search(r'__all__ = \[(.*?)\]', source.read_text(), re.DOTALL)[1]
    names = [name for name in re.findall(r"'(\w+)'", listed) if name not in CONSTANTS]
    text = (site / 'reference' / page / 'index.html').read_text()
    assert names and [name for name in names if not re.search(rf'<h2 id="[\w.]*\.{name}"', text)] == []


def test_the_notebook_runs(monkeypatch):
    plt = pytest.importorskip('matplotlib.pyplot')
    pytest.importorskip('skimage')
    plt.switch_backend('agg')
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())['cells'] if cell['cell_type'] == 'code']
    assert all(cell['execution_count'] and cell['outputs'] for cell in cells)
    source = '\n'.join(''.join(cell['source']) for cell in cells)
    assert "'vmamba_t'" in source and '1024' in source
    assert 'import vmamba' in source  # here the models are registered already
    names = {}
    exec(source.replace("'vmamba_t'", "'vmamba_nano'").replace('1024', '256'), names)
    plt.close('all')
    assert names['probabilities'].shape == (1000,)
    assert [tuple(features.shape) for features in names['maps']] == [
        (1, 32 * 2**i, 64 // 2**i, 64 // 2**i) for i in range(4)
    ]
