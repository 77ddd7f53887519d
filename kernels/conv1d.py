"""Causal depthwise convolutions of sequences: Mamba's, and Vim's two, one along the sequence and one against it."""

from functools import lru_cache
from typing import Any, Iterator, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check, check_that
from ._device import fast_sigmoid, sigmoid
from ._launch import MAX_PLANS, Launch, cdiv, is_nvidia, num_processors, runs_on_triton, tl, triton
from ._operator import Operator

NUM_DIRECTIONS = 2
MAX_TAPS = 4  # of the Triton kernels
# Programs of the backward pass for each multiprocessor: a few at a time, and several rounds of them.
_PROGRAMS_PER_PROCESSOR = 16


class _Tile(NamedTuple):
    """Parts of a sequence by channels of a program, and the steps of a part that the forward pass walks: neighbouring
    programs would load what its taps see several times. A row of a tile fills whole sectors of memory."""

    block_l: int
    block_d: int
    walk: int = 1


# By what neighbours in memory are. A thread of the backward pass has few elements: it keeps a sum for every tap and
# direction of each.
_FORWARD_TILES = dict(channels_last=_Tile(16, 64, walk=8), steps_last=_Tile(128, 16))
_BACKWARD_TILES = dict(channels_last=_Tile(16, 32), steps_last=_Tile(128, 4))


