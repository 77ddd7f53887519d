"""The model in several processes: copies of it (DDP) or shards of it (PyTorch's FSDP2)."""

from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import Any, Dict, Iterator, List, Union

import torch
import torch.distributed as dist
from timm.task import TrainingTask
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from vmamba.tools.user_errors import UserError

from .config import Config
from .runtime import Runtime

CPU_VERSION = (2, 13)  # of PyTorch, from which on FSDP2 is known to average right without GPUs


class Copies:
    """Every process holds all weights; those of several average their gradients (DistributedDataParallel)."""

    saves_alone = True  # the first process can write a checkpoint without the others

    def __init__(self, config: Config, task: TrainingTask, runtime: Runtime) -> None:
        self.task, self.runtime = task, runtime
        if config.compile:
            task.compile()
        if runtime.world > 1:
            task.eval_model = task.get_eval_model()  # not the wrapper, which might wait for the others
            device_ids = [runtime.device.index] if runtime.device.type == 'cuda' else None
            # Gradients are averaged in place instead of being copied to buckets and back.
            task.prepare_distributed(device_ids=device_ids, gradient_as_bucket_view=True)

    def no_sync(self) -> AbstractContextManager:
        """Gradients computed inside are not averaged over the processes until a later step."""
        return self.task.no_sync()

    def eval_models(self) -> List[nn.Module]:
        """The model, and its moving average if there is one, for as many batches as each process has."""
        averages = [self.task.get_eval_model(ema=True)] if self.task.has_ema() else []
        return [self.task.get_eval_model(), *averages]

    def gather(self, state: Dict[str, Any]) -> Dict[str, Any]:
        """The state as the first process saves it; other processes need not call this."""
        return state

    def load(self, state: Dict[str, Any], optimizer: Optimizer) -> None:
        """Loads weights, moving average and optimizer of a checkpoint."""
        _load(self.task, state, optimizer)

    def stop_signal(self, own: int) -> int:
        """The signal for which this process should save and stop, 0 for none."""
        return own if self.runtime.is_primary else 0


class Shards:
    """Every process holds a share of the weights, gradients, moments and moving average (FSDP2).

    The weights of a block are gathered for its forward and its backward pass. They stay fp32: a policy of mixed
    precision would round the norms, A and D too, whereas autocast rounds what it rounds without shards.
    """

    saves_alone = False

    def __init__(self, config: Config, task: TrainingTask, runtime: Runtime) -> None:
        self.task, self.runtime = task, runtime
        # FSDP2 takes weights of no other format; convolutions follow that of the images.
        self.model = task.get_trainable_module().to(memory_format=torch.contiguous_format)
        self.skeleton = _without_weights(self.model)
        mesh = init_device_mesh(runtime.device.type, (runtime.world,))
        self.group = dist.new_group(backend='gloo')  # for decisions, so that they do not wait for the GPU
        for block in blocks_of(self.model):
            if config.compile:
                block.compile()
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        if task.has_ema():
            shards = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            task.get_trainable_module(ema=True).module.load_state_dict(shards, assign=True)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients computed inside are not averaged over the processes until a later step."""
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

    def gather(self, state: Dict[str, Any]) -> Dict[str, Any]:
        """The state with whole tensors, in the first process; all processes have to call this."""
        return whole(state, self.runtime.is_primary)

    def load(self, state: Dict[str, Any], optimizer: Optimizer) -> None:
        """Loads weights, moving average and optimizer of a checkpoint, which holds whole tensors."""
        shards = self.model.state_dict()
        weights = {
            name: {key: like(value, shards[key]) for key, value in state[name].items()}
            for name in ('state_dict', 'state_dict_ema')
            if name in state
        }
        parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
        numbers = [number for group in state['optimizer']['param_groups'] for number in group['params']]
        found = state['optimizer']['state']
        moments = {
            number: {key: like(value, parameter) for key, value in found[number].items()}
            for number, parameter in zip(numbers, parameters, strict=True)
            if number in found
        }
        _load(self.task, {**weights, 'optimizer': {**state['optimizer'], 'state': moments}}, optimizer)

    def stop_signal(self, own: int) -> int:
        """A signal that any of the processes received: all have to save after the same update."""
        signal = torch.tensor(own)
        dist.all_reduce(signal, dist.ReduceOp.MAX, group=self.group)
        return int(signal)


Parallel = Union[Copies, Shards]


def distribute(config: Config, task: TrainingTask, runtime: Runtime) -> Parallel:
    """Compiles the model of a task if asked for, and distributes it; its parameters may be replaced."""
    return (Shards if config.shard else Copies)(config, task, runtime)


def check_sharding(config: Config, runtime: Runtime) -> None:
    """Raises UserError if sharding is asked for and not possible."""
    if not config.shard:
        return
    if runtime.world == 1:
        raise UserError('shard distributes the weights over processes: start several by torchrun, or leave it out')
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


def whole(value: Any, keep: bool = True) -> Any:
    """A tensor, or a dictionary of any depth, with sharded tensors gathered; all processes have to call it.

    Without `keep`, each is dropped as soon as it is gathered.
    """
    if isinstance(value, dict):
        return {key: whole(item, keep) for key, item in value.items()}
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full if keep else None


def like(value: Any, shard: Any) -> Any:
    """A whole tensor distributed as a sharded one of its shape; any other value as it is."""
    if not isinstance(shard, DTensor) or not isinstance(value, torch.Tensor) or value.shape != shard.shape:
        return value
    return distribute_tensor(value.to(shard.device), shard.device_mesh, shard.placements)


def _load(task: TrainingTask, state: Dict[str, Any], optimizer: Optimizer) -> None:
    task.load_checkpoint_state(state['state_dict'])
    if task.has_ema():
        task.load_checkpoint_state(state['state_dict_ema'], ema=True)
    optimizer.load_state_dict(state['optimizer'])
