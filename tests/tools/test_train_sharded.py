"""train.py with models sharded over two processes (FSDP2), whose checkpoints one process can resume."""

import shutil
import signal

import pytest
import timm
import torch
import torch.distributed as dist
from forked import two_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_runs import CONFIGS, TORCHRUN, assert_same, finish, newest, rows, start, wait_for

from vmamba.kernels import use_triton
from vmamba.layers import residual
from vmamba.tools import train
from vmamba.tools.training.parallel import CPU_VERSION, blocks_of, whole

pytestmark = [
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split('.')[:2])) < CPU_VERSION, reason='needs FSDP2 that works on a CPU'
    ),
    pytest.mark.filterwarnings('ignore:Unable to enable fault handler'),
]


@pytest.fixture
def alone():
    """The mesh of this process alone."""
    dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh('cpu', (1,))
    dist.destroy_process_group()


def test_shards_learn_as_one_process_and_resume_exactly(run_alone, tmp_path, capsys):
    # 160 images are three updates of 48 and one of 16, of which each process has 8 in two steps.
    shape = dict(depths=[1, 1], embed_dim=16)
    args = f'{CONFIGS}/lfw_vmamba_nano.yaml', '--model-args', shape, '--workers', 0, '--device', 'cpu', '--epochs', 1
    args = *args, '--warmup-epochs', 0.5, '--opt', 'sgd', '--lr', 0.05, '--clip-grad', 1.0, '--ema-decay', 0.5
    args = *args, '--layer-decay', 0.9, '--precision', 'fp32', '--channels-last'
    shards = *args, '--batch-size', 12, '--accumulate', 2, '--shard', '--log-every', 1
    one, two, broken, single = (tmp_path / name for name in ('one', 'two', 'broken', 'single'))
    saving = '--checkpoint-every', 1, '--keep-checkpoints', 9
    run_alone(*args, '--batch-size', 48, '--output', one)
    with two_processes(train.main, *shards, *saving, '--output', two) as processes:
        for process in processes:
            finish(process)
    for folder in (broken, single):
        folder.mkdir()
        for number in (1, 2):  # what a killed run leaves
            name = f'checkpoint-{number:08d}.pt'
            shutil.copy(two / name, folder / name)
    damage(broken / name)
    process = start(*shards, '--resume', '--output', broken, launcher=TORCHRUN)
    wait_for(process, 'epoch 1 update 2/4')
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)

    assert process.returncode and 'stopped by signal 15' in out
    assert f'skipped the broken checkpoint {broken / name}' in err
    ours = newest(broken)
    theirs = torch.load(two / f'checkpoint-{ours["update"]:08d}.pt', weights_only=True)
    assert ours['update'] > 1
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'sums', 'update', 'position'):
        assert_same(ours[key], theirs[key])

    assert rows(two) == [pytest.approx(row, rel=1e-4) for row in rows(one)]
    ours, theirs = (torch.load(folder / 'best.pt', weights_only=True) for folder in (two, one))
    assert ours['averaged'] is theirs['averaged']
    for (name, value), (expected_name, expected) in zip(
        ours['state_dict'].items(), theirs['state_dict'].items(), strict=True
    ):
        assert name == expected_name and type(value) is torch.Tensor
        assert torch.allclose(value, expected, rtol=1e-3, atol=1e-4), name
    overlay = dict(file=str(two / 'best.pt'))
    model = timm.create_model('vmamba_nano', num_classes=2, pretrained=True, pretrained_cfg_overlay=overlay, **shape)
    assert torch.equal(model.head.fc.weight, ours['state_dict']['head.fc.weight'])

    run_alone(*args, '--batch-size', 48, '--output', single, '--resume')
    assert f'resumed from {single}/checkpoint-00000002.pt' in capsys.readouterr().out
    for ours, theirs in zip(newest(single)['state_dict'].values(), newest(one)['state_dict'].values(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def damage(path):
    """Changes a byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize('recomputed', [False, True], ids=['kept', 'recomputed'])
@pytest.mark.parametrize('name', ['vmamba_nano', 'vim_nano', 'test_vit'])
def test_blocks_are_sharded_and_compute_the_same(alone, name, recomputed):
    args = dict(drop_path_rate=0.5, num_classes=7)
    small = {'vmamba_nano': dict(depths=(1, 2), embed_dim=16), 'vim_nano': dict(depth=2, embed_dim=32)}
    plain = timm.create_model(name, **args, **small.get(name, {}))
    sharded = timm.create_model(name, **args, **small.get(name, {}))
    sharded.load_state_dict(plain.state_dict())
    images = torch.randn(3, *plain.pretrained_cfg['input_size'])
    blocks = blocks_of(sharded)
    assert len(blocks) == {'vmamba_nano': 3, 'vim_nano': 2, 'test_vit': 6}[name]
    for module in (*blocks, sharded):
        fully_shard(module, mesh=alone)
    for model in (plain, sharded):
        model.set_grad_checkpointing(recomputed)
        for _ in range(2):
            torch.manual_seed(1)
            model(images).square().mean().backward()
    for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(whole(ours.grad), theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings('error:.* returned a view')  # which nothing after a block could change in place
@pytest.mark.parametrize('name', ['vmamba_nano', 'vim_nano'])
def test_sharded_blocks_run_on_the_fused_kernels(alone, monkeypatch, name):
    small = {'vmamba_nano': dict(depths=(1,), embed_dim=16), 'vim_nano': dict(depth=1, embed_dim=16, img_size=32)}
    plain, sharded = (timm.create_model(name, num_classes=2, **small[name]) for _ in range(2))
    sharded.load_state_dict(plain.state_dict())
    for module in (*blocks_of(sharded), sharded):
        fully_shard(module, mesh=alone)
    fused = []
    monkeypatch.setattr(residual, '_run_fused', lambda *args, run=residual._run_fused: fused.append(1) or run(*args))
    images = torch.randn(1, 3, 32, 32)
    for model in (plain, sharded):
        with use_triton(model is sharded):
            model(images).square().sum().backward()
    assert fused == [1]
    for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(whole(ours.grad), theirs.grad, rtol=1e-4, atol=1e-5)
