"""Image files: which are found, how they become pixels of 8 bits, and how they are augmented."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torchvision.datasets import ImageFolder

from vmamba.tools.images.batches import SKIPPED, Samples
from vmamba.tools.images.decoding import read_image, read_pixels, to_mode
from vmamba.tools.images.image_files import find_images
from vmamba.tools.images.labelled_folders import (
    LabelledFiles,
    corruption_folders,
    folder_names,
    read_folder,
)
from vmamba.tools.training.config import Config
from vmamba.tools.training.data import create_train_transform
from vmamba.tools.training.seeding import seeded
from vmamba.tools.user_errors import UserError

SHADES = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)


def save(path, image=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new('RGB', (8, 8))).save(path)
    return path


@pytest.mark.parametrize('ending', ['png', 'tif', 'pgm'])
def test_sixteen_bits_a_pixel_are_scaled_to_eight(tmp_path, ending):
    path = save(tmp_path / f'scan.{ending}', Image.fromarray(SHADES))
    expected = (SHADES / 257).round()
    assert np.array_equal(np.asarray(read_image(path, 'L')), expected)
    assert np.array_equal(read_pixels(path, 'RGB'), np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize('dtype', [np.int32, np.float32])
def test_pixels_of_an_unknown_range_are_unreadable_and_say_so(tmp_path, dtype):
    path = save(tmp_path / 'depth.tif', Image.fromarray(SHADES.astype(dtype)))
    with pytest.raises(ValueError, match='32 bits'):
        read_image(path)
    samples = Samples(ImageDataset('', reader=LabelledFiles([(str(path), 0)], {}, tmp_path)), lambda x: x, 'RGB', False)
    assert samples[0][1] == SKIPPED
    with pytest.raises(UserError, match=r'depth.tif \(its pixels have 32 bits .*--skip-bad-images'):
        samples.check()


def test_other_modes_become_what_pillow_makes_of_them():
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for mode in ('L', 'P', 'CMYK', 'RGBA', '1'):
        image = colours.convert(mode)
        assert np.array_equal(np.asarray(to_mode(image, 'RGB')), np.asarray(image.convert('RGB')))


def test_images_above_pillows_limit_are_read(tmp_path, monkeypatch):
    path = save(tmp_path / 'large.png', Image.new('RGB', (40, 30)))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    assert read_image(path).size == (40, 30)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_images_are_found_behind_links_but_not_twice_around_a_ring(tmp_path):
    inside, outside = save(tmp_path / 'images/cat/a.png'), save(tmp_path / 'elsewhere/b.webp')
    (tmp_path / 'images/dog').symlink_to(outside.parent, target_is_directory=True)
    (tmp_path / 'images/cat/up').symlink_to(tmp_path / 'images', target_is_directory=True)
    (tmp_path / 'images/lost.png').symlink_to(tmp_path / 'nowhere.png')
    assert find_images(tmp_path / 'images') == [inside, tmp_path / 'images/dog/b.webp']


def link(path, target):
    path.symlink_to(target, target_is_directory=True)


@pytest.fixture
def classes(tmp_path):
    """Class folders 1, 2, 10 and one elsewhere, with an image of another folder among them."""
    for name in ('1/a.png', '2/b.png', '2/deep/c.png', '10/d.png', '10/e.png'):
        save(tmp_path / 'val' / name)
    save(tmp_path / 'elsewhere/f.webp')
    link(tmp_path / 'val/x', tmp_path / 'elsewhere')
    (tmp_path / 'val/1/g.png').symlink_to(save(tmp_path / 'pool/g.png'))
    return tmp_path / 'val'


def add_loops(classes):
    """Links to ancestors, to folders that are there anyway, to themselves, and a ring through another folder."""
    link(classes / 'all', '.')
    link(classes / '2/up', '..')
    link(classes / '10/top', '../..')
    link(classes / '10/side', '../2/deep')
    link(classes / '1/self', 'self')
    link(classes.parent / 'elsewhere/back', classes)
    link(classes.parent / 'elsewhere/above', '..')


def test_each_folder_is_read_once_whatever_links_lead_to_it(classes):
    found, folder = find_images(classes), read_folder(classes, top=True)
    names = list(folder.class_to_idx)
    assert len(found) == 7
    assert [(path.rpartition('/')[2], names[label]) for path, label in folder.samples] == [
        *(('a.png', '1'), ('g.png', '1'), ('b.png', '2'), ('c.png', '2')),
        *(('d.png', '10'), ('e.png', '10'), ('f.webp', 'x')),
    ]
    add_loops(classes)
    assert find_images(classes) == found
    assert read_folder(classes, top=True).samples == folder.samples


def test_two_links_to_one_folder_count_once(tmp_path):
    save(tmp_path / 'elsewhere/a.png')
    save(tmp_path / 'images/b.png')
    for name in ('first', 'second'):
        link(tmp_path / 'images' / name, tmp_path / 'elsewhere')
    assert find_images(tmp_path / 'images') == [tmp_path / 'images/b.png', tmp_path / 'images/first/a.png']


def test_training_reads_folders_as_the_libraries_do_but_without_loops(classes):
    theirs, torch_theirs = ReaderImageFolder(str(classes)), ImageFolder(str(classes))
    options = dict(class_map={'deep': 7, '10': 3}, input_key='.png')
    assert read_folder(classes, **options).samples == ReaderImageFolder(str(classes), **options).samples
    add_loops(classes)
    (classes / 'all').unlink()  # which torchvision counts as a class
    ours, torch_ours = read_folder(classes), read_folder(classes, top=True, key=str)
    assert (ours.samples, ours.class_to_idx) == (theirs.samples, theirs.class_to_idx)
    assert ours.filenames() == theirs.filenames()
    assert (torch_ours.samples, torch_ours.class_to_idx) == (torch_theirs.samples, torch_theirs.class_to_idx)
    (classes / 'empty').mkdir()
    assert read_folder(classes).empty == read_folder(classes, top=True).empty == [str(classes / 'empty')]


def test_corruptions_behind_a_loop_are_not_found_again(tmp_path):
    for name in ('fog/3/0', 'blur/defocus/1/0', 'blur/defocus/1/5'):
        save(tmp_path / name / 'a.png')
    found = [tmp_path / name for name in ('blur/defocus/1', 'fog/3')]
    assert corruption_folders(tmp_path) == found
    link(tmp_path / 'all', '.')
    assert corruption_folders(tmp_path) == found


def test_features_among_the_images_are_left_out_however_their_folder_is_spelt(tmp_path):
    image, output = save(tmp_path / 'images/a.png'), tmp_path / 'images/features'
    output.mkdir()
    np.save(output / 'map.npy', np.zeros(3))
    for spelt in (output, tmp_path / 'images/../images/features'):
        assert find_images(tmp_path / 'images', also=['.npy'], without=spelt) == [image]
    assert len(find_images(tmp_path / 'images', also=['.npy'])) == 2
    for name in ('settings.json', 'progress.npy'):
        (output / name).touch()
    assert find_images(tmp_path / 'images', also=['.npy']) == [image]


def test_a_folder_without_images_names_the_endings(tmp_path):
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes/a.txt').touch()
    with pytest.raises(UserError, match=r'must end in \.png, \.jpg, .*\.webp$'):
        find_images(tmp_path)
    with pytest.raises(UserError, match=r'must end in \.png, \.jpg, .*\.webp$'):
        read_folder(tmp_path)


def test_folders_of_one_name_are_called_by_their_paths(tmp_path, monkeypatch):
    roots = [tmp_path / 'a/val', tmp_path / 'b/val', tmp_path / 'test']
    assert folder_names(roots) == [str(roots[0]), str(roots[1]), 'test']
    monkeypatch.chdir(tmp_path)
    assert folder_names([type(tmp_path)('.')]) == [tmp_path.name]


@pytest.mark.parametrize('policy', ['rand-m10-inc1-n40', 'augmix-m10', 'v0'])
def test_no_level_of_a_policy_is_refused_by_pillow(policy):
    config = dataclasses.replace(Config(), auto_augment=policy)
    data_config = dict(input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bicubic', crop_pct=1.0)
    transform = create_train_transform(config, data_config)
    image = Image.new('RGB', (8, 8), (100, 150, 200))
    for seed in range(100):
        with seeded(seed):
            transform(image)


def test_a_packaged_image_is_read_from_memory():
    file = io.BytesIO()
    Image.fromarray(SHADES.astype(np.uint8)).save(file, 'ppm')
    file.seek(0)
    assert np.array_equal(np.asarray(read_image(file, 'L')), SHADES.astype(np.uint8))
