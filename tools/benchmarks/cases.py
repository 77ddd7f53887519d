"""What bench_kernels.py measures: operators and models at the sizes of VMamba and Vim."""

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba.kernels import NUM_ROUTES, selective_scan, ss2d_core, ssd_scan, switch_mlp

KINDS = ('scan', 'ssd', 'ss2d', 'moe', 'model', 'host')
KERNELS = ('scan', 'ssd', 'ss2d', 'moe')
INFERENCE, TRAINING = 'inference', 'training'


class Workload(NamedTuple):
    """What is timed: the forward pass, and the tensors of which the backward pass computes the gradients."""

    forward: Callable[[], Tensor]
    inputs: Tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        kind: Of KINDS. The first input of kernels is like their output.
        shape: Sizes other than the batch, as text.
        build: Makes the tensors, from a batch size and a device.
        by: Package.
        passes: What to time: INFERENCE, the forward pass, and TRAINING, the forward and the backward pass.
        beside: Names of the cases with which it is compared.
    """

    kind: str
    name: str
    batch: int
    shape: str
    build: Callable[[int, Any], Workload]
    by: str = 'vmamba'
    passes: Tuple[str, ...] = (INFERENCE, TRAINING)
    compile: bool = False
    beside: Tuple[str, ...] = ()

    def workload(self, device: Any) -> Workload:
        return self.build(self.batch, device)

    def fewest_bytes(self) -> Tuple[int, int]:
        """Of a kernel's forward pass: each input read once and the output written once. Of its backward pass: inputs
        and the output's gradient read, a gradient of each input written."""
        sizes = [tensor.nbytes for tensor in self.workload('meta').inputs]
        return sum(sizes) + sizes[0], 2 * sum(sizes) + sizes[0]


def _tensors(device: Any, **shapes: Sequence[int]) -> Dict[str, Tensor]:
    """Random inputs by name: in bf16 what depends on the image and its projections, in fp32 parameters of the state."""
    tensors = {}
    for name, shape in shapes.items():
        if name == 'A':
            tensor = -16 * torch.rand(shape, device=device)
        elif name in ('D', 'norm_weight', 'norm_bias'):
            tensor = torch.ones(shape, device=device)
        elif name.endswith('_bias'):
            tensor = torch.rand(shape, device=device) - 4
        else:
            dtype = torch.float32 if name in ('dt_weight', 'router_weight') else torch.bfloat16
            scale = shape[-1] ** -0.5 if name.endswith('_weight') else shape[-2] ** -0.5 if name[:2] == 'fc' else 1
            tensor = torch.randn(shape, device=device, dtype=dtype) * scale
        tensors[name] = tensor.requires_grad_()
    return tensors


def _kernel(function: Callable[..., Tensor], inputs: Dict[str, Tensor], **options: Any) -> Workload:
    return Workload(partial(function, **inputs, **options), tuple(inputs.values()))


def scan_case(
    name: str,
    batch: int,
    dim: int,
    length: int,
    dstate: int,
    groups: int,
    function: Callable[..., Tensor] = selective_scan,
) -> Case:
    """A selective scan with softplus, bias of dt and skip connection, and without gate."""

    def build(batch: int, device: Any) -> Workload:
        u, state = (batch, dim, length), (batch, groups, dstate, length)
        shapes = dict(u=u, delta=u, A=(dim, dstate), B=state, C=state, D=(dim,), delta_bias=(dim,))
        return _kernel(function, _tensors(device, **shapes), delta_softplus=True)

    shape = f'D {dim}, L {length}, N {dstate}, G {groups}'
    return Case('scan', name, batch, shape, build, function.__module__.split('.')[0])


