"""Exported files compute the same as the models, in runtimes that know neither PyTorch's modules nor this library."""

import shutil
import subprocess
import sys
import zipfile

import model_cases
import oracles
import pytest
import torch
from model_cases import CLASS_TOKENS, SMALL, images

from vmamba import export
from vmamba.export import ExportError, FeatureMaps, export_onnx, export_pt2

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

# One block of every kind of mixer; MambaVision and VSSD have two.
TOKENS, STAGES = dict(depth=1, img_size=16), dict(depths=(0, 1))
SHALLOW = {family: TOKENS if family in CLASS_TOKENS else STAGES for family in SMALL}
SHALLOW['mambavision'], SHALLOW['vssd'] = dict(depths=(0, 0, 2)), dict(depths=(0, 0, 1, 1))
MIXERS = {'mamba2': dict(d_state=4), 's4d': dict(d_state=4), 'h3': dict(d_state=4), 'attention': dict(d_state=None)}
LOOPS = {'Loop', 'Scan', 'If', 'SequenceAt'}


def small(family, **kwargs):
    return model_cases.small(family, **{**SHALLOW[family], **kwargs}).eval()


def images_of(family, batch=1):
    return images(batch, 3, *([16, 16] if family in CLASS_TOKENS else [32, 32]))


def run(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return [torch.from_numpy(output) for output in session.run(None, {'images': x.numpy()})]


@pytest.mark.parametrize('family', SMALL)
def test_every_family_runs_as_onnx_for_any_batch(family, tmp_path):
    model, path = small(family), tmp_path / 'model.onnx'
    facts = export_onnx(model, images_of(family), path, dynamic_batch=True)
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {''} and not LOOPS & {node.op_type for node in graph.node}
    assert facts.nodes == len(graph.node) and facts.size == path.stat().st_size and facts.error < 1e-4
    for batch in (1, 2, 5):
        x = images_of(family, batch)
        (logits,) = run(path, x)
        assert oracles.relative_error(logits, model(x)) < 1e-5


@pytest.mark.parametrize('mixer', MIXERS)
def test_every_mixer_of_vim_runs_as_onnx(mixer, tmp_path):
    model, x = small('vim', mixer=mixer, headdim=8, **MIXERS[mixer]), images_of('vim', 2)
    export_onnx(model, x, tmp_path / 'model.onnx')
    assert oracles.relative_error(run(tmp_path / 'model.onnx', x)[0], model(x)) < 1e-5


@pytest.mark.parametrize('family', ['vmamba', 'vim'])
def test_feature_maps_run_as_onnx(family, tmp_path):
    model, x = small(family), images_of(family)
    export_onnx(FeatureMaps(model).eval(), x, tmp_path / 'maps.onnx')
    maps = run(tmp_path / 'maps.onnx', x)
    expected = model.forward_intermediates(x, intermediates_only=True)
    assert all(oracles.relative_error(ours, theirs) < 1e-5 for ours, theirs in zip(maps, expected, strict=True))


def test_half_precision_and_metadata(tmp_path):
    model, x, path = small('vmamba'), images_of('vmamba'), tmp_path / 'model.onnx'
    expected = model(x)
    export_onnx(model.half(), x.half(), path, metadata={'mean': '[0.5]'})
    (logits,) = run(path, x.half())
    assert logits.dtype == torch.float16 and oracles.relative_error(logits.float(), expected) < 0.02
    session = onnxruntime.InferenceSession(str(path))
    assert session.get_modelmeta().custom_metadata_map == {'mean': '[0.5]'}


@pytest.mark.parametrize('family', ['vmamba', 'mambavision'])
def test_int8_leaves_the_projections_of_the_scans(family, tmp_path):
    model, x, path = small(family), images_of(family), tmp_path / 'model.onnx'
    export_onnx(model, x, path, int8=True)
    assert oracles.relative_error(run(path, x)[0], model(x)) < 0.2
    graph = onnx.load(path).graph
    kept = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.data_type == 1]
    quantised = [tensor for tensor in graph.initializer if tensor.data_type == 3 and len(tensor.dims) == 2]
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(quantised) == len([name for name in linear if not name.endswith('x_proj')]) < len(linear)
    projections = 'x_proj.weight', 'dt_proj_weight'
    for weight in (parameter for name, parameter in model.named_parameters() if name.endswith(projections)):
        found = [array for array in kept if array.shape == weight.mT.shape]
        assert any(torch.equal(torch.tensor(array), weight.mT) for array in found)