def bidirectional_conv1d(x: Tensor, weight: Tensor, bias: Tensor, silu: bool = False) -> Tensor:
    """Causal depthwise convolutions of a sequence in both directions.

    With w taps, and x zero outside of the sequence:

        u_{l,0} = bias[0] + sum_t weight[0, :, t] * x_{l - (w - 1) + t}
        u_{l,1} = bias[1] + sum_t weight[1, :, t] * x_{l + (w - 1) - t}

    Computed in fp32 (fp64 if x is fp64), by Triton for at most 4 taps. Differentiable in reverse mode in every tensor.

    Args:
        x: [B, L, D], in any floating dtype and with any strides.
        weight: [2, D, w].
        bias: [2, D].
        silu: Return silu(u).

    Returns:
        u [B, L, 2, D] in x's dtype, both directions in the sequence's order, contiguous.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    check('bidirectional_conv1d', x=(x, 'B L D'), weight=(weight, '2 D w>0'), bias=(bias, '2 D'))
    return _conv1d(x, weight, bias, silu, _has_kernel(x, weight))


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    seq_idx: Optional[Tensor] = None,
    initial_states: Optional[Tensor] = None,
    return_final_states: bool = False,
    final_states_out: Optional[Tensor] = None,
    activation: Optional[str] = None,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """Causal depthwise convolution with the signature and layouts of causal_conv1d's `causal_conv1d_fn`.

    With w taps, and x_{-1}, ..., x_{-(w - 1)} the columns of initial_states from the last to the first, or zero:

        out_l = activation(bias + sum_t weight[:, t] * x_{l - (w - 1) + t})

    Computed in fp32 (fp64 if x is fp64), by Triton for at most 4 taps; with seq_idx in plain PyTorch. Differentiable in
    reverse mode in every floating tensor.

    Args:
        x: [B, D, L], in any floating dtype and with any strides.
        weight: [D, w].
        bias: [D].
        seq_idx: Integers [B, L], the number of the packed sequence of each position: a tap only sees positions with
            the same number. Where it is negative (padding), out is zero.
        initial_states: The columns before x [B, D, w - 1]; not together with seq_idx.
        return_final_states: Also return the last w - 1 columns of initial_states and x; not together with seq_idx.
        final_states_out: Tensor [B, D, w - 1] that these are written to; unused without `return_final_states`.
        activation: None, 'silu' or 'swish', which is the same.

    Returns:
        out [B, D, L] in x's dtype and its order of dimensions in memory; with `return_final_states` also the final
        states [B, D, w - 1] in x's dtype.

    Raises:
        ValueError: If shapes, dtypes, devices or options do not fit together.
    """
    states = dict(initial_states=(initial_states, 'B D history'), final_states_out=(final_states_out, 'B D history'))
    known = dict(history=weight.shape[-1] - 1) if weight.ndim else {}
    check('causal_conv1d', known, x=(x, 'B D L'), weight=(weight, 'D w>0'), bias=(bias, 'D'), **states)
    for name, (tensor, _) in states.items():
        same = tensor is None or tensor.dtype == x.dtype
        check_that(same, f'{name} must be {x.dtype} like x, got {getattr(tensor, "dtype", None)}')
    check_that(activation in (None, 'silu', 'swish'), f"activation must be None, 'silu' or 'swish', got {activation!r}")
    silu = activation is not None
    if seq_idx is not None:
        _check_seq_idx(x, seq_idx, initial_states, return_final_states)
        return _packed_conv1d(x, weight, bias, seq_idx, silu)
    history = weight.shape[1] - 1
    if initial_states is not None:
        x = torch.cat([initial_states.mT, x.mT], dim=1).mT if x.stride(1) == 1 else torch.cat([initial_states, x], -1)
    out = _conv1d(x.mT, weight[None], None if bias is None else bias[None], silu, _has_kernel(x, weight))
    out = out.squeeze(2).mT
    out = out if initial_states is None else out[..., history:]
    if not return_final_states:
        return out
    final_states = F.pad(x, (history - x.shape[-1], 0))  # a copy, cut or filled up at its beginning
    return out, final_states if final_states_out is None else final_states_out.copy_(final_states)


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    return weight.shape[-1] <= MAX_TAPS and runs_on_triton(x)


def _check_seq_idx(x: Tensor, seq_idx: Tensor, initial_states: Optional[Tensor], return_final_states: bool) -> None:
    expected = x.shape[0], x.shape[2]
    fits = tuple(seq_idx.shape) == expected and seq_idx.dtype in (torch.int32, torch.int64)
    check_that(fits, f'seq_idx must be integers {list(expected)}, got {tuple(seq_idx.shape)} {seq_idx.dtype}')
    check_that(seq_idx.device == x.device, f'seq_idx must be on {x.device} like x, got {seq_idx.device}')
    if initial_states is not None or return_final_states:
        given = 'initial_states' if initial_states is not None else 'return_final_states=True'
        raise ValueError(f'seq_idx cannot be combined with initial or final states, got {given}')


def _packed_conv1d(x: Tensor, weight: Tensor, bias: Optional[Tensor], seq_idx: Tensor, silu: bool) -> Tensor:
    """`causal_conv1d` with `seq_idx`."""
    seqlen, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    x_wide, weight, seq_idx = x.to(wide), weight.to(wide), seq_idx.unsqueeze(1)
    out = torch.zeros_like(x_wide) if bias is None else bias.to(wide)[:, None].expand_as(x)
    for tap in range(weight.shape[1]):
        back = weight.shape[1] - 1 - tap
        if back < seqlen:
            same = seq_idx[..., back:] == seq_idx[..., : seqlen - back]
            seen = torch.where(same, x_wide[..., : seqlen - back], 0)
            out = out + F.pad(weight[:, tap, None] * seen, (back, 0))
    out = torch.where(seq_idx < 0, 0, F.silu(out) if silu else out)
    return torch.empty_like(x).copy_(out)


def _forward(x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool, triton: bool, save: bool) -> Tuple[Tensor]:
    if triton:
        return (conv1d_forward(x, weight.contiguous(), None if bias is None else bias.contiguous(), silu),)
    u = _convolve(x, weight, bias)
    return (_empty_output(x, weight).copy_(F.silu(u, inplace=True) if silu else u),)


def _backward(grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Optional[Tensor]]:
    (grad_u,), (x, weight, bias, silu, triton) = grads, inputs
    if triton:
        grad_x = torch.empty_like(x)
        contiguous = weight.contiguous(), None if bias is None else bias.contiguous()
        total = conv1d_backward(grad_u, x, *contiguous, silu, grad_x).sum(dim=0)
        grad_weight, grad_bias = total.split([weight.numel(), total.numel() - weight.numel()])
        return grad_x, grad_weight.view(weight.shape), None if bias is None else grad_bias.view(bias.shape)
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_u, x_wide = grad_u.to(wide), x.to(wide)
    if silu:
        u = _convolve(x, weight, bias)
        gate = u.sigmoid()
        grad_u = grad_u * gate * (1 + u * (1 - gate))
    grad_x = torch.zeros_like(x, dtype=wide)
    grad_weight = torch.zeros_like(weight, dtype=wide, memory_format=torch.contiguous_format)
    taps = _taps_first(weight.to(wide))
    for direction, tap, to, source in _taps(x.shape[1], weight):
        grad = grad_u[:, to, direction]
        grad_x[:, source].addcmul_(grad, taps[direction, tap])
        grad_weight[direction, :, tap] = (grad * x_wide[:, source]).sum(dim=(0, 1))
    return grad_x.to(x.dtype), grad_weight, None if bias is None else grad_u.sum(dim=(0, 1))


def _like(x: Tensor, weight: Tensor, *others: Any) -> Tuple[Tensor]:
    return (_empty_output(x, weight),)


def _macs(x: Sequence[int], weight: Sequence[int], *others: Any) -> int:
    batch, seqlen, _ = x
    directions, dim, taps = weight
    return batch * seqlen * directions * dim * taps


_conv1d = Operator('causal_conv1d', _forward, _backward, _like, macs=_macs)


def _empty_output(x: Tensor, weight: Tensor) -> Tensor:
    """Uninitialised [B, L, K, D] for x [B, L, D]: of one direction in x's order of dimensions, otherwise contiguous."""
    if weight.shape[0] == 1:
        return torch.empty_like(x.unsqueeze(2))
    return x.new_empty((*x.shape[:2], weight.shape[0], x.shape[2]))


