"""Branches of residual blocks on Triton, against their definitions in float64."""

import oracles
import pytest
import torch
from cases import DEVICE
from kernel_cases import randn

from vmamba.kernels import use_triton
from vmamba.kernels.branches import (
    BiMambaBranch,
    BiMambaParameters,
    Link,
    MlpBranch,
    MlpParameters,
    SS2DBranch,
    SS2DParameters,
    can_run,
    mlp,
    run_chain,
)
from vmamba.kernels.branches.parameters import Layout, Parts, Weight, lay_out_weights, sum_parts

pytestmark = [
    pytest.mark.usefixtures('triton_kernels'),
    pytest.mark.filterwarnings('error:invalid value:RuntimeWarning'),
]


def norm_of(dim):
    return 1 + 0.3 * randn(dim), randn(dim)


def linear_of(outputs, inputs):
    return randn(outputs, inputs) * inputs**-0.5


def mlp_parameters(dim=6, hidden=20):
    return MlpParameters(*norm_of(dim), linear_of(hidden, dim), randn(hidden), linear_of(dim, hidden), randn(dim))


def ss2d_parameters(dim=6, inner=5, gated=False, bias=True, window=3, rank=2, dstate=2):
    return SS2DParameters(
        *norm_of(dim),
        in_proj_weight=linear_of(2 * inner if gated else inner, dim),
        conv_weight=randn(inner, 1, window, window),
        conv_bias=randn(inner) if bias else None,
        x_proj_weight=linear_of(4 * (rank + 2 * dstate), inner),
        dt_weight=randn(4, inner, rank) * rank**-0.5,
        dt_bias=randn(4, inner) - 2,
        A_log=randn(4, inner, dstate) * 0.5,
        D=randn(4, inner),
        out_norm_weight=1 + 0.3 * randn(inner),
        out_norm_bias=randn(inner),
        out_proj_weight=linear_of(dim, inner),
    )


def bimamba_parameters(dim=6, inner=5, width=4, rank=2, dstate=3):
    return BiMambaParameters(
        norm_weight=1 + 0.3 * randn(dim),
        in_proj_weight=linear_of(2 * inner, dim),
        conv_weight=randn(2, inner, width),
        conv_bias=randn(2, inner),
        x_proj_weight=randn(2, rank + 2 * dstate, inner) * inner**-0.5,
        dt_weight=randn(2, inner, rank) * rank**-0.5,
        dt_bias=randn(2, inner) - 2,
        A_log=randn(2, inner, dstate) * 0.5,
        D=randn(2, inner),
        out_proj_weight=linear_of(dim, inner),
    )


def define_mlp(x, branch, p):
    hidden = oracles.layer_norm(x, p.norm_weight, p.norm_bias, branch.norm_eps) @ p.fc1_weight.T + p.fc1_bias
    return oracles.gelu(hidden) @ p.fc2_weight.T + p.fc2_bias


def define_ss2d(x, branch, p):
    projected = oracles.layer_norm(x, p.norm_weight, p.norm_bias, branch.norm_eps) @ p.in_proj_weight.T
    inner = p.out_proj_weight.shape[1]
    u = oracles.depthwise_conv2d(projected[..., :inner], p.conv_weight[:, 0], p.conv_bias, activation='silu')
    norm = p.out_norm_weight, p.out_norm_bias, branch.out_norm_eps
    y = oracles.ss2d_core(u, p.x_proj_weight, p.dt_weight, p.dt_bias, -torch.exp(p.A_log), p.D, *norm)
    if projected.shape[-1] > inner:
        y = y * oracles.silu(projected[..., inner:])
    return y @ p.out_proj_weight.T


def define_bimamba(x, branch, p):
    xz = oracles.rms_norm(x, p.norm_weight, branch.norm_eps) @ p.in_proj_weight.T
    core = p.conv_weight, p.conv_bias, p.x_proj_weight, p.dt_weight, p.dt_bias, -torch.exp(p.A_log), p.D
    return oracles.bimamba_core(xz, *core) @ p.out_proj_weight.T


DEFINITIONS = {MlpBranch: define_mlp, SS2DBranch: define_ss2d, BiMambaBranch: define_bimamba}
MLP, SS2D, BIMAMBA = MlpBranch(1e-3), SS2DBranch(1e-3, 1e-4), BiMambaBranch(1e-3)
HALF_ERROR = 1e-2  # of sums over few pixels, with products in fp16
FACTORS = torch.tensor([1.5, 0.0])  # of the samples, as stochastic depth draws them