def ssd_case(
    name: str,
    batch: int,
    length: int,
    heads: int,
    dim: int,
    dstate: int,
    function: Callable[..., Tensor],
    by: str = 'vmamba',
) -> Case:
    """The scan of Mamba-2 with softplus, bias of dt and skip connection, of one group and without gate."""

    def build(batch: int, device: Any) -> Workload:
        dt, state, own = (batch, length, heads), (batch, length, 1, dstate), (heads,)
        shapes = dict(x=(*dt, dim), dt=dt, A=own, B=state, C=state, D=own, dt_bias=own)
        return _kernel(function, _tensors(device, **shapes))

    return Case('ssd', name, batch, f'L {length}, H {heads}, P {dim}, N {dstate}', build, by)


def ss2d_case(name: str, batch: int, dim: int, size: int, dstate: int, dt_rank: int) -> Case:
    """The core of SS2D on square maps: projections, four scans, their sum and its LayerNorm."""

    def build(batch: int, device: Any) -> Workload:
        routes = NUM_ROUTES, dim
        weights = dict(x_proj_weight=(NUM_ROUTES * (dt_rank + 2 * dstate), dim), dt_weight=(*routes, dt_rank))
        state = dict(dt_bias=routes, A=(*routes, dstate), D=routes, norm_weight=(dim,), norm_bias=(dim,))
        return _kernel(ss2d_core, _tensors(device, x=(batch, size, size, dim), **weights, **state))

    return Case('ss2d', name, batch, f'D {dim}, {size}x{size}, N {dstate}, R {dt_rank}', build)


def moe_case(name: str, batch: int, length: int, dim: int, experts: int) -> Case:
    """Experts in bf16, of which each token passes one, with router and capacity; for 0 experts one MLP alone."""

    def build(batch: int, device: Any) -> Workload:
        count, router = max(experts, 1), dict(router_weight=(experts, dim)) if experts else {}
        shapes = dict(x=(batch * length, dim), fc1=(count, dim, 3 * dim), fc2=(count, 3 * dim, dim), **router)
        return _kernel(_experts if experts else _mlp, _tensors(device, **shapes))

    by, experts_text = ('vmamba', f'{experts} experts') if experts else ('torch', 'one MLP')
    return Case('moe', name, batch, f'L {length}, D {dim}, hidden {3 * dim}, {experts_text}', build, by)


