"""Launches of Triton kernels with little work on the host."""

from collections import OrderedDict
from typing import Any, Hashable, Optional, Sequence, Tuple, Union

import triton
from torch import Tensor

_MAX_REMEMBERED = 4096


class Launcher:
    """Launches a Triton kernel and remembers what it was compiled to.

    At each launch Triton looks at every argument for its dtype, alignment and value to find the compiled kernel, which
    takes as long as the kernels on small maps. Here a launch whose arguments are alike finds it by one key. Images of
    ever new sizes would fill the host's memory with keys, so of very many the oldest is forgotten: a later launch of
    its kind looks again, and Triton compiles nothing anew.

    Args:
        kernel: A function under `triton.jit` whose parameters are tensors, then integers, then constants. Triton makes
            a constant of an integer that is 1: the kernel converts its integers by `tl.cast`, not `.to`.
    """

    def __init__(self, kernel: triton.JITFunction) -> None:
        self._kernel = kernel
        self._compiled: OrderedDict[Hashable, Any] = OrderedDict()

    def __call__(
        self,
        programs: Union[int, Tuple[int, int]],
        tensors: Sequence[Optional[Tensor]],
        sizes: Tuple[int, ...],
        constants: Tuple[Hashable, ...],
        warps: int,
        registers: Optional[int] = None,
        stages: Optional[int] = None,
    ) -> None:
        """Launches programs, a number or two of them, on the current device, which must be the tensors'.

        Raises:
            RuntimeError: If the tensors are on several devices, of which a kernel would read wild memory.
        """
        grid = (*programs, 1) if isinstance(programs, tuple) else (programs, 1, 1)
        if 0 in grid:
            return
        pointers = tuple(None if t is None else (t.dtype, t.data_ptr() % 16 == 0, t.get_device()) for t in tensors)
        key = tensors[0].device, pointers, sizes, constants, warps, registers, stages
        compiled = self._compiled.get(key)
        if compiled is None:
            devices = sorted({str(tensor.device) for tensor in tensors if tensor is not None})
            if len(devices) > 1:
                raise RuntimeError(f'the tensors are on {" and ".join(devices)}; move them to one device')
            options = dict(num_warps=warps)
            if registers is not None:
                options.update(maxnreg=registers)
            if stages is not None:
                options.update(num_stages=stages)
            compiled = self._kernel[grid](*tensors, *sizes, *constants, **options)
            if compiled is not None:  # Triton's interpreter compiles nothing
                self._compiled[key] = compiled
                if len(self._compiled) > _MAX_REMEMBERED:
                    self._compiled.popitem(last=False)
        else:
            compiled[grid](*tensors, *sizes, *constants)
