"""Training of mmdet and mmseg models with weights, gradients and moments sharded over the processes (FSDP2)."""

from collections import defaultdict
from typing import Any, Dict, Optional

import torch.distributed as dist
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.model import convert_sync_batchnorm
from mmengine.registry import RUNNERS
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from vmamba.tools.training.parallel import blocks_of, like

from .runs import StrictRunner


@RUNNERS.register_module()
class ShardedRunner(StrictRunner):
    """A runner that shards the model by FSDP2 instead of keeping a copy in every process.

    Weights are initialised, loaded and resumed as whole tensors and sharded afterwards. Checkpoints are gathered to one
    file, which is that of the other runner: training can resume on any number of processes.
    """

    gathered: Dict[str, Any]  # weights and optimizer of the checkpoint that is being written

    def wrap_model(self, model_wrapper_cfg: Optional[dict], model: nn.Module) -> nn.Module:
        """Only moves the model to its device: it has no weights to shard yet."""
        if self.cfg.get('sync_bn') is not None:
            model = convert_sync_batchnorm(model, self.cfg.sync_bn)
        return model.to(get_device())

    def load_or_resume(self) -> None:
        """Loads what the config asks for, and shards it."""
        super().load_or_resume()
        shard(self.model, self.optim_wrapper.optimizer)
        self.register_hook(GatheredHook())

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Writes a checkpoint in the first process; all have to call it, for each holds a part of it."""
        states = dict(state_dict=self.model.state_dict(), optimizer=self.optim_wrapper.state_dict())
        self.gathered = apply_to(states, lambda leaf: isinstance(leaf, Tensor), _gather)
        super().save_checkpoint(*args, **kwargs)
        del self.gathered


class GatheredHook(Hook):
    """Replaces one process's shards in a checkpoint by whole tensors, before other hooks see it."""

    priority = 'HIGHEST'

    def before_save_checkpoint(self, runner: ShardedRunner, checkpoint: Dict[str, Any]) -> None:
        checkpoint.update((key, value) for key, value in runner.gathered.items() if key in checkpoint)


def _gather(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def shard(model: nn.Module, optimizer: Optimizer) -> None:
    """Shards the first process's weights and moments."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), src=0)
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for module in (*blocks_of(model), model):
        fully_shard(module, mesh=mesh)
    shards = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group['params'] = [shards[names[parameter]] for parameter in group['params']]
    moments = {shards[names[parameter]]: state for parameter, state in optimizer.state.items()}
    optimizer.state = defaultdict(dict)
    for parameter, state in moments.items():
        optimizer.state[parameter] = {key: like(value, parameter) for key, value in state.items()}
