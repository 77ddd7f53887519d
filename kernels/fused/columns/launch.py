"""The selective scan of many states on Triton kernels, both ways, as `scan.py` calls it."""

from typing import Optional

from torch import Tensor

from ..arithmetic import parts
from ..sequences import Gradients, prepare
from .config import STEPS, ScanConfig, fit
from .launch_backward import backward, targets_of
from .launch_forward import forward

CONFIG = ScanConfig()


def states_shape(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[int, ...]:
    """What `run_forward` saves: the states before each tile and after the last, [batch, tiles + 1, N, dim]."""
    batch, dim, length = u.shape
    return batch, parts(length, STEPS) + 1, A.shape[1], dim


def run_forward(y: Tensor, save: bool, *arguments) -> tuple[Tensor, Tensor]:
    """Fills y; returns the last state and the saved states. The arguments are those of `prepare` but the first two."""
    scan = prepare(_as_it_is, _constants, *arguments)
    return forward(scan, y, save, fit(CONFIG, scan.A.shape[1]))


def run_backward(grad_y: Tensor, grad_last: Optional[Tensor], states: Tensor, *arguments) -> Gradients:
    scan = prepare(_as_it_is, _constants, *arguments)
    return backward(scan, grad_y, grad_last, states, fit(CONFIG, scan.A.shape[1]), targets_of(scan))


def _as_it_is(sequence: Tensor) -> Tensor:
    return sequence


def _constants(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous() if tensor.ndim == 2 else tensor