MAP, TOKENS = (2, 2, 3), (2, 7)
CHAINS = {
    'mlp': (MAP, lambda: [Link(MLP, mlp_parameters())]),
    'ss2d': (MAP, lambda: [Link(SS2D, ss2d_parameters())]),
    'ss2d-gated-without-bias': (MAP, lambda: [Link(SS2D, ss2d_parameters(gated=True, bias=False, dstate=1))]),
    'ss2d-wide-window': (MAP, lambda: [Link(SS2D, ss2d_parameters(window=5, rank=1, dstate=3))]),
    'bimamba': (TOKENS, lambda: [Link(BIMAMBA, bimamba_parameters())]),
    'bimamba-of-odd-sizes': (TOKENS, lambda: [Link(BIMAMBA, bimamba_parameters(7, 9, width=2, rank=3, dstate=5))]),
    'dropped': (MAP, lambda: [Link(MLP, mlp_parameters(), FACTORS)]),
    'block': (MAP, lambda: [Link(SS2D, ss2d_parameters(), FACTORS), Link(MLP, mlp_parameters(), FACTORS.flip(0))]),
    'plain-after-dropped': (
        TOKENS,
        lambda: [Link(BIMAMBA, bimamba_parameters(), FACTORS), Link(MLP, mlp_parameters())],
    ),
    'three': (
        MAP,
        lambda: [Link(MLP, mlp_parameters()), Link(MLP, mlp_parameters(), FACTORS), Link(SS2D, ss2d_parameters())],
    ),
}


def define(x, links):
    for branch, p, scale in links:
        y = DEFINITIONS[type(branch)](x, branch, p)
        x = x + (y if scale is None else y * scale.double().view(-1, *[1] * (x.ndim - 1)))
    return x


def place(links, dtype=torch.float32, device=DEVICE):
    """Links with leaves in another dtype."""

    def leaf(t):
        return None if t is None else t.detach().to(device, dtype).requires_grad_()

    return [
        Link(branch, type(p)(*map(leaf, p)), None if scale is None else scale.to(device)) for branch, p, scale in links
    ]


def run(function, x, links):
    """The output and all gradients by name, on the CPU."""
    x = x.detach().requires_grad_()
    out = function(x, links)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.double() * weights.to(out.device)).sum().backward()
    grads = {
        f'{i}.{name}': t.grad
        for i, link in enumerate(links)
        for name, t in link.parameters._asdict().items()
        if t is not None
    }
    return {k: t.detach().cpu() for k, t in {'out': out, 'x': x.grad, **grads}.items()}


def fused(dtype):
    return lambda x, links: run_chain(x, links, dtype)


@pytest.mark.parametrize('chain', CHAINS)
def test_results_and_gradients(chain):
    shape, make = CHAINS[chain]
    links = make()
    x = randn(*shape, 6 if chain != 'bimamba-of-odd-sizes' else 7)
    expected = run(define, x, place(links, torch.float64, 'cpu'))
    actual = run(fused(torch.float32), x.float().to(DEVICE), place(links))
    oracles.assert_all_match(actual, expected, torch.float32)


@pytest.mark.parametrize('chain', ['block', 'bimamba'])
@pytest.mark.parametrize('stream', [torch.float32, torch.float16], ids=str)
def test_products_in_half_precision(chain, stream):
    """As under autocast: parameters and their gradients in fp32, and the stream in a dtype of its own."""
    shape, make = CHAINS[chain]
    links = make()
    x = randn(*shape, 6).to(stream)
    expected = run(define, x.double(), place(links, torch.float64, 'cpu'))
    actual = run(fused(torch.float16), x.to(DEVICE), place(links))
    assert all(t.dtype == (stream if name in ('out', 'x') else torch.float32) for name, t in actual.items())
    for name in expected:
        assert oracles.relative_error(actual[name], expected[name]) < HALF_ERROR, name


@pytest.mark.parametrize('stream', [torch.float32, torch.float16], ids=str)
def test_a_hidden_map_on_the_chip(stream, monkeypatch):
    """Of few channels in half precision, by a kernel for all of the MLP; with the sum of the branch before."""
    launched = []
    run_kernel = mlp._run_kernel
    monkeypatch.setattr(mlp, '_run_kernel', lambda *arguments: launched.append(1) or run_kernel(*arguments))
    links = [
        Link(SS2D, ss2d_parameters(48, 6), FACTORS),
        Link(MLP, mlp_parameters(48, 64), FACTORS.flip(0)),
        Link(MLP, mlp_parameters(48, 64)),
    ]
    x = randn(*MAP, 48).to(stream)
    expected = run(define, x.double(), place(links, torch.float64, 'cpu'))
    actual = run(fused(torch.float16), x.to(DEVICE), place(links))
    assert launched == [1, 1]
    for name in expected:
        assert oracles.relative_error(actual[name], expected[name]) < HALF_ERROR, name


@pytest.mark.parametrize('chain', ['block', 'plain-after-dropped'])
def test_inference_gives_the_same(chain):
    shape, make = CHAINS[chain]
    links, x = place(make()), randn(*shape, 6).float().to(DEVICE)
    expected = run_chain(x, links, torch.float32)
    assert expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            actual = run_chain(x, links, torch.float32)
        assert not actual.requires_grad
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-5, atol=1e-5)


