"""Predicted classes, compared with those of timm's own preprocessing."""

import io
import shutil

import pytest
import timm
import torch
from folders import truncate, write_photographs
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from vmamba.tools import predict

RANDOM = '--model', 'vmamba_nano=untrained'


@pytest.fixture
def photographs(tmp_path):
    return write_photographs(tmp_path / 'photographs')


@pytest.fixture
def checkpoint(tmp_path):
    """Three classes, as `vmamba train` stores them, with a preprocessing of its own."""
    model = timm.create_model('vmamba_nano', num_classes=3)
    config = dict(model='vmamba_nano', model_args={}, in_chans=3, img_size=40, num_classes=3, crop_pct=0.8)
    config.update(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], interpolation='bilinear', crop_mode='center')
    config['class_names'] = ['a cat', 'a dog', 'a cow']
    torch.save({'state_dict': model.state_dict(), 'config': config}, tmp_path / 'best.pt')
    return tmp_path / 'best.pt'


@pytest.fixture
def run(capsys):
    """Runs the tool; returns the classes and percentages of every image, and what else was said."""

    def call(*arguments):
        predict.main([*map(str, arguments), '--workers', '0', '--device', 'cpu'])
        out, error = capsys.readouterr()
        found, path = {}, None
        for line in out.splitlines():
            if line.startswith('  '):
                value, _, name = line.strip().partition('  ')
                found[path].append((name, float(value.rstrip('%'))))
            else:
                path, found[line] = line, []
        return found, error

    return call


def expected(model, path, names, **config):
    """By timm alone: an image at a time."""
    transform = create_transform(**resolve_data_config(config, model=model))
    with torch.inference_mode():
        probabilities = model.eval()(transform(Image.open(path).convert('RGB'))[None])[0].softmax(-1)
    values, indices = probabilities.sort(descending=True)
    return [(names[index], 100 * value) for index, value in zip(indices.tolist(), values.tolist())]


def assert_close(found, wanted):
    assert [name for name, _ in found] == [name for name, _ in wanted]
    assert [value for _, value in found] == pytest.approx([value for _, value in wanted], abs=0.011)


def test_the_checkpoint_says_the_model_its_preprocessing_and_its_classes(run, photographs, checkpoint):
    found, _ = run(photographs, '--checkpoint', checkpoint)
    content = torch.load(checkpoint, weights_only=True)
    model = timm.create_model('vmamba_nano', num_classes=3)
    model.load_state_dict(content['state_dict'])
    config = {key: content['config'][key] for key in ('mean', 'std', 'interpolation', 'crop_mode', 'crop_pct')}
    for path in (photographs / 'astronaut.png', photographs / 'deep/coffee.png'):
        names = content['config']['class_names']
        assert_close(found[str(path)], expected(model, path, names, img_size=40, **config))


def test_a_thousand_classes_are_those_of_imagenet(run, photographs):
    path = photographs / 'astronaut.png'
    found, error = run(path, *RANDOM, '--seed', 3, '--top', 4)
    torch.manual_seed(3)
    info = ImageNetInfo()
    names = [info.index_to_description(i) for i in range(1000)]
    assert_close(found[str(path)], expected(timm.create_model('vmamba_nano'), path, names)[:4])
    assert error == 'The weights are random: the predictions mean nothing.\n'


def test_other_classes_are_numbers(run, photographs, tmp_path):
    torch.save(timm.create_model('vmamba_nano', num_classes=7).state_dict(), tmp_path / 'seven.pth')
    found, _ = run(photographs / 'astronaut.png', '--model', 'vmamba_nano', '--checkpoint', tmp_path / 'seven.pth')
    (classes,) = found.values()
    assert len(classes) == 5 and {name for name, _ in classes} <= {f'class {i}' for i in range(7)}


def test_a_list_on_the_standard_input(run, photographs, monkeypatch):
    paths = [str(photographs / name) for name in ('deep/coffee.png', 'astronaut.png')]
    monkeypatch.setattr('sys.stdin', io.StringIO('\n'.join(paths) + '\n'))
    found, _ = run('-', *RANDOM)
    assert list(found) == paths


def test_batches_keep_the_order_and_bad_images_are_named(run, photographs, capsys):
    for i in range(4):
        shutil.copy(photographs / 'astronaut.png', photographs / f'b{i}.png')
    truncate(photographs / 'b1.png')
    with pytest.raises(SystemExit):
        run(photographs, *RANDOM, '--batch-size', 2)
    error = capsys.readouterr().err
    assert f'cannot read the image {photographs}/b1.png' in error and '--skip-bad-images' in error
    found, error = run(photographs, *RANDOM, '--batch-size', 2, '--skip-bad-images')
    names = ['astronaut.png', 'b0.png', 'b2.png', 'b3.png', 'deep/coffee.png']
    assert list(found) == [str(photographs / name) for name in names]
    assert found[str(photographs / 'b3.png')] == found[str(photographs / 'astronaut.png')]
    assert found[str(photographs / 'deep/coffee.png')] != found[str(photographs / 'astronaut.png')]
    assert f'skipped 1 unreadable image(s): {photographs}/b1.png' in error


def test_the_picture_has_a_row_for_every_image(run, photographs, tmp_path):
    run(photographs / 'astronaut.png', *RANDOM, '--draw', tmp_path / 'one.png')
    run(photographs, *RANDOM, '--draw', tmp_path / 'two.png')
    with Image.open(tmp_path / 'one.png') as one, Image.open(tmp_path / 'two.png') as two:
        assert two.size == (one.width, 2 * one.height)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (('--model', 'vmamba_nano'), 'vmamba_nano has no published weights: give a checkpoint, vmamba_nano=FILE, or'),
        ((), 'name the model by --model'),
        (('--model', 'vmamba_nan=untrained'), "unknown model 'vmamba_nan'; did you mean vmamba_nano"),
        (('--checkpoint', 'absent.pt'), 'there is no checkpoint absent.pt'),
        ((*RANDOM, '--checkpoint', 'absent.pt'), 'both name weights'),
        ((*RANDOM, '--model-args', '{num_classes: 0}'), 'has no classifier'),
    ],
)
def test_user_errors_are_one_line(run, photographs, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        run(photographs, *arguments)
    text = capsys.readouterr().err
    assert error.value.code == 2 and text.startswith('predict.py: error: ') and text.count('\n') == 1
    assert message in text


def test_a_checkpoint_without_its_model_needs_a_name(run, photographs, tmp_path, capsys):
    torch.save(timm.create_model('vmamba_nano', num_classes=2).state_dict(), tmp_path / 'plain.pth')
    with pytest.raises(SystemExit):
        run(photographs, '--checkpoint', tmp_path / 'plain.pth')
    assert f'{tmp_path}/plain.pth: name the model by --model' in capsys.readouterr().err
    (tmp_path / 'text.pth').write_text('hello' * 100)
    with pytest.raises(SystemExit):
        run(photographs, '--checkpoint', tmp_path / 'text.pth')
    assert f'error: {tmp_path}/text.pth is not a readable checkpoint' in capsys.readouterr().err
