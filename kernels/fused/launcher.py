"""Launches of Triton kernels with little work on the host."""

from typing import Any, Dict, Hashable, Optional, Sequence, Tuple

import triton
from torch import Tensor


class Launcher:
    """Launches a Triton kernel and remembers what it was compiled to.

    At each launch Triton looks at every argument for its dtype, alignment and value to find the compiled kernel, which
    takes as long as the kernels on small maps. Here a launch whose arguments are alike finds it by one key.

    Args:
        kernel: A function under `triton.jit` whose parameters are tensors, then integers, then constants.
    """

    def __init__(self, kernel: triton.JITFunction) -> None:
        self._kernel = kernel
        self._compiled: Dict[Hashable, Any] = {}

    def __call__(
        self,
        programs: int,
        tensors: Sequence[Optional[Tensor]],
        sizes: Tuple[int, ...],
        constants: Tuple[Hashable, ...],
        warps: int,
        registers: Optional[int] = None,
    ) -> None:
        """Launches `programs` programs on the current device, which must be the tensors'."""
        if programs == 0:
            return
        grid = programs, 1, 1
        aligned = all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)
        dtypes = tuple(None if tensor is None else tensor.dtype for tensor in tensors)
        key = tensors[0].device, dtypes, sizes, constants, warps, registers
        compiled = self._compiled.get(key) if aligned else None
        if compiled is None:
            options = dict(num_warps=warps)
            if registers is not None:
                options.update(maxnreg=registers)
            compiled = self._kernel[grid](*tensors, *sizes, *constants, **options)
            if aligned and compiled is not None:  # Triton's interpreter compiles nothing
                self._compiled[key] = compiled
        else:
            compiled[grid](*tensors, *sizes, *constants)
