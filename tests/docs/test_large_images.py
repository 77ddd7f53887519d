"""The examples of docs/large_images.md, as they are written there, with a smaller model and smaller images."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / 'docs' / 'large_images.md'
SMALLER = {
    "'vmamba_t'": "'vmamba_nano'",
    "'cuda' if torch.cuda.is_available() else 'cpu'": "'cpu'",
    '3, 2048, 2048': '3, 160, 200',
    '1024, 1024, device': '64, 64, device',
    'backbone, image, tile=1024, overlap=256)\nprint': 'backbone, image, tile=64, overlap=32)\nprint',
    'tile=1024, overlap=overlap': 'tile=64, overlap=overlap',
    '(0, 128, 256, 512)': '(0, 32, 64, 192)',
}


@pytest.fixture(scope='module')
def page():
    """What the examples leave behind."""
    source = '\n'.join(re.findall(r'```python\n(.*?)```', PAGE.read_text(), flags=re.DOTALL))
    for written, smaller in SMALLER.items():
        assert source.count(written) >= 1, f'{written} is not in the page'
        source = source.replace(written, smaller)
    names = {}
    exec(compile(source, str(PAGE), 'exec'), names)
    return names


def test_tiles_cover_the_map(page):
    assert page['features'].shape == page['whole'].shape == (256, 5, 7)
    assert page['features'].isfinite().all()
    assert not torch.equal(page['features'], page['whole'])


def test_an_overlap_that_covers_the_image_makes_no_difference(page):
    torch.testing.assert_close(page['tiled'], page['whole'])  # the last overlap of the loop


def test_each_tile_is_where_it_belongs(page):
    tile = page['image'][:, 64:128, 128:192]
    alone = page['tiled_features'](page['backbone'], tile, tile=64, overlap=0)
    without_overlap = page['tiled_features'](page['backbone'], page['image'], tile=64, overlap=0)
    torch.testing.assert_close(without_overlap[:, 2:4, 4:6], alone)


@pytest.mark.parametrize('sizes', [dict(tile=48), dict(overlap=16)])
def test_tiles_off_the_stride_are_an_error(page, sizes):
    with pytest.raises(ValueError, match='multiples of 32'):
        page['tiled_features'](page['backbone'], page['image'], **sizes)


def test_training_reaches_every_used_parameter(page):
    gradients = {name for name, p in page['model'].named_parameters() if p.grad is not None}
    assert gradients == {name for name, _ in page['model'].named_parameters() if not name.startswith('norm')}
