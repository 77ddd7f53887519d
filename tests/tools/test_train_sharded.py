"""train.py with models sharded over two processes (FSDP2), and the checkpoints of which each writes a share."""

import pickle
import shutil
import signal
import zlib
from contextlib import contextmanager

import pytest
import timm
import torch
import torch.distributed as dist
from folders import full_disk
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from training_runs import CONFIGS, TORCHRUN, assert_same, finish, rows, start, wait_for
from vmamba.kernels import use_triton
from vmamba.tools.training.parallel import CPU_VERSION, blocks_of, whole
from vmamba.tools.training.sharded_checkpoint import ShardedCheckpoints
from vmamba.tools.user_errors import UserError

from vmamba.layers import residual

pytestmark = [
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split('.')[:2])) < CPU_VERSION, reason='needs FSDP2 that works on a CPU'
    ),
    pytest.mark.filterwarnings('ignore:Unable to enable fault handler'),
]


@contextmanager
def joined_alone():
    """A process group of this process alone: its mesh and itself."""
    dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh('cpu', (1,)), dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def alone():
    with joined_alone() as group:
        yield group


def test_shards_learn_as_one_process_and_resume_exactly(run_alone, tmp_path, capsys):
    # 160 images are three updates of 48 and one of 16, of which each process has 8 in two steps.
    shape = dict(depths=[1, 1], embed_dim=16)
    args = f'{CONFIGS}/lfw_vmamba_nano.yaml', '--model-args', shape, '--workers', 0, '--device', 'cpu', '--epochs', 1
    args = *args, '--warmup-epochs', 0.5, '--opt', 'sgd', '--lr', 0.05, '--clip-grad', 1.0, '--ema-decay', 0.5
    args = *args, '--layer-decay', 0.9, '--precision', 'fp32', '--channels-last'
    shards = *args, '--batch-size', 12, '--accumulate', 2, '--shard', '--log-every', 1
    one, two, broken = (tmp_path / name for name in ('one', 'two', 'broken'))
    saving = '--checkpoint-every', 1, '--keep-checkpoints', 9
    whole_run = start(*shards, *saving, '--output', two, launcher=TORCHRUN)
    run_alone(*args, '--batch-size', 48, '--output', one)
    finish(whole_run)
    for number in (1, 2):  # what a killed run leaves
        name = f'checkpoint-{number:08d}'
        shutil.copytree(two / name, broken / name)
    damage(broken / name / '__1_0.distcp')
    process = start(*shards, '--resume', '--output', broken, launcher=TORCHRUN)
    wait_for(process, 'epoch 1 update 2/4')
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)

    assert process.returncode and 'stopped by signal 15' in out
    assert f'skipped the broken checkpoint {broken / name}' in err
    with joined_alone() as group:
        checkpoints = ShardedCheckpoints(broken, 2, *group)
        ours = whole(checkpoints.load_newest(pytest.fail)[0])
        theirs = whole(checkpoints.read(two / f'checkpoint-{ours["update"]:08d}'))
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

    with pytest.raises(SystemExit):
        run_alone(*args, '--batch-size', 48, '--output', two, '--resume')
    assert 'is of a run with shard True, now False' in capsys.readouterr().err


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
        fully_shard(module, mesh=alone[0])
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
        fully_shard(module, mesh=alone[0])
    fused = []
    monkeypatch.setattr(residual, '_run_fused', lambda *args, run=residual._run_fused: fused.append(1) or run(*args))
    images = torch.randn(1, 3, 32, 32)
    for model in (plain, sharded):
        with use_triton(model is sharded):
            model(images).square().sum().backward()
    assert fused == [1]
    for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(whole(ours.grad), theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.fixture
def checkpoints(alone, tmp_path):
    return ShardedCheckpoints(tmp_path, 2, *alone)


def state_of(number, mesh):
    """A state with sharded tensors on two levels."""
    weight = torch.full((3, 50_000), float(number))
    moments = {0: {'exp_avg': distribute_tensor(weight / 2, mesh, [Shard(0)]), 'step': torch.tensor(1.0)}}
    return dict(
        state_dict={'a.weight': distribute_tensor(weight, mesh, [Shard(0)])},
        optimizer=dict(state=moments, param_groups=[{'lr': 0.1, 'params': [0]}]),
        update=number,
    )


def test_a_broken_checkpoint_is_skipped_and_the_two_newest_are_kept(checkpoints, tmp_path):
    for update in (5, 10, 15, 15):
        checkpoints.save(state_of(update, checkpoints.mesh), update)
    names = [path.name for path in checkpoints.paths()]
    assert names == ['checkpoint-00000015_1', 'checkpoint-00000015']
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    (tmp_path / names[0] / '.metadata').unlink()
    warnings = []
    state, path = checkpoints.load_newest(warnings.append)
    assert path.name == names[1] and len(warnings) == 1 and names[0] in warnings[0]
    assert_same(whole(state), whole(state_of(15, checkpoints.mesh)))
    path = checkpoints.save(state_of(16, checkpoints.mesh), 16)
    assert [path.name for path in checkpoints.paths()] == ['checkpoint-00000016', names[1]]
    (tmp_path / names[1] / 'whole.pt').write_bytes(b'')
    (path / 'whole.pt').write_bytes(b'')
    with pytest.raises(UserError, match='all 2 checkpoints'):
        checkpoints.load_newest(warnings.append)


def test_a_full_disk_leaves_the_previous_checkpoint(checkpoints, tmp_path):
    path = checkpoints.save(state_of(5, checkpoints.mesh), 5)
    (tmp_path / '.checkpoint-00000004.part').mkdir()  # of a run that was killed
    message = 'cannot write .*checkpoint-00000010: the disk took only a part of it; what was saved before'
    with full_disk(100_000), pytest.raises(UserError, match=message):
        checkpoints.save(state_of(10, checkpoints.mesh), 10)
    assert list(tmp_path.iterdir()) == [path]
    assert checkpoints.load_newest(pytest.fail)[0]['update'] == 5


def test_an_index_that_would_run_code_is_refused(checkpoints, tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, (f'open({str(tmp_path / "ran")!r}, "w")',)

    path = checkpoints.save(state_of(5, checkpoints.mesh), 5)
    (path / '.metadata').write_bytes(pickle.dumps(Evil()))
    content = torch.load(path / 'whole.pt')
    content['files']['.metadata'] = zlib.crc32((path / '.metadata').read_bytes())
    torch.save(content, path / 'whole.pt')
    warnings = []
    with pytest.raises(UserError, match='all 1 checkpoints'):
        checkpoints.load_newest(warnings.append)
    assert 'its index names builtins.exec' in warnings[0]
    assert not (tmp_path / 'ran').exists()
