"""The selective scan's tensors as its kernels take them, and its gradients. Importable without the package triton."""

from typing import Callable, NamedTuple, Optional

from torch import Tensor


class Scan(NamedTuple):
    """The tensors of a scan as the kernels take them, and its sizes.

    Where two directions are walked at once (the second one against the sequence), sequences are [B, 2, D, L], B and C
    [B, 2, N, L], and parameters have a first dimension of 2.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Optional[Tensor]
    z: Optional[Tensor]
    delta_bias: Optional[Tensor]
    initial: Optional[Tensor]
    groups: int
    softplus: bool
    reverse: bool

    @property
    def directions(self) -> int:
        return self.u.shape[1] if self.u.ndim == 4 else 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Batch, channels, length, states."""
        return self.u.shape[0], self.u.shape[-2], self.u.shape[-1], self.A.shape[-1]

    @property
    def group_dim(self) -> int:
        return self.u.shape[-2] // self.groups

    @property
    def share(self) -> int:
        return self.u.shape[-2] // self.delta.shape[-2]

    def strides(self, name: str) -> tuple[int, ...]:
        """All strides but that along L, which is 1. Constants [dim, N] have only the one between states."""
        tensor = getattr(self, name)
        if tensor is None:
            return 0, 0
        return (0, 0, 1) if tensor.ndim == 2 else tensor.stride()[:-1]

    def group_share(self, name: str) -> int:
        """How many of the scan's groups share one group of B or C."""
        tensor = getattr(self, name)
        return 1 if tensor.ndim == 2 or self.directions > 1 else self.groups // tensor.shape[1]


class Gradients(NamedTuple):
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Optional[Tensor]
    z: Optional[Tensor]
    delta_bias: Optional[Tensor]
    initial: Tensor


def prepare(
    sequence: Callable[[Tensor], Tensor],
    coefficients: Callable[[Tensor], Tensor],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    z: Optional[Tensor],
    delta_bias: Optional[Tensor],
    initial_state: Optional[Tensor],
    softplus: bool,
    reverse: bool,
) -> Scan:
    """The scan with its sequences as `sequence` lays them out, B and C as `coefficients` does, all else contiguous."""
    groups = [tensor.shape[1] for tensor in (B, C) if tensor.ndim == 4]
    return Scan(
        sequence(u),
        sequence(delta),
        A.float().contiguous(),
        coefficients(B),
        coefficients(C),
        None if D is None else D.contiguous(),
        None if z is None else sequence(z),
        None if delta_bias is None else delta_bias.contiguous(),
        None if initial_state is None else initial_state.contiguous(),
        max(groups, default=1),
        softplus,
        reverse,
    )


def unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
