"""The selective scan on its Triton kernels, against the float64 definition of `oracles`.

Without a GPU the kernels run in Triton's interpreter (see conftest.py), where raw bfloat16 is not computed as on a GPU.
"""

import oracles
import pytest
import torch
from test_selective_scan import arguments, doubled, library, run
from vmamba.kernels import reference, selective_scan
from vmamba.kernels.backend import use_triton

pytest.importorskip('triton')
from vmamba.kernels.fused import scan as fused  # noqa: E402
from vmamba.kernels.fused.columns import launch as columns  # noqa: E402
from vmamba.kernels.fused.lanes import launch as lanes  # noqa: E402

HAS_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if HAS_GPU else 'cpu'
SMALL = {
    lanes: lanes.ScanConfig(rows=4, lanes=2, warps=1, chunks=1, splits=1),
    columns: columns.ScanConfig(columns=4, chunks=1, splits=1),
}

CONFIGS = {lanes: ('FORWARD', 'BACKWARD'), columns: ('CONFIG',)}


@pytest.fixture(autouse=True)
def triton_kernels():
    with use_triton(True):
        yield


@pytest.fixture(params=[lanes, columns], ids=['lanes', 'columns'])
def configure(request, monkeypatch):
    """Takes one of the designs for any number of states, and sets how both passes cut their work.

    `channels` of a tile have another name in each design.
    """
    design = request.param
    monkeypatch.setattr(fused, 'MANY_STATES', 1 if design is columns else 1000)

    def set_config(channels=None, **changes):
        if channels:
            changes['columns' if design is columns else 'rows'] = channels
        for name in CONFIGS[design]:
            monkeypatch.setattr(design, name, SMALL[design]._replace(**changes))

    if not HAS_GPU:
        set_config()
    set_config.design = design
    return set_config


def on_device(tensors):
    return {k: None if t is None else t.to(DEVICE) for k, t in tensors.items()}


def check(tensors, dtype=torch.float32, **options):
    """Output, last state and all gradients; the definition walks on the CPU."""
    expected = run(oracles.selective_scan, doubled(tensors), **options)
    actual = run(library, on_device(tensors), **options)
    oracles.assert_all_match({k: None if t is None else t.cpu() for k, t in actual.items()}, expected, dtype)


def small(**changes):
    return arguments(**{'batch': 1, 'dim': 4, 'seqlen': 21, 'dstate': 2, 'dtype': torch.float32, **changes})


SHAPES = [
    pytest.param(dict(seqlen=1), id='one-step'),
    pytest.param(dict(seqlen=15, dstate=1), id='tile-minus-one'),
    pytest.param(dict(seqlen=16, dstate=3), id='tile'),
    pytest.param(dict(seqlen=17, dstate=1, B=0, C=0), id='tile-plus-one'),
    pytest.param(dict(seqlen=9, dstate=16, B=0, C=0), id='n16'),
    pytest.param(dict(seqlen=18, dstate=70, dim=3, B=0, C=0), id='n70'),
    pytest.param(dict(seqlen=18, dstate=66, dim=3, B=None, C=None), id='n66-constant'),
    pytest.param(dict(dim=5, B=0, C=0), id='dim-5'),
    pytest.param(dict(dim=6, B=3, C=1), id='different-groups'),
    pytest.param(dict(B=4, C=4, dstate=1), id='group-per-channel'),
    pytest.param(dict(B=None, C=None), id='constant-b-and-c'),
    pytest.param(dict(B=None, C=2, dim=6), id='constant-b'),
    pytest.param(dict(B=0, C=None, dstate=1), id='constant-c'),
    pytest.param(dict(share=2, batch=2), id='delta-shared-by-2'),
    pytest.param(dict(share=4, B=0, C=0, dstate=1), id='delta-shared-by-all'),
]


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('sizes', SHAPES)
def test_outputs_and_gradients(sizes, reverse, configure):
    if configure.design is lanes and sizes.get('dstate', 0) > 16 and not HAS_GPU:
        pytest.skip('more states than lanes are ever given, at half a minute each in the interpreter')
    check(small(**sizes), delta_softplus=True, reverse=reverse)


@pytest.mark.parametrize('optional', ['', 'D', 'z', 'b', 's', 'zs'])
def test_every_optional_argument(optional, configure):
    check(small(optional=optional), delta_softplus='b' in optional)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('chunks,seqlen', [(2, 33), (3, 80)])
