"""Device functions that the Triton kernels share."""

from ._launch import TRITON_VERSION, tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MAX_DECAY = tl.constexpr(3e38)
_FLIPS_ANY_AXIS = tl.constexpr(TRITON_VERSION >= (3, 6))


@triton.jit
def load_rows(pointer, row, stride, channel, mask):
    """Rows of a map, `stride` apart, in fp32: [ROWS, BLOCK_D]"""
    return tl.load(pointer + row[:, None] * stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def wait_for_kernel_ahead(EARLY: tl.constexpr):
    """Waits until the kernel ahead has ended, whose results can be read then, and lets the next one start.

    Where `EARLY`, a kernel may be launched while the one ahead runs; up to here it reads only what that does not write.
    """
    if EARLY:
        tl.inline_asm_elementwise('griddepcontrol.wait; // dummy $0', '=r', [], dtype=tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise(
            'griddepcontrol.launch_dependents; // dummy $0', '=r', [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def fast_sigmoid(x, NVIDIA: tl.constexpr):
    """`sigmoid` without the instructions that keep denormal numbers, for kernels that have few others.

    A result below 2^-126 becomes zero; all else is the same.
    """
    if NVIDIA:
        power = tl.inline_asm_elementwise(
            'ex2.approx.ftz.f32 $0, $1;', '=f,f', [x * -LOG2_E], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.inline_asm_elementwise(
            'rcp.approx.ftz.f32 $0, $1;', '=f,f', [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return sigmoid(x)


@triton.jit
def softplus_log2(x, EXACT: tl.constexpr, NVIDIA: tl.constexpr):
    """log2(1 + 2**x), which is softplus(x * ln 2) / ln 2; EXACT keeps the precision of small results."""
    power = tl.exp2(x)
    if NVIDIA:  # a dozen instructions less than tl.log2
        value = tl.inline_asm_elementwise(
            'lg2.approx.f32 $0, $1;', '=f,f', [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        value = tl.log2(1.0 + power)
    if EXACT:
        series = power * 1.4426950408889634 * (1.0 - power * (0.5 - power * (0.33333334 - power * 0.25)))
        value = tl.where(power < 0.03, series, value)
    return tl.where(x > 28.853900817779268, x, value)


@triton.jit
def flip_first(x):
    """x [a, b, c] with its first axis reversed. Free where threads own that axis: the compiler renames registers."""
    if _FLIPS_ANY_AXIS:
        return tl.flip(x, 0)
    else:
        return tl.permute(tl.flip(tl.permute(x, (1, 2, 0))), (2, 0, 1))


@triton.jit
def last_of_axis(x):
    """x[-1] in fp32, for tiles whose first axis a thread owns; as integers, since the compiler removes additions of
    0."""
    SIZE: tl.constexpr = x.shape[0]
    index = tl.reshape(tl.arange(0, SIZE), [SIZE] + [1] * (len(x.shape) - 1))
    bits = tl.where(index == SIZE - 1, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def keep_second(first, second):
    """Combines to the second: a scan with it only changes the layout, to that of scans."""
    return second


@triton.jit
def load_factors(scale, row, rows, rows_per_sample):
    """The factor of each row's sample [ROWS, 1], of scale [samples]."""
    return tl.load(scale + row // rows_per_sample, mask=row < rows, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _fast_reciprocal(x, NVIDIA: tl.constexpr):
    if NVIDIA:
        return tl.inline_asm_elementwise(
            'rcp.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _upper_tail(x, NVIDIA: tl.constexpr):
    """The probability of a standard normal variable above |x|, within 1e-7, and exp(-x^2 / 2).

    Abramowitz and Stegun, 7.1.26: fewer instructions than the error function of the compiler's library.
    """
    t = _fast_reciprocal(1.0 + 0.2316418886 * tl.abs(x), NVIDIA)
    series = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    bell = tl.exp2(x * x * -0.7213475204444817)
    return series * bell, bell


@triton.jit
def gelu(x, NVIDIA: tl.constexpr):
    """x times the probability of a standard normal variable below x."""
    tail, bell = _upper_tail(x, NVIDIA)
    return tl.maximum(x, 0.0) - tl.abs(x) * tail


@triton.jit
def gelu_with_gradient(x, NVIDIA: tl.constexpr):
    """`gelu` and its derivative."""
    tail, bell = _upper_tail(x, NVIDIA)
    below = tl.where(x > 0.0, 1.0 - tail, tail)
    return x * below, below + x * bell * 0.3989422804014327
