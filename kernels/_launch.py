"""Where operators run, facts about the device, and launches of Triton kernels with little work on the host."""

import contextlib
import functools
import os
from collections import OrderedDict
from typing import Any, ContextManager, Hashable, Iterator, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor


class _MissingTriton:
    """Stands for the package triton where it is not installed: kernels can be defined, not launched."""

    def __getattr__(self, name: str) -> '_MissingTriton':
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else self


try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton = tl = _MissingTriton()
    HAS_TRITON = False

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_REMEMBERED = 4096

# Kernels are compiled or interpreted for good when they are defined.
INTERPRETED = HAS_TRITON and os.environ.get('TRITON_INTERPRET') == '1'

_choice: Optional[bool] = None


@contextlib.contextmanager
def use_triton(enabled: Optional[bool]) -> Iterator[None]:
    """Within this context operators run on the Triton kernels (True), in plain PyTorch (False), or as usual (None).

    As usual: Triton for fp32, fp16 and bf16 tensors on a GPU where the package triton is installed, plain PyTorch for
    everything else. True requires Triton: elsewhere, and in fp64, it is an error. On a CPU it needs the environment
    variable TRITON_INTERPRET=1 before the first import. The choice is made when an operator is called, also for its
    backward pass, and holds for all threads.
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
        RuntimeError: If `use_triton(True)` requires Triton where it cannot run.
    """
    device = tensor.device.type
    if _choice is False or (_choice is None and device in ('cpu', 'meta')):
        return False
    possible = HAS_TRITON and tensor.dtype in _DTYPES and (INTERPRETED if device == 'cpu' else device != 'meta')
    if _choice and not possible:
        raise RuntimeError(
            f'use_triton(True): Triton cannot run on a {tensor.dtype} tensor of the device {tensor.device}; it needs '
            'the package triton, fp32, fp16 or bf16, and a GPU (or TRITON_INTERPRET=1 before the first import)'
        )
    return possible


def cdiv(size: int, block: int) -> int:
    """Number of blocks of at most `block` that cover `size`. (Triton's own function is slow on the host.)"""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of 2 that is at least `size`."""
    return 1 << (size - 1).bit_length()


def on_device(tensor: Tensor) -> ContextManager[None]:
    """Makes the tensor's device the current one, which is where Triton launches."""
    if tensor.device.type == 'cpu' or (tensor.is_cuda and tensor.get_device() == torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def num_processors(tensor: Tensor) -> int:
    """Streaming multiprocessors of the tensor's device; 1 where there are none."""
    return _num_processors(tensor.device.index) if tensor.is_cuda else 1


@functools.cache
def _num_processors(index: Optional[int]) -> int:
    # A fake tensor may claim to be on a GPU.
    return torch.cuda.get_device_properties(index).multi_processor_count if torch.cuda.is_available() else 1


def is_nvidia(tensor: Tensor) -> bool:
    """Whether kernels on this tensor are compiled for an NVIDIA GPU."""
    return tensor.is_cuda and torch.version.hip is None and not INTERPRETED


def dot_precision(tensor: Tensor) -> str:
    """`input_precision` of tl.dot that keeps the precision of a main input like `tensor`."""
    if not is_nvidia(tensor):
        return 'ieee'
    return 'tf32x3' if tensor.dtype == torch.float32 else 'tf32'


class Launcher:
    """Launches a Triton kernel and remembers the compiled kernel of each kind of launch.

    Triton looks at every argument of every launch for its dtype, alignment and value to find the compiled kernel, which
    takes longer than many kernels run. Here a launch like an earlier one finds it by one key, and passes addresses
    instead of tensors. The oldest of very many keys is forgotten: Triton compiles nothing again for it.

    Args:
        kernel: A function under `triton.jit` whose parameters are tensors, then integers or tuples of integers, then
            constants or named tuples of constants. Triton makes a constant of an integer that is 1: the kernel converts
            integers by `tl.cast`.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: OrderedDict[Hashable, Tuple[Any, Any, Any]] = OrderedDict()

    def __call__(
        self,
        grid: Union[int, Tuple[int, int]],
        tensors: Sequence[Optional[Tensor]],
        sizes: Tuple[Hashable, ...],
        constants: Tuple[Hashable, ...],
        warps: int = 4,
        registers: Optional[int] = None,
        stages: Optional[int] = None,
    ) -> None:
        """Launches a grid of programs on the current device, which must be that of all tensors.

        Args:
            grid: Number of programs, or numbers along two axes.
            tensors: Arguments of the kernel that are tensors or None.
            sizes: Its integers, or tuples of them.
            constants: Its constants, or named tuples of them.
            warps: Warps of a program.
            registers: Most registers of a thread, for NVIDIA GPUs.
            stages: Stages of pipelined loops.
        """
        blocks, rows = grid if isinstance(grid, tuple) else (grid, 1)
        if blocks == 0 or rows == 0:
            return
        pointers, dtypes, bits = [], [], 0
        for tensor in tensors:
            if tensor is None:
                pointers.append(None)
                dtypes.append(None)
            else:
                pointer = tensor.data_ptr()
                pointers.append(pointer)
                dtypes.append(tensor.dtype)
                bits |= pointer
        # Nearly always all pointers are aligned, as the allocator makes them.
        aligned = True if bits % 16 == 0 else tuple([not pointer or pointer % 16 == 0 for pointer in pointers])
        device = next(tensor for tensor in tensors if tensor is not None).get_device()
        key = device, tuple(dtypes), aligned, sizes, constants, warps, registers, stages
        found = self._compiled.get(key)
        if found is None:
            self._compile((blocks, rows, 1), key, tensors)
        else:
            run, function, metadata = found
            stream = triton.runtime.driver.active.get_current_stream(device)
            run(blocks, rows, 1, stream, function, metadata, None, None, None, *pointers, *sizes, *constants)

    def _compile(self, grid: Tuple[int, int, int], key: tuple, tensors: Sequence[Optional[Tensor]]) -> None:
        """Launches by Triton's own way, and remembers what it compiled."""
        *_, sizes, constants, warps, registers, stages = key
        options = dict(num_warps=warps)
        if registers is not None:
            options.update(maxnreg=registers)
        if stages is not None:
            options.update(num_stages=stages)
        # Triton takes the numbers of a tuple for variables unless each is marked.
        marked = (type(c)(*map(tl.constexpr, c)) if isinstance(c, tuple) else c for c in constants)
        compiled = self._kernel[grid](*tensors, *sizes, *marked, **options)
        if compiled is None:  # Triton's interpreter compiles nothing
            return
        self._compiled[key] = compiled.run, compiled.function, compiled.packed_metadata
        if len(self._compiled) > _MAX_REMEMBERED:
            self._compiled.popitem(last=False)
