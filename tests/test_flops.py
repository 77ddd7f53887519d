"""Operation counts: the official tables to the digit, and PyTorch's counter."""

import pytest
import timm
import torch
from cases import BACKENDS, DEVICE, needs_triton
from torch.utils.flop_counter import FlopCounterMode

from vmamba.flops import count_macs
from vmamba.kernels import bidirectional_scan, selective_scan, ss2d_core, ss2d_scan, use_triton

pytest.importorskip('fvcore')
pytestmark = pytest.mark.filterwarnings('ignore')

OFFICIAL = [
    # name, 10^9 multiply-adds as printed
    ('vmamba_t', '4.905610'),
    ('vmamba_s', '8.715775'),
    ('vmamba_b', '15.358944'),
    ('vmamba_t_s2l5', '4.857742'),
    ('vmamba_s_s1l20', '8.612211'),
    ('vmamba_b_s1l20', '15.220860'),
    ('vmamba_t_v0', '5.627'),
    ('vmamba_s_v0', '11.232'),
    ('vmamba_b_v0', '18.020'),
]


@pytest.mark.parametrize('name,printed', OFFICIAL, ids=[name for name, _ in OFFICIAL])
def test_the_official_counts(name, printed):
    """By small images and shallow models: without classifier the count is linear in the pixels, and in the blocks of
    the deepest stage. Weights do not matter."""
    whole = timm.create_model(name, device='meta')
    *first, deep, last = (len(stage.blocks) for stage in whole.stages)
    shallow = [timm.create_model(name, depths=(*first, i, last), num_classes=0, device='meta') for i in (1, 2)]
    one, two = (count_macs(model.to_empty(device='cpu'), (3, 32, 32)) for model in shallow)
    macs = 7 * 7 * (one + (deep - 1) * (two - one)) + whole.num_features * whole.num_classes
    assert f'{macs / 1e9:.{len(printed.split(".")[1])}f}' == printed


def test_a_whole_model_of_the_official_tables():
    assert f'{count_macs(timm.create_model("vmamba_t")) / 1e9:.6f}' == OFFICIAL[0][1]


@needs_triton
@pytest.mark.parametrize('d_state', [1, 2])
def test_the_count_does_not_depend_on_the_kernels(d_state):
    model = timm.create_model('vmamba_nano', depths=(1,), embed_dim=8, d_state=d_state).to(DEVICE)
    counts = []
    for triton_kernels in (False, True):
        with use_triton(triton_kernels):
            counts.append(count_macs(model, (3, 12, 8)))
    assert counts[0] == counts[1]


