"""What bench_kernels.py measures: operators and models at the sizes of VMamba and Vim."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, ClassVar, Dict, List, NamedTuple, Optional, Sequence, Tuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba.kernels import NUM_ROUTES, selective_scan, ss2d_core, ssd_scan

KINDS = ('scan', 'ssd', 'ss2d', 'model', 'host')
INFERENCE, TRAINING = 'inference', 'training'


class Workload(NamedTuple):
    """What is timed: the forward pass, and the tensors of which the backward pass computes the gradients."""

    forward: Callable[[], Tensor]
    inputs: Tuple[Tensor, ...]


@dataclass(frozen=True)
class Case(ABC):
    """Something to measure.

    Attributes:
        name: Unique, beginning with the kind.
        batch: Batch size.
        passes: What to time: INFERENCE, the forward pass, and TRAINING, the forward and the backward pass.
    """

    name: str
    batch: int
    kind: ClassVar[str]
    by: ClassVar[str] = 'vmamba'
    passes: ClassVar[Tuple[str, ...]] = (INFERENCE, TRAINING)

    @property
    @abstractmethod
    def shape(self) -> str:
        """Sizes other than the batch, as text."""

    @abstractmethod
    def workload(self, device: torch.device) -> Workload:
        """Builds the tensors on a device."""


class KernelCase(Case):
    """An operator, the first of whose inputs is like its output."""

    @abstractmethod
    def inputs(self, device: Any) -> Dict[str, Tensor]:
        """The tensor arguments by name: in bf16 what depends on the image, in fp32 the parameters of the state."""

    def forward_bytes(self) -> int:
        """Fewest bytes of a forward pass: each input read once and the output written once."""
        sizes = [tensor.nbytes for tensor in self.inputs('meta').values()]
        return sum(sizes) + sizes[0]

    def backward_bytes(self) -> int:
        """Fewest bytes of a backward pass: inputs and the output's gradient read, a gradient of each input written."""
        sizes = [tensor.nbytes for tensor in self.inputs('meta').values()]
        return 2 * sum(sizes) + sizes[0]

    def _workload(self, function: Callable[..., Tensor], device: torch.device, **options: Any) -> Workload:
        inputs = {name: tensor.requires_grad_() for name, tensor in self.inputs(device).items()}
        return Workload(partial(function, **inputs, **options), tuple(inputs.values()))


@dataclass(frozen=True)
class ScanCase(KernelCase):
    """A selective scan with softplus, bias of dt and skip connection, and without gate."""

    dim: int
    length: int
    dstate: int
    groups: int
    function: Callable[..., Tensor] = selective_scan
    kind = 'scan'

    @property
    def by(self) -> str:
        return self.function.__module__.split('.')[0]

    @property
    def shape(self) -> str:
        return f'D {self.dim}, L {self.length}, N {self.dstate}, G {self.groups}'

    def inputs(self, device: Any) -> Dict[str, Tensor]:
        data = dict(device=device, dtype=torch.bfloat16)
        projection = self.batch, self.groups, self.dstate, self.length
        return dict(
            u=torch.randn(self.batch, self.dim, self.length, **data),
            delta=torch.randn(self.batch, self.dim, self.length, **data),
            A=-torch.rand(self.dim, self.dstate, device=device) * self.dstate,
            B=torch.randn(projection, **data),
            C=torch.randn(projection, **data),
            D=torch.ones(self.dim, device=device),
            delta_bias=torch.rand(self.dim, device=device) - 4,
        )

    def workload(self, device: torch.device) -> Workload:
        return self._workload(self.function, device, delta_softplus=True)


@dataclass(frozen=True)
class SSDCase(KernelCase):
    """The scan of Mamba-2 with softplus, bias of dt and skip connection, of one group and without gate.

    Attributes:
        function: Takes the tensors by name.
    """

    length: int
    heads: int
    dim: int
    dstate: int
    function: Callable[..., Tensor]
    package: str = 'vmamba'
    kind = 'ssd'

    @property
    def by(self) -> str:
        return self.package

    @property
    def shape(self) -> str:
        return f'L {self.length}, H {self.heads}, P {self.dim}, N {self.dstate}'

    def inputs(self, device: Any) -> Dict[str, Tensor]:
        data = dict(device=device, dtype=torch.bfloat16)
        rows, heads = (self.batch, self.length), self.heads
        return dict(
            x=torch.randn(*rows, heads, self.dim, **data),
            dt=torch.randn(*rows, heads, **data),
            A=-torch.rand(heads, device=device) * 15 - 1,
            B=torch.randn(*rows, 1, self.dstate, **data),
            C=torch.randn(*rows, 1, self.dstate, **data),
            D=torch.ones(heads, device=device),
            dt_bias=torch.rand(heads, device=device) - 4,
        )

    def workload(self, device: torch.device) -> Workload:
        return self._workload(self.function, device)


