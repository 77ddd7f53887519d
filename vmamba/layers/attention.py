"""Attention as a mixer, as the hybrids of Mamba use it.

An Empirical Study of Mamba-based Language Models, https://arxiv.org/abs/2406.07887
"""

from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from .depthwise import CausalConv1d
from .norm import widen
from .options import check_counts, check_divides


class AttentionCache(NamedTuple):
    """What attention remembers of a sequence; updated in place.

    Attributes:
        keys: [B, heads, longest, head_dim], of which the first `length` positions are filled.
        values: The same.
        length: Positions so far, an integer tensor [] on the CPU.
        conv: The last inputs of the convolution, the newest last, [B, channels, d_conv]; None without one.
    """

    keys: Tensor
    values: Tensor
    length: Tensor
    conv: Optional[Tensor]


@register_notrace_module
class Attention(nn.Module):
    """Multi-head attention over a token sequence, with the constructor and the parameter names of mamba_ssm's `MHA`.

    q, k, v = conv1d(in_proj(h));  out = out_proj(softmax(q k^T * softmax_scale) v), where the convolution and rotary
    position embeddings of q and k are optional.

    Args:
        embed_dim: Token channels d.
        num_heads: Heads of q.
        num_heads_kv: Heads of k and v, which groups of heads of q share; num_heads by default.
        head_dim: Channels of a head; embed_dim / num_heads by default.
        qkv_proj_bias: Whether in_proj has a bias.
        out_proj_bias: Whether out_proj has a bias.
        softmax_scale: head_dim^-0.5 by default.
        causal: Tokens see earlier tokens and themselves only.
        window: Tokens see only those less than this many positions away; None for all.
        layer_idx: Stored for callers.
        d_conv: Width of a causal depthwise convolution over q, k and v; 0 for none.
        rotary_emb_dim: Channels of a head, the first ones, that are rotated by their position; 0 for none.
        rotary_emb_base: The slowest rotation has a period of about 2 * pi * rotary_emb_base positions.
        rotary_emb_interleaved: Rotate neighbouring channels in pairs, not those of the two halves.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: Optional[int] = None,
        head_dim: Optional[int] = None,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: Optional[float] = None,
        causal: bool = False,
        window: Optional[int] = None,
        layer_idx: Optional[int] = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        check_counts(embed_dim=embed_dim, num_heads=num_heads, num_heads_kv=num_heads_kv)
        check_counts(0, d_conv=d_conv, rotary_emb_dim=rotary_emb_dim)
        if window is not None:
            check_counts(window=window)
        check_divides(num_heads, 'heads', num_heads_kv=num_heads_kv)
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f'num_heads must divide the {embed_dim} channels, or give head_dim; got {num_heads}')
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        check_counts(head_dim=self.head_dim)
        if rotary_emb_dim % 2 or rotary_emb_dim > self.head_dim:
            raise ValueError(f'rotary_emb_dim must be even and at most {self.head_dim}, got {rotary_emb_dim}')
        if d_conv and not causal:
            raise ValueError(f'the convolution is causal: d_conv={d_conv} needs causal=True')
        self.heads = num_heads, num_heads_kv, num_heads_kv
        self.softmax_scale = self.head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.causal, self.window, self.layer_idx = causal, window, layer_idx
        self.rotary = rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved
        channels = sum(self.heads) * self.head_dim
        self.in_proj = nn.Linear(embed_dim, channels, bias=qkv_proj_bias, **dd)
        self.conv1d = CausalConv1d(channels, d_conv, silu=False, **dd) if d_conv else None
        self.out_proj = nn.Linear(num_heads * self.head_dim, embed_dim, bias=out_proj_bias, **dd)

    def forward(self, x: Tensor, cache: Optional[AttentionCache] = None) -> Tensor:
        """[B, L, d] -> [B, L, d]

        Args:
            x: Tokens [B, L, d].
            cache: What precedes x; updated to what precedes the next token. Carries no gradients.

        Raises:
            ValueError: If the cache has no room for the tokens.
        """
        qkv = self.in_proj(x)
        if self.conv1d is not None:
            qkv = self.conv1d(qkv, state=None if cache is None else cache.conv)
        return self._attend(qkv, cache)

    def allocate_cache(self, batch_size: int, max_seqlen: int) -> AttentionCache:
        """The cache of a sequence that has not begun, with room for `max_seqlen` tokens, on the parameters' device.

        Raises:
            ValueError: If the attention is not causal.
        """
        if not self.causal:
            raise ValueError('attention has steps only with causal=True')
        shape = batch_size, self.heads[1], max_seqlen, self.head_dim
        conv = None if self.conv1d is None else self.conv1d.allocate_state(batch_size)
        weight = self.in_proj.weight
        return AttentionCache(weight.new_zeros(shape), weight.new_zeros(shape), torch.zeros((), dtype=torch.long), conv)

    @torch.no_grad()
    def step(self, x: Tensor, cache: AttentionCache) -> Tensor:
        """The output for one more token, equal to that of the whole sequence; without gradients.

        Args:
            x: Token [B, d].
            cache: What precedes the token; updated.

        Returns:
            [B, d].

        Raises:
            ValueError: If the cache is full.
        """
        qkv = self.in_proj(x)
        if self.conv1d is not None:
            qkv = self.conv1d.step(qkv, cache.conv)
        return self._attend(qkv.unsqueeze(1), cache).squeeze(1)

    def _attend(self, qkv: Tensor, cache: Optional[AttentionCache]) -> Tensor:
        """[B, L, (q, k, v)] -> [B, L, d]"""
        heads = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, L, head_dim]
        q, k, v = heads.split(self.heads, dim=1)
        first, seqlen = 0 if cache is None else int(cache.length), q.shape[2]
        position = torch.arange(first, first + seqlen, device=q.device)
        q, k = self._rotate(q, position), self._rotate(k, position)
        if cache is not None:
            k, v = self._append(cache, k, v, first)
        mask, causal = self._mask(position, k.shape[2])
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.softmax_scale)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _append(self, cache: AttentionCache, k: Tensor, v: Tensor, first: int) -> Tuple[Tensor, Tensor]:
        """All keys and values up to the new ones, which the cache gets."""
        end, room = first + k.shape[2], cache.keys.shape[2]
        if end > room:
            raise ValueError(f'the cache has room for {room} tokens, got {end}: allocate it with a larger max_seqlen')
        for stored, new in ((cache.keys, k), (cache.values, v)):
            stored[:, :, first:end] = new.detach()
        cache.length.fill_(end)
        return cache.keys[:, :, :end].to(k.dtype), cache.values[:, :, :end].to(v.dtype)

    def _mask(self, position: Tensor, keys: int) -> Tuple[Optional[Tensor], bool]:
        """Which keys each position sees [L, keys], None for all; and whether it is the causal mask instead."""
        if self.window is None and (not self.causal or position.shape[0] == keys):
            return None, self.causal
        distance = position[:, None] - torch.arange(keys, device=position.device)
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            seen &= distance.abs() < self.window
        return seen, False

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Rotary position embedding of [B, heads, L, head_dim]: pairs of channels turn by position * base^(-2i / dim).

        RoFormer, https://arxiv.org/abs/2104.09864
        """
        dim, base, interleaved = self.rotary
        if dim == 0:
            return x
        speed = base ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float64) / dim)
        angle = position[:, None] * speed
        turned, rest = widen(x[..., :dim]), x[..., dim:]
        cos, sin = angle.cos().to(turned.dtype), angle.sin().to(turned.dtype)  # [L, dim / 2]
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, dim=-1)
        pair = a * cos - b * sin, a * sin + b * cos
        turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
        return torch.cat([turned.to(x.dtype), rest], dim=-1)
