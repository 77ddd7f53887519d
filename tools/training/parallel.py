"""How the processes of a run share the work: by copies of the model, or by shards of it (PyTorch's FSDP2)."""

from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Iterator, List, Union

import torch
import torch.distributed as dist
from timm.task import TrainingTask
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from vmamba.tools.user_errors import UserError

from .checkpoint import Checkpoints
from .config import Config
from .runtime import Runtime
from .sharded_checkpoint import ShardedCheckpoints

CPU_VERSION = (2, 13)  # of PyTorch, from which on FSDP2 is known to average right without GPUs


class Copies:
    """Every process holds all weights; those of several average their gradients (DistributedDataParallel).

    Args:
        config: Settings.
        task: Model, moving average and loss; changed in place.
        runtime: Place among the processes.
    """

    saves_alone = True  # the first process can write a checkpoint without the others

    def __init__(self, config: Config, task: TrainingTask, runtime: Runtime) -> None:
        self.task, self.runtime = task, runtime
        self.saves = runtime.is_primary  # whether this process takes part in writing checkpoints
        if config.compile:
            task.compile()
        if runtime.world > 1:
            task.eval_model = task.get_eval_model()  # not the wrapper, which might wait for the others
            device_ids = [runtime.device.index] if runtime.device.type == 'cuda' else None
            # Gradients are averaged where they lie instead of being copied there and back.
            task.prepare_distributed(device_ids=device_ids, gradient_as_bucket_view=True)

    def no_sync(self) -> AbstractContextManager:
        """Gradients of what runs inside stay in this process until those of a later step are averaged."""
        return self.task.no_sync()

    def eval_models(self) -> List[nn.Module]:
        """The model, and its moving average if there is one, for as many batches as each process has."""
        averages = [self.task.get_eval_model(ema=True)] if self.task.has_ema() else []
        return [self.task.get_eval_model(), *averages]

    def stop_signal(self, own: int) -> int:
        """The signal for which this process should save and stop, 0 for none.

        Args:
            own: The signal that it received.
        """
        return own if self.runtime.is_primary else 0

    def checkpoints(self, folder: Path, keep: int) -> Checkpoints:
        return Checkpoints(folder, keep)


class Shards:
    """Every process holds a share of the weights, gradients, moments and moving average (FSDP2).

    The weights of a block are gathered for its forward and its backward pass. They stay fp32: a policy of mixed
    precision would round the norms, A and D too, whereas autocast rounds what it rounds without shards.

    Args:
        config: Settings.
        task: Model, moving average and loss; changed in place.
        runtime: Place among the processes.
    """

    saves_alone = False

    def __init__(self, config: Config, task: TrainingTask, runtime: Runtime) -> None:
        self.task, self.saves = task, True
        # FSDP2 takes weights of no other format; convolutions follow that of the images.
        self.model = task.get_trainable_module().to(memory_format=torch.contiguous_format)
        self.skeleton = _without_weights(self.model)
        self.mesh = init_device_mesh(runtime.device.type, (runtime.world,))
        self.group = dist.new_group(backend='gloo')  # for decisions, which so do not wait for the GPU
        for block in blocks_of(self.model):
            if config.compile:
                block.compile()
            fully_shard(block, mesh=self.mesh)
        fully_shard(self.model, mesh=self.mesh)
        if task.has_ema():
            shards = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            task.get_trainable_module(ema=True).module.load_state_dict(shards, assign=True)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of what runs inside stay in this process until those of a later step are averaged."""
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def eval_models(self) -> List[nn.Module]:
        """Whole copies: to gather each block for each batch, all would have to have as many batches."""
        states = [self.task.get_checkpoint_state()['state_dict']]
        if self.task.has_ema():
            states.append(self.task.get_checkpoint_state(ema=True)['state_dict_ema'])
        models = [deepcopy(self.skeleton) for _ in states]
        for model, state in zip(models, states, strict=True):
            model.load_state_dict(whole(state), assign=True)
        return models

    def stop_signal(self, own: int) -> int:
        """A signal that any of the processes received: all have to save after the same update."""
        signal = torch.tensor(own)
        dist.all_reduce(signal, dist.ReduceOp.MAX, group=self.group)
        return int(signal)

    def checkpoints(self, folder: Path, keep: int) -> ShardedCheckpoints:
        return ShardedCheckpoints(folder, keep, self.mesh, self.group)


Parallel = Union[Copies, Shards]


def distribute(config: Config, task: TrainingTask, runtime: Runtime) -> Parallel:
    """Compiles the model of a task if asked for, and shares it out; its parameters may be others afterwards."""
    return (Shards if config.shard else Copies)(config, task, runtime)


def check_sharding(config: Config, runtime: Runtime) -> None:
    """Raises UserError if the model is to be sharded and cannot be."""
    if not config.shard:
        return
    if runtime.world == 1:
        raise UserError('shard shares the weights out among processes: start several by torchrun, or leave it out')
    check_version(runtime.device.type)


def check_version(device: str) -> None:
    """Raises UserError if this PyTorch cannot shard on a type of device."""
    version = tuple(map(int, torch.__version__.split('.')[:2]))
    if device == 'cpu' and version < CPU_VERSION:
        needed = '.'.join(map(str, CPU_VERSION))
        raise UserError(f'sharding needs GPUs, or PyTorch {needed} on a CPU; this is {torch.__version__}')


def blocks_of(model: nn.Module) -> List[nn.Module]:
    """The blocks of a model, as timm's models name them, inner ones first.

    The weights of each are gathered together; the model itself takes what they leave.
    """
    lists = [module for name, module in model.named_modules() if name.rpartition('.')[2] == 'blocks']
    return [block for parent in reversed(lists) for block in parent.children()]


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy for evaluation whose parameters have no data yet."""
    copy = deepcopy(model).eval()
    for module in copy.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.to('meta'), requires_grad=False))
    return copy


def whole(value: Any) -> Any:
    """A tensor, or a dictionary of any depth, with sharded tensors gathered; all processes have to call it."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return value.full_tensor() if isinstance(value, DTensor) else value
