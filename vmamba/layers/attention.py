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
from .plain import apply_linear


class AttentionCache(NamedTuple):
    """What attention remembers of a sequence; updated in place.

    Attributes:
        keys: [B, heads, longest, head_dim], of which the first `position` are filled.
        values: The same.
        length: Positions so far of the longest sequence, an integer tensor [] on the CPU.
        position: Positions so far of each sequence, an integer tensor [B] on the parameters' device.
        conv: The last inputs of the convolution, the newest last, [B, channels, d_conv]; None without one.
    """

    keys: Tensor
    values: Tensor
    length: Tensor
    position: Tensor
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

    def forward(self, x: Tensor, cache: Optional[AttentionCache] = None, seq_idx: Optional[Tensor] = None) -> Tensor:
        """[B, L, d] -> [B, L, d]

        Args:
            x: Tokens [B, L, d].
            cache: What precedes x, as much of each sequence; updated to what precedes the next token. Carries no
                gradients.
            seq_idx: Integers [B, L], the number of the packed sequence of each token, which sees no others; not
                together with a cache.

        Raises:
            ValueError: If both seq_idx and a cache are given, or the cache has no room for the tokens.
        """
        if seq_idx is not None and cache is not None:
            raise ValueError('give seq_idx or a cache, not both: a cache is of one sequence')
        qkv = apply_linear(self.in_proj, x)
        if self.conv1d is not None:
            qkv = self.conv1d(qkv, seq_idx=seq_idx, state=None if cache is None else cache.conv)
        first = 0 if cache is None else int(cache.length)
        position = torch.arange(first, first + x.shape[1], device=x.device)
        q, k, v = self._heads(qkv, position)
        if cache is not None:
            k, v = self._append(cache, k, v, first)
        mask, causal = self._mask(position, k.shape[2])
        if seq_idx is not None:
            same = (seq_idx[:, :, None] == seq_idx[:, None, :]).unsqueeze(1)  # [B, 1, L, L]
            mask = torch.ones_like(same).tril() if causal else mask
            mask, causal = same if mask is None else same & mask, False
        return self._attend(q, k, v, mask, causal)

    def allocate_cache(self, batch_size: int, max_seqlen: int) -> AttentionCache:
        """The cache of sequences that have not begun, with room for `max_seqlen` tokens, on the parameters' device.

        Raises:
            ValueError: If the attention is not causal, or max_seqlen is below 1.
        """
        if not self.causal:
            raise ValueError('attention has steps only with causal=True')
        check_counts(max_seqlen=max_seqlen)
        shape = batch_size, self.heads[1], max_seqlen, self.head_dim
        conv = None if self.conv1d is None else self.conv1d.allocate_state(batch_size)
        weight, integer = self.in_proj.weight, torch.long
        position = weight.new_zeros(batch_size, dtype=integer)
        keys, values = weight.new_zeros(shape), weight.new_zeros(shape)
        return AttentionCache(keys, values, torch.zeros((), dtype=integer), position, conv)

    @torch.no_grad()
    def step(self, x: Tensor, cache: AttentionCache) -> Tensor:
        """The output for one more token, equal to that of the whole sequence; without gradients.

        Sequences may be of different lengths so far. Takes as long as a sequence that fills the cache.

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
        self._grow(cache, 1)
        position = cache.position.unsqueeze(1)  # [B, 1]
        q, k, v = self._heads(qkv.unsqueeze(1), position)
        place = position[:, None, :, None].expand(k.shape)
        for stored, new in ((cache.keys, k), (cache.values, v)):
            stored.scatter_(2, place, new.to(stored.dtype))
        distance = position - torch.arange(cache.keys.shape[2], device=x.device)  # [B, longest]
        seen = distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)
        y = self._attend(q, cache.keys.to(k.dtype), cache.values.to(v.dtype), seen[:, None, None], False)
        cache.position.add_(1)
        return y.squeeze(1)

    def _heads(self, qkv: Tensor, position: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """[B, L, (q, k, v)] -> q, k, v [B, heads, L, head_dim], rotated by the positions [L] or [B, L]"""
        heads = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split(self.heads, dim=1)
        return self._rotate(q, position), self._rotate(k, position), v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], causal: bool) -> Tensor:
        """[B, heads, L, head_dim] -> [B, L, d]"""
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.softmax_scale)
        return apply_linear(self.out_proj, y.transpose(1, 2).flatten(2))

    def _grow(self, cache: AttentionCache, tokens: int) -> int:
        """Counts tokens, for which there must be room; returns the length."""
        end, room = int(cache.length) + tokens, cache.keys.shape[2]
        if end > room:
            raise ValueError(f'the cache has room for {room} tokens, got {end}: allocate it with a larger max_seqlen')
        cache.length.fill_(end)
        return end

    def _append(self, cache: AttentionCache, k: Tensor, v: Tensor, first: int) -> Tuple[Tensor, Tensor]:
        """All keys and values up to the new ones, which the cache gets."""
        end = self._grow(cache, k.shape[2])
        for stored, new in ((cache.keys, k), (cache.values, v)):
            stored[:, :, first:end] = new.detach()
        cache.position.add_(k.shape[2])
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

        Positions are [L] or [B, L].

        RoFormer, https://arxiv.org/abs/2104.09864
        """
        dim, base, interleaved = self.rotary
        if dim == 0:
            return x
        speed = base ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float64) / dim)
        angle = position[..., None] * speed
        angle = angle if angle.ndim == 2 else angle.unsqueeze(1)  # [L, dim / 2] or [B, 1, L, dim / 2]
        turned, rest = widen(x[..., :dim]), x[..., dim:]
        cos, sin = angle.cos().to(turned.dtype), angle.sin().to(turned.dtype)
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, dim=-1)
        pair = a * cos - b * sin, a * sin + b * cos
        turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
        return torch.cat([turned.to(x.dtype), rest], dim=-1)
