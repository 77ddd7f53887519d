"""Device functions of single numbers that several kernels share."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MAX_DECAY = tl.constexpr(3e38)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def short_sigmoid(x, NVIDIA: tl.constexpr):
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
