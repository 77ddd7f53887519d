"""Chooses between the Triton kernels and plain PyTorch."""

import contextlib
import functools
import os
from typing import ContextManager, Iterator, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

try:
    import triton
except ImportError:
    triton = None

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Kernels are compiled or interpreted for good when they are defined.
INTERPRETED = triton is not None and os.environ.get('TRITON_INTERPRET') == '1'

_choice: Optional[bool] = None


@contextlib.contextmanager
def use_triton(enabled: Optional[bool]) -> Iterator[None]:
    """Within this context the operators run on the Triton kernels (True), in plain PyTorch (False) or as usual (None).

    As usual means: Triton for fp32, fp16 and bf16 tensors of a GPU where the package triton is installed, plain PyTorch
    for everything else. True demands Triton: elsewhere, and in fp64, it is an error; on a CPU it needs the environment
    variable TRITON_INTERPRET=1 before the first import. The choice is made when an operator is called, for its backward
    pass too, and holds for all threads.
    """
    global _choice
    before, _choice = _choice, enabled
    try:
        yield
    finally:
        _choice = before


def runs_on_triton(tensor: Tensor) -> bool:
    """Whether an operator whose main input is `tensor` runs on the Triton kernels.

    Raises:
        RuntimeError: If `use_triton(True)` demands what cannot be.
    """
    device = tensor.device.type
    if _choice is False or (_choice is None and device in ('cpu', 'meta')):
        return False
    possible = triton is not None and tensor.dtype in _DTYPES and (INTERPRETED if device == 'cpu' else device != 'meta')
    if _choice and not possible:
        raise RuntimeError(
            f'use_triton(True): Triton cannot run on a {tensor.dtype} tensor of the device {tensor.device}; it needs '
            'the package triton, fp32, fp16 or bf16, and a GPU (or TRITON_INTERPRET=1 before the first import)'
        )
    return possible


def check_tensors(function: str, **tensors: Optional[Tensor]) -> None:
    """Raises an error unless the tensors of a public function, the first of which is given, may go to its operators.

    An operator with a backward pass of its own has no forward mode: PyTorch silently takes its result for constant.

    Raises:
        ValueError: If the tensors are on several devices.
        NotImplementedError: If one has a tangent of forward-mode differentiation.
    """
    main = next(iter(tensors))
    device = tensors[main].device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            found = f'{main} on {device} and {name} on {tensor.device}'
            raise ValueError(f'{function} needs all tensors on one device, got {found}')
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f'{function} is differentiable in reverse mode only, got {name} with a tangent of forward mode '
                '(torch.func.jvp, torch.func.jacfwd, torch.autograd.forward_ad)'
            )


def device_of(tensor: Tensor) -> ContextManager[None]:
    """Makes the tensor's device the current one, which is where Triton launches."""
    if tensor.device.type == 'cpu' or (tensor.is_cuda and tensor.device.index == torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def processors_of(tensor: Tensor) -> int:
    """Streaming multiprocessors of the tensor's device, or 1 where there are none."""
    return _processors(tensor.device.index) if tensor.is_cuda else 1


@functools.cache
def _processors(index: Optional[int]) -> int:
    # A fake tensor may pretend to be on a GPU.
    return torch.cuda.get_device_properties(index).multi_processor_count if torch.cuda.is_available() else 1


def compiles_for_nvidia(tensor: Tensor) -> bool:
    """Whether kernels on this tensor become code of an NVIDIA GPU."""
    return tensor.is_cuda and torch.version.hip is None and not INTERPRETED


def dot_precision(tensor: Tensor) -> str:
    """`input_precision` of tl.dot that loses nothing of what a main input like `tensor` holds."""
    if not compiles_for_nvidia(tensor):
        return 'ieee'
    return 'tf32x3' if tensor.dtype == torch.float32 else 'tf32'


def operators_are_watched() -> bool:
    """Whether calls must go through PyTorch's dispatcher: they are traced, or a mode or a transform looks at them.

    Otherwise they can do without, which saves the host as much time as small kernels take.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return traced or is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active()


def needs_gradients(*tensors: Tensor) -> bool:
    """Whether a call on these tensors is recorded for a backward pass."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
