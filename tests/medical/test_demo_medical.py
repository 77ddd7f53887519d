"""The demo on small images, and how it cuts folds and counts nuclei."""

import numpy as np
import pandas as pd
import pytest
import tifffile

from vmamba.tools import demo_medical
from vmamba.tools.segmentation.nuclei import (
    BORDER,
    Nuclei,
    count_matches,
    instances_of,
    quadrant,
    training_regions,
)


def squares(shape, side=8, gap=2):
    """Numbered squares in rows and columns, near each other."""
    instances = np.zeros(shape, np.uint16)
    number = 0
    for y in range(gap, shape[-2] - side, side + gap):
        for x in range(gap, shape[-1] - side, side + gap):
            number += 1
            instances[..., y : y + side, x : x + side] = number
    return instances


def test_the_demo_trains_scores_and_draws(monkeypatch, tmp_path, capsys):
    for rank, shape in (('2d', (96, 80)), ('3d', (8, 48, 48))):
        instances = squares(shape)
        noise = np.random.default_rng(0).normal(0, 5, shape)
        tifffile.imwrite(tmp_path / f'img{rank}.tif', (50 + 100 * (instances > 0) + noise).astype(np.uint16))
        tifffile.imwrite(tmp_path / f'mask{rank}.tif', instances)
    small = dict(features=[4, 8], batch_size=2, iterations=2)
    patches = {'2d': [16, 16], '3d': [8, 8, 8]}
    sizes = {(rank, 'cpu'): dict(small, patch_size=patch) for rank, patch in patches.items()}
    monkeypatch.setattr(demo_medical, 'SIZES', sizes)
    monkeypatch.setattr(demo_medical, 'MARGINS', {'2d': 8, '3d': 4})
    arguments = ['--images', str(tmp_path), '--output', str(tmp_path / 'out'), '--seeds', '3', '--device', 'cpu']
    networks = ['U-Mamba Enc', 'ResidualEncoderUNet']
    demo_medical.main([*arguments, '--processes', '1', '--networks', *networks])
    rows = pd.read_csv(tmp_path / 'out/scores.csv')
    assert len(rows) == 2 * 2 and rows.dice.between(0, 1).all() and rows.f1.between(0, 1).all()
    pictures = {path.name for path in (tmp_path / 'out').glob('*.png')}
    assert pictures == {f'{rank}_{name}.png' for rank in patches for name in ('u-mamba-enc', 'residualencoderunet')}
    assert 'does not rank them' in capsys.readouterr().out


@pytest.mark.parametrize('shape', [(20, 31), (5, 20, 31)], ids=['2d', '3d'])
def test_training_keeps_a_distance_from_the_quadrant_held_out(shape):
    covered = np.zeros(shape, int)
    for fold in range(4):
        held_out, trained = np.zeros(shape, bool), np.zeros(shape, int)
        held_out[quadrant(shape, fold)] = True
        covered += held_out
        for region in training_regions(shape, fold, margin=3):
            trained[region] += 1
        assert trained.max() == 1 and trained.sum() > shape[0]
        near = np.argwhere(held_out)
        for place in np.argwhere(trained):
            assert np.abs(near - place).max(axis=1).min() > 3
    assert (covered == 1).all()


@pytest.mark.parametrize('shape', [(64, 48), (6, 34, 34)], ids=['2d', '3d'])
def test_nuclei_are_found_again_from_their_labels(shape):
    instances = squares(shape, gap=1)
    predicted = instances_of(Nuclei(instances, instances).labels())
    hits, wrong, missed = count_matches(predicted, instances)
    assert (hits, wrong, missed) == (hits, 0, 0) and hits > 3


def test_wrong_and_missed_nuclei_are_counted_but_not_those_at_the_border():
    instances = squares((60, 60), gap=4)
    kept = [n for n in np.unique(instances)[1:] if np.argwhere(instances == n).min() > BORDER]
    predicted = np.where(instances == kept[0], 0, instances)  # one is missed
    predicted[:, :2] = 99  # at the border
    predicted[50:58, 56:58] = 100  # at no nucleus, but near the border
    predicted[40:42, 24:27] = 101
    hits, wrong, missed = count_matches(predicted, instances)
    assert (hits, wrong, missed) == (len(kept) - 1, 1, 1)