def test_chunks_of_the_sequence(chunks, seqlen, reverse, configure):
    configure(chunks=chunks)
    check(small(seqlen=seqlen, dim=3, B=0, C=0), delta_softplus=True, reverse=reverse)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('configure', [columns], ids=['columns'], indirect=True)
def test_pieces_of_chunks(configure, reverse):
    configure(chunks=2, pieces=2)
    check(small(seqlen=85, dim=3, B=0, C=0), delta_softplus=True, reverse=reverse)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('configure', [columns], ids=['columns'], indirect=True)
def test_chunks_of_many_states(reverse, configure):
    configure(chunks=2)
    check(small(seqlen=40, dstate=65, dim=2, B=0, C=0), delta_softplus=True, reverse=reverse)


@pytest.mark.parametrize('dstate', [5, 70])
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('configure', [columns], ids=['columns'], indirect=True)
def test_half_tiles(configure, reverse, dstate):
    configure(chunks=2)
    check(small(seqlen=50, dstate=dstate, dim=3, B=0, C=0, optional='Dzbs'), delta_softplus=True, reverse=reverse)


@pytest.mark.parametrize('dstate,warps', [(5, 1), (5, 2), (12, 4), (3, 8)])
def test_states_of_a_warp(dstate, warps, monkeypatch):
    for name in CONFIGS[columns]:
        monkeypatch.setattr(columns, name, SMALL[columns]._replace(warps=warps))
    monkeypatch.setattr(fused, 'MANY_STATES', 1)
    check(small(dstate=dstate, B=0, C=0), delta_softplus=True)


@pytest.mark.parametrize('constant', ['B', 'C'])
def test_chunks_with_constants(constant, configure):
    configure(chunks=2)
    check(small(**{'seqlen': 40, 'B': 0, 'C': 0, 'optional': '', constant: None}))


@pytest.mark.parametrize('splits', [1, 2, 3])
def test_blocks_of_channels(splits, configure):
    configure(channels=2, splits=splits)
    check(small(dim=7, seqlen=17, dstate=1, B=0, C=0), delta_softplus=True)


def test_half_precision(configure):
    """Rows of whole vectors, which are loaded as such."""
    configure(chunks=2)
    check(small(seqlen=64, dstate=1, dtype=torch.float16, batch=2), torch.float16, delta_softplus=True)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('configure', [columns], ids=['columns'], indirect=True)
def test_coefficients_in_bfloat16(configure, reverse):
    """B and C are packed as words of two steps, and taken apart."""
    configure(chunks=2)
    tensors = small(seqlen=43, dstate=5, B=2, C=2, dtype=torch.bfloat16)
    check(tensors, torch.bfloat16, delta_softplus=True, reverse=reverse)


@pytest.mark.parametrize('wanted', [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize('plain', [False, True], ids=['triton', 'plain'])
def test_output_dtype(wanted, plain, configure):
    tensors = on_device(small(dtype=torch.float16))
    expected, _ = reference.selective_scan(**{k: None if t is None else t.double() for k, t in tensors.items()})
    with use_triton(not plain):
        y = selective_scan(**tensors, out_dtype=wanted)
    assert y.dtype == wanted
    oracles.assert_matches(y, expected, torch.float16 if wanted == torch.float16 else torch.float32)


def test_an_integer_output_dtype_is_an_error():
    with pytest.raises(ValueError, match='out_dtype'):
        selective_scan(**on_device(small()), out_dtype=torch.int32)


def transposed(tensor):
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def within(tensor):
    """As a part of a larger tensor whose rows are not aligned."""
    larger = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float('nan'), dtype=tensor.dtype)
    larger[..., 1:-2] = tensor
    return larger[..., 1:-2]


@pytest.mark.parametrize('optional', ['Dzbs', ''])
@pytest.mark.parametrize('configure', [columns], ids=['columns'], indirect=True)
def test_channels_last_sequences(optional, configure):
    """They are walked where they lie, and so are their gradients."""
    configure(chunks=2)
    tensors = small(seqlen=40, dstate=5, dim=6, batch=2, optional=optional)
    laid_out = {k: transposed(t) if k in ('u', 'delta', 'z') and t is not None else t for k, t in tensors.items()}
    expected = run(oracles.selective_scan, doubled(tensors), delta_softplus=True)
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in on_device(laid_out).items()}
    y, state = library(**leaves, delta_softplus=True)
    torch.manual_seed(1)
    assert y.stride() == leaves['u'].stride()
    actual = run(library, on_device(laid_out), delta_softplus=True)
    oracles.assert_all_match({k: None if t is None else t.cpu() for k, t in actual.items()}, expected, torch.float32)
    grads = torch.autograd.grad(y.sum() + state.sum(), [leaves['u'], leaves['delta']])
    assert all(grad.stride() == leaves['u'].stride() for grad in grads)


