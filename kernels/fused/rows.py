"""Device functions of tiles whose rows, the first axis, a thread owns."""

import triton
import triton.language as tl


@triton.jit
def pick_last(x):
    """x[-1] in fp32; as integers, since the compiler removes integer additions of 0."""
    ROWS: tl.constexpr = x.shape[0]
    rows = tl.reshape(tl.arange(0, ROWS), [ROWS] + [1] * (len(x.shape) - 1))
    bits = tl.where(rows == ROWS - 1, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def second(first, second):
    """Combines nothing: a scan with it changes the layout alone, to that of scans."""
    return second
