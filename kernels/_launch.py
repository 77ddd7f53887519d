"""Where operators run, facts about the device, and launches of Triton kernels with little work on the host."""

import contextlib
import functools
import os
from typing import Any, ContextManager, Dict, Iterator, Optional, Tuple, Union

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
    TRITON_VERSION = tuple(map(int, triton.__version__.split('.')[:2]))
except ImportError:
    triton = tl = _MissingTriton()
    HAS_TRITON = False
    TRITON_VERSION = (0, 0)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_PLANS = 4096  # launches that are kept for the next one of the same sizes, of each operator

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


def product_block(size: int) -> int:
    """Columns of a tile that holds so many: tensor cores multiply at least 16."""
    return max(next_power_of_2(size), 16)


def share_rows(rows: int, block_rows: int, most: int) -> Tuple[int, int]:
    """Shares rows among at most so many programs, in whole blocks: programs, at least one, and rows of each."""
    programs = max(min(cdiv(rows, block_rows), most), 1)
    rows_per_program = cdiv(cdiv(rows, programs), block_rows) * block_rows
    return max(cdiv(rows, max(rows_per_program, 1)), 1), rows_per_program


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


def shared_memory(tensor: Tensor) -> int:
    """Most bytes of shared memory that a program on the tensor's device can have; many where there is no such limit."""
    return _shared_memory(tensor.device.index) if tensor.is_cuda else 2**20


@functools.cache
def _shared_memory(index: Optional[int]) -> int:
    if not torch.cuda.is_available():  # a fake tensor's device
        return 2**20
    properties = torch.cuda.get_device_properties(index)
    # What programs can have on request is not known of AMD's GPUs, which have no more than they get without.
    return getattr(properties, 'shared_memory_per_block_optin', 0) or properties.shared_memory_per_block


def is_nvidia(tensor: Tensor) -> bool:
    """Whether kernels on this tensor are compiled for an NVIDIA GPU."""
    return tensor.is_cuda and torch.version.hip is None and not INTERPRETED


def can_launch_early(tensor: Tensor) -> bool:
    """Whether a kernel on this tensor can be launched before the one ahead of it has ended: from Hopper on."""
    return is_nvidia(tensor) and TRITON_VERSION >= (3, 6) and torch.cuda.get_device_capability(tensor.device)[0] >= 9


def dot_precision(tensor: Tensor) -> str:
    """`input_precision` of tl.dot that keeps the precision of a main input like `tensor`."""
    if not is_nvidia(tensor):
        return 'ieee'
    return 'tf32x3' if tensor.dtype == torch.float32 else 'tf32'


class Launch:
    """A launch of a Triton kernel in all but its tensors, worth keeping for the next one of the same sizes.

    It is called with the kernel's tensors, or None for absent ones, on their device, which must be the current one.
    Triton looks at every argument of every launch for its dtype, alignment and value to find the compiled kernel, which
    takes longer than many kernels run. Here a launch like an earlier one finds it by one key, and passes addresses
    instead of tensors.

    Args:
        kernel: A function under `triton.jit` whose parameters are tensors, then integers or tuples of integers, then
            constants or named tuples of constants. Triton makes a constant of an integer that is 1: the kernel converts
            integers by `tl.cast`.
        grid: Number of programs, or numbers along two axes.
        sizes: The kernel's integers, or tuples of them.
        constants: Its constants, or named tuples of them.
        warps: Warps of a program.
        registers: Most registers of a thread, for NVIDIA GPUs.
        stages: Stages of pipelined loops.
        early: Launch before the kernel ahead has ended, once all its programs allow it: see `wait_for_kernel_ahead`.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Union[int, Tuple[int, int]],
        sizes: Tuple[Any, ...],
        constants: Tuple[Any, ...],
        warps: int = 4,
        registers: Optional[int] = None,
        stages: Optional[int] = None,
        early: bool = False,
    ) -> None:
        self.kernel = kernel
        self.grid = grid if isinstance(grid, tuple) else (grid, 1)
        self.arguments = *sizes, *constants
        self.options = dict(num_warps=warps)
        if registers is not None:
            self.options.update(maxnreg=registers)
        if stages is not None:
            self.options.update(num_stages=stages)
        if early:
            self.options.update(launch_pdl=True)
        self._compiled: Dict[tuple, Tuple[Any, Any, Any, Any]] = {}

    def __call__(self, *tensors: Optional[Tensor]) -> None:
        blocks, rows = self.grid
        if blocks == 0 or rows == 0:
            return
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        dtypes = tuple([None if tensor is None else tensor.dtype for tensor in tensors])
        bits = 0
        for pointer in pointers:
            bits |= pointer
        # Nearly always all pointers are aligned, as the allocator makes them.
        aligned = bits % 16 == 0 or tuple([pointer % 16 == 0 for pointer in pointers])
        device = next(tensor for tensor in tensors if tensor is not None).get_device()
        key = device, dtypes, aligned
        found = self._compiled.get(key)
        if found is None:
            self._compile(key, tensors)
        else:
            run, function, metadata, stream_of = found
            stream = stream_of(device)
            run(blocks, rows, 1, stream, function, metadata, None, None, None, *pointers, *self.arguments)

    def _compile(self, key: tuple, tensors: Tuple[Optional[Tensor], ...]) -> None:
        """Launches by Triton's own way, and remembers what it compiled."""
        grid = (*self.grid, 1)
        compiled = self.kernel[grid](*tensors, *self.marked_arguments(), **self.options)
        if compiled is not None:  # Triton's interpreter compiles nothing
            stream_of = triton.runtime.driver.active.get_current_stream
            self._compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, stream_of

    def marked_arguments(self) -> Iterator[Any]:
        """Integers and constants as Triton takes them: the numbers of a named tuple are constants."""
        for argument in self.arguments:
            is_constant = hasattr(argument, '_fields')
            yield type(argument)(*map(tl.constexpr, argument)) if is_constant else argument