def _experts(x: Tensor, router_weight: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    return switch_mlp(x, router_weight, fc1, fc2, capacity=x.shape[0] // fc1.shape[0]).out


def _mlp(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    return F.relu(x @ fc1[0]) @ fc2[0]


def model_case(
    kind: str, name: str, batch: int, model: str, training: bool = False, compile: bool = False, size: int = 224, **more
) -> Case:
    """A timm model under bf16 autocast: inference, or forward and backward in training mode."""

    def build(batch: int, device: Any) -> Workload:
        built = timm.create_model(model).to(device).train(training)
        run = torch.compile(built) if compile else built
        images = torch.randn(batch, 3, size, size, device=device)

        def forward() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return run(images)

        return Workload(forward, tuple(built.parameters()))

    by = timm.models.model_entrypoint(model).__module__.split('.')[0]
    passes = (TRAINING if training else INFERENCE,)
    return Case(kind, name, batch, f'{size}x{size}', build, by, passes, compile, **more)


def peer(module: str, name: str, device: torch.device) -> Optional[Callable[..., Any]]:
    """A function of another package, on a GPU and where it can be imported."""
    try:
        return getattr(import_module(module), name) if device.type == 'cuda' else None
    except ImportError:
        return None


def ssd_scans(device: torch.device) -> Dict[str, Callable[..., Tensor]]:
    """Scans of Mamba-2 by who made them: ours, and those of mamba_ssm and fla."""
    scans: Dict[str, Callable[..., Tensor]] = {'vmamba': partial(ssd_scan, chunk_size=64, dt_softplus=True)}
    mamba = peer('mamba_ssm.ops.triton.ssd_combined', 'mamba_chunk_scan_combined', device)
    for chunk in (64, 128, 256) if mamba else ():
        scans[f'mamba_ssm, chunk {chunk}'] = partial(mamba, chunk_size=chunk, dt_softplus=True)
    if gla := peer('fla.ops.simple_gla', 'chunk_simple_gla', device):
        scans['fla'] = partial(_simple_gla, gla)
    return scans


def _simple_gla(
    scan: Callable[..., Tuple[Tensor, Any]],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
) -> Tensor:
    """The scan as linear attention with one decay a head, whose queries, keys and values are C, B and dt * x."""
    dt = F.softplus(dt.float() + dt_bias)
    queries, keys = (tensor.expand(-1, -1, x.shape[2], -1) for tensor in (C, B))
    y, _ = scan(queries, keys, (x * dt.unsqueeze(-1)).to(x.dtype), dt * A, scale=1.0)
    return y + x * D.to(x.dtype).unsqueeze(-1)


_SCANS = (  # batch, D, L, N, G
    (64, 384, 3136, 1, 4),
    (64, 768, 784, 1, 4),
    (64, 1536, 196, 1, 4),
    (64, 768, 3136, 16, 4),
    (64, 384, 197, 16, 1),
    (16, 384, 6085, 16, 1),
    (1, 384, 65536, 16, 1),
)
_SSD = (16, 6144, 6, 64, 64), (64, 196, 12, 32, 64), (128, 784, 8, 32, 48)  # batch, L, H, P, N
_SS2D = ('vmamba_t', 1, 1), ('vmamba_t_s2l5', 2, 1), ('vmamba_t_v0', 2, 16)  # model, ssm_ratio, N
_MOE = (64, 1024, 768), (16, 1024, 1024), (8, 2048, 768)  # batch, L, d
_EXPERTS = 32
_HOST = {
    'vmamba_t': ('convnext_tiny', 'swin_tiny_patch4_window7_224'),
    'vim_t': ('deit_tiny_patch16_224',),
}


def scan_cases(device: torch.device) -> List[Case]:
    """Selective scans, each followed by mamba_ssm's on a GPU where that is installed."""
    theirs = peer('mamba_ssm.ops.selective_scan_interface', 'selective_scan_fn', device)
    return [
        scan_case(f'scan_d{dim}_l{length}_n{dstate}_g{groups}', batch, dim, length, dstate, groups, function)
        for batch, dim, length, dstate, groups in _SCANS
        for function in filter(None, (selective_scan, theirs))
    ]


def ssd_cases(device: torch.device) -> List[Case]:
    """The scan of Mamba-2 at the sizes of vision models, each followed by those of other packages."""
    return [
        ssd_case(f'ssd_l{length}_h{heads}_p{dim}_n{dstate}', batch, length, heads, dim, dstate, function, by)
        for batch, length, heads, dim, dstate in _SSD
        for by, function in ssd_scans(device).items()
    ]


def ss2d_cases() -> List[Case]:
    """The four stages of VMamba models."""
    return [
        ss2d_case(f'ss2d_{model}_stage{i + 1}', 64, ratio * 96 * 2**i, 56 // 2**i, dstate, 6 * 2**i)
        for model, ratio, dstate in _SS2D
        for i in range(4)
    ]


def moe_cases() -> List[Case]:
    """Mixtures of experts, each followed by an MLP of the size of one expert."""
    return [
        moe_case(f'moe_b{batch}_l{length}_d{dim}', batch, length, dim, experts)
        for batch, length, dim in _MOE
        for experts in (_EXPERTS, 0)
    ]


def model_cases(models: Sequence[str]) -> List[Case]:
    """Inference and training of models, plain and compiled."""
    return [
        model_case('model', f'model_{model}_{name}{"_compile" * compile}', batch, model, training, compile)
        for model in models
        for name, batch, training in (('inference', 128, False), ('training', 64, True))
        for compile in (False, True)
    ]


def host_cases() -> List[Case]:
    """Models whose passes take as long as the host does, on one image, each followed by those it is compared with."""
    return [
        model_case('host', f'host_{model}', 1, model, training=True, beside=_HOST.get(model, ()))
        for ours, peers in _HOST.items()
        for model in (ours, *peers)
    ]
