"""Independent float64 definitions of the operators, and the comparisons that tests make with them.

Nothing here imports the library. Loops walk one position at a time and index what the definition names, so that a
mistake shared with a vectorised implementation is unlikely.
"""

import inspect
import math

import torch
import torch.nn.functional as F

# torch.library.opcheck takes a tolerance only in newer versions of torch.
_HAS_TOLERANCE = 'rtol' in inspect.signature(torch.library.opcheck).parameters
OPCHECK_TOLERANCE = dict(rtol=2e-2, atol=2e-2) if _HAS_TOLERANCE else {}

# dtype -> (bound of the relative error by norm, rtol, atol); the last two as in mamba_ssm's own tests.
TOLERANCES = {
    torch.float64: (1e-10, 1e-8, 1e-8),
    torch.float32: (1e-4, 6e-4, 2e-3),
    torch.float16: (2e-3, 3e-3, 5e-3),
    torch.bfloat16: (1e-2, 3e-2, 5e-2),
}
DTYPES = list(TOLERANCES)
TINY = 1e-30  # what is smaller than this in float64 may be nothing in fp32


def relative_error(actual, expected):
    """Norm of the difference over the norm of what is expected; NaN if either holds one."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if not expected.numel():
        return 0.0
    scale = torch.linalg.vector_norm(expected).item()
    difference = torch.linalg.vector_norm(actual - expected).item()
    return difference / max(scale, TINY)


def assert_matches(actual, expected, dtype, name='', outliers=0.0):
    """Both by norm and element by element; absolute tolerances are in units of the root mean square.

    Of long sums with large terms that cancel, rounded to half precision, a share of `outliers` of the elements (or two)
    may exceed the tolerances up to four times.
    """
    assert actual.shape == expected.shape, f'{name}: {tuple(actual.shape)} instead of {tuple(expected.shape)}'
    if not expected.numel():
        return
    bound, rtol, atol = TOLERANCES[dtype]
    error = relative_error(actual, expected)
    assert error <= bound, f'{name}: relative error {error:.3g} is over {bound:.3g}'
    scale = expected.detach().double().square().mean().sqrt().item()
    if outliers:
        excess = (actual.double() - expected).abs() / (atol * max(scale, TINY) + rtol * expected.abs())
        count, worst = int((excess > 1).sum()), excess.max().item()
        assert count <= max(outliers * excess.numel(), 2), f'{name}: {count} of {excess.numel()} are not close'
        assert worst <= 4, f'{name}: the tolerance is exceeded {worst:.3g} times'
        return
    torch.testing.assert_close(
        actual.detach().double(),
        expected.detach().double(),
        rtol=rtol,
        atol=atol * max(scale, TINY),
        msg=lambda m: f'{name}: {m}',
    )


def assert_all_match(actual, expected, dtype, outliers=0.0):
    """Two dictionaries of tensors by name; None only where both have it."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert (actual[name] is None) == (expected[name] is None), name
        if expected[name] is not None:
            assert_matches(actual[name], expected[name], dtype, name, outliers)


def softplus(x):
    """log(1 + e^x) without overflow."""
    return torch.clamp(x, min=0) + torch.log1p(torch.exp(-torch.abs(x)))


def silu(x):
    return x / (1 + torch.exp(-x))