def test_an_mlp_in_slices_gives_the_same(monkeypatch):
    links, x = place([Link(MLP, mlp_parameters())]), randn(*MAP, 6).float().to(DEVICE)
    with torch.no_grad():
        expected = run_chain(x, links, torch.float32)
        monkeypatch.setattr(mlp, '_HIDDEN_BYTES', 5 * 20 * 4)  # of five rows
        torch.testing.assert_close(run_chain(x, links, torch.float32), expected)


def test_two_runs_are_equal_bit_by_bit():
    shape, make = CHAINS['block']
    links, x = make(), randn(*shape, 6).float().to(DEVICE)
    first, second = (run(fused(torch.float32), x, place(links)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_gradient_alone():
    """Frozen parameters change nothing in the others' gradients."""
    shape, make = CHAINS['block']
    links, x = make(), randn(*shape, 6).float().to(DEVICE)
    expected = run(fused(torch.float32), x, place(links))
    frozen = place(links)
    for link in frozen:
        for t in link.parameters:
            t.requires_grad_(False)
    wanted = frozen[0].parameters.dt_weight.requires_grad_()
    out = run_chain(x, frozen, torch.float32)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.double() * weights.to(DEVICE)).sum().backward()
    torch.testing.assert_close(wanted.grad.cpu(), expected['0.dt_weight'])


def test_inputs_are_left_alone():
    shape, make = CHAINS['block']
    links, x = place(make()), randn(*shape, 6).float().to(DEVICE)
    before = [t.clone() for t in (x, *links[0].parameters, *links[1].parameters)]
    run(fused(torch.float32), x, links)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *links[0].parameters, *links[1].parameters)))


def test_gradients_of_gradients_are_an_error():
    links = place([Link(MLP, mlp_parameters())])
    x = randn(*MAP, 6).float().to(DEVICE).requires_grad_()
    (grad,) = torch.autograd.grad(run_chain(x, links, torch.float32).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


def test_where_a_chain_runs():
    x = torch.zeros(2, 3, device=DEVICE)
    assert can_run(x) and can_run(torch.nn.Parameter(x))
    assert can_run(x.half()) and not can_run(x.double())
    assert not can_run(x[:0])
    assert not can_run(x.as_subclass(type('Quantised', (torch.Tensor,), {})))
    with use_triton(False):
        assert not can_run(x)
    with torch.autograd.forward_ad.dual_level():
        assert not can_run(x)
    assert not torch.func.vmap(lambda x: torch.tensor(can_run(x)))(x).any()


def test_weights_are_laid_out_at_once():
    weights = [
        Weight(torch.randn(3, 5)),
        Weight(torch.randn(2, 4, 3), Layout((2, 8, 3), 1, 1, 4)),  # rows 1 to 3 begin at row 4
        Weight(torch.randn(2, 3, 2), Layout((2, 3, 4), 2, 2, 4)),
        Weight(torch.randn(4, 2), log_A=True),
        Weight(torch.randn(7)),
    ]
    weights = [weight._replace(weight=weight.weight.to(DEVICE)) for weight in weights]
    same, rows, columns, A, vector = (t.cpu() for t in lay_out_weights(weights, torch.float16))
    given = [weight.weight.cpu() for weight in weights]
    assert torch.equal(same, given[0].half()) and torch.equal(vector, given[4].half())
    expected = torch.zeros(2, 8, 3)
    expected[:, 0], expected[:, 4:7] = given[1][:, 0], given[1][:, 1:]
    assert torch.equal(rows, expected.half())
    assert torch.equal(columns, torch.nn.functional.pad(given[2], (0, 2)).half())
    assert A.dtype == torch.float32
    torch.testing.assert_close(A, -torch.exp(given[3]))


def test_weights_that_are_laid_out_already_are_returned_themselves():
    weight = torch.randn(3, 5, device=DEVICE)
    (same,) = lay_out_weights([Weight(weight)], torch.float32)
    assert same is weight
    same, cast = lay_out_weights([Weight(weight), Weight(weight.half())], torch.float32)
    assert same is weight and torch.equal(cast, weight.half().float())


def test_parts_are_summed_up_at_once():
    sizes = [(1, 3), (70, 33), (5, 2)]
    arrays = [torch.randn(*size, device=DEVICE) for size in sizes]
    a, b, c, d = sum_parts(
        [
            Parts(arrays[0], ('a',), ((3,),)),
            Parts(arrays[1], ('b', 'c'), ((4, 8), (1,))),
            Parts(arrays[2], ('d',), ((2,),)),
        ]
    )
    expected = [array.double().sum(dim=0).float() for array in arrays]
    torch.testing.assert_close(a, expected[0])
    torch.testing.assert_close(b, expected[1][:32].view(4, 8))
    torch.testing.assert_close(c, expected[1][32:])
    torch.testing.assert_close(d, expected[2])
    assert len({t.untyped_storage().data_ptr() for t in (a, b, c, d)}) == 1
