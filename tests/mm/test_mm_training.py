"""Training through mmengine: in two processes, and resumed after an interruption."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mm_cases import ROOT, batch_for, small_config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

PROCESSES = 2
CONFIGS = {
    'vmamba': ROOT / 'configs/segmentation/vmamba-t_upernet_8xb2-amp-160k_ade20k-512x512.py',
    'vim': ROOT / 'configs/segmentation/vim-t_upernet_4xb8-amp-60k_ade20k-512x512.py',
}


def plain_config(name):
    """Nothing random in a step, and no statistics over the batch."""
    config = small_config(CONFIGS[name])
    config.model.backbone.drop_path_rate = 0.0
    for head in (config.model.decode_head, config.model.auxiliary_head):
        head.update(dropout_ratio=0.0, norm_cfg=dict(type='GN', num_groups=2))
    config.optim_wrapper = {k: v for k, v in config.optim_wrapper.items() if k not in ('dtype', 'loss_scale')}
    config.optim_wrapper.type = 'OptimWrapper'
    return config


def build(config):
    torch.manual_seed(0)
    init_default_scope('mmseg')
    model = MODELS.build(config.model)
    return model, batch_for(model, [(72, 104)] * 2 * PROCESSES)


def gradients(model, batch):
    """The gradients with which a training step of mmengine's calls the optimizer."""
    wrapper, grads = build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=0.1))), {}

    def keep(*_):
        grads.update({name.removeprefix('module.'): p.grad.clone() for name, p in model.named_parameters()})

    wrapper.optimizer.register_step_pre_hook(keep)
    model.train_step(batch, wrapper)
    return grads


def work(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=PROCESSES)
    for name in CONFIGS:
        model, batch = build(plain_config(name))
        share = {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}
        torch.save(gradients(MMDistributedDataParallel(model), share), results / f'{name}_{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason='needs torch.distributed')
def test_two_processes_get_the_gradients_of_one(tmp_path):
    # Forks, which saves importing mmseg again.
    mp.start_processes(work, (tmp_path / 'store', tmp_path), nprocs=PROCESSES, start_method='fork')
    for name in CONFIGS:
        expected = gradients(*build(plain_config(name)))
        assert all(grad.count_nonzero() for grad in expected.values())
        for rank in range(PROCESSES):
            grads = torch.load(tmp_path / f'{name}_{rank}.pt', weights_only=True)
            assert grads.keys() == expected.keys()
            for key, grad in grads.items():
                torch.testing.assert_close(grad, expected[key], rtol=1e-3, atol=1e-6)


class Images(torch.utils.data.Dataset):
    def __init__(self, model):
        torch.manual_seed(1)
        self.batch = batch_for(model, [(72, 104)] * 6)

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {key: value[index] for key, value in self.batch.items()}


def train(config, work_dir, iterations, resume=False):
    torch.manual_seed(0)
    init_default_scope('mmseg')
    model = MODELS.build(config.model)
    warmup, decay = config.param_scheduler
    runner = Runner(
        model,
        str(work_dir),
        train_dataloader=dict(
            batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True), dataset=Images(model)
        ),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iterations),
        optim_wrapper=config.optim_wrapper,
        param_scheduler=[{**warmup, 'end': 3}, {**decay, 'begin': 3, 'end': 8}],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=3)),
        default_scope='mmseg',
        randomness=dict(seed=0),
        resume=resume,
        experiment_name=f'{work_dir.name}_{iterations}_{resume}',
    )
    runner.train()
    return runner


@pytest.mark.parametrize('name', CONFIGS)
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(name, tmp_path):
    config = plain_config(name)
    whole = train(config, tmp_path / 'whole', 6)
    train(config, tmp_path / 'parts', 3)
    resumed = train(config, tmp_path / 'parts', 6, resume=True)
    assert resumed.iter == 6
    weights, other = whole.model.state_dict(), resumed.model.state_dict()
    for key, value in weights.items():
        assert torch.equal(other[key], value), key
    states = [runner.optim_wrapper.optimizer.state_dict() for runner in (whole, resumed)]
    assert [g['lr'] for g in states[0]['param_groups']] == [g['lr'] for g in states[1]['param_groups']]
    for i, moments in states[0]['state'].items():
        for key, value in moments.items():
            assert torch.equal(states[1]['state'][i][key], value)
    at_three = torch.load(tmp_path / 'parts' / 'iter_3.pth', weights_only=False)['state_dict']
    changed = [key for key in weights if not torch.equal(at_three[key], weights[key])]
    assert len(changed) > len(weights) / 2


def test_a_runners_checkpoint_is_a_pretrained_one(tmp_path):
    config = plain_config('vmamba')
    trained = train(config, tmp_path, 3).model.backbone
    config.model.backbone.pretrained = str(tmp_path / 'iter_3.pth')
    backbone = MODELS.build(config.model.backbone)
    backbone.init_weights()
    for key, value in trained.model.state_dict().items():
        assert torch.equal(backbone.model.state_dict()[key], value), key
