"""Long convolutions by FFT, and those of diagonal state-space models: their kernels and their states.

On the Parameterization and Initialization of Diagonal State Space Models, https://arxiv.org/abs/2206.11893

Powers of the decays are never laid out for every position: positions are counted as block * i + j, so that a kernel of
length L is a product of two matrices with about sqrt(L) powers each.
"""

from math import isqrt
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check_that
from ._launch import cdiv


def long_conv(u: Tensor, kernel: Tensor, kernel_ahead: Optional[Tensor] = None) -> Tensor:
    """Convolution with kernels as long as the sequence, by FFT; directly where a model is exported.

        out_l = sum_{j >= 0} kernel_j * u_{l - j} + sum_{j >= 0} kernel_ahead_j * u_{l + 1 + j}

    Computed in at least fp32. Differentiable in every tensor.

    Args:
        u: [..., L], in any floating dtype.
        kernel: [..., K], whose other dimensions broadcast with those of u; taps from L on are unused.
        kernel_ahead: The taps of later positions [..., K'], or None for a causal convolution.

    Returns:
        [..., L] in at least fp32.

    Raises:
        ValueError: If u or a kernel is empty.
    """
    seqlen = u.shape[-1]
    found = f'L = {seqlen} and K = {kernel.shape[-1]}'
    check_that(seqlen > 0 and kernel.shape[-1] > 0, f'long_conv: u and kernel must not be empty, got {found}')
    wide = torch.promote_types(u.dtype, torch.float32)
    kernel = kernel[..., :seqlen].to(wide)
    taps = kernel.shape[-1]
    if kernel_ahead is not None:
        kernel_ahead = kernel_ahead[..., : max(seqlen - 1, 1)].to(wide)
        taps = max(taps, kernel_ahead.shape[-1] + 1)
    if torch.compiler.is_exporting() and kernel.ndim < u.ndim:
        return _direct_conv(u.to(wide), kernel, kernel_ahead)
    size = _fft_size(seqlen + taps - 1)
    spectrum = torch.fft.rfft(kernel, size)
    if kernel_ahead is not None:  # position -1 - j of a circle
        ahead = F.pad(kernel_ahead.flip(-1), (size - kernel_ahead.shape[-1], 0))
        spectrum = spectrum + torch.fft.rfft(ahead, size)
    return torch.fft.irfft(torch.fft.rfft(u.to(wide), size) * spectrum, size)[..., :seqlen]


def _direct_conv(u: Tensor, kernel: Tensor, kernel_ahead: Optional[Tensor]) -> Tensor:
    """`long_conv` as a depthwise convolution, because formats such as ONNX have no fast FFT."""
    taps, before = kernel.flip(-1), kernel.shape[-1] - 1
    after = 0
    if kernel_ahead is not None:
        taps, after = torch.cat([taps, kernel_ahead], dim=-1), kernel_ahead.shape[-1]
    shape = torch.broadcast_shapes(u.shape[:-1], kernel.shape[:-1])
    u = F.pad(u.expand(*shape, -1).flatten(1, -2), (before, after))
    taps = taps.expand(*shape[1:], -1).reshape(-1, 1, taps.shape[-1])
    return F.conv1d(u, taps, groups=taps.shape[0]).unflatten(1, shape[1:])


def diagonal_kernel(log_decay: Tensor, coefficient: Tensor, length: int) -> Tensor:
    """Kernel of a diagonal state-space model with states in conjugate pairs.

        K_l = 2 * Re(sum_n coefficient_n * exp(l * log_decay_n))

    Differentiable in both tensors. Holds about 2 * M * sqrt(length) numbers per channel, never M * length.

    Args:
        log_decay: Logarithm of the decay per step, complex [H, M], with negative real parts.
        coefficient: Complex [..., H, M].
        length: Positions, l = 0, ..., length - 1.

    Returns:
        [..., H, length], real.
    """
    check_that(length > 0, 'diagonal_kernel: length must be at least 1, got {}', length)
    block = _block(length)
    within = _powers(log_decay, block)  # [H, M, block]
    before = _powers(log_decay * block, cdiv(length, block)).mT  # [H, blocks, M]
    starts = coefficient.unsqueeze(-2) * before  # [..., H, blocks, M]
    with torch.autocast(log_decay.device.type, enabled=False):
        kernel = 2 * (starts.real @ within.real - starts.imag @ within.imag)  # [..., H, blocks, block]
    return kernel.flatten(-2)[..., :length]


def diagonal_state(log_decay: Tensor, u: Tensor) -> Tensor:
    """State of a diagonal state-space model after a sequence, starting from zero.

        h = sum_l exp((L - 1 - l) * log_decay) * u_l

    Differentiable in both tensors; see `diagonal_kernel` for the memory.

    Args:
        log_decay: Complex [H, M], with negative real parts.
        u: Real [..., H, L].

    Returns:
        Complex [..., H, M].
    """
    seqlen = u.shape[-1]
    block = _block(seqlen)
    blocks = cdiv(seqlen, block)
    within = _powers(log_decay, block).flip(-1).mT  # [H, block, M]
    after = _powers(log_decay * block, blocks).flip(-1).mT  # [H, blocks, M]
    u = u.to(within.real.dtype).contiguous()  # torch 2.7 traces wrong strides where others are padded by nothing
    u = F.pad(u, (blocks * block - seqlen, 0)).unflatten(-1, (blocks, block))
    with torch.autocast(log_decay.device.type, enabled=False):
        ends = torch.complex(u @ within.real, u @ within.imag)  # [..., H, blocks, M]
    return (ends * after).sum(dim=-2)


def _powers(log_decay: Tensor, number: int) -> Tensor:
    """exp(j * log_decay) for j < number: [..., number]"""
    steps = torch.arange(number, device=log_decay.device, dtype=log_decay.real.dtype)
    return torch.exp(log_decay.unsqueeze(-1) * steps)


def _block(length: int) -> int:
    return isqrt(length - 1) + 1


def _fft_size(least: Any) -> int:
    """The smallest product of powers of 2, 3 and 5 of at least `least`: other sizes are slow."""
    if not isinstance(least, int):  # a symbolic size
        return least
    best = 1 << (least - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            best = min(best, three << max((cdiv(least, three) - 1).bit_length(), 0))
            three *= 3
        five *= 5
    return best
