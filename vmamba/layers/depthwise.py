"""Depthwise convolutions of sequences and of maps, channels last."""

from typing import Optional

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import causal_conv1d, causal_conv1d_update, depthwise_conv2d
from .options import check_counts


@register_notrace_module
class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution of a channels-last map, which keeps its size; see `vmamba.kernels.depthwise_conv2d`.

    Args:
        dim: Channels d.
        kernel_size: Odd side of the window.
        bias: Whether there is a bias.
        silu: Return silu of the result.
        residual: Add the input to the result; not together with silu.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        bias: bool = True,
        silu: bool = False,
        residual: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        check_counts(dim=dim, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, got {kernel_size}')
        options = dict(padding=kernel_size // 2, groups=dim, bias=bias, device=device, dtype=dtype)
        super().__init__(dim, dim, kernel_size, **options)
        self.silu = silu
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, d] -> [B, H, W, d]"""
        return depthwise_conv2d(x, self.weight.squeeze(1), self.bias, self.silu, self.residual)


@register_notrace_module
class CausalConv1d(nn.Conv1d):
    """Causal depthwise convolution of a sequence, with SiLU; see `vmamba.kernels.causal_conv1d`.

    A state lets it continue earlier inputs: [B, d, w], the last w inputs, the newest last, zeros before the first.

    Args:
        dim: Channels d.
        kernel_size: Width w of the window.
        bias: Whether there is a bias.
        silu: Return silu of the result.
    """

    def __init__(
        self, dim: int, kernel_size: int = 4, bias: bool = True, silu: bool = True, device=None, dtype=None
    ) -> None:
        check_counts(dim=dim, kernel_size=kernel_size)
        options = dict(padding=kernel_size - 1, groups=dim, bias=bias, device=device, dtype=dtype)
        super().__init__(dim, dim, kernel_size, **options)
        self.silu = silu

    def forward(self, x: Tensor, seq_idx: Optional[Tensor] = None, state: Optional[Tensor] = None) -> Tensor:
        """[B, L, d] -> [B, L, d]

        Args:
            x: [B, L, d].
            seq_idx: Integers [B, L], the number of the packed sequence of each position.
            state: Of the inputs before x; updated, without gradients.
        """
        history = None if state is None else state[..., 1:].to(x.dtype, copy=True)
        activation = 'silu' if self.silu else None
        options = dict(seq_idx=seq_idx, initial_states=history, activation=activation)
        out = causal_conv1d(x.mT, self.weight.squeeze(1), self.bias, **options).mT
        if state is not None:
            state.copy_(torch.cat([state, x.mT.to(state.dtype)], dim=-1)[..., -state.shape[-1] :].detach())
        return out

    def allocate_state(self, batch_size: int) -> Tensor:
        """The state before the first input, on the parameters' device."""
        return self.weight.new_zeros(batch_size, self.weight.shape[0], self.weight.shape[-1])

    @torch.no_grad()
    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """The output for one more input, [B, d] -> [B, d]; updates the state, without gradients."""
        activation = 'silu' if self.silu else None
        return causal_conv1d_update(x, state, self.weight.squeeze(1), self.bias, activation)
