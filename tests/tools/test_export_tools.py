import json
import re
from pathlib import Path

import pytest
import timm
import torch
from folders import write_photographs
from PIL import Image
from timm.data import create_transform, resolve_data_config

import vmamba  # noqa: F401
from vmamba import export
from vmamba.tools import export_onnx, export_pt2

onnxruntime = pytest.importorskip('onnxruntime')
SMALL = '{depth: 1, embed_dim: 16, d_state: 2}'


def run(tool, *arguments):
    tool.main([str(argument) for argument in arguments])


def error_of(capsys, tool, *arguments):
    with pytest.raises(SystemExit) as end:
        run(tool, *arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_checkpoint_becomes_a_file_with_its_preprocessing(tmp_path, capsys):
    model = timm.create_model('vim_nano', depth=1, embed_dim=16, d_state=2, img_size=16, num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    path = tmp_path / 'model.onnx'
    run(export_onnx, 'vim_nano', path, '--checkpoint', tmp_path / 'weights.pth', '--model-args', SMALL)
    out = capsys.readouterr().out
    assert f'Wrote {path}: ' in out and ' nodes, loaded in ' in out
    session = onnxruntime.InferenceSession(str(path))
    x = torch.randn(1, 3, 16, 16)
    (logits,) = session.run(None, {'images': x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(x).detach(), rtol=1e-4, atol=1e-4)
    mean = json.loads(session.get_modelmeta().custom_metadata_map['mean'])
    assert mean == pytest.approx(model.pretrained_cfg['mean'])


def test_an_output_is_overwritten_only_by_force(tmp_path, capsys):
    path = tmp_path / 'model.onnx'
    path.write_text('precious')
    assert '--force overwrites it' in error_of(capsys, export_onnx, 'vim_nano=untrained', path)
    assert path.read_text() == 'precious'


@pytest.mark.parametrize(
    'arguments, message',
    [
        (('vim_nano=untrained', '--img-size', 33), '--img-size 33: image size 33x33 is not covered by patches'),
        (('vim_nano=untrained', '--opset', 17), 'opset must be from 18 to'),
        (('vim_nano',), 'vim_nano has no published weights'),
        (('vim_nan=untrained',), 'did you mean vim_nano'),
    ],
)
def test_what_a_file_cannot_hold_is_one_line(arguments, message, tmp_path, capsys):
    name, *options = arguments
    error = error_of(capsys, export_onnx, name, tmp_path / 'model.onnx', '--model-args', SMALL, *options)
    assert message in error and error.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


def test_the_serving_example_of_the_page_preprocesses_as_timm_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(export_onnx, 'vim_nano=untrained', 'vmamba_t.onnx', '--model-args', SMALL, '--dynamic-batch')
    page = (Path(__file__).parents[2] / 'docs/deployment.md').read_text()
    example = next(code for code in re.findall(r'```python\n(.*?)```', page, re.DOTALL) if 'def preprocess' in code)
    names = {}
    exec(example, names)
    root = write_photographs(tmp_path / 'images', 71, 100)
    files = [root / 'astronaut.png', root / 'deep/coffee.png']
    torch.manual_seed(0)
    model = timm.create_model('vim_nano', depth=1, embed_dim=16, d_state=2).eval()
    transform = create_transform(**resolve_data_config(pretrained_cfg=model.pretrained_cfg))
    images = torch.stack([transform(Image.open(file).convert('RGB')) for file in files])
    assert names['preprocess'](files[0]).flags.c_contiguous  # packages of AOTInductor misread others
    ours = torch.stack([torch.from_numpy(names['preprocess'](file)) for file in files])
    torch.testing.assert_close(ours, images, rtol=1e-5, atol=1e-5)
    assert names['classify'](files) == model(images).argmax(dim=1).tolist()


def test_a_failed_comparison_ends_with_code_2_and_leaves_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, '_TOLERANCES', {torch.float32: 0})
    path = tmp_path / 'model.onnx'
    error = error_of(capsys, export_onnx, 'vim_nano=untrained', path, '--model-args', SMALL, '--img-size', 16)
    assert 'vim_nano=untrained: output 0 differs from PyTorch by' in error and error.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


def test_a_package_needs_a_compiler(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_pt2.shutil, 'which', lambda _: None)
    assert 'install g++ or clang++' in error_of(capsys, export_pt2, 'vim_nano=untrained', tmp_path / 'model.pt2')
