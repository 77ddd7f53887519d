"""The cases of bench_kernels.py: shapes, inputs, and what their peers took.

The figures of the peers were measured earlier, on another NVIDIA H100 80GB with torch 2.11, CUDA 13.0 and mamba_ssm
2.3.2: in bf16, medians of CUDA events, inputs included in the peaks.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, Callable, ClassVar, Dict, List, NamedTuple, Optional, Sequence, Tuple

import timm
import torch
from torch import Tensor

from vmamba.kernels import NUM_ROUTES, selective_scan, ss2d_core

KINDS = ('scan', 'ss2d', 'model', 'host')
REFERENCE_GPU = 'H100'
FORWARD, BACKWARD, BOTH = 'forward', 'backward', 'forward_backward'


class Reference(NamedTuple):
    """What a peer took: milliseconds, and MiB at most; None where it was not measured."""

    peer: str
    forward_ms: Optional[float] = None
    backward_ms: Optional[float] = None
    forward_backward_ms: Optional[float] = None
    forward_peak_mib: Optional[float] = None
    training_peak_mib: Optional[float] = None


class Workload(NamedTuple):
    """What is timed: the forward pass, and the tensors of which the backward pass makes the gradients."""

    forward: Callable[[], Tensor]
    inputs: Tuple[Tensor, ...]


@dataclass(frozen=True)
class Case(ABC):
    """Something to measure.

    Attributes:
        name: Unique, beginning with the kind.
        batch: Batch size.
        reference: What a peer took at the registered batch size.
    """

    name: str
    batch: int
    reference: Optional[Reference]
    kind: ClassVar[str]
    implementation: ClassVar[str] = 'vmamba'

    @property
    def passes(self) -> Tuple[str, ...]:
        """Which of FORWARD, BACKWARD and BOTH to time."""
        return FORWARD, BACKWARD, BOTH

    def is_peer_of(self, other: 'Case') -> bool:
        """Whether the other case is to be compared with this one, where both are measured in a run."""
        return False

    @property
    @abstractmethod
    def shape(self) -> str:
        """Sizes other than the batch, to be read."""

    @abstractmethod
    def workload(self, device: torch.device) -> Workload:
        """Builds the tensors on a device."""

    def forward_bytes(self) -> Optional[int]:
        """Fewest bytes of a forward pass: each input read once and the output written once."""
        return None

    def backward_bytes(self) -> Optional[int]:
        """Fewest bytes of a backward pass: inputs and the output's gradient read, a gradient of each input written."""
        return None

    def updates(self) -> Optional[int]:
        """State updates of a forward pass."""
        return None


class KernelCase(Case):
    """An operator, the first of whose inputs is like its output."""

    @abstractmethod
    def inputs(self, device: Any) -> Dict[str, Tensor]:
        """The tensor arguments by name, in bf16 what depends on the image, in fp32 the state's parameters."""

    def forward_bytes(self) -> int:
        read, written = self._bytes()
        return read + written

    def backward_bytes(self) -> int:
        read, written = self._bytes()
        return 2 * read + written

    def _bytes(self) -> Tuple[int, int]:
        """Of the inputs, and of the output."""
        sizes = [tensor.nbytes for tensor in self.inputs('meta').values()]
        return sum(sizes), sizes[0]

    def _workload(self, function: Callable[..., Tensor], device: torch.device, **options: Any) -> Workload:
        inputs = {name: tensor.requires_grad_() for name, tensor in self.inputs(device).items()}
        return Workload(partial(function, **inputs, **options), tuple(inputs.values()))


@dataclass(frozen=True)
class ScanCase(KernelCase):
    """A selective scan with softplus, bias of the step and skip connection, and without gate."""

    dim: int
    length: int
    dstate: int
    groups: int
    function: Callable[..., Tensor] = selective_scan
    kind = 'scan'

    @property
    def implementation(self) -> str:
        return self.function.__module__.split('.')[0]

    def is_peer_of(self, other: Case) -> bool:
        return other.name == self.name and self.implementation == 'mamba_ssm' != other.implementation

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

    def updates(self) -> int:
        return self.batch * self.dim * self.length * self.dstate


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

    def updates(self) -> int:
        return NUM_ROUTES * self.batch * self.size**2 * self.dim * self.dstate


@dataclass(frozen=True)
class ModelCase(Case):
    """A timm model under bf16 autocast: inference, or forward and backward in training mode."""

    model: str
    training: bool
    compile: bool
    size: int = 224
    kind = 'model'

    @property
    def implementation(self) -> str:
        return timm.models.model_entrypoint(self.model.partition('.')[0]).__module__.split('.')[0]

    @property
    def shape(self) -> str:
        return f'{self.size}x{self.size}'

    @property
    def passes(self) -> Tuple[str, ...]:
        return (BOTH,) if self.training else (FORWARD,)

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
        beside: The model of another case, with which it is compared.
    """

    beside: Optional[str] = None
    kind = 'host'

    def is_peer_of(self, other: Case) -> bool:
        return isinstance(other, HostCase) and other.beside == self.model


def mamba_ssm_scan() -> Optional[Callable[..., Tensor]]:
    """mamba_ssm's own selective scan, where it can be imported."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn


# batch, D, L, N, G; milliseconds of mamba_ssm: forward, backward
_SCANS = (
    (64, 384, 3136, 1, 4, 0.558, 1.536),
    (64, 768, 784, 1, 4, 0.290, 0.782),
    (64, 1536, 196, 1, 4, 0.167, 0.520),
    (64, 768, 3136, 16, 4, 5.33, 20.3),
    (64, 384, 197, 16, 1, 0.201, 0.650),
    (16, 384, 6085, 16, 1, 1.07, 4.57),
    (1, 384, 65536, 16, 1, 0.682, 2.04),
)

# model, ssm_ratio, N; a stage each, of the official code: milliseconds forward and forward + backward, MiB of both
_SS2D = (
    (
        'vmamba_t',
        1,
        1,
        ((2.461, 6.423, 717, 797), (1.237, 3.625, 358, 396), (0.789, 2.810, 177, 197), (0.981, 2.812, 89, 102)),
    ),
    ('vmamba_t_s2l5', 2, 1, ((4.387, 11.711), (1.990, 5.782), (1.254, 3.406), (1.108, 3.112))),
    ('vmamba_t_v0', 2, 16, ((), (), (), ())),
)

_INFERENCE_BATCH, _TRAINING_BATCH = 128, 64

# peer, images per second and MiB of inference, of compiled inference, and of training
_MODELS = {
    'vmamba_t': ('official vmamba_tiny_s1l8', (2828, 1947), None, (762, 6051)),
    'vmamba_t_s2l5': ('official vmamba_tiny_s2l5', (2187, 3417), None, (729, 7456)),
    'vmamba_s': ('official vmamba_small_s2l15', (1505, 3416), None, (461, 11224)),
    'vmamba_t_v0': ('official vanilla_vmamba_tiny', (838, 6641), None, (245, 14208)),
    'vim_t': ('official Vim-T', (4203, 250), None, (507, 2260)),
    'vim_s': ('official Vim-S', (2249, 497), None, (471, 4418)),
    'swin_tiny_patch4_window7_224': ('timm', (5122, 1514), (10252, 936), (1552, 4374)),
    'convnext_tiny': ('timm', (7264, 1029), (13562, 664), (1905, 3856)),
    'mambaout_tiny': ('timm', (5283, 1349), None, (1550, 4971)),
    'deit_tiny_patch16_224': ('timm', (26441, 148), None, (2890, 1101)),
    'deit_small_patch16_224': ('timm', (16707, 296), None, (2306, 2187)),
}


def scan_cases() -> List[ScanCase]:
    cases = []
    for batch, dim, length, dstate, groups, forward_ms, backward_ms in _SCANS:
        name = f'scan_d{dim}_l{length}_n{dstate}_g{groups}'
        reference = Reference('mamba_ssm', forward_ms, backward_ms)
        cases.append(ScanCase(name, batch, reference, dim, length, dstate, groups))
    return cases


def ss2d_cases() -> List[SS2DCase]:
    cases = []
    for model, ssm_ratio, dstate, stages in _SS2D:
        for stage, figures in enumerate(stages):
            dim, size = 96 * 2**stage, 56 // 2**stage
            forward_ms, both_ms, *peaks = figures or (None, None)
            reference = Reference('official', forward_ms, None, both_ms, *peaks) if figures else None
            name = f'ss2d_{model}_stage{stage + 1}'
            cases.append(SS2DCase(name, 64, reference, ssm_ratio * dim, size, dstate, ceil(dim / 16)))
    return cases


def model_cases(models: Sequence[str], compile_training: bool = False) -> List[ModelCase]:
    cases = []
    for model in models:
        peer, inference, compiled, training = _MODELS.get(model, ('', None, None, None))
        works = [('inference', False, False, inference), ('inference_compile', False, True, compiled)]
        works.append(('training', True, False, training))
        if compile_training:
            works.append(('training_compile', True, True, None))
        for work, trains, compiles, figures in works:
            batch = _TRAINING_BATCH if trains else _INFERENCE_BATCH
            reference = _model_reference(peer, batch, trains, *figures) if figures else None
            cases.append(ModelCase(f'model_{model}_{work}', batch, reference, model, trains, compiles))
    return cases


def host_cases() -> List[HostCase]:
    """Of images one by one: models of this library, each followed by the one of timm that it is compared with."""
    pairs = ('vmamba_t', 'convnext_tiny'), ('vim_t', 'deit_tiny_patch16_224')
    models = [(model, beside) for ours, theirs in pairs for model, beside in ((ours, theirs), (theirs, None))]
    return [
        HostCase(f'host_{model}', 1, None, model, training=True, compile=False, beside=beside)
        for model, beside in models
    ]


def _model_reference(peer: str, batch: int, training: bool, images_per_second: float, peak: float) -> Reference:
    ms = 1e3 * batch / images_per_second
    if training:
        return Reference(peer, forward_backward_ms=ms, training_peak_mib=peak)
    return Reference(peer, forward_ms=ms, forward_peak_mib=peak)