def vim_macs(dim, depth, grid, patch, classes):
    """Counted by hand for a Vim of N = 16: linear layers, convolutions and scans of L = grid + 1 tokens."""
    inner, rank, tokens = 2 * dim, -(-dim // 16), grid + 1
    direction = inner * 4 + inner * (rank + 32) + inner * rank + inner * (9 * 16 + 1)
    block = dim * 2 * inner + 2 * direction + inner * dim
    return grid * dim * 3 * patch**2 + depth * tokens * block + dim * classes


def test_vim_by_hand():
    options = dict(img_size=32, patch_size=4, depth=2, embed_dim=32, num_classes=5)
    counted = count_macs(timm.create_model('vim_t', **options), (3, 32, 32))
    expected = vim_macs(32, 2, 64, 4, 5)
    assert expected <= counted <= 1.05 * expected, 'norms may come on top'


@pytest.mark.parametrize('training', [False, True])
def test_counting_leaves_the_model_as_it_was(training):
    model = timm.create_model('vmamba_nano', depths=(1, 1), embed_dim=16).train(training)
    count_macs(model, (3, 40, 24))
    assert model.training == training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('channels', [3, 4], ids=['counted', 'refused'])
def test_counting_leaves_frozen_parts_as_they_were(channels):
    model = timm.create_model('vmamba_nano', depths=(1, 1), embed_dim=16).train()
    model.stem.eval()
    modes = [module.training for module in model.modules()]
    if channels == 3:
        count_macs(model, (3, 40, 24))
    else:
        with pytest.raises(ValueError, match='got 4'):
            count_macs(model, (4, 40, 24))
    assert [module.training for module in model.modules()] == modes


def test_the_count_follows_the_image():
    model = timm.create_model('vmamba_nano', depths=(1, 1), embed_dim=16, num_classes=0)
    assert count_macs(model, (3, 64, 32)) == 2 * count_macs(model, (3, 32, 32))


def flops(function, *tensors, backward=False):
    tensors = [t.requires_grad_(backward) for t in tensors]
    with FlopCounterMode(display=False) as counter:
        y = function(*tensors)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


def ss2d_arguments(batch, height, width, dim, dstate, rank, routes=4):
    shapes = (
        (batch, height, width, dim),
        (batch, height, width, routes, rank + 2 * dstate),
        (routes, dim, rank),
        (routes, dim),
        (routes, dim, dstate),
        (routes, dim),
    )
    return [torch.randn(shape) for shape in shapes]


@pytest.mark.parametrize('triton_kernels', BACKENDS)
@pytest.mark.parametrize('batch,height,width,dim,dstate,rank', [(2, 3, 5, 7, 1, 2), (1, 4, 1, 3, 3, 1)])
def test_pytorchs_counter_knows_ss2d(batch, height, width, dim, dstate, rank, triton_kernels):
    """And leaves out the norm."""
    args = [t.to(DEVICE) for t in ss2d_arguments(batch, height, width, dim, dstate, rank)]
    norm = [torch.ones(dim, device=DEVICE), torch.zeros(dim, device=DEVICE)]
    pixels = batch * height * width
    macs = pixels * 4 * dim * (9 * dstate + 1 + rank)
    with use_triton(triton_kernels):
        assert flops(ss2d_scan, *args) == 2 * macs
        assert flops(ss2d_scan, *args, backward=True) == 4 * 2 * macs
        x, x_dbl, *parameters = args
        projection = torch.randn(x_dbl[0, 0, 0].numel(), dim, device=DEVICE)
        projection_macs = pixels * projection.numel()
        assert flops(ss2d_core, x, projection, *parameters, *norm) == 2 * (macs + projection_macs)
        assert flops(ss2d_core, x, projection, *parameters, *norm, backward=True) == 2 * (
            4 * macs + 3 * projection_macs
        )


def test_pytorchs_counter_knows_the_bidirectional_scan():
    u, x_dbl, *parameters = ss2d_arguments(2, 1, 11, 6, 3, 2, routes=2)
    u = u[:, 0].unsqueeze(2).repeat(1, 1, 2, 1)
    macs = 2 * 11 * 2 * 6 * (9 * 3 + 1 + 2)
    assert flops(bidirectional_scan, u, x_dbl[:, 0], *parameters) == 2 * macs


@pytest.mark.parametrize('skip,gate', [(False, False), (True, False), (True, True)])
def test_pytorchs_counter_knows_the_selective_scan(skip, gate):
    u, delta, z = torch.randn(2, 6, 11), torch.rand(2, 6, 11), torch.randn(2, 6, 11)
    A, B, C, D = -torch.rand(6, 3), torch.randn(2, 3, 11), torch.randn(2, 3, 11), torch.randn(6)

    def scan(u):
        return selective_scan(u, delta, A, B, C, D if skip else None, z if gate else None)

    assert flops(scan, u) == 2 * 2 * 6 * 11 * (9 * 3 + skip + gate)


def test_pytorchs_counter_counts_a_whole_model_on_the_meta_device():
    """Twice the multiply-adds, without norms and pooling."""
    model = timm.create_model('vmamba_t', device='meta').eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device='meta'))
    assert 0.98 < counter.get_total_flops() / 2 / 4.905610e9 < 1
