"""The order of the images, the packaged data and the checkpoints of train.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.data import create_transform

from vmamba.tools.images.packaged_data import CLUTTER_SCALES, DATASETS, create_packaged_dataset, stratified_split
from vmamba.tools.images.scenes import Composer
from vmamba.tools.output_files import write_atomically
from vmamba.tools.training.checkpoint import Checkpoints
from vmamba.tools.training.config import Config
from vmamba.tools.training.order import BatchOrder
from vmamba.tools.training.seeding import derive_seed, seed_all, seeded
from vmamba.tools.training.setup import create_optimizer, create_scheduler
from vmamba.tools.training.splits import load_datasets
from vmamba.tools.user_errors import UserError


def updates(order, epoch=0, start=0):
    """Sorted keys of each update, of one process."""
    order.go_to(epoch, start)
    batches = list(order)
    assert len(order) == len(batches)
    parts = [batches[i : i + order.accumulate] for i in range(0, len(batches), order.accumulate)]
    return [[key for batch in part for key in batch] for part in parts]


def test_an_update_sees_the_same_images_however_it_is_shared_out():
    data = range(103)
    one = updates(BatchOrder(data, 24, drop_last=False, seed=3))
    assert [len(update) for update in one] == [24, 24, 24, 24, 7]
    assert sorted(index for update in one for _, index in update) == list(data)
    processes = [BatchOrder(data, 4, 3, world=2, rank=rank, drop_last=False, seed=3) for rank in (0, 1)]
    shared = [first + second for first, second in zip(*map(updates, processes), strict=True)]
    assert [sorted(update) for update in shared] == [sorted(update) for update in one]


@pytest.mark.parametrize('length, world, accumulate', [(17, 2, 1), (19, 2, 3), (41, 4, 2), (40, 2, 2), (9, 4, 2)])
def test_weights_make_the_mean_of_the_images_of_each_update(length, world, accumulate):
    values = torch.arange(length).double() ** 2
    args = dict(batch_size=2, accumulate=accumulate, world=world, drop_last=False)
    orders = [BatchOrder(range(length), rank=rank, **args) for rank in range(world)]
    totals = torch.zeros(orders[0].updates_per_epoch, dtype=torch.double)
    counted = 0
    for order in orders:
        for step, (batch, (count, weight)) in enumerate(zip(order, order.counts(), strict=True)):
            assert 1 <= len(batch) <= 2
            totals[step // accumulate] += values[[index for _, index in batch]].mean() * weight / world
            counted += count
    joined = updates(BatchOrder(range(length), 2 * world * accumulate, drop_last=False))
    means = torch.stack([values[[index for _, index in update]].mean() for update in joined])
    assert torch.allclose(totals, means)
    assert counted == length


def test_an_epoch_continues_in_its_middle_and_each_is_different():
    order = BatchOrder(range(50), 8)
    whole = updates(order, epoch=2)
    assert len(whole) == 6
    assert updates(order, epoch=2, start=4) == whole[4:]
    assert updates(order, epoch=3) != whole
    assert updates(BatchOrder(range(50), 8, seed=1), epoch=2) != whole


def test_repeated_augmentation_brings_an_image_again_with_another_seed():
    (update,) = updates(BatchOrder(range(12), 12, repeats=3))
    assert len({index for _, index in update}) == 4
    assert len({seed for seed, _ in update}) == 12
    first, second = (BatchOrder(range(12), 6, world=2, rank=rank, repeats=3) for rank in (0, 1))
    assert {index for _, index in updates(first)[0]} == {index for _, index in updates(second)[0]}


def test_the_cosine_begins_after_the_warm_up_or_at_the_first_epoch():
    def rates(**settings):
        config = Config(epochs=10, warmup_epochs=2, warmup_lr=0, min_lr=0, **settings)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = create_scheduler(config, optimizer, updates_per_epoch=5)
        return [scheduler._get_lr(update)[0] for update in (5, 10, 30, 50)]

    assert rates(warmup_prefix=True) == pytest.approx([0.5, 1, 0.5, 0])
    assert rates() == pytest.approx([0.5, (1 + np.cos(0.2 * np.pi)) / 2, (1 + np.cos(0.6 * np.pi)) / 2, 0])


def test_optimizers_of_timm_are_known_with_its_lookahead():
    optimizer = create_optimizer(Config(opt='lookahead_adamw'), torch.nn.Linear(2, 2), 512)
    assert type(optimizer).__name__ == 'Lookahead'


@pytest.mark.parametrize('splits, wrong', [(('trian', 'test'), 'train_split'), (('train', 'training'), 'val_split')])
def test_a_split_that_timm_takes_for_the_other_part_is_an_error(monkeypatch, splits, wrong):
    def create_dataset(name, split, **kwargs):  # as timm of torchvision's
        return SimpleNamespace(train=split in ('train', 'training'))

    monkeypatch.setattr('vmamba.tools.training.splits.create_dataset', create_dataset)
    with pytest.raises(UserError, match=f'^{wrong} .* of torch/cifar10 are the'):
        load_datasets(Config(data='torch/cifar10', train_split=splits[0], val_split=splits[1]))
    assert load_datasets(Config(data='torch/cifar10', val_split='test'))


def test_seeds_leave_the_other_random_numbers_alone():
    assert derive_seed(0, 1) != derive_seed(1, 0)
    seed_all(derive_seed(5))
    with seeded(7):
        inside = np.random.rand(), torch.rand(1)
    after = np.random.rand(), torch.rand(1)
    seed_all(derive_seed(5))
    assert after == (np.random.rand(), torch.rand(1))
    with seeded(7):
        assert inside == (np.random.rand(), torch.rand(1))


@pytest.mark.parametrize('name, count, classes', [('mnist5k', 5000, 10), ('digits', 1797, 10), ('lfw', 200, 2)])
def test_packaged_images_come_as_a_dataset_of_timm(name, count, classes):
    parts = [create_packaged_dataset(f'packaged/{name}', split) for split in ('train', 'validation', 'all')]
    assert [round(5 * len(part) / count) for part in parts] == [4, 1, 5]
    assert len(parts[0]) + len(parts[1]) == count
    assert not set(parts[0].filenames()) & set(parts[1].filenames())
    search = [create_packaged_dataset(f'packaged/{name}', split) for split in ('search', 'search_validation')]
    names = [set(part.filenames()) for part in (*search, parts[0])]
    assert not names[0] & names[1] and names[0] | names[1] < names[2]
    assert [round(6 * len(part) / len(parts[0]), 1) for part in search] == [2, 1]
    assert all(len(np.unique(part.reader.labels)) == classes for part in search)
    assert len(parts[0].reader.class_to_idx) == classes
    parts[2].transform = create_transform(28, is_training=False, mean=(0, 0, 0), std=(1, 1, 1))
    image, label = parts[2][count - 1]
    pixels, labels, *_ = DATASETS[name]()
    assert image.shape == (3, 28, 28)
    assert label == labels[-1]
    grey = create_packaged_dataset(f'packaged/{name}', 'all', 'L')
    assert np.array_equal(grey[count - 1][0], pixels[-1])


def test_cluttered_digits_are_always_the_same_and_their_splits_share_nothing():
    parts = [create_packaged_dataset('packaged/clutter', split) for split in ('train', 'validation')]
    assert [len(part) for part in parts] == [6000, 1500]
    assert not set(parts[0].filenames()) & set(parts[1].filenames())
    for part, name in zip(parts, ('training', 'validation')):
        composer = Composer(name, (64, 64), range(10), 0, max_objects=1, scales=CLUTTER_SCALES)  # shares nothing
        for index in (len(part) - 1, 3):
            image, label = part[index]
            scene = composer(index)
            assert image.mode == 'RGB' and np.array_equal(np.asarray(image), scene.image)
            assert [label] == scene.labels and scene.masks.shape == (1, 64, 64)
        counts = np.bincount(part.reader.labels, minlength=10)
        assert len(counts) == len(part.reader.class_to_idx) == 10
        assert (0.08 < counts / len(part)).all() and (counts / len(part) < 0.12).all()


def test_a_broken_checkpoint_is_skipped_and_only_broken_ones_are_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for update in (5, 10, 15):
        checkpoints.save({'update': update, 'weights': torch.full((1000,), float(update))}, update)
    assert [path.name for path in checkpoints.paths()] == ['checkpoint-00000015.pt', 'checkpoint-00000010.pt']
    newest, older = checkpoints.paths()
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 255  # in the weights
    newest.write_bytes(content)
    warnings = []
    state, path = checkpoints.load_newest(warnings.append)
    assert (path, state['update']) == (older, 10)
    assert len(warnings) == 1 and str(newest) in warnings[0]
    older.write_bytes(b'')
    with pytest.raises(UserError, match='all 2 checkpoints'):
        checkpoints.load_newest(warnings.append)


def test_broken_checkpoints_do_not_take_the_place_of_good_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for update in (5, 10):
        checkpoints.save({'update': update}, update)
    (tmp_path / 'checkpoint-00000010.pt').write_bytes(b'')
    checkpoints.load_newest(lambda text: None)
    checkpoints.save({'update': 7}, 7)  # stopped before the place of the broken one
    assert [path.name for path in checkpoints.paths()] == ['checkpoint-00000007.pt', 'checkpoint-00000005.pt']
    assert checkpoints.load_newest(pytest.fail)[0] == {'update': 7}


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'before')

    def write(file):
        file.write(b'part')
        raise OSError(28, 'No space left on device')

    with pytest.raises(UserError, match='No space left on device; what was saved before is intact'):
        write_atomically(path, write)
    assert [file.name for file in tmp_path.iterdir()] == ['file']
    assert path.read_bytes() == b'before'


def test_a_split_is_stratified_disjoint_and_repeatable():
    labels = torch.arange(10).repeat_interleave(50)
    train, test = stratified_split(labels, 0.2, seed=3)
    assert labels[train].bincount().tolist() == [40] * 10
    assert torch.cat([train, test]).sort().values.tolist() == list(range(500))
    assert torch.equal(test, stratified_split(labels, 0.2, seed=3)[1])
    assert not torch.equal(test, stratified_split(labels, 0.2, seed=4)[1])
