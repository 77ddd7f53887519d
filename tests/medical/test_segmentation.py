"""`vmamba train` of U-Mamba on folders of images and of volumes, and U-Mamba with MONAI's losses and inference."""

import re
import shutil
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from medical_cases import discs
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from PIL import Image
from umamba_cases import FLAT, PUBLISHED, SOLID, build

from vmamba.configs import FOLDER
from vmamba.tools import train
from vmamba.tools.segmentation.config import Config
from vmamba.tools.segmentation.data import find_cases
from vmamba.tools.segmentation.run import create_network, load_network
from vmamba.tools.training.config import load_config

from skimage.io import imsave

SMALL = '--features [8,16] --kernel-sizes [3,3] --strides [1,2] --momentum 0.9 --val-every 2 --workers 0 --device cpu'
TOGETHER = [*SMALL.split(), '--batch-size', '4', '--iterations', '10', '--num-classes', '2', '--log']


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    for name in ('images', 'labels'):
        (folder / name).mkdir()
    for i, (image, mask) in enumerate(discs(4, (24, 40))):
        imsave(folder / f'images/disc{i}.png', image, check_contrast=False)
        imsave(folder / f'labels/disc{i}.png', mask, check_contrast=False)
    return folder


@pytest.fixture(scope='module')
def volumes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('volumes')
    for name in ('images', 'labels'):
        (folder / name).mkdir()
    for i, pair in enumerate(discs(3, (16, 18, 10))):
        for name, array in zip(('images', 'labels'), pair):
            nibabel.save(nibabel.Nifti1Image(array, np.diag([1, 1, 2, 1])), folder / name / f'ball{i}.nii.gz')
    return folder


@pytest.fixture
def run(capsys):
    """Trains by a configuration; returns the output and the errors."""

    def call(*arguments, code=0):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try:
                train.main([*map(str, arguments)])
                found = 0
            except SystemExit as end:
                found = end.code
        out, err = capsys.readouterr()
        assert found == code, out + err
        return out, err

    return call


def flat(images, output, *arguments):
    sizes = ('--patch-size', '[16,24]', '--in-chans', 1)
    return ('umamba_bot_2d', '--data', images, *sizes, '--output', output, *TOGETHER, *arguments)


def test_images_are_segmented_scored_and_drawn(run, images, tmp_path):
    out, _ = run(*flat(images, tmp_path / 'run', '--epochs', 4))
    assert 'best weights: Dice' in out
    epochs, scores = (pd.read_csv(tmp_path / 'run' / name) for name in ('epochs.csv', 'scores.csv'))
    assert epochs.train_loss.iloc[-1] < epochs.train_loss.iloc[0]
    assert scores.dice.between(0.5, 1).all() and scores.surface_dice.between(0.2, 1).all()
    (picture,) = (tmp_path / 'run/drawn').glob('*.png')
    assert picture.stem == scores.case[0] and Image.open(picture).size[0] > 100
    network = load_network(tmp_path / 'run/best.pt')
    assert network(torch.randn(1, 1, 24, 40)).shape == (1, 2, 24, 40)


def test_a_resumed_run_equals_one_without_interruption(run, images, tmp_path):
    run(*flat(images, tmp_path / 'whole', '--epochs', 2))
    run(*flat(images, tmp_path / 'halves', '--epochs', 2))
    checkpoint = tmp_path / 'halves/checkpoint-00000020.pt'
    expected = torch.load(checkpoint, weights_only=True)['state_dict']
    checkpoint.unlink()
    out, _ = run(*flat(images, tmp_path / 'halves', '--epochs', 2, '--resume'))
    assert 'resumed from' in out and 'epoch 2' in out
    found = torch.load(checkpoint, weights_only=True)['state_dict']
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    whole = torch.load(tmp_path / 'whole/checkpoint-00000020.pt', weights_only=True)['state_dict']
    assert all(torch.equal(found[key], whole[key]) for key in expected)


def test_volumes_are_segmented_scored_and_drawn_in_three_planes(run, volumes, tmp_path):
    sizes = ('--patch-size', '[8,8,8]', '--window', '[0,255]', '--epochs', 2)
    out, _ = run('umamba_enc_3d', '--data', volumes, '--output', tmp_path / 'run', *TOGETHER, *sizes)
    assert 'surface Dice' in out
    (picture,) = (tmp_path / 'run/drawn').glob('*.png')
    width, height = Image.open(picture).size
    assert width > 2 * height


ERRORS = {
    'no-data': (['--data', 'nowhere'], 'there is no folder nowhere/images'),
    'patch': (['--patch-size', '[15,24]'], r'patch_size must be divisible by .*\(2, 2\), got \(15, 24\)'),
    'small-patch': (['--patch-size', '[2,2]'], r'larger than the product of the strides \(2, 2\), got \(2, 2\)'),
    'rank': (['--patch-size', '[16]'], 'patch_size must have 2 or 3 numbers'),
    'volumes': (['--patch-size', '[8,8,8]'], 'has no files with .nii, .nii.gz for patches in 3-D'),
    'classes': (['--num-classes', '1'], 'has the label 1, but num_classes is 1'),
    'kind': (['--kind', 'botx'], "kind must be one of bot, enc, got 'botx'; did you mean bot"),
    'window': (['--window', '[3,1]'], r'window must be two numbers, the lower first, got \[3.0, 1.0\]'),
    'option': (['--kindd', 'bot'], "unknown option '--kindd'; did you mean --kind"),
    'split': (['--val-fraction', '0.9'], 'has 4 images, too few to validate on 4'),
    'nan': (
        ['--lr', '1e30', '--clip-grad', '1e30'],
        r'the loss is not a finite number in epoch 1; lower lr \(1e\+30\)',
    ),
}


@pytest.mark.parametrize('arguments, message', ERRORS.values(), ids=ERRORS)
def test_bad_input_is_one_line(arguments, message, run, images, tmp_path):
    _, err = run(*flat(images, tmp_path / 'run', '--epochs', 1, *arguments), code=2)
    assert 'Traceback' not in err and re.search(message, err.splitlines()[-1]), err


def test_an_image_without_a_mask_is_named(images, tmp_path):
    shutil.copytree(images, tmp_path / 'images')
    (tmp_path / 'images/labels/disc2.png').unlink()
    with pytest.raises(Exception, match='has no mask for disc2'):
        find_cases(tmp_path / 'images', 2)


@pytest.mark.parametrize('kind', ['bot', 'enc'])
@pytest.mark.parametrize('plan', [FLAT, SOLID], ids=['2d', '3d'])
def test_monai_infers_in_windows_and_trains(kind, plan):
    model, size = build(kind, plan), [side + 5 for side in plan['patch_size']]
    images, labels = torch.randn(1, 2, *size), torch.randint(3, (1, 1, *size))
    logits = sliding_window_inference(images, plan['patch_size'], 2, model, overlap=0.5)
    assert logits.shape == (1, 3, *size)
    DiceCELoss(to_onehot_y=True, softmax=True)(logits, labels).backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    patch = images[(..., *(slice(side) for side in plan['patch_size']))]
    torch.testing.assert_close(model(MetaTensor(patch)), model(patch))
    torch.testing.assert_close(sliding_window_inference(patch, plan['patch_size'], 1, model), model(patch))


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    torch.save(build('bot', FLAT).state_dict(), tmp_path / 'weights.pt')
    with pytest.raises(Exception, match='is no checkpoint of a training for segmentation'):
        load_network(tmp_path / 'weights.pt')


def test_the_configurations_have_the_sizes_of_the_plans():
    published = {'2d': PUBLISHED['microscopy-2d'], '3d': PUBLISHED['abdomen-ct-3d']}
    names = {path.stem for path in (FOLDER / 'biomedical').glob('*.yaml')}
    assert names == {f'umamba_{kind}_{rank}' for kind in ('bot', 'enc') for rank in published}
    for name in names:
        _, kind, rank = name.split('_')
        _, _, num_classes, *counts, _ = published[rank]
        config = load_config(Path(name), dict(data='images', num_classes=num_classes), Config)
        with torch.device('meta'):
            network = create_network(config)
        assert sum(parameter.numel() for parameter in network.parameters()) == dict(zip(('bot', 'enc'), counts))[kind]


def test_the_examples_of_the_page_run():
    page = (Path(__file__).parents[2] / 'docs/medical.md').read_text()
    examples = re.findall(r'^```python\n(.*?)^```', page, re.MULTILINE | re.DOTALL)
    runnable = [text for text in examples if '.pt' not in text]  # others load files
    assert len(runnable) == 2
    for text in runnable:
        exec(text, {})
