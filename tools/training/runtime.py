"""The device and the processes of a run."""

import os
import resource
import signal
from dataclasses import dataclass
from typing import Any, List

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor

from vmamba.tools.devices import pick_device

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Runtime:
    """The device of this process, and its place among the others."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_primary(self) -> bool:
        return self.rank == 0

    def place(self, tensor: Tensor) -> Tensor:
        """The tensor on the device."""
        return tensor.to(self.device, non_blocking=True)

    def sum(self, values: Tensor) -> List[Any]:
        """Sums of the values over all processes, nested as they were."""
        if self.world > 1:
            dist.all_reduce(values)
        return values.tolist()


def start(device: str) -> Runtime:
    """Joins the processes that torchrun started, if it did."""
    found = init_distributed_device_so(pick_device(device).type)
    return Runtime(torch.device(found['device']), found['global_rank'], found['world_size'])


def peak_memory_mib(device: torch.device) -> float:
    """Most memory so far: of the GPU, or of this process on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def leave_stopping_to_main(worker: int) -> None:
    """For loading processes: they ignore stop signals to the whole job, because the main process needs their images.

    They end with the main process, which PyTorch's workers check every few seconds.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Remembers SIGTERM or SIGINT, to stop between two updates; a second one has its default effect.

    With copies of the model only the first process stops by itself, after writing a checkpoint. The others continue,
    because it needs them to finish its update, until it is gone or torchrun ends them.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._previous = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}

    def restore(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def exit(self, number: int) -> None:
        """Ends the process with the exit status of a signal."""
        os._exit(128 + number)  # waiting for the others would take as long as they wait for this one
