"""The layer of the Block-State Transformer: attention in windows, and to the states of an SSM that reads everything.

Block-State Transformers, https://arxiv.org/abs/2306.09539
"""

import math
from typing import Any, NamedTuple, Optional, Set, Tuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import diagonal_state, long_conv
from .norm import widen
from .options import check_choice, check_counts
from .s4d import BlockConv, BlockKernel, Diagonal, check_ssm, init_log_dt_

MODES = 'sh', 'mh', 'mf'


class BlockStateCache(NamedTuple):
    """What the layer remembers of a sequence: two windows and a state; updated in place.

    Attributes:
        keys: Of this window and the one before, [B, heads, 2 * window, head_dim]; that of position p is at p mod 2W.
        values: The same.
        context: Keys and values of the context states of this window, [B, heads, window or num_states, 2 * head_dim].
        last: In mode 'mf' the SSM's latest outputs, [B, num_states, d]; else empty.
        state: Of the SSM, complex [B, d, M].
        position: Positions so far of each sequence, an integer tensor [B] on the parameters' device.
    """

    keys: Tensor
    values: Tensor
    context: Tensor
    last: Tensor
    state: Tensor
    position: Tensor


@register_notrace_module
class BlockState(nn.Module):
    """The mixer of a Block-State Transformer layer, whose residual connection and MLP belong to the block around it.

    An SSM reads the whole sequence. In windows of W positions, all in parallel, each token attends to itself and what
    precedes it in its window and the window before, with T5's relative position bias, and to context states made of the
    SSM's outputs:

        out = out_proj([softmax(q k^T + bias) v, softmax(q' k'^T) v']),  k', v' = state_proj(context states)

    - 'sh' (single head): the outputs [L, d] of one SSM for all heads. A token sees those of its window up to itself.
    - 'mh' (multi-head): the same with one SSM output, and one state_proj, for each head.
    - 'mf' (multi-filter): num_states outputs of the SSM at the last position of the window before, with an embedding of
      their number; the first window has learned ones.

    Args:
        d_model: Token channels d.
        mode: 'sh', 'mh' or 'mf'.
        window: Positions W of a window.
        num_heads: Heads of both attentions.
        head_dim: Channels of a head; d_model / num_heads by default.
        num_states: Context states of 'mf'.
        ssm: 's4d' for diagonal state-space models as in `S4D`; 'filter' for kernels exp(-a t) * FFN(pos(t)), which have
            no steps. Either has a skip connection D.
        d_state: State dimension N of 's4d'.
        num_buckets: Different biases of a head.
        max_distance: The distance from which on all have the same bias.
    """

    def __init__(
        self,
        d_model: int,
        mode: str = 'sh',
        window: int = 512,
        num_heads: int = 8,
        head_dim: Optional[int] = None,
        num_states: int = 32,
        ssm: str = 's4d',
        d_state: int = 64,
        num_buckets: int = 32,
        max_distance: int = 128,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_choice(MODES, mode=mode)
        check_choice(('s4d', 'filter'), ssm=ssm)
        check_counts(d_model=d_model, window=window, num_heads=num_heads, num_states=num_states)
        check_counts(2, num_buckets=num_buckets)
        check_counts(num_buckets, max_distance=max_distance)
        check_ssm(d_state, 0.0, 'zoh', None, 0.001, 0.1)
        if head_dim is None and d_model % num_heads:
            raise ValueError(f'num_heads must divide the {d_model} channels, or give head_dim; got {num_heads}')
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        check_counts(head_dim=self.head_dim)
        self.mode, self.window, self.num_heads, self.max_distance = mode, window, num_heads, max_distance
        inner = num_heads * self.head_dim
        outputs = {'sh': 1, 'mh': num_heads, 'mf': num_states}[mode]
        if ssm == 's4d':
            kernel = BlockKernel(d_model, d_state // 2, outputs, d_model, 'lin', 'zoh', (0.001, 0.1), **dd)
            self.ssm: nn.Module = BlockConv(kernel, outputs, **dd)
        else:
            self.ssm = _FilterConv(d_model, outputs, **dd)
        self.in_proj = nn.Linear(d_model, 4 * inner, bias=False, **dd)  # q, k, v and the queries to the states
        heads = num_heads if mode == 'mh' else 1
        self.state_proj = nn.Parameter(torch.empty(heads, d_model, 2 * inner // heads, **dd))
        self.out_proj = nn.Linear(2 * inner, d_model, bias=False, **dd)
        self.relative_bias = nn.Parameter(torch.empty(num_buckets, num_heads, **dd))
        if mode == 'mf':
            self.first_states = nn.Parameter(torch.empty(num_states, d_model, **dd))
            self.state_embed = nn.Parameter(torch.empty(num_states, d_model, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises what is not a module; SSM and linear layers initialise themselves."""
        bound = self.state_proj.shape[1] ** -0.5
        nn.init.uniform_(self.state_proj, -bound, bound)
        nn.init.normal_(self.relative_bias, std=0.02)
        if self.mode == 'mf':
            nn.init.normal_(self.first_states, std=0.02)
            nn.init.normal_(self.state_embed, std=0.02)

    def forward(self, x: Tensor, cache: Optional[BlockStateCache] = None) -> Tensor:
        """[B, L, d] -> [B, L, d]

        Args:
            x: Tokens [B, L, d].
            cache: What precedes x, as much of each sequence; updated to what precedes the next token. Carries no
                gradients.
        """
        if cache is not None:
            return self._continue_windows(x, cache)
        seqlen = x.shape[1]
        x = F.pad(x, (0, 0, 0, -seqlen % self.window))  # whole windows; nothing sees later tokens
        q, k, v, q_state = (self._windows(part) for part in self._heads(self.in_proj(x)))
        k_state, v_state = self._context(x).chunk(2, dim=-1)
        own = self._attend_to_tokens(q, k, v)
        states = _attend(q_state, k_state, v_state, is_causal=self.mode != 'mf')
        y = torch.cat([own, states], dim=2).permute(0, 1, 3, 2, 4)  # [B, windows, W, 2 * heads, head_dim]
        return self.out_proj(y.flatten(3).flatten(1, 2))[:, :seqlen]

    def _heads(self, x: Tensor) -> Tuple[Tensor, ...]:
        """[B, L, c * heads * head_dim] -> c of [B, heads, L, head_dim]"""
        return x.unflatten(-1, (-1, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def _windows(self, x: Tensor) -> Tensor:
        """[B, heads, L, c] -> [B, windows, heads, W, c]"""
        return x.unflatten(2, (-1, self.window)).transpose(1, 2)

    def _attend_to_tokens(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention to this window and the one before: three of [B, windows, heads, W, head_dim] -> the same"""
        place = torch.arange(self.window, device=q.device)
        distance = place[:, None] - place  # [W, W]
        bias = torch.cat([self._bias(distance + self.window), self._bias(distance)], dim=-1).to(q.dtype)
        first = F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], bias[..., self.window :]).unsqueeze(1)
        if q.shape[1] == 1:
            return first
        k, v = (torch.cat([part[:, :-1], part[:, 1:]], dim=3) for part in (k, v))
        return torch.cat([first, _attend(q[:, 1:], k, v, bias)], dim=1)

    def _bias(self, distance: Tensor) -> Tensor:
        """T5's bias of keys this many positions back, minus infinity for those ahead: [...] -> [heads, ...]

        https://arxiv.org/abs/1910.10683. Half of the buckets are of one distance each, the others grow exponentially.
        """
        buckets = self.relative_bias.shape[0]
        exact = buckets // 2
        growth = torch.log(distance.clamp(min=exact) / exact) / math.log(self.max_distance / exact)
        far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
        bias = self.relative_bias[torch.where(distance < exact, distance.clamp(min=0), far)].movedim(-1, 0)
        return bias.masked_fill(distance < 0, float('-inf'))

    def _context(self, x: Tensor) -> Tensor:
        """Keys and values of the context states: [B, L, d] -> [B, windows, heads, W or S, 2 * head_dim]"""
        u = widen(x).mT  # [B, d, L]
        if self.mode != 'mf':
            return self._windows(self._project_states(self._convolve(u).to(x.dtype)))
        first = self.first_states.expand(x.shape[0], 1, -1, -1)
        before = self._window_ends(u).to(x.dtype)[:, :-1]  # [B, windows - 1, S, d]
        return self._project_states(torch.cat([first.to(x.dtype), before], dim=1))

    def _project_states(self, states: Tensor) -> Tensor:
        """Keys and values: [B, 1 or heads, L, d], or in mode 'mf' [B, ..., S, d] -> [B, ..., heads, L, 2 * head_dim]"""
        if self.mode == 'mf':
            states = (states + self.state_embed).unsqueeze(-3)
        projected = states @ self.state_proj.to(states.dtype)
        if self.mode == 'mh':
            return projected
        return projected.squeeze(-3).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def _convolve(self, u: Tensor) -> Tensor:
        """Outputs of the SSM at all positions: [B, d, L] -> [B, outputs, L, d]"""
        kernel = self.ssm.kernel()
        taps = kernel.kernel(u.shape[-1])
        return (long_conv(u.unsqueeze(1), taps) + self._skip(u)).mT

    def _skip(self, u: Tensor) -> Tensor:
        """D u: [B, d, L] -> [B, outputs, d, L]"""
        return widen(self.ssm.D).unsqueeze(-1) * u.unsqueeze(1)

    def _window_ends(self, u: Tensor) -> Tensor:
        """Outputs of the SSM at the last position of each window: [B, d, L] -> [B, windows, outputs, d]"""
        last = slice(self.window - 1, None, self.window)
        ssm = self.ssm.kernel()
        if not isinstance(ssm, Diagonal):
            return self._convolve(u)[:, :, last].transpose(1, 2)
        states = ssm.gain * diagonal_state(ssm.log_decay, u.unflatten(-1, (-1, self.window)).transpose(1, 2))
        reach = 1  # each state holds this many windows
        while reach < states.shape[1]:
            earlier = torch.exp(ssm.log_decay * (reach * self.window)) * states[:, :-reach]
            states = torch.cat([states[:, :reach], states[:, reach:] + earlier], dim=1)
            reach *= 2
        return self._outputs(ssm, states) + self._skip(u[..., last]).permute(0, 3, 1, 2)

    def _outputs(self, ssm: Diagonal, state: Tensor) -> Tensor:
        """[..., d, M] -> [..., outputs, d]"""
        return 2 * torch.einsum('kdm,...dm->...kd', ssm.C, state).real

    def allocate_cache(self, batch_size: int) -> BlockStateCache:
        """The cache of a sequence that has not begun, on the parameters' device.

        Raises:
            ValueError: If the SSM has no steps.
        """
        if isinstance(self.ssm, _FilterConv):
            raise ValueError("the layer has steps only with ssm='s4d', got ssm='filter'")
        weight, shape = self.in_proj.weight, (batch_size, self.num_heads)
        keys = weight.new_zeros(*shape, 2 * self.window, self.head_dim)
        places = self.window
        last = weight.new_empty(batch_size, 0, weight.shape[1])
        if self.mode == 'mf':
            places = self.first_states.shape[0]
            last = self.first_states.detach().expand(batch_size, -1, -1).clone()
        context = weight.new_zeros(*shape, places, 2 * self.head_dim)
        decay = self.ssm.kernel().log_decay
        state, position = decay.new_zeros(batch_size, *decay.shape), weight.new_zeros(batch_size, dtype=torch.long)
        return BlockStateCache(keys, keys.clone(), context, last, state, position)

    @torch.no_grad()
    def step(self, x: Tensor, cache: BlockStateCache) -> Tensor:
        """The output for one more token, equal to that of the whole sequence; without gradients.

        Sequences may be of different lengths so far.

        Args:
            x: Token [B, d].
            cache: What precedes the token; updated.

        Returns:
            [B, d].
        """
        y, updated = self._continue(x.unsqueeze(1), cache)
        _store(cache, updated)
        return y.squeeze(1)

    def _continue_windows(self, x: Tensor, cache: BlockStateCache) -> Tensor:
        """Tokens after what precedes them, window by window: [B, L, d] -> [B, L, d]"""
        first = self.window - int(cache.position[0]) % self.window  # tokens that this window lacks
        # The backward pass needs what the cache held.
        updated, outputs = BlockStateCache(*(part.clone() for part in cache)) if torch.is_grad_enabled() else cache, []
        for part in (x[:, :first], *x[:, first:].split(self.window, dim=1)):
            if part.shape[1]:
                y, updated = self._continue(part, updated)
                outputs.append(y)
        _store(cache, updated)
        return torch.cat(outputs, dim=1)

    def _continue(self, x: Tensor, cache: BlockStateCache) -> Tuple[Tensor, BlockStateCache]:
        """Tokens of one window [B, L, d] -> [B, L, d], and what precedes the next one; reads nothing from the device.

        Without gradients the cache is updated in place.
        """
        seqlen, slots = x.shape[1], 2 * self.window
        position = cache.position.unsqueeze(1) + torch.arange(seqlen, device=x.device)  # [B, L]
        q, k, v, q_state = self._heads(self.in_proj(x))
        keys, values = (_put(*pair, position % slots) for pair in ((cache.keys, k), (cache.values, v)))
        distance = (position.unsqueeze(-1) - torch.arange(slots, device=x.device)) % slots  # [B, L, slots]
        start = position // self.window * self.window - self.window  # of the window before
        seen = distance <= (position - start.clamp(min=0)).unsqueeze(-1)
        bias = self._bias(torch.where(seen, distance, -1)).transpose(0, 1).to(q.dtype)  # [B, heads, L, slots]
        own = F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype), bias)
        place = position % self.window
        context, last, state = self._continue_context(x, place, cache)
        k_state, v_state = context.to(q.dtype).chunk(2, dim=-1)
        seen = None
        if self.mode != 'mf':
            seen = (torch.arange(self.window, device=x.device) <= place.unsqueeze(-1)).unsqueeze(1)
        states = F.scaled_dot_product_attention(q_state, k_state, v_state, seen)
        y = self.out_proj(torch.cat([own, states], dim=1).transpose(1, 2).flatten(2))
        return y, BlockStateCache(keys, values, context, last, state, cache.position + seqlen)

    def _continue_context(self, x: Tensor, place: Tensor, cache: BlockStateCache) -> Tuple[Tensor, Tensor, Tensor]:
        """`context`, `last` and `state` of the cache after these tokens, whose places in the window are [B, L]."""
        u, ssm = widen(x).mT, self.ssm.kernel()
        state = ssm.last_state(cache.state, u)
        if self.mode == 'mf':
            new = self._project_states(cache.last.to(x.dtype)).to(cache.context.dtype)
            context = torch.where((place[:, 0] == 0)[:, None, None, None], new, cache.context)
            return context, self._outputs(ssm, state) + self._skip(u[..., -1:]).squeeze(-1), state
        outputs = self._convolve(u).mT + ssm.response(cache.state.clone(), x.shape[1])  # [B, outputs, d, L]
        return _put(cache.context, self._project_states(outputs.mT.to(x.dtype)), place), cache.last, state

    def no_weight_decay(self) -> Set[str]:
        """Names of the step sizes, A and B of the SSM, or of the decays of the filters."""
        ssm = ('.inv_dt', '.A_real', '.A_imag', '.B', '.log_decay')
        return {name for name, _ in self.named_parameters() if name.startswith('ssm.') and name.endswith(ssm)}


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:
    """Attention in windows: [B, windows, heads, W, c], two of [B, windows, heads, K, c] -> [B, windows, heads, W, c]"""
    windows = q.shape[:2]
    q, k, v = (part.flatten(0, 1) for part in (q, k, v))  # kernels take four dimensions
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=is_causal).unflatten(0, windows)


def _put(stored: Tensor, new: Tensor, place: Tensor) -> Tensor:
    """New entries [B, heads, L, c] at their places [B, L], in place unless gradients are needed."""
    new, index = new.to(stored.dtype), place[:, None, :, None].expand(new.shape)
    return stored.scatter(2, index, new) if torch.is_grad_enabled() else stored.scatter_(2, index, new)


def _store(cache: BlockStateCache, updated: BlockStateCache) -> None:
    for old, new in zip(cache, updated):
        if new is not old:
            old.copy_(new.detach())


class _Taps(NamedTuple):
    """Kernels that are computed tap by tap."""

    module: '_FilterKernel'

    def kernel(self, length: int) -> Tensor:
        """[outputs, d, length]"""
        return self.module.taps(length)


class _FilterKernel(nn.Module):
    """Kernels exp(-a t) * FFN(pos(t)), where pos(t) are sines and cosines of several speeds.

    Args:
        dim: Channels d.
        outputs: Kernels of each channel.
    """

    BANDS, HIDDEN = 16, 64

    def __init__(self, dim: int, outputs: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = nn.Linear(2 * self.BANDS, self.HIDDEN, **dd)
        self.fc2 = nn.Linear(self.HIDDEN, outputs * dim, **dd)
        self.log_decay = nn.Parameter(torch.empty(outputs, dim, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decays as the step sizes of S4D; the outputs of slow ones are as large as those of fast ones."""
        init_log_dt_(self.log_decay, 0.001, 0.1)
        scale = torch.exp(self.log_decay / 2).flatten()
        self.fc2.reset_parameters()
        self.fc2.weight.mul_(scale.unsqueeze(-1))
        self.fc2.bias.mul_(scale)

    def forward(self) -> Any:
        return _Taps(self)

    def taps(self, length: int) -> Tensor:
        """[outputs, d, length]"""
        decay = torch.exp(widen(self.log_decay))
        time = torch.arange(length, device=decay.device, dtype=decay.dtype)
        speed = 10000 ** -(torch.arange(self.BANDS, device=decay.device, dtype=decay.dtype) / self.BANDS)
        angle = time[:, None] * speed
        features = torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.fc1.weight.dtype)
        values = self.fc2(F.gelu(self.fc1(features))).mT.unflatten(0, decay.shape)
        return torch.exp(-decay.unsqueeze(-1) * time) * values


class _FilterConv(nn.Module):
    """Kernels with a skip connection D, as `BlockConv` has it."""

    def __init__(self, dim: int, outputs: int, device=None, dtype=None) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.empty(outputs, dim, device=device, dtype=dtype))
        self.kernel = _FilterKernel(dim, outputs, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.D)
