"""Makes Triton's interpreter, in which the kernels run without a GPU, fast enough for tests.

- It calls the function of a scan or of a reduction for one element at a time; here, for a slice across the axis.
- Whenever a kernel calls a function it replaces the functions of the language; here, when it first calls one of a
  module.
- It finds out what follows from a type and a shape for every tensor; here, once.
- It computes integers a second time in 64 bits for a check of overflows that only debugging makes; here, it does not.
- It broadcasts tensors of one type to each other; here, it leaves them alone.
"""

from itertools import accumulate

import numpy as np
import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, ReduceOps, ScanOps

# A class from triton 3.4 on.
TritonSemantic = getattr(semantic, 'TritonSemantic', None)
broadcast = TritonSemantic and TritonSemantic.broadcast_impl_value
reduce_elements, call_and_patch = ReduceOps.generic_reduce, InterpretedFunction.__call__
find_dtype, init_block, init_tensor = interpreter._get_np_dtype, tl.block_type.__init__, tl.tensor.__init__
patched, dtypes, blocks, tensors_of_type = set(), {}, {}, {}


def speed_up():
    for owner, name, function in FASTER:
        setattr(owner, name, function)
    # Triton 3.3 calls this of its compiler's builder for masks of constants; its interpreter's builder lacks it.
    if not hasattr(interpreter.InterpreterBuilder, 'get_int1_ty'):
        interpreter.InterpreterBuilder.get_int1_ty = lambda self: tl.int1


def _scan(scan, tensors):
    arrays = [np.stack(slices, axis=scan.axis) for slices in zip(*_accumulate(scan, tensors))]
    return _as_tensors(scan, tensors, arrays)


def _reduce(reduction, tensors):
    if reduction.axis is None:
        return reduce_elements(reduction, tensors)
    *_, arrays = _accumulate(reduction, tensors)
    if reduction.keep_dims:
        arrays = [np.expand_dims(array, reduction.axis) for array in arrays]
    return _as_tensors(reduction, tensors, arrays)


def _as_tensors(operation, tensors, arrays):
    return [operation.to_tensor(array, tensor.dtype) for array, tensor in zip(arrays, tensors)]


def _accumulate(operation, tensors):
    """The slices across the axis of all tensors, each combined with those before it."""

    def combine(before, slices):
        combined = operation.combine_fn.fn(
            *_as_tensors(operation, tensors, before), *_as_tensors(operation, tensors, slices)
        )
        combined = combined if isinstance(combined, tuple) else (combined,)
        return [tensor.handle.data.reshape(array.shape) for tensor, array in zip(combined, slices)]

    return accumulate(zip(*(np.moveaxis(tensor.handle.data, operation.axis, 0) for tensor in tensors)), combine)


def _call(function, *args, **kwargs):
    """What a kernel undoes at its end, the next one does itself; the rest stays."""
    if function.fn.__module__ not in patched:
        patched.add(function.fn.__module__)
        return call_and_patch(function, *args, **kwargs)
    return function.rewrite()(*args, **kwargs)


def _dtype(dtype):
    if dtype.name not in dtypes:
        dtypes[dtype.name] = find_dtype(dtype)
    return dtypes[dtype.name]


def _init_block(block, element, shape):
    key = element.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape)
    if key not in blocks:
        init_block(block, element, shape)
        blocks[key] = vars(block).copy()
    vars(block).update(blocks[key])


def _init_tensor(tensor, handle, type):
    if type.name not in tensors_of_type:
        init_tensor(tensor, None, type)
        tensors_of_type[type.name] = vars(tensor).copy()
    vars(tensor).update(tensors_of_type[type.name], handle=handle, type=type)


def _check_no_overflow(*arguments):
    pass


def _broadcast(semantic, left, right):
    return (left, right) if left.type.name == right.type.name else broadcast(semantic, left, right)


FASTER = (
    (ScanOps, 'generic_scan', _scan),
    (ReduceOps, 'generic_reduce', _reduce),
    (InterpretedFunction, '__call__', _call),
    (interpreter, '_get_np_dtype', _dtype),
    (tl.block_type, '__init__', _init_block),
    (tl.tensor, '__init__', _init_tensor),
)
if TritonSemantic is not None:
    FASTER += (
        (TritonSemantic, 'binary_op_sanitize_overflow_impl', _check_no_overflow),
        (TritonSemantic, 'broadcast_impl_value', _broadcast),
    )
AS_IT_WAS = tuple((owner, name, getattr(owner, name)) for owner, name, _ in FASTER)
