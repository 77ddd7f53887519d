"""Makes Triton's interpreter, in which the kernels run without a GPU, fast enough for tests.

It calls the function of a scan or of a reduction for one element at a time; here, for a slice across the axis.
"""

from itertools import accumulate

import numpy as np
from triton.runtime.interpreter import ReduceOps, ScanOps

scan_elements, reduce_elements = ScanOps.generic_scan, ReduceOps.generic_reduce


def combine_slices():
    ScanOps.generic_scan = _scan
    ReduceOps.generic_reduce = _reduce


def _scan(scan, tensors):
    arrays = [np.stack(slices, axis=scan.axis) for slices in zip(*_accumulate(scan, tensors))]
    return [scan.to_tensor(array, tensor.dtype) for array, tensor in zip(arrays, tensors)]


def _reduce(reduction, tensors):
    if reduction.axis is None:
        return reduce_elements(reduction, tensors)
    *_, arrays = _accumulate(reduction, tensors)
    if reduction.keep_dims:
        arrays = [np.expand_dims(array, reduction.axis) for array in arrays]
    return [reduction.to_tensor(array, tensor.dtype) for array, tensor in zip(arrays, tensors)]


def _accumulate(operation, tensors):
    """The slices across the axis of all tensors, each combined with those before it."""

    def as_tensors(slices):
        return [operation.to_tensor(array, tensor.dtype) for array, tensor in zip(slices, tensors)]

    def combine(before, slices):
        combined = operation.combine_fn.fn(*as_tensors(before), *as_tensors(slices))
        combined = combined if isinstance(combined, tuple) else (combined,)
        return [tensor.handle.data.reshape(array.shape) for tensor, array in zip(combined, slices)]

    return accumulate(zip(*(np.moveaxis(tensor.handle.data, operation.axis, 0) for tensor in tensors)), combine)