def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    initial_state=None,
    reverse=False,
):
    """The selective scan for one position, group and state at a time; differentiable. All arguments in float64.

    Returns:
        y [batch, dim, L] and the last state [batch, dim, N].
    """
    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    share = dim // delta.shape[1]
    h = [u.new_zeros(batch, dim) if initial_state is None else initial_state[:, :, n] for n in range(dstate)]
    y = [None] * seqlen
    for step in range(seqlen - 1, -1, -1) if reverse else range(seqlen):
        dt = torch.stack([delta[:, d // share, step] for d in range(dim)], dim=1)
        if delta_bias is not None:
            dt = dt + delta_bias
        if delta_softplus:
            dt = softplus(dt)
        x = u[:, :, step]
        out = 0
        for n in range(dstate):
            h[n] = torch.exp(dt * A[:, n]) * h[n] + dt * _coefficient(B, n, step, u) * x
            out = out + _coefficient(C, n, step, u) * h[n]
        if D is not None:
            out = out + D * x
        if z is not None:
            out = out * silu(z[:, :, step])
        y[step] = out
    return torch.stack(y, dim=-1), torch.stack(h, dim=-1)


def ssd_scan(
    x,
    dt,
    A,
    B,
    C,
    chunk_size=None,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    dt_softplus=False,
    dt_limit=(0, math.inf),
    reverse=False,
):
    """The scan of Mamba-2 for one position and head at a time; differentiable. All arguments in float64.

    Returns:
        y [batch, L, H, P] and the last state [batch, H, P, N].
    """
    batch, seqlen, heads, dim = x.shape
    share, dstate = heads // B.shape[2], B.shape[3]
    outs, states = [], []
    for head in range(heads):
        S = x.new_zeros(batch, dim, dstate) if initial_states is None else initial_states[:, head]
        before = torch.zeros(batch, dtype=torch.long, device=x.device)
        y = [None] * seqlen
        for step in range(seqlen - 1, -1, -1) if reverse else range(seqlen):
            if seq_idx is not None:
                S = torch.where((seq_idx[:, step] == before)[:, None, None], S, 0)
                before = seq_idx[:, step]
            size = dt[:, step, head] + (0 if dt_bias is None else dt_bias[head])
            size = softplus(size) if dt_softplus else size
            size = size.clamp(*dt_limit)
            u, b, c = x[:, step, head], B[:, step, head // share], C[:, step, head // share]
            S = torch.exp(size * A[head])[:, None, None] * S + torch.einsum('b,bp,bn->bpn', size, u, b)
            out = torch.einsum('bpn,bn->bp', S, c)
            if D is not None:
                out = out + D[head] * u
            if z is not None:
                out = out * silu(z[:, step, head])
            y[step] = out
        outs.append(torch.stack(y, dim=1))
        states.append(S)
    return torch.stack(outs, dim=2), torch.stack(states, dim=1)


def non_causal_ssd(x, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False):
    """Every position reads the sum of what all positions write; in float64."""
    share = x.shape[2] // B.shape[2]
    outs = []
    for head in range(x.shape[2]):
        size = dt[:, :, head] + (0 if dt_bias is None else dt_bias[head])
        weight = -(softplus(size) if dt_softplus else size) * A[head]
        u, b, c = x[:, :, head], B[:, :, head // share], C[:, :, head // share]
        S = sum(torch.einsum('b,bp,bn->bpn', weight[:, i], u[:, i], b[:, i]) for i in range(x.shape[1]))
        out = torch.stack([torch.einsum('bpn,bn->bp', S, c[:, i]) for i in range(x.shape[1])], dim=1)
        outs.append(out if D is None else out + D[head] * u)
    return torch.stack(outs, dim=2)


def _coefficient(tensor, n, step, u):
    """Entry n of B or C at one position for each channel, [batch or 1, dim]."""
    batch, dim, _ = u.shape
    if tensor.ndim == 2:
        return tensor[None, :, n]
    if tensor.ndim == 3:
        return tensor[:, n, step, None].expand(batch, dim)
    groups = tensor.shape[1]
    return torch.stack([tensor[:, d * groups // dim, n, step] for d in range(dim)], dim=1)


def route_pixels(height, width):
    """The (row, column) pairs that each of the four routes visits, in order."""
    by_row = [(h, w) for h in range(height) for w in range(width)]
    by_column = [(h, w) for w in range(width) for h in range(height)]
    return [by_row, by_column, by_row[::-1], by_column[::-1]]


def ss2d_scan(x, x_dbl, dt_weight, dt_bias, A, D):
    """Four scans over the routes of a map, each output added where its pixel is; differentiable, in float64."""
    batch, height, width, dim = x.shape
    dt_rank, dstate = dt_weight.shape[2], A.shape[2]
    out = {}
    for k, pixels in enumerate(route_pixels(height, width)):
        h = x.new_zeros(batch, dim, dstate)
        for row, column in pixels:
            dt, B, C = x_dbl[:, row, column, k].split([dt_rank, dstate, dstate], dim=-1)
            delta = softplus(torch.einsum('dr,br->bd', dt_weight[k], dt) + dt_bias[k])
            pixel = x[:, row, column]
            h = torch.exp(delta[:, :, None] * A[k]) * h + torch.einsum('bd,bn,bd->bdn', delta, B, pixel)
            y = torch.einsum('bn,bdn->bd', C, h) + D[k] * pixel
            out[row, column] = out.get((row, column), 0) + y
    rows = [torch.stack([out[row, column] for column in range(width)], dim=1) for row in range(height)]
    return torch.stack(rows, dim=1)


def gated_rms_norm(y, z, weight, other=None, groups=1, eps=1e-5, norm_before_gate=False):
    """Each group of channels on its own."""
    y, gate = y if other is None else (y + other) / 2, silu(z)
    ones = torch.ones(y.shape[-1] // groups, dtype=y.dtype)
    parts = (y if norm_before_gate else y * gate).chunk(groups, dim=-1)
    normal = torch.cat([rms_norm(part, ones, eps) for part in parts], dim=-1) * weight
    return normal * gate if norm_before_gate else normal


def layer_norm(x, weight, bias, eps=1e-5):
    """Over the last dimension."""
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * weight + bias


def add_norm(x, residual, weight, bias=None, eps=1e-5):
    """The norm of residual + x, and that sum."""
    summed = x if residual is None else residual + x
    return rms_norm(summed, weight, eps) if bias is None else layer_norm(summed, weight, bias, eps), summed


def rms_norm(x, weight, eps=1e-5):
    """Over the last dimension."""
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def causal_conv1d(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    """Depthwise: x [batch, dim, L], weight [dim, width] whose last tap meets the present position.

    Returns:
        out [batch, dim, L], and the last width - 1 columns of initial_states and x.
    """
    batch, dim, seqlen = x.shape
    width = weight.shape[-1]
    past = torch.cat([x.new_zeros(batch, dim, width - 1) if initial_states is None else initial_states, x], dim=-1)
    columns = []
    for position in range(seqlen):
        total = (x.new_zeros(dim) if bias is None else bias).expand(batch, dim)
        for tap in range(width):
            source = position - (width - 1) + tap
            seen = past[:, :, position + tap]
            if seq_idx is not None:
                same = source >= 0 and (seq_idx[:, source] == seq_idx[:, position])[:, None]
                seen = torch.where(torch.as_tensor(same), seen, 0)
            total = total + weight[:, tap] * seen
        total = total if activation is None else silu(total)
        if seq_idx is not None:
            total = torch.where((seq_idx[:, position] < 0)[:, None], 0, total)  # padding
        columns.append(total)
    return torch.stack(columns, dim=-1), past[..., past.shape[-1] - (width - 1) :]


def bidirectional_conv1d(x, weight, bias, activation=None):
    """Depthwise, along a sequence and against it: x [batch, L, dim], weight [2, dim, width] -> [batch, L, 2, dim]."""
    along, _ = causal_conv1d(x.mT, weight[0], bias[0], activation=activation)
    against, _ = causal_conv1d(x.flip(1).mT, weight[1], bias[1], activation=activation)
    return torch.stack([along.mT, against.mT.flip(1)], dim=2)


def depthwise_conv2d(x, weight, bias=None, activation=None):
    """x [batch, H, W, dim], weight [dim, k, k] whose centre meets the pixel itself; zero outside of the map."""
    _, height, width, dim = x.shape
    kernel = weight.shape[-1]
    rows = []
    for row in range(height):
        pixels = []
        for column in range(width):
            total = (x.new_zeros(dim) if bias is None else bias).expand(x.shape[0], dim)
            for i in range(kernel):
                for j in range(kernel):
                    h, w = row + i - kernel // 2, column + j - kernel // 2
                    if 0 <= h < height and 0 <= w < width:
                        total = total + weight[:, i, j] * x[:, h, w]
            pixels.append(total if activation is None else silu(total))
        rows.append(torch.stack(pixels, dim=1))
    return torch.stack(rows, dim=1)


def bidirectional_scan(u, x_dbl, dt_weight, dt_bias, A, D):
    """Two scans of a sequence, the second by flipping what it sees and flipping its output back; in float64."""
    total = 0
    for k in range(2):
        turn = (lambda t: t.flip(1)) if k else (lambda t: t)
        dt, B, C = turn(x_dbl[:, :, k]).split([dt_weight.shape[-1], A.shape[-1], A.shape[-1]], dim=-1)
        y, _ = selective_scan(
            turn(u[:, :, k]).transpose(1, 2),
            (dt @ dt_weight[k].T).transpose(1, 2),
            A[k],
            B.transpose(1, 2),
            C.transpose(1, 2),
            D[k],
            delta_bias=dt_bias[k],
            delta_softplus=True,
        )
        total = total + turn(y.transpose(1, 2))
    return total


def bimamba_core(xz, conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D):
    """What lies between the projections of a bidirectional Mamba block; differentiable, in float64."""
    x, z = xz.chunk(2, dim=-1)
    u = silu(bidirectional_conv1d(x, conv_weight, conv_bias))
    x_dbl = torch.einsum('blkd,kpd->blkp', u, x_proj_weight)
    return bidirectional_scan(u, x_dbl, dt_weight, dt_bias, A, D) / 2 * silu(z)


def ss2d_core(x, x_proj_weight, dt_weight, dt_bias, A, D, norm_weight, norm_bias, norm_eps=1e-5):
    """`ss2d_scan` of a map with its projections, normalised; differentiable, in float64."""
    x_dbl = torch.einsum('bhwd,pd->bhwp', x, x_proj_weight).unflatten(-1, (4, -1))
    return layer_norm(ss2d_scan(x, x_dbl, dt_weight, dt_bias, A, D), norm_weight, norm_bias, norm_eps)


def resize_grid(grid, height, width):
    """Bicubic without aligned corners: [1, h, w, d] -> [1, height, width, d]"""
    resized = F.interpolate(grid.permute(0, 3, 1, 2), size=(height, width), mode='bicubic', align_corners=False)
    return resized.permute(0, 2, 3, 1)
