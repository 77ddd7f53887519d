"""Whole-graph capture: torch.compile, torch.export and FX."""

import shutil

import chains
import model_cases
import oracles
import pytest
import torch
from cases import DEVICE, needs_triton
from model_cases import CLASS_TOKENS, FUSED, SMALL, images
from timm.models import create_feature_extractor, get_graph_node_names

from vmamba.kernels import use_triton

pytestmark = pytest.mark.slow

SHALLOW = {family: dict(depth=2) if family in CLASS_TOKENS else dict(depths=(1, 1)) for family in SMALL}
ONE_BLOCK = {family: dict(depth=1) if family in CLASS_TOKENS else dict(depths=(1,)) for family in SMALL}
# Both kinds of mixers.
SHALLOW['mambavision'] = SHALLOW['vssd'] = dict(depths=(0, 0, 1, 2))
CASES = [
    pytest.param('vmamba', {}, id='vmamba'),
    pytest.param('v0', {}, id='v0'),
    pytest.param('vim', {}, id='vim'),
    pytest.param('vim', dict(global_pool='avg'), id='vim-avg'),
    pytest.param('vim', dict(dynamic_img_size=True), id='vim-dynamic'),
]


def small(family, **kwargs):
    return model_cases.small(family, **{**SHALLOW[family], **kwargs})


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def outputs_and_gradients(model, forward, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = forward(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize('family,options', [*CASES, *((family, {}) for family in SMALL if family not in FUSED)])
def test_compiled_in_one_graph_equals_eager(family, options):
    model, x = small(family, **options).train(), images()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    all_expected = outputs_and_gradients(model, model, x)
    largest = max(expected.abs().max() for expected in all_expected)
    for actual, expected in zip(outputs_and_gradients(model, compiled, x), all_expected):
        if expected.abs().max() < 1e-6 * largest:  # of a bias before BatchNorm: rounding errors
            assert actual.abs().max() < 1e-6 * largest
        else:
            assert oracles.relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize('family', ['vmamba', 'vim'])
def test_compiled_under_autocast_equals_eager(family):
    model, x = small(family, **ONE_BLOCK[family]).train(), images()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.autocast('cpu', torch.bfloat16):
        for actual, expected in zip(outputs_and_gradients(model, compiled, x), outputs_and_gradients(model, model, x)):
            assert oracles.relative_error(actual.float(), expected.float()) < 0.05


@torch.no_grad()
@pytest.mark.parametrize('family', ['vmamba', 'vim'])
def test_compiled_for_any_batch_size(family):
    model = small(family, **ONE_BLOCK[family]).eval()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager', dynamic=True)
    for batch in (2, 3, 5):
        x = images(batch, 3, 32, 32)
        assert oracles.relative_error(compiled(x), model(x)) < 1e-5


@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
@pytest.mark.parametrize('family', ['vmamba', 'vim'])
def test_compiled_to_native_code_equals_eager(family):
    """A whole Vim, and a block of a VMamba, whose rest is plain PyTorch and takes the C++ compiler half a minute."""
    model = small(family, **ONE_BLOCK[family]).train()
    part, x = (model, images()) if family == 'vim' else (model.stages[0].blocks[0], images(2, 5, 7, 8))
    compiled = torch.compile(part, fullgraph=True)
    for actual, expected in zip(outputs_and_gradients(part, compiled, x), outputs_and_gradients(part, part, x)):
        assert oracles.relative_error(actual, expected) < 1e-4


@needs_triton
@pytest.mark.parametrize('family', FUSED)
def test_compiled_on_the_kernels_equals_eager(family, monkeypatch):
    """Compiled graphs hold operators; eager blocks run fused."""
    options = dict(img_size=16) if family == 'vim' else {}
    model = small(family, d_state=2, **ONE_BLOCK[family], **options).train().to(DEVICE)
    x = images(2, 3, 16, 16).to(DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    ran = chains.record(monkeypatch)
    with use_triton(True):
        actual = outputs_and_gradients(model, compiled, x)
        assert not ran
        expected = outputs_and_gradients(model, model, x)
        assert len(ran) == 1
        with torch.no_grad():
            graph = str(torch.export.export(model.eval(), (x,)).graph)
    assert all(oracles.relative_error(ours, theirs) < 1e-4 for ours, theirs in zip(actual, expected, strict=True))
    assert 'vmamba.norm.default' in graph and len(ran) == 1


@torch.no_grad()
@pytest.mark.parametrize('family,options', CASES)
def test_exported_equals_eager(family, options):
    model, x = small(family, **options).eval(), images()
    exported = torch.export.export(model, (x,)).module()
    assert oracles.relative_error(exported(x), model(x)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_exported_with_a_dynamic_batch_equals_eager(family):
    model = small(family).eval()
    dynamic = ({0: torch.export.Dim('batch', min=1, max=64)},)
    exported = torch.export.export(model, (images(3, 3, 32, 32),), dynamic_shapes=dynamic).module()
    for batch in (1, 2, 7):
        x = images(batch, 3, 32, 32)
        assert oracles.relative_error(exported(x), model(x)) < 1e-5


@torch.no_grad()
def test_vim_exported_for_dynamic_sizes_takes_its_own_too():
    model = small('vim', dynamic_img_size=True).eval()
    height, width = (4 * torch.export.Dim(name, min=4, max=32) for name in ('rows', 'columns'))
    x = images(1, 3, 48, 40)
    exported = torch.export.export(model, (x,), dynamic_shapes=({2: height, 3: width},)).module()
    for size in ((48, 40), (32, 40), (32, 32), (64, 16)):
        x = images(1, 3, *size)
        assert oracles.relative_error(exported(x), model(x)) < 1e-5


@torch.no_grad()
def test_vim_compiled_for_dynamic_sizes_takes_its_own_too():
    model = small('vim', dynamic_img_size=True, depth=1).eval()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager', dynamic=True)
    for size in ((48, 40), (32, 32)):
        x = images(2, 3, *size)
        assert oracles.relative_error(compiled(x), model(x)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize('family', FUSED)
def test_a_saved_export_loads_and_names_the_operators(family, tmp_path):
    model, x = small(family).eval(), images()
    program = torch.export.export(model, (x,))
    operators = {str(node.target).split('.')[0] for node in program.graph.nodes if node.op == 'call_function'}
    assert 'vmamba' in operators
    torch.export.save(program, tmp_path / 'model.pt2')
    assert oracles.relative_error(torch.export.load(tmp_path / 'model.pt2').module()(x), model(x)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_traced_by_fx_equals_eager(family):
    model, x = small(family).eval(), images()
    _, nodes = get_graph_node_names(model)
    extractor = create_feature_extractor(model, {nodes[-1]: 'logits', 'norm': 'features'})
    out = extractor(x)
    assert torch.equal(out['logits'], model(x))
    assert torch.equal(out['features'], model.forward_features(x))


@torch.no_grad()
@pytest.mark.parametrize('family', FUSED)
def test_captured_graphs_still_refuse_bad_images(family):
    model = small(family).eval()
    compiled = torch.compile(model, backend='eager')
    compiled(images())
    with pytest.raises(ValueError, match='got 4'):
        compiled(images(2, 4, 32, 32))


@torch.no_grad()
@pytest.mark.parametrize('family', FUSED)
def test_fx_traces_models_that_drop_paths(family):
    options = dict(features_only=True, feature_cls='fx', out_indices=(1, 3), drop_path_rate=0.5)
    features, x = model_cases.small(family, **options), images()
    torch.manual_seed(1)
    dropping = features.train()(x)
    torch.manual_seed(2)
    assert not torch.equal(features(x)[1], dropping[1])
    assert torch.equal(features.eval()(x)[1], features(x)[1])
