"""Training of mmdet and mmseg models whose weights, gradients and moments are shared out among the processes."""

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
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from vmamba.tools.training.parallel import blocks_of, whole

from .runs import StrictRunner


@RUNNERS.register_module()
class ShardedRunner(StrictRunner):
    """A runner that shards the model by PyTorch's FSDP2 instead of keeping a copy in every process.

    Weights are initialised, loaded and resumed in whole, then sharded, and its checkpoints hold the whole of them: they
    are those of other runners, and go on on any number of processes.
    """

    whole: Dict[str, Any]  # what the checkpoint that is being written holds of model and optimizer

    def wrap_model(self, model_wrapper_cfg: Optional[dict], model: nn.Module) -> nn.Module:
        """Takes the model to its device only, for it has no weights yet."""
        if self.cfg.get('sync_bn') is not None:
            model = convert_sync_batchnorm(model, self.cfg.sync_bn)
        return model.to(get_device())

    def load_or_resume(self) -> None:
        """Loads what the config asks for, and shards what training begins with."""
        super().load_or_resume()
        shard(self.model, self.optim_wrapper.optimizer)
        self.register_hook(WholeHook())

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Writes a checkpoint in the first process; all have to call it, for each holds a part of it."""
        states = dict(state_dict=self.model.state_dict(), optimizer=self.optim_wrapper.state_dict())
        self.whole = apply_to(whole(states), lambda leaf: isinstance(leaf, Tensor), Tensor.cpu)
        super().save_checkpoint(*args, **kwargs)
        del self.whole


class WholeHook(Hook):
    """Puts whole tensors in the places of one process's shards in a checkpoint, before others look at it."""

    priority = 'HIGHEST'

    def before_save_checkpoint(self, runner: ShardedRunner, checkpoint: Dict[str, Any]) -> None:
        checkpoint.update((key, value) for key, value in runner.whole.items() if key in checkpoint)


def shard(model: nn.Module, optimizer: Optimizer) -> None:
    """Shares out the first process's weights and moments among all.

    Args:
        model: All of it on one device; its parameters are others afterwards.
        optimizer: Of the model's parameters, which it follows.
    """
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
        optimizer.state[parameter] = {key: _laid_out(value, parameter) for key, value in state.items()}


def _laid_out(value: Any, parameter: DTensor) -> Any:
    """A moment shared out as its parameter; anything else, such as the number of steps, as it is."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
