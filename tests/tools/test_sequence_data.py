"""The data of long-range tasks: their published rules and statistics."""

import random
from statistics import median

import numpy as np
import pytest

from vmamba.tools import make_sequences
from vmamba.tools.sequences import listops, pathfinder, synthetic
from vmamba.tools.sequences.tasks import load_task
from vmamba.tools.user_errors import UserError


def value_of(symbols):
    """The value of a list in the published notation, by a stack."""
    stack = [[]]
    functions = {'[MIN': min, '[MAX': max, '[MED': lambda values: int(median(values)), '[SM': lambda v: sum(v) % 10}
    for symbol in symbols:
        name = listops.NAMES[symbol]
        if name in functions:
            stack.append([functions[name]])
        elif name == 'X':
            function, *values = stack.pop()
            assert 2 <= len(values) <= 10
            stack[-1].append(function(values))
        else:
            stack[-1].append(int(name))
    ((value,),) = stack
    return value


def test_listops_follow_their_rules_and_statistics():
    """The figures are of 1,500 trees of the original generator."""
    data = listops.make_listops(1500, seed=1)
    inputs, targets = data['inputs'], data['targets']
    lengths = (inputs != listops.PAD).sum(axis=1) - 1
    assert 500 < lengths.min() and lengths.max() < 2000
    assert abs(lengths.mean() - 1067) < 60 and abs(np.median(lengths) - 1012) < 90
    assert len({row.tobytes() for row in inputs}) == 1500
    opened = (inputs >= listops.OPERATORS) & (inputs < listops.CLOSE)
    depth = opened.cumsum(axis=1) - (inputs == listops.CLOSE).cumsum(axis=1)
    assert (depth.max(axis=1) == 9).mean() > 0.99
    shares = [0.166, 0.097, 0.083, 0.077, 0.101, 0.087, 0.071, 0.075, 0.085, 0.157]
    assert np.abs(np.bincount(targets, minlength=10) / 1500 - shares).max() < 0.035
    for row, length, target in zip(inputs[:50], lengths, targets):
        assert row[length] == listops.END and value_of(row[:length]) == target
    rng = random.Random(0)
    kept = [tree for tree in (listops.draw_tree(rng) for _ in range(5000)) if tree and len(tree[0]) > 500]
    assert abs(len(kept) / 5000 - 0.083) < 0.015


def test_operators_of_listops():
    assert [listops.evaluate(operator, [7, 2, 9, 4]) for operator in range(4)] == [2, 9, 5, 2]
    assert listops.evaluate(2, [1, 8, 3]) == 3


@pytest.fixture(scope='module')
def drawn():
    return [pathfinder.draw_sample(pathfinder.SETTINGS[32], 0, index) for index in range(300)]


def test_pathfinder_images_have_the_published_statistics(drawn):
    """Of 200 images of the original generator: mean before the circles 0.074, distance of markers 13.7 +- 5.2 and
    12.7 +- 5.1 pixels, 298 attempts an image."""
    assert abs(np.mean([sample.unmarked.mean() for sample in drawn]) - 0.074) < 0.003
    labels = np.array([sample.label for sample in drawn])
    assert abs(labels.mean() - 0.5) < 0.1
    distances = np.array([np.hypot(*(sample.markers[0] - sample.markers[1])) for sample in drawn])
    for label, mean in ((1, 13.7), (0, 12.7)):
        assert abs(distances[labels == label].mean() - mean) < 1.5 and abs(distances[labels == label].std() - 5.1) < 1
    # The distance alone tells little.
    cuts = [((distances > cut) == labels).mean() for cut in range(30)]
    assert 0.5 < max(*cuts, *(1 - cut for cut in cuts)) < 0.66


def test_attempts_of_pathfinder_fail_as_often_as_published(monkeypatch):
    attempts, draw = [], pathfinder._draw_two_curves
    monkeypatch.setattr(pathfinder, '_draw_two_curves', lambda *args: attempts.append(1) or draw(*args))
    for index in range(100):
        pathfinder.draw_sample(pathfinder.SETTINGS[32], 1, index)
    assert 200 < len(attempts) / 100 < 420


