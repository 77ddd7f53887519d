"""Two processes that share a batch get the gradients of one that has it all."""

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import vmamba  # noqa: F401  registers the models

PROCESSES = 2


def model_and_images(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, drop_path_rate=0.0)
    return model, torch.randn(2 * PROCESSES, *model.default_cfg['input_size'])


def loss_of(model, images):
    return model(images).square().mean()


def work(rank, name, store, results):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=PROCESSES)
    model, images = model_and_images(name)
    parallel = DistributedDataParallel(model)
    loss_of(parallel, images.chunk(PROCESSES)[rank]).backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, results / f'{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason='needs torch.distributed')
@pytest.mark.parametrize('name', ['vmamba_nano', 'vim_nano'])
def test_two_processes_get_the_gradients_of_one(name, tmp_path):
    mp.spawn(work, (name, tmp_path / 'store', tmp_path), nprocs=PROCESSES)
    model, images = model_and_images(name)
    loss_of(model, images).backward()
    for rank in range(PROCESSES):
        grads = torch.load(tmp_path / f'{rank}.pt', weights_only=True)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)