@dataclass(frozen=True)
class SS2DCase(KernelCase):
    """The core of SS2D on square maps: projections, four scans, their sum and its LayerNorm."""

    dim: int
    size: int
    dstate: int
    dt_rank: int
    kind = 'ss2d'

    @property
    def shape(self) -> str:
        return f'D {self.dim}, {self.size}x{self.size}, N {self.dstate}, R {self.dt_rank}'

    def inputs(self, device: Any) -> Dict[str, Tensor]:
        routes, dim = NUM_ROUTES, self.dim
        data = dict(device=device, dtype=torch.bfloat16)
        return dict(
            x=torch.randn(self.batch, self.size, self.size, dim, **data),
            x_proj_weight=torch.randn(routes * (self.dt_rank + 2 * self.dstate), dim, **data) * dim**-0.5,
            dt_weight=torch.randn(routes, dim, self.dt_rank, device=device) * self.dt_rank**-0.5,
            dt_bias=torch.rand(routes, dim, device=device) - 4,
            A=-torch.rand(routes, dim, self.dstate, device=device) * self.dstate,
            D=torch.ones(routes, dim, device=device),
            norm_weight=torch.ones(dim, device=device),
            norm_bias=torch.zeros(dim, device=device),
        )

    def workload(self, device: torch.device) -> Workload:
        return self._workload(ss2d_core, device)


@dataclass(frozen=True)
class ModelCase(Case):
    """A timm model under bf16 autocast: inference, or forward and backward in training mode."""

    model: str
    training: bool = False
    compile: bool = False
    size: int = 224
    kind = 'model'

    @property
    def by(self) -> str:
        return timm.models.model_entrypoint(self.model).__module__.split('.')[0]

    @property
    def passes(self) -> Tuple[str, ...]:
        return (TRAINING if self.training else INFERENCE,)

    @property
    def shape(self) -> str:
        return f'{self.size}x{self.size}'

    def workload(self, device: torch.device) -> Workload:
        model = timm.create_model(self.model).to(device).train(self.training)
        run = torch.compile(model) if self.compile else model
        images = torch.randn(self.batch, 3, self.size, self.size, device=device)

        def forward() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return run(images)

        return Workload(forward, tuple(model.parameters()))


@dataclass(frozen=True)
class HostCase(ModelCase):
    """A model whose forward and backward pass take as long as the host does, measured in turn with others.

    Attributes:
        beside: The models with which it is compared.
    """

    beside: Tuple[str, ...] = ()
    training: bool = True
    kind = 'host'


def mamba_ssm_scan() -> Optional[Callable[..., Tensor]]:
    """mamba_ssm's own selective scan, where it can be imported."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn


def ssd_scans(device: torch.device) -> Dict[str, Callable[..., Tensor]]:
    """Scans of Mamba-2 by who made them: on a GPU also those of mamba_ssm and fla, where they can be imported."""
    scans: Dict[str, Callable[..., Tensor]] = {'vmamba': partial(ssd_scan, chunk_size=64, dt_softplus=True)}
    if device.type != 'cuda':
        return scans
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        for chunk in (64, 128, 256):
            scans[f'mamba_ssm, chunk {chunk}'] = partial(mamba_chunk_scan_combined, chunk_size=chunk, dt_softplus=True)
    except ImportError:
        pass
    try:
        from fla.ops.simple_gla import chunk_simple_gla

        scans['fla'] = partial(_simple_gla, chunk_simple_gla)
    except ImportError:
        pass
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
_HOST = {
    'vmamba_t': ('convnext_tiny', 'swin_tiny_patch4_window7_224'),
    'vim_t': ('deit_tiny_patch16_224',),
}


def scan_cases(device: torch.device) -> List[ScanCase]:
    """Selective scans, each followed by mamba_ssm's on a GPU where that is installed."""
    peer = mamba_ssm_scan() if device.type == 'cuda' else None
    functions = [selective_scan] if peer is None else [selective_scan, peer]
    return [
        ScanCase(f'scan_d{dim}_l{length}_n{dstate}_g{groups}', batch, dim, length, dstate, groups, function)
        for batch, dim, length, dstate, groups in _SCANS
        for function in functions
    ]


def ssd_cases(device: torch.device) -> List[SSDCase]:
    """The scan of Mamba-2 at the sizes of vision models, each followed by those of other packages."""
    return [
        SSDCase(f'ssd_l{length}_h{heads}_p{dim}_n{dstate}', batch, length, heads, dim, dstate, function, by)
        for batch, length, heads, dim, dstate in _SSD
        for by, function in ssd_scans(device).items()
    ]


def ss2d_cases() -> List[SS2DCase]:
    """The four stages of VMamba models."""
    return [
        SS2DCase(f'ss2d_{model}_stage{stage + 1}', 64, ratio * 96 * 2**stage, 56 // 2**stage, dstate, 6 * 2**stage)
        for model, ratio, dstate in _SS2D
        for stage in range(4)
    ]


def model_cases(models: Sequence[str], compile_training: bool = False) -> List[ModelCase]:
    """Inference, compiled inference and training of models."""
    cases = []
    for model in models:
        cases.append(ModelCase(f'model_{model}_inference', 128, model))
        cases.append(ModelCase(f'model_{model}_inference_compile', 128, model, compile=True))
        cases.append(ModelCase(f'model_{model}_training', 64, model, training=True))
        if compile_training:
            cases.append(ModelCase(f'model_{model}_training_compile', 64, model, training=True, compile=True))
    return cases


def host_cases() -> List[HostCase]:
    """Models of this library on one image, each followed by those of timm that it is compared with."""
    models = [
        (model, peers) for ours, peers in _HOST.items() for model, peers in [(ours, peers), *((p, ()) for p in peers)]
    ]
    return [HostCase(f'host_{model}', 1, model, beside=peers) for model, peers in models]