def _convolve(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """The convolution before its activation in plain PyTorch, [B, L, K, D] in fp32 or fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    u = x.new_empty(*x.shape[:2], weight.shape[0], x.shape[2])
    u[:] = 0 if bias is None else bias
    taps = _taps_first(weight.to(wide))
    for direction, tap, to, source in _taps(x.shape[1], weight):
        u[:, to, direction].addcmul_(x[:, source], taps[direction, tap])
    return u


def _taps_first(weight: Tensor) -> Tensor:
    """[K, D, w] -> [K, w, D]"""
    return weight.permute(0, 2, 1).contiguous()


def _taps(seqlen: int, weight: Tensor) -> Iterator[Tuple[int, int, slice, slice]]:
    """Yields direction, tap, the positions that the tap writes and those that it reads."""
    directions, _, width = weight.shape
    for tap in range(width):
        back = width - 1 - tap
        if back < seqlen:
            late, early = slice(back, seqlen), slice(0, seqlen - back)
            for direction, (to, source) in zip(range(directions), ((late, early), (early, late))):
                yield direction, tap, to, source


# The kernels count taps back from the present position: tap s of direction 0 sees x_{l-s}, tap s of direction 1
# x_{l+s}; both are weight[k, :, TAPS - 1 - s]. LOOK is the sign of that offset, -1 or 1.


@triton.jit
def _load_steps(columns, stride, step, has_channel, seqlen):
    """The steps `step` [BLOCK_L] of columns that begin at the pointers [1, BLOCK_D], zero outside of the sequence."""
    mask = ((step >= 0) & (step < seqlen))[:, None] & has_channel[None, :]
    return tl.load(columns + step[:, None] * stride, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_L, BLOCK_D]


@triton.jit
def _load_window(x, columns, stride, step, has_channel, seqlen, LOOK: tl.constexpr, TAPS: tl.constexpr):
    """The tiles that the taps see from the tile x at `step`, in the taps' order; x is the first."""
    window = (x,)
    for tap in tl.static_range(1, TAPS):
        window = window + (_load_steps(columns, stride, step + tap * LOOK, has_channel, seqlen),)
    return window


@triton.jit
def _load_parameters(weight, bias, direction, channel, has_channel, dim, TAPS: tl.constexpr):
    """The taps of a direction, as a tuple of [1, BLOCK_D], and its bias [1, BLOCK_D]."""
    row = direction * dim + channel
    taps = ()
    for tap in tl.static_range(TAPS):
        loaded = tl.load(weight + row * TAPS + (TAPS - 1 - tap), mask=has_channel, other=0.0)  # [BLOCK_D]
        taps = taps + (loaded.to(tl.float32)[None, :],)
    shift = tl.zeros_like(taps[0])
    if bias is not None:
        shift = tl.load(bias + row, mask=has_channel, other=0.0).to(tl.float32)[None, :]
    return taps, shift


@triton.jit(do_not_specialize_on_alignment=['seqlen'])
def conv1d_kernel(
    x,  # [B, L, D], by its strides
    weight,  # [DIRECTIONS, D, TAPS]
    bias,  # [DIRECTIONS, D], or None
    out,  # [B, L, DIRECTIONS, D], by its strides
    seqlen,
    dim,
    x_strides,
    out_strides,
    DIRECTIONS: tl.constexpr,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WALK: tl.constexpr,
    NVIDIA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program computes BLOCK_L parts of WALK steps in all directions, for one entry of the batch.

    It walks all parts at once and holds what the taps see, so that it loads each step once.
    """
    x_batch, x_step, x_channel = x_strides
    out_batch, out_step, out_direction, out_channel = out_strides
    pid = tl.program_id(0)
    channel_blocks = tl.cdiv(dim, BLOCK_D)
    step_blocks = tl.cdiv(seqlen, BLOCK_L * WALK)
    channel = pid % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    first = (pid // channel_blocks % step_blocks * BLOCK_L + tl.arange(0, BLOCK_L)) * WALK
    batch = (pid // channel_blocks // step_blocks).to(tl.int64)
    if WIDE:
        channel = channel.to(tl.int64)
        first = first.to(tl.int64)
    has_channel = channel < dim
    columns = x + batch * x_batch + (channel * x_channel)[None, :]
    out += batch * out_batch + (channel * out_channel)[None, :]
    taps, shift = _load_parameters(weight, bias, 0, channel, has_channel, dim, TAPS)
    if DIRECTIONS > 1:
        taps_against, shift_against = _load_parameters(weight, bias, 1, channel, has_channel, dim, TAPS)
    here: tl.constexpr = TAPS - 1  # the place of the present step in the window
    ahead: tl.constexpr = (DIRECTIONS - 1) * here
    window = ()
    for place in tl.static_range(here + ahead):
        window = window + (_load_steps(columns, x_step, first + (place - here), has_channel, seqlen),)
    for walked in tl.static_range(WALK):
        step = first + walked
        window = window + (_load_steps(columns, x_step, step + ahead, has_channel, seqlen),)
        mask = (step < seqlen)[:, None] & has_channel[None, :]
        target = out + step[:, None] * out_step
        u = shift
        for tap in tl.static_range(TAPS):
            u += taps[tap] * window[walked + here - tap]
        if SILU:
            u *= fast_sigmoid(u, NVIDIA)
        tl.store(target, u.to(out.dtype.element_ty), mask=mask)
        if DIRECTIONS > 1:
            u = shift_against
            for tap in tl.static_range(TAPS):
                u += taps_against[tap] * window[walked + here + tap]
            if SILU:
                u *= fast_sigmoid(u, NVIDIA)
            tl.store(target + out_direction, u.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_direction(
    grad_x,
    sums,
    past,
    ahead,
    taps,
    bias,
    grad_columns,
    stride,
    step,
    has_channel,
    seqlen,
    LOOK: tl.constexpr,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
):
    """Adds a direction's part of the gradient of x at `step`, and of the sums for each tap and the bias.

    Tap s takes x_m to the output at m - LOOK * s, so that its part of the gradient of x is the gradient there times the
    tap, and its own gradient the sum over m of the gradient there times x_m. `past` are the tiles of x that the taps
    see from `step`, and `ahead` their counterparts on the other side; without SILU only the first of them.
    """
    added = ()
    for s in tl.static_range(TAPS):
        grad = _load_steps(grad_columns, stride, step - s * LOOK, has_channel, seqlen)
        if SILU:
            u = bias
            for tap in tl.static_range(TAPS):
                if tap >= s:
                    u += taps[tap] * past[tap - s]
                else:
                    u += taps[tap] * ahead[s - tap]
            gate = sigmoid(u)
            grad *= gate * (1.0 + u * (1.0 - gate))
        if s == 0:
            sum_bias = sums[TAPS] + grad
        grad_x += taps[s] * grad
        added = added + (sums[s] + grad * past[0],)
    return grad_x, added + (sum_bias,)


@triton.jit
def _store_sums(target, sums, row, weights, has_channel, TAPS: tl.constexpr):
    """Sums over the steps, of rows [BLOCK_D] of the weight [weights], and of the bias after it."""
    for tap in tl.static_range(TAPS):
        tl.store(target + row * TAPS + (TAPS - 1 - tap), tl.sum(sums[tap], axis=0), mask=has_channel)
    tl.store(target + weights + row, tl.sum(sums[TAPS], axis=0), mask=has_channel)


@triton.jit(do_not_specialize_on_alignment=['seqlen', 'chunks', 'chunk_tiles'])
def conv1d_backward_kernel(
    grad_u,  # [B, L, DIRECTIONS, D], by its strides
    x,  # [B, L, D], by its strides
    weight,  # [DIRECTIONS, D, TAPS]
    bias,  # [DIRECTIONS, D], or None
    grad_x,  # [B, L, D], by its strides: written
    sums,  # [B * chunks, DIRECTIONS * D * (TAPS + 1)]: written, parts of the gradients of weight and bias
    seqlen,
    dim,
    chunks,
    chunk_tiles,
    grad_strides,
    x_strides,
    grad_x_strides,
    DIRECTIONS: tl.constexpr,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program walks the tiles of a chunk of L for BLOCK_D channels, for one entry of the batch."""
    grad_batch, grad_step, grad_direction, grad_channel = grad_strides
    x_batch, x_step, x_channel = x_strides
    grad_x_batch, grad_x_step, grad_x_channel = grad_x_strides
    pid = tl.program_id(0)
    channel_blocks = tl.cdiv(dim, BLOCK_D)
    channel = pid % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    row = (pid // channel_blocks).to(tl.int64)
    batch = row // chunks
    first = pid // channel_blocks % chunks * chunk_tiles * BLOCK_L
    if WIDE:
        channel = channel.to(tl.int64)
        first = first.to(tl.int64)
    has_channel = channel < dim
    columns = x + batch * x_batch + (channel * x_channel)[None, :]
    grad_columns = grad_u + batch * grad_batch + (channel * grad_channel)[None, :]
    grad_x += batch * grad_x_batch + (channel * grad_x_channel)[None, :]
    sums += row * (DIRECTIONS * (TAPS + 1)) * dim

    taps, shift = _load_parameters(weight, bias, 0, channel, has_channel, dim, TAPS)
    zero = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    none = ()
    for _ in tl.static_range(TAPS + 1):
        none = none + (zero,)
    along, against = none, none
    if DIRECTIONS > 1:
        taps_against, shift_against = _load_parameters(weight, bias, 1, channel, has_channel, dim, TAPS)
    for tile in range(0, chunk_tiles):
        step = first + tile * BLOCK_L + tl.arange(0, BLOCK_L)
        here = _load_steps(columns, x_step, step, has_channel, seqlen)
        before, after = (here,), (here,)
        if SILU:
            before = _load_window(here, columns, x_step, step, has_channel, seqlen, -1, TAPS)
            after = _load_window(here, columns, x_step, step, has_channel, seqlen, 1, TAPS)
        grad, along = _add_direction(
            zero, along, before, after, taps, shift, grad_columns, grad_step, step, has_channel, seqlen, -1, TAPS, SILU
        )
        if DIRECTIONS > 1:
            grad, against = _add_direction(
                grad,
                against,
                after,
                before,
                taps_against,
                shift_against,
                grad_columns + grad_direction,
                grad_step,
                step,
                has_channel,
                seqlen,
                1,
                TAPS,
                SILU,
            )
        mask = (step < seqlen)[:, None] & has_channel[None, :]
        tl.store(grad_x + step[:, None] * grad_x_step, grad.to(grad_x.dtype.element_ty), mask=mask)
    weights = DIRECTIONS * dim * TAPS
    _store_sums(sums, along, channel, weights, has_channel, TAPS)
    if DIRECTIONS > 1:
        _store_sums(sums, against, dim + channel, weights, has_channel, TAPS)


def conv1d_forward(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool, out: Optional[Tensor] = None
) -> Tensor:
    """Causal convolutions of x in K = 1 or 2 directions on Triton, and SiLU of them on request; computed in fp32.

    Args:
        x: [B, L, D] with any strides; fast where channels or steps are neighbours in memory.
        weight: [K, D, w], contiguous, with w of 1 to 4 taps, the last of which sees the present position; direction 0
            looks back, direction 1 ahead.
        bias: [K, D], contiguous.
        silu: Apply SiLU.
        out: Where to write, [B, L, K, D] with any strides.

    Returns:
        u [B, L, K, D]: `out`, or a new tensor in x's dtype.
    """
    out = _empty_output(x, weight) if out is None else out
    options = weight.shape[0], weight.shape[2], silu, is_nvidia(x)
    launch = _forward_launch(x.shape, x.stride(), out.stride(), *options)
    launch(x, weight, bias, out)
    return out


def conv1d_backward(
    grad_u: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool, grad_x: Tensor
) -> Tensor:
    """Gradients of `conv1d_forward`, the same at every run: writes that of x into grad_x, and returns the others.

    The convolution before SiLU is recomputed from x.

    Args:
        grad_u: Gradient of u [B, L, K, D] with any strides.
        grad_x: Where to write, [B, L, D] with any strides.

    Returns:
        Partial sums [parts, K * D * (w + 1)] in fp32 of the gradients of weight [K, D, w] and, after it, bias [K, D].
    """
    directions, dim, taps = weight.shape
    strides = grad_u.stride(), x.stride(), grad_x.stride()
    launch, parts = _backward_launch(x.shape, *strides, directions, taps, silu, num_processors(x))
    sums = torch.empty(parts, directions * dim * (taps + 1), dtype=torch.float32, device=x.device)
    launch(grad_u, x, weight, bias, grad_x, sums)
    return sums


@lru_cache(maxsize=MAX_PLANS)
def _forward_launch(
    shape: Tuple[int, int, int],
    x_strides: Tuple[int, ...],
    out_strides: Tuple[int, ...],
    directions: int,
    taps: int,
    silu: bool,
    nvidia: bool,
) -> Launch:
    batch, seqlen, dim = shape
    tile = _FORWARD_TILES[_layout(x_strides)]
    wide = _is_wide(tile, seqlen, dim, x_strides, out_strides)
    return Launch(
        conv1d_kernel,
        cdiv(dim, tile.block_d) * cdiv(seqlen, tile.block_l * tile.walk) * batch,
        (seqlen, dim, x_strides, out_strides),
        (directions, taps, silu, *tile, nvidia, wide),
    )


@lru_cache(maxsize=MAX_PLANS)
def _backward_launch(
    shape: Tuple[int, int, int],
    grad_strides: Tuple[int, ...],
    x_strides: Tuple[int, ...],
    grad_x_strides: Tuple[int, ...],
    directions: int,
    taps: int,
    silu: bool,
    processors: int,
) -> Tuple[Launch, int]:
    """The launch, and how many partial sums it leaves."""
    batch, seqlen, dim = shape
    tile = _BACKWARD_TILES[_layout(x_strides)]
    tiles, others = cdiv(seqlen, tile.block_l), batch * cdiv(dim, tile.block_d)
    wanted = cdiv(_PROGRAMS_PER_PROCESSOR * processors, max(others, 1))
    chunk_tiles = cdiv(tiles, max(min(wanted, tiles), 1))
    chunks = cdiv(tiles, max(chunk_tiles, 1))
    wide = _is_wide(tile, seqlen, dim, x_strides, grad_x_strides, grad_strides)
    launch = Launch(
        conv1d_backward_kernel,
        others * chunks,
        (seqlen, dim, chunks, chunk_tiles, grad_strides, x_strides, grad_x_strides),
        (directions, taps, silu, tile.block_l, tile.block_d, wide),
    )
    return launch, batch * chunks


def _layout(strides: Tuple[int, ...]) -> str:
    return 'steps_last' if strides[1] == 1 != strides[2] else 'channels_last'


def _is_wide(tile: _Tile, seqlen: int, dim: int, *strides: Tuple[int, ...]) -> bool:
    """Whether offsets within an entry of the batch, also of tiles that overhang, may need more than 32 bits."""
    steps, channels = seqlen + tile.block_l * tile.walk + MAX_TAPS, dim + tile.block_d
    return any(steps * stride[1] + channels * stride[-1] >= 2**31 for stride in strides)
