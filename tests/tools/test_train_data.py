"""Streams and their loading processes, and images that are cached on the device, as train.py reads them."""

import io
import random
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IterableImageDataset
from timm.data.readers.reader import Reader
from torch.utils.data import Dataset, get_worker_info
from training_runs import ROOT, SMALL, assert_same, newest, rows, signals_kept

from vmamba.tools import train
from vmamba.tools.images.packaged_data import create_packaged_dataset
from vmamba.tools.training.config import Config
from vmamba.tools.training.data import IndexedData, StreamedData, create_data, create_validation, random_crops
from vmamba.tools.training.runtime import Runtime
from vmamba.tools.user_errors import UserError

DATA_CONFIG = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear', crop_pct=1.0)


class Shuffled(Reader):
    """Grey squares in an order that follows the loading process's seed, as of WebDataset's samples."""

    def __init__(self, count=24):
        super().__init__()
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        worker = get_worker_info()
        labels = list(range(worker.id, self.count, worker.num_workers))
        random.Random(worker.seed).shuffle(labels)
        for label in labels:
            pixels = np.random.default_rng(label).integers(0, 255, (24, 24, 3), dtype=np.uint8)
            yield Image.fromarray(pixels), label


def stream(**settings):
    config = replace(Config(), model='test_vit', data='wds/', batch_size=4, workers=2, **settings)
    return StreamedData(
        IterableImageDataset(None, reader=Shuffled()), config, DATA_CONFIG, Runtime(torch.device('cpu'))
    )


def test_a_stream_continues_where_it_stopped():
    whole = stream()
    first, second = list(whole.batches(0, 0)), list(whole.batches(1, 0))
    assert len(first) == whole.updates_per_epoch == 6
    assert sorted(torch.cat([batch.targets for batch in first]).tolist()) == list(range(24))
    torch.rand(7)  # random numbers of the main process are of no consequence
    assert_same([list(batch) for batch in stream().batches(1, 2)], [list(batch) for batch in second[2:]])
    assert [batch.targets.tolist() for batch in first] != [batch.targets.tolist() for batch in second]
    other = next(stream(seed=1).batches(0, 0))
    assert other.targets.tolist() != first[0].targets.tolist()


def test_what_streams_cannot_do_is_an_error():
    with pytest.raises(UserError, match='cannot repeat images'):
        stream(aug_repeats=3)
    with pytest.raises(UserError, match='can skip no images'):
        stream(skip_bad_images=True)
    config, dataset = Config(data='wds/', cache=True), IterableImageDataset(None, reader=Shuffled())
    with pytest.raises(UserError, match='wds/ is read as a stream, which cannot be cached'):
        create_data(config, DATA_CONFIG, [dataset], 2, Runtime(torch.device('cpu')))


def test_cached_images_are_those_of_the_loader_in_its_order():
    config, runtime = Config(batch_size=50, workers=0, augment=False, drop_last=False), Runtime(torch.device('cpu'))
    datasets = [create_packaged_dataset('packaged/lfw', split) for split in ('train', 'validation')]
    loaded, cached = (
        create_data(replace(config, cache=cache), DATA_CONFIG, datasets, 2, runtime) for cache in (False, True)
    )
    for epoch, update in ((0, 0), (1, 2)):
        ours, theirs = ([list(batch) for batch in data[0].batches(epoch, update)] for data in (cached, loaded))
        assert len(ours) == 4 - update
        assert_same(ours, theirs)
    for _ in range(2):
        assert_same(*([list(batch) for batch in data[1]] for data in (cached, loaded)))
    augmented = create_data(replace(config, cache=True, augment=True), DATA_CONFIG, datasets, 2, runtime)[0]
    first, second = (list(augmented.batches(epoch, 0)) for epoch in (0, 1))
    assert_same([list(batch) for batch in augmented.batches(0, 1)], [list(batch) for batch in first[1:]])
    assert not torch.equal(first[0].images, second[0].images)


