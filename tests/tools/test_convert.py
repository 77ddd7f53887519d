import pytest
import timm
import torch
from folders import full_disk
from safetensors.torch import load_file

from vmamba.tools import convert


@pytest.fixture
def checkpoint(tmp_path):
    """A vmamba_nano of 1000 classes and the file of its weights."""
    torch.manual_seed(0)
    model = timm.create_model('vmamba_nano').eval()
    path = tmp_path / 'checkpoint.pth'
    torch.save({'model': model.state_dict()}, path)
    return model, path


def run(*arguments):
    convert.main([str(argument) for argument in arguments])


def load(path, **kwargs):
    overlay = dict(file=str(path))
    return timm.create_model('vmamba_nano', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def test_converted_weights_give_the_same_logits(checkpoint, tmp_path):
    model, path = checkpoint
    run('vmamba_nano', path, tmp_path / 'out.safetensors')
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(tmp_path / 'out.safetensors')(x), model(x))


def test_backbone_has_no_classifier(checkpoint, tmp_path):
    model, path = checkpoint
    run('vmamba_nano', path, tmp_path / 'out.safetensors', '--num-classes', 0)
    assert not any(key.startswith('head.') for key in load_file(tmp_path / 'out.safetensors'))
    x = torch.randn(2, 3, 32, 32)
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(load(tmp_path / 'out.safetensors', num_classes=0)(x), expected)


def test_a_checkpoint_of_a_run_has_its_classes_and_arguments(tmp_path):
    model = timm.create_model('vmamba_nano', num_classes=2, in_chans=1, depths=(1, 1, 1, 1)).eval()
    facts = dict(model='vmamba_nano', model_args={'depths': [1, 1, 1, 1]}, in_chans=1, num_classes=2, img_size=None)
    torch.save({'state_dict': model.state_dict(), 'config': facts}, tmp_path / 'best.pt')
    run('vmamba_nano', tmp_path / 'best.pt', tmp_path / 'out.safetensors')
    written = load_file(tmp_path / 'out.safetensors')
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(value, written[key]) for key, value in model.state_dict().items())


def test_output_is_overwritten_only_by_force(checkpoint, tmp_path, capsys):
    _, path = checkpoint
    output = tmp_path / 'out.safetensors'
    output.write_text('precious')
    with pytest.raises(SystemExit):
        run('vmamba_nano', path, output)
    assert 'exists; --force overwrites it' in capsys.readouterr().err
    assert output.read_text() == 'precious'
    run('vmamba_nano', path, output, '--force')
    assert load_file(output)


def test_a_full_disk_is_one_line_and_leaves_what_was_there(checkpoint, tmp_path, capsys):
    output = tmp_path / 'out.safetensors'
    output.write_text('precious')
    with full_disk(10_000), pytest.raises(SystemExit) as error:
        run('vmamba_nano', checkpoint[1], output, '--force')
    assert error.value.code == 2 and f'cannot write {output}: File too large' in capsys.readouterr().err
    assert output.read_text() == 'precious' and not list(tmp_path.glob('.*'))


@pytest.mark.parametrize(
    'model, name, options, message',
    [
        ('vmamba_nano', 'absent.pth', (), 'there is no checkpoint file'),
        ('vmamba_t', 'checkpoint.pth', (), 'does not fit VMamba'),
        ('vmamba_nano', 'checkpoint.pth', ('--num-classes', 10), 'does not fit VMamba'),
        ('vmamba_nano', 'checkpoint.pth', ('--num-classes', -1), 'num_classes must be'),
        ('no_such_model', 'checkpoint.pth', (), 'Unknown model'),
    ],
    ids=['no file', 'other variant', 'other classes', 'no classes', 'no model'],
)
def test_expected_failures_are_one_line(checkpoint, tmp_path, capsys, model, name, options, message):
    with pytest.raises(SystemExit) as error:
        run(model, tmp_path / name, tmp_path / 'out.safetensors', *options)
    printed = capsys.readouterr().err
    assert error.value.code == 2 and message in printed and printed.count('\n') == 1
    assert not (tmp_path / 'out.safetensors').exists()