def test_the_curves_of_pathfinder_give_its_label(drawn):
    for sample in drawn:
        first, second = sample.markers.tolist()
        tails, heads = sample.curves[:, 0].tolist(), sample.curves[:, -1].tolist()
        curve = tails.index(first)
        assert heads[curve if sample.label else 1 - curve] == second
        steps = np.hypot(*np.moveaxis(np.diff(sample.curves.astype(int), axis=1), -1, 0))
        assert sample.curves.shape == (2, 14, 2) and steps.max() < 9
        assert sample.image.dtype == np.uint8 and sample.image.max() == 255
        for point in sample.markers:  # a circle of brightness 1 among lines of up to 2
            assert sample.image[tuple(point)] >= 100


def test_the_points_of_the_curves_of_pathfinder_are_on_dashes(drawn):
    for sample in drawn[:20]:
        assert min(sample.unmarked[tuple(point)] for curve in sample.curves for point in curve) > 0.3
        assert 0.03 < (sample.unmarked > 0.3).mean() < 0.15


@pytest.mark.parametrize('size', (64, 128))
def test_pathfinder_has_larger_images(size):
    sample = pathfinder.draw_sample(pathfinder.SETTINGS[size], 0, 0)
    again = pathfinder.draw_sample(pathfinder.SETTINGS[size], 0, 0)
    assert sample.image.shape == (size, size) and (sample.image == again.image).all()


def test_selective_copying():
    rng = np.random.default_rng(0)
    for _ in range(20):
        inputs, targets = synthetic.selective_copying(rng, 50, 7)
        assert inputs.shape == (57,) and (inputs[50:] == 15).all()
        assert (inputs[:50][inputs[:50] > 0] == targets).all() and set(targets) <= set(range(1, 15))


def test_induction_heads():
    rng = np.random.default_rng(0)
    places = set()
    for _ in range(200):
        inputs, target = synthetic.induction_heads(rng, 12)
        place, last = np.flatnonzero(inputs == 15)
        assert last == 11 and target == inputs[place + 1] < 15
        places.add(int(place))
    assert places == set(range(10))


def test_fresh_sequences_depend_on_their_key_only():
    data = load_task('selective_copying', 'train', length=20, tokens=3, train_count=8)
    assert len(data) == 8 and data.task.outputs == 3
    assert (data[5, 1][0] == data[5, 1][0]).all() and (data[5, 1][0] != data[6, 1][0]).any()
    held_out = load_task('selective_copying', 'validation', length=20, tokens=3, validation_count=4)
    assert len(held_out) == 4 and (held_out[0][0] == held_out[0][0]).all()


def test_pixels_of_packaged_digits():
    data = load_task('digits', 'validation')
    pixels, target = data[0]
    assert pixels.shape == (64,) and -1 <= pixels.min() < pixels.max() <= 1 and target in range(10)


@pytest.mark.parametrize('task', ('listops', 'pathfinder32'))
def test_a_folder_of_data(task, tmp_path, capsys):
    args = [task, '--output', str(tmp_path / task), '--train', '3', '--validation', '2', '--test', '1']
    make_sequences.main(args)
    data = [load_task(task, split, tmp_path / task) for split in ('train', 'validation', 'test')]
    assert [len(part) for part in data] == [3, 2, 1]
    inputs, target = data[0][0]
    if task == 'listops':
        assert inputs.shape == (2048,) and value_of(inputs[: (inputs > 0).sum() - 1].tolist()) == target
    else:
        assert inputs.shape == (1024,) and inputs.max() == 1 and target in (0, 1)
    make_sequences.main(args)
    assert 'has this data already' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        make_sequences.main([*args, '--seed', '1'])
    assert 'move it away' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('name', 'split', 'options', 'message'),
    [
        ('listop', 'train', {}, 'there is no task sequences/listop; did you mean listops'),
        ('listops', 'train', dict(folder='nowhere'), 'there is no nowhere/train.npz: make it by `vmamba make-seq'),
        ('digits', 'test', {}, 'sequences/digits has no test split'),
        ('digits', 'dev', {}, "split 'dev' of sequences/digits must be one of train, validation, test"),
        ('induction_heads', 'train', dict(lenght=3), "has no option 'lenght'; did you mean length"),
        ('induction_heads', 'train', dict(length=2), 'sequences/induction_heads: length must be at least 3, got 2'),
        ('selective_copying', 'train', dict(length=4, tokens=5), 'tokens must be from 1 to length=4, got 5'),
        ('digits', 'train', dict(length=3), "sequences/digits has no option 'length'"),
    ],
    ids=str,
)
def test_bad_requests_are_one_line(name, split, options, message):
    with pytest.raises(UserError, match=message):
        load_task(name, split, **options)
