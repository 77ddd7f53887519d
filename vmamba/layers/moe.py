"""A mixture of experts in place of an MLP: each token passes one of many.

Switch Transformers, https://arxiv.org/abs/2101.03961. MoE-Mamba, https://arxiv.org/abs/2401.04081
"""

from typing import Any, Dict, Optional

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import switch_mlp
from .options import check_counts

INIT_SCALE = 0.1  # initial weights have this variance / fan-in, and are cut at twice this


@register_notrace_module
class SwitchMoE(nn.Module):
    """Feed-forward networks ("experts") of which a router chooses one per token.

    p = softmax(router(x));  e = argmax(p);  out = p_e * fc2_e(relu(fc1_e(x))),  all without biases

    The router runs in at least fp32. In training an expert takes int(capacity_factor * T / E) of the T tokens of a
    batch, the first ones; the output of all others is 0. In evaluation no token is dropped. A training step leaves its
    auxiliary loss in `loss`; see `auxiliary_loss`. With share_e the share of tokens whose expert is e, before any is
    dropped, this is

        aux_weight * E * sum_e mean(p_e) * share_e + z_weight * mean(logsumexp(router(x))^2)

    All experts are computed as one grouped matrix product where PyTorch has one: from torch 2.10 on, in bf16, for
    channels that are multiples of 8. Otherwise they are computed one by one, which waits for a GPU.

    Args:
        d_model: Token channels d.
        num_experts: Number E of experts.
        d_hidden: Hidden channels of an expert; 3 * d_model by default.
        capacity_factor: Capacity of an expert in training, relative to an equal share of the tokens; None for no limit.
        aux_weight: Weight of the loss that balances the experts.
        z_weight: Weight of the loss that keeps the router's logits small.

    Attributes:
        loss: Auxiliary loss of the latest training step, None before and after `auxiliary_loss` has read it.
        expert_load: Share of the tokens of that step that chose each expert [E], before any is dropped.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        d_hidden: Optional[int] = None,
        capacity_factor: Optional[float] = 1.0,
        aux_weight: float = 0.01,
        z_weight: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        d_hidden = 3 * d_model if d_hidden is None else d_hidden
        check_counts(d_model=d_model, num_experts=num_experts, d_hidden=d_hidden)
        if capacity_factor is not None and not capacity_factor > 0:
            raise ValueError(f'capacity_factor must be above 0, or None for no limit, got {capacity_factor!r}')
        for name, weight in (('aux_weight', aux_weight), ('z_weight', z_weight)):
            if not weight >= 0:
                raise ValueError(f'{name} must be at least 0, got {weight!r}')
        self.num_experts, self.capacity_factor = num_experts, capacity_factor
        self.aux_weight, self.z_weight = aux_weight, z_weight
        self.router_weight = nn.Parameter(torch.empty(num_experts, d_model, **dd))
        self.fc1 = nn.Parameter(torch.empty(num_experts, d_model, d_hidden, **dd))
        self.fc2 = nn.Parameter(torch.empty(num_experts, d_hidden, d_model, **dd))
        self.loss: Optional[Tensor] = None
        self.expert_load: Optional[Tensor] = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises router and experts by truncated normals; fc2 counts the hidden channels of all experts."""
        experts, dim, hidden = self.fc1.shape
        for weight, fan_in in ((self.router_weight, dim), (self.fc1, dim), (self.fc2, experts * hidden)):
            nn.init.trunc_normal_(weight, std=(INIT_SCALE / fan_in) ** 0.5, a=-2 * INIT_SCALE, b=2 * INIT_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ..., d] -> [B, ..., d]

        Raises:
            ValueError: In training, if there are fewer tokens than experts, or the capacity is below one token.
        """
        tokens = x.flatten(0, -2)
        result = self._compute(tokens, self._capacity(tokens.shape[0]) if self.training else None)
        self.loss = None
        if self.training:
            self.expert_load = result.counts / tokens.shape[0]
            share = self.expert_load.to(result.mean_p.dtype)
            self.loss = self.aux_weight * self.num_experts * torch.dot(result.mean_p, share)
            if self.z_weight > 0:
                self.loss = self.loss + self.z_weight * result.z
        return result.out.view(x.shape)

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """The output for single tokens [B, d] -> [B, d], of which none is dropped, also in training."""
        return self._compute(x, None).out

    def _compute(self, tokens: Tensor, capacity: Optional[int]) -> Any:
        dtype = _products_dtype(tokens, self.fc1)
        return switch_mlp(tokens, self.router_weight, self.fc1, self.fc2, capacity, dtype)

    def _capacity(self, tokens: int) -> Optional[int]:
        """Tokens that an expert takes of so many in training."""
        if self.capacity_factor is None:
            return None
        capacity = int(self.capacity_factor * tokens / self.num_experts)
        if tokens < self.num_experts or capacity < 1:
            raise ValueError(
                f'{tokens} tokens are too few for {self.num_experts} experts with capacity_factor='
                f'{self.capacity_factor}: train with larger batches, fewer experts, or capacity_factor=None'
            )
        return capacity

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, 'loss': None}  # copies of the module have no part in its graph


def auxiliary_loss(model: nn.Module) -> Any:
    """Sum of the auxiliary losses of all `SwitchMoE` of a model since their latest training step, to add to its loss.

    Each is read once: a second call gives 0, as does a model without experts.
    """
    total: Any = 0.0
    for module in model.modules():
        if isinstance(module, SwitchMoE) and module.loss is not None:
            total = total + module.loss
            module.loss = None
    return total


def expert_load(model: nn.Module) -> Dict[str, Tensor]:
    """`expert_load` of the latest training step, by name of each `SwitchMoE` of a model."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, SwitchMoE))
    return {name: module.expert_load for name, module in layers if module.expert_load is not None}


def _products_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which a linear layer with this weight would run; autocast has no rule for grouped products."""
    device = x.device.type
    if not x.is_meta and weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype
