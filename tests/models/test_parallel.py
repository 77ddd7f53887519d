"""Two processes that share a batch get the gradients of one that has it all: replicated (DDP) and sharded (FSDP2)."""

import os
from itertools import product

import chains
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

if os.environ.get('TRITON_INTERPRET') == '1':  # also in the processes, which know no conftest.py
    from interpreter import speed_up

    speed_up()

from vmamba.kernels import _launch, use_triton  # noqa: E402
from vmamba.models.vim import VimBlock  # noqa: E402
from vmamba.models.vmamba import VMambaBlock  # noqa: E402

pytestmark = pytest.mark.slow

PROCESSES = 2
HAS_SHARDS = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 13)  # FSDP2 that averages right without GPUs
MODELS = {
    'vmamba': ('vmamba_nano', dict(depths=(1, 1), embed_dim=8), (3, 16, 24)),
    'vim': ('vim_nano', dict(depth=2, embed_dim=16, img_size=16, d_state=2), (3, 16, 16)),
}


def model_and_images(name):
    torch.manual_seed(0)
    variant, options, shape = MODELS[name]
    return timm.create_model(variant, num_classes=5, **options), torch.randn(2 * PROCESSES, *shape)


def loss_of(model, images):
    return model(images).square().mean()


def shard(model):
    """In place, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh('cpu', (PROCESSES,))
    for module in (*(m for m in model.modules() if isinstance(m, (VimBlock, VMambaBlock))), model):
        fully_shard(module, mesh=mesh)
    return model


WRAPPERS = {'replicated': DistributedDataParallel, **({'sharded': shard} if HAS_SHARDS else {})}
CASES = [*product(MODELS, WRAPPERS, [False]), *product(['vim'] if _launch.INTERPRETED else [], WRAPPERS, [True])]


def work(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=PROCESSES)
    ran = chains.record(pytest.MonkeyPatch())
    for name, wrapper, triton_kernels in CASES:
        model, images = model_and_images(name)
        parallel = WRAPPERS[wrapper](model)
        ran.clear()
        with use_triton(triton_kernels):
            loss_of(parallel, images.chunk(PROCESSES)[rank]).backward()
        grads = {key: getattr(p.grad, 'full_tensor', lambda p=p: p.grad)() for key, p in model.named_parameters()}
        torch.save([grads, len(ran)], results / f'{name}_{wrapper}_{triton_kernels}_{rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """What all processes leave, which start once."""
    path = tmp_path_factory.mktemp('results')
    mp.spawn(work, (path / 'store', path), nprocs=PROCESSES)
    return path


@pytest.mark.skipif(not dist.is_available(), reason='needs torch.distributed')
@pytest.mark.parametrize('name,wrapper,triton_kernels', CASES)
def test_two_processes_get_the_gradients_of_one(results, name, wrapper, triton_kernels):
    model, images = model_and_images(name)
    loss_of(model, images).backward()
    for rank in range(PROCESSES):
        grads, fused = torch.load(results / f'{name}_{wrapper}_{triton_kernels}_{rank}.pt', weights_only=True)
        assert fused == (2 if triton_kernels else 0), 'on Triton both blocks run fused'
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(grads[key], parameter.grad, rtol=1e-4, atol=1e-6)