def test_int8_is_of_models_in_fp32(tmp_path):
    with pytest.raises(ExportError, match='fp32, got torch.float16'):
        export_onnx(small('vim').half(), images_of('vim').half(), tmp_path / 'model.onnx', int8=True)


def test_a_file_that_differs_is_not_left(tmp_path, monkeypatch):
    """With a wrong form of an operator."""
    forms = export.decompositions()
    scan = next(operator for operator in forms if 'bidirectional_scan' in str(operator))
    monkeypatch.setattr(export, 'decompositions', lambda: {**forms, scan: lambda u, *others: u.sum(dim=2)})
    with pytest.raises(ExportError, match='output 0 differs from PyTorch by .* of its largest value, more than 1e-04'):
        export_onnx(small('vim'), images_of('vim'), tmp_path / 'model.onnx')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('opset', [17, 99])
def test_an_opset_that_is_not_supported(opset, tmp_path):
    with pytest.raises(ExportError, match=f'opset must be from 18 to .*, got {opset}'):
        export_onnx(small('vim'), images_of('vim'), tmp_path / 'model.onnx', opset=opset)


@pytest.mark.parametrize('write', [export_onnx, export_pt2])
@pytest.mark.parametrize('own, given', [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)])
def test_dtypes_that_are_not_supported(write, own, given, tmp_path):
    message = f'must both be in fp32 or in fp16, got {own} and {given}'
    with pytest.raises(ExportError, match=message):
        write(small('vim').to(own), images_of('vim').to(given), tmp_path / 'model')
    assert list(tmp_path.iterdir()) == []


def test_images_that_do_not_fit(tmp_path):
    with pytest.raises(ExportError, match=r'one or more, got shape \(0, 3, 16, 16\)'):
        export_onnx(small('vim'), images_of('vim')[:0], tmp_path / 'model.onnx')
    with pytest.raises(ValueError, match=r'takes 16x16 images, got 32x32: create it .* with dynamic_img_size=True'):
        export_onnx(small('vim'), images(1, 3, 32, 32), tmp_path / 'model.onnx')
    assert list(tmp_path.iterdir()) == []


def test_models_that_a_graph_cannot_hold():
    model, x = small('vim'), images_of('vim')
    with pytest.raises(ExportError, match=r'training mode; call model.eval\(\)'):
        export.capture(model.train(), x)
    handle = model.eval().blocks[0].mixer.register_forward_hook(lambda *_: None)
    with pytest.raises(ExportError, match='blocks.0.mixer has hooks.*remove them'):
        export.capture(model, x)
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    with pytest.raises(ExportError, match='all modules have hooks'):
        export.capture(model, x)
    handle.remove()
    export.capture(model, x)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
def test_a_compiled_package_can_keep_the_operators(tmp_path):
    model, path = small('vim', d_state=1, img_size=8), tmp_path / 'model.pt2'
    assert export_pt2(model, images(1, 3, 8, 8), path, portable=False) < 1e-4
    with zipfile.ZipFile(path) as package:
        operators = b''.join(package.read(name) for name in package.namelist() if name.endswith('.json'))
    assert b'vmamba::causal_conv1d' in operators


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
def test_a_compiled_package_runs_without_the_library(tmp_path):
    model, path = small('vim', d_state=1, img_size=8), tmp_path / 'model.pt2'
    assert export_pt2(model, images(1, 3, 8, 8), path, dynamic_batch=True) < 1e-4
    x = images(3, 3, 8, 8)
    torch.save({'x': x, 'expected': model(x).detach()}, tmp_path / 'case.pt')
    code = (
        'import sys, torch; case = torch.load("case.pt"); '
        'y = torch._inductor.aoti_load_package("model.pt2")(case["x"]); '
        'assert "vmamba" not in sys.modules; torch.testing.assert_close(y, case["expected"], atol=1e-4, rtol=1e-4)'
    )
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)