@pytest.mark.parametrize('layout', [transposed, within], ids=lambda f: f.__name__)
def test_strides(layout, configure):
    tensors = small()
    expected = run(library, on_device(tensors), delta_softplus=True)
    laid_out = {
        k: layout(t) if k in ('u', 'delta', 'z', 'B', 'C', 'A', 'initial_state') else t for k, t in tensors.items()
    }
    y, state = library(**on_device(laid_out), delta_softplus=True)
    assert torch.equal(y, expected['y']) and torch.equal(state, expected['last_state'])


def test_gradients_without_saved_states(configure):
    """As where the forward operator could not know that gradients would be wanted."""
    tensors = on_device(small())
    leaves = [None if t is None else t.requires_grad_() for t in tensors.values()]
    results = []
    for save in (False, True):
        y, state, _ = torch.ops.vmamba.selective_scan_fused(*leaves, True, False, torch.float32, save)
        results.append(torch.autograd.grad(y.sum() + state.sum(), [t for t in leaves if t is not None]))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_the_gradient_of_the_last_state_alone(configure):
    tensors = {k: t.requires_grad_() for k, t in small(optional='bs').items() if t is not None}
    weight = torch.randn(1, 4, 2)
    (library(**on_device(tensors))[1].cpu() * weight).sum().backward()
    grads = {k: t.grad for k, t in tensors.items() if k != 'C'}
    wide = {k: t.detach().double().requires_grad_() for k, t in tensors.items()}
    (oracles.selective_scan(**wide)[1] * weight).sum().backward()
    oracles.assert_all_match(grads, {k: wide[k].grad for k in grads}, torch.float32)


@pytest.mark.parametrize('batch', [0, 2])
def test_batches(batch, configure):
    check(small(batch=batch, seqlen=5), delta_softplus=True)


def test_growth_leaves_zeros_alone(configure):
    """Where exp(sum of delta * A) overflows, states that are zero stay zero."""
    configure(chunks=3)
    tensors = {k: t for k, t in small(seqlen=48, optional='').items() if t is not None}
    tensors['A'] = -tensors['A'] * 50
    tensors['u'] = torch.zeros_like(tensors['u'])
    y, state = library(**on_device(tensors))
    assert not y.any() and not state.any()


@pytest.mark.parametrize('case', ['underflow', 'wide-range', 'softplus-threshold', 'zero-steps'])
def test_extreme_steps_and_decays(case, configure):
    configure(chunks=2)
    tensors = small(seqlen=40, optional='Ds')
    if case == 'underflow':
        tensors['delta'] = tensors['delta'] * 100 + 50
        tensors['A'] = tensors['A'] * 1e3 - 100
    elif case == 'wide-range':
        tensors['delta'] = 10 ** (tensors['delta'] * 18 - 7)
        tensors['A'] = -(10 ** (-tensors['A'] * 2 - 2))
    elif case == 'softplus-threshold':
        tensors['delta'] = tensors['delta'] * 200 - 50
    else:
        tensors['delta'] = tensors['delta'] * 0
    check(tensors, delta_softplus=case == 'softplus-threshold')


@pytest.mark.parametrize('optional,save', [('Dzbs', True), ('', False)])
def test_registration(optional, save, configure):
    tensors = on_device(small(optional=optional, seqlen=9))
    args = [None if t is None else t.requires_grad_() for t in tensors.values()]
    torch.library.opcheck(
        torch.ops.vmamba.selective_scan_fused.default,
        (*args, True, False, torch.float32, save),
        test_utils=('test_schema', 'test_autograd_registration', 'test_faketensor'),
    )


@pytest.mark.parametrize('dstate', [1, 4, 16, 63, 64, 256])
def test_programs_have_the_registers_that_they_ask_for(dstate):
    config = columns.fit(columns.CONFIG, dstate)
    assert config.num_warps * config.programs_per_processor * 32 * config.registers <= 65536


gpu = pytest.mark.skipif(not HAS_GPU, reason='needs a GPU')