def test_crops_have_the_areas_shapes_and_places_of_the_configuration():
    count, height, width = 400, 24, 32
    y, x = torch.meshgrid(
        *((2 * torch.arange(side) + 1) / side - 1 for side in (height, width)), indexing='ij'
    )  # coordinates as an image: a crop shows where each of its pixels comes from
    images = torch.stack([x, y]).expand(count, 2, height, width)
    config = Config(scale=[0.3, 0.6], ratio=[0.8, 1.25], hflip=0.25, vflip=0.0)
    crops = random_crops(images, config, torch.Generator().manual_seed(0))
    inner = crops[..., 2:-2, 2:-2]  # the outermost pixels may lie beyond the image's centres
    steps = inner[:, 0, 0, 1:] - inner[:, 0, 0, :-1], inner[:, 1, 1:, 0] - inner[:, 1, :-1, 0]
    for step in steps:
        torch.testing.assert_close(step, step[:, :1].expand_as(step), atol=1e-5, rtol=0)
    sides = steps[0][:, 0] * width / 2, steps[1][:, 0] * height / 2
    assert 0.15 < (sides[0] < 0).float().mean() < 0.35 and (sides[1] > 0).all()
    areas, ratios = sides[0].abs() * sides[1], sides[0].abs() / sides[1]
    for found, (least, most) in ((areas, config.scale), (ratios, config.ratio)):
        assert least - 1e-4 < found.min() < least + 0.05 and most - 0.05 < found.max() < most + 1e-4
    for axis, side in enumerate(sides):
        places = inner[:, axis].mean(dim=(1, 2))
        assert (places.abs() <= 1 - side.abs() + 1e-4).all() and places.min() < -0.3 and places.max() > 0.3
    whole = Config(scale=[1.0, 1.0], ratio=[1.0, 1.0], hflip=0.0, vflip=1.0)
    flipped = random_crops(images, whole, torch.Generator())
    torch.testing.assert_close(flipped, images.flip(-2))


class SomeBroken(Dataset):
    """Images of which some cannot be read."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        if index in (1, 4, 5):
            raise OSError('truncated')
        return Image.new('RGB', (20, 20)), index


def test_a_validation_does_without_unreadable_images_and_training_takes_their_neighbours():
    config, runtime = Config(batch_size=2, workers=0, skip_bad_images=True), Runtime(torch.device('cpu'))
    validation = create_validation(SomeBroken(), config, DATA_CONFIG, runtime)
    assert [targets.tolist() for *_, targets in validation] == [[0], [2, 3], [6]]
    assert validation.samples.report() == 'skipped 3 unreadable image(s): image 1, image 4, image 5'
    train = IndexedData(SomeBroken(), replace(config, drop_last=False), DATA_CONFIG, runtime)
    assert sorted(torch.cat([batch.targets for batch in train.batches(0, 0)]).tolist()) == [0, 2, 2, 3, 6, 6, 6]


def write_shard(path, labels):
    """A tar file of WebDataset."""
    with tarfile.open(path, 'w') as archive:
        for label in labels:
            image = io.BytesIO()
            Image.new('RGB', (40, 40), (10 * label, 99, 0)).save(image, 'png')
            for name, content in (('png', image.getvalue()), ('cls', str(label % 2).encode())):
                info = tarfile.TarInfo(f'{label:04d}.{name}')
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def test_a_webdataset_run_goes_on_exactly(monkeypatch, tmp_path):
    pytest.importorskip('webdataset')
    monkeypatch.chdir(ROOT)
    for number in range(2):
        write_shard(tmp_path / f'train-{number}.tar', range(12 * number, 12 * number + 12))
    write_shard(tmp_path / 'val-0.tar', range(8))
    splits = '--train-split', 'train-{0..1}.tar|24', '--val-split', 'val-0.tar|8', '--num-classes', 2
    args = *SMALL, '--data', 'wds/', '--data-dir', tmp_path, *splits, '--batch-size', 4, '--workers', 1
    args = *args, '--hflip', 0.5, '--checkpoint-every', 1, '--keep-checkpoints', 99
    for name, options in (('whole', ()), ('again', ('--resume',))):
        if options:
            shutil.copytree(tmp_path / 'whole', tmp_path / name)
            for path in (tmp_path / name).glob('checkpoint-*'):
                if path.name > 'checkpoint-00000008.pt':
                    path.unlink()
        with signals_kept():
            train.main([*map(str, args), *options, '--output', str(tmp_path / name)])
    assert rows(tmp_path / 'whole')[-1]['updates'] == 12
    assert_same(newest(tmp_path / 'again')['state_dict'], newest(tmp_path / 'whole')['state_dict'])