def compare_with_plain(tensors, dtype, **options):
    """Against the plain path in float64 on the GPU, for sizes that the definition would take too long for."""
    with use_triton(False):
        expected = run(library, on_device(doubled(tensors)), **options)
    actual = run(library, on_device(tensors), **options)
    oracles.assert_all_match(actual, expected, dtype)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize('dtype', oracles.DTYPES[1:], ids=str)
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize(
    'sizes',
    [
        dict(batch=2, dim=96, seqlen=784, dstate=1, B=4, C=4),
        dict(batch=2, dim=40, seqlen=197, dstate=16, B=0, C=0),
        dict(batch=1, dim=24, seqlen=1023, dstate=5, B=2, C=1),
        dict(batch=1, dim=24, seqlen=100, dstate=16, B=0, C=None),
        dict(batch=1, dim=24, seqlen=100, dstate=4, B=None, C=2),
        dict(batch=2, dim=8, seqlen=100, dstate=256, B=0, C=0),
        dict(batch=1, dim=8, seqlen=65536, dstate=2, B=0, C=0),
    ],
    ids=str,
)
def test_sizes_on_a_gpu(sizes, dtype, reverse):
    compare_with_plain(arguments(**sizes, dtype=dtype), dtype, delta_softplus=True, reverse=reverse)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize('seqlen', [8, 16, 32, 64, 128, 256, 372, 512, 784, 1024, 1134, 2048, 4096])
@pytest.mark.parametrize('groups', [0, 2])
@pytest.mark.parametrize('optional', ['Dzb', ''])
@pytest.mark.parametrize('dtype', oracles.DTYPES[1:], ids=str)
def test_the_cases_of_mamba_ssm(dtype, optional, groups, seqlen):
    tensors = arguments(batch=2, dim=4, seqlen=seqlen, dstate=8, B=groups, C=groups, optional=optional, dtype=dtype)
    compare_with_plain(tensors, dtype, delta_softplus=True)


@gpu
@pytest.mark.gpu
@torch.no_grad()
def test_a_million_steps():
    tensors = arguments(batch=1, dim=2, seqlen=1_000_000, dstate=2, B=0, C=0, optional='Ds', dtype=torch.float32)
    tensors['delta'] = tensors['delta'] * 1e-2
    with use_triton(False):
        expected = library(**on_device(doubled(tensors)))
    for actual, reference_value in zip(library(**on_device(tensors)), expected):
        oracles.assert_matches(actual, reference_value, torch.float32)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize('chunks', [1, 8])
def test_repeated_runs_agree_bit_by_bit(chunks, monkeypatch):
    for design, name in ((design, name) for design, names in CONFIGS.items() for name in names):
        monkeypatch.setattr(design, name, getattr(design, name)._replace(chunks=chunks))
    tensors = on_device(arguments(batch=4, dim=192, seqlen=3136, dstate=4, B=2, C=2, dtype=torch.bfloat16))
    first = run(library, tensors, delta_softplus=True)
    for _ in range(5):
        again = run(library, tensors, delta_softplus=True)
        assert all(torch.equal(first[k], again[k]) for k in first)


@gpu
@pytest.mark.gpu
@torch.no_grad()
def test_offsets_beyond_32_bits():
    batch, dim, seqlen = 2, 8, 1 << 28  # 2^32 elements
    u = torch.zeros(batch, dim, seqlen, dtype=torch.float16, device=DEVICE)
    u[-1, -1, -1000:] = 1
    delta = torch.full((1, 1, 1), 0.5, dtype=torch.float16, device=DEVICE).expand(batch, 1, 1)
    B = torch.ones(dim, 1, device=DEVICE)
    A = -torch.ones(dim, 1, device=DEVICE)
    part = slice(seqlen - 4096, None)
    y, last = selective_scan(u[..., part], delta.expand(batch, 1, 4096).contiguous(), A, B, B, return_last_state=True)
    copied, _ = selective_scan(
        u[..., part].contiguous(), delta.expand(batch, 1, 4096).contiguous(), A, B, B, return_last_state=True
    )
    assert torch.equal(y, copied) and last[-1, -1].item() > 0


@gpu
@pytest.mark.gpu
def test_compiles_without_a_graph_break():
    tensors = on_device(arguments(batch=2, dim=8, seqlen=100, dtype=torch.float32))
    expected = run(library, tensors, delta_softplus=True)
    actual = run(torch.compile(library, fullgraph=True), tensors, delta_softplus=True)
    assert all(torch.equal(actual[k], expected[k]) for k in expected)


@gpu
@pytest.mark.gpu
@torch.no_grad()
def test_replays_in_a_cuda_graph():
    tensors = on_device(arguments(batch=1, dim=64, seqlen=4096, dtype=torch.bfloat16))
    expected = library(**tensors, delta_softplus=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = library(**tensors, delta_softplus=True)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))
