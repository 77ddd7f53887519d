"""A classifier of sequences on any stack of mixers, for the tasks of the Long Range Arena and the like.

https://arxiv.org/abs/2011.04006
"""

from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

from ..layers import H3, S4D, Attention, BiMamba, BiMamba2, LayerNorm, RmsNorm
from ..layers.options import check_choice, check_counts
from .model import FEED_FORWARDS, MIXERS, Block, Layer, init_blocks_, normalise, undecayed

# Mixers by name that see later tokens too: modules [B, L, d] -> [B, L, d].
BIDIRECTIONAL: Dict[str, Callable[..., nn.Module]] = {
    'mamba': BiMamba,
    'mamba2': BiMamba2,
    's4d': partial(S4D, layout='block', bidirectional=True),
    'h3': partial(H3, bidirectional=True),
    'attention': Attention,
}
CAUSAL: Dict[str, Callable[..., nn.Module]] = {**MIXERS, 'attention': partial(Attention, causal=True)}
POOLINGS = 'mean', 'last'


class SequenceClassifier(nn.Module):
    """Blocks of mixers and feed-forwards between an embedding and a linear classifier.

    h = embedding(x); for every block `h, residual = block(h, residual)`; logits = head(pool(norm_f(h + residual)))

    Args:
        num_classes: Number of classes.
        vocab_size: Number of different symbols; 0 for sequences of real numbers.
        layers: Of every block the name of its mixer, or the names of mixer and feed-forward, one of `FEED_FORWARDS` or
            'none'. Mixers are those of `MIXERS`, or of `BIDIRECTIONAL`.
        d_model: Channels d.
        bidirectional: Whether mixers see later positions.
        pool: 'mean' of all positions or 'last' position, without padding.
        outputs: Classify this many last positions, each on its own, instead of the pooled sequence; 0 for the latter.
        padding: Symbol after the end of shorter sequences; None if there is none.
        layer_cfg: Arguments by name of mixer or feed-forward, such as {'attention': {'num_heads': 4}}.
        rms_norm: RMSNorm, otherwise LayerNorm.
        norm_epsilon: Added to mean squares and variances.

    Raises:
        TypeError: If an argument of a mixer is unknown.
        ValueError: If a name or a value is wrong.
    """

    def __init__(
        self,
        num_classes: int,
        vocab_size: int = 0,
        layers: Sequence[Layer] = ('mamba', 'mamba'),
        d_model: int = 64,
        bidirectional: bool = False,
        pool: str = 'mean',
        outputs: int = 0,
        padding: Optional[int] = None,
        layer_cfg: Optional[Dict[str, Dict[str, Any]]] = None,
        rms_norm: bool = True,
        norm_epsilon: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_counts(num_classes=num_classes, d_model=d_model)
        check_counts(0, vocab_size=vocab_size, outputs=outputs)
        check_choice(POOLINGS, pool=pool)
        if padding is not None and not 0 <= padding < vocab_size:
            raise ValueError(f'padding must be a symbol below vocab_size={vocab_size}, or None, got {padding!r}')
        self.num_classes, self.vocab_size, self.pool = num_classes, vocab_size, pool
        self.outputs, self.padding = outputs, padding
        mixers = BIDIRECTIONAL if bidirectional else CAUSAL
        names = _names(layers, mixers)
        arguments = _arguments(layer_cfg or {}, {name for pair in names for name in pair})
        norm_cls = RmsNorm if rms_norm else LayerNorm

        def make_norm() -> nn.Module:
            return norm_cls(d_model, eps=norm_epsilon, autocast=True, **dd)

        blocks: List[Block] = []
        for mixer, feed_forward in names:
            make_mlp = FEED_FORWARDS.get(feed_forward)
            mlp = make_mlp and make_mlp(d_model, **arguments[feed_forward], **dd)
            blocks.append(Block(mixers[mixer](d_model, **arguments[mixer], **dd), mlp, make_norm, True))
        self.embedding = nn.Embedding(vocab_size, d_model, **dd) if vocab_size else nn.Linear(1, d_model, **dd)
        self.layers = nn.ModuleList(blocks)
        self.norm_f = make_norm()
        self.head = nn.Linear(d_model, num_classes, **dd)
        init_blocks_(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        """Symbols or numbers [B, L] -> logits [B, num_classes], or [B, outputs, num_classes]

        Raises:
            ValueError: If x does not fit vocab_size or outputs, or a symbol is out of range (on a CPU).
        """
        hidden: Tensor = self._embed(x)
        residual: Optional[Tensor] = None
        for block in self.layers:
            hidden, residual = block(hidden, residual)
        normal = normalise(self.norm_f, hidden, residual)[0]
        return self.head(normal[:, x.shape[1] - self.outputs :] if self.outputs else self._pool(normal, x))

    def no_weight_decay(self) -> Set[str]:
        """Names of A_log, D, dt_bias, norms, biases, and of what mixers name themselves."""
        return undecayed(self)

    def _embed(self, x: Tensor) -> Tensor:
        """[B, L] -> [B, L, d]"""
        if x.ndim != 2 or x.shape[1] < max(self.outputs, 1):
            least = max(self.outputs, 1)
            raise ValueError(f'x must be [B, L] with L of at least {least}, got {tuple(x.shape)}')
        if x.is_floating_point() == bool(self.vocab_size):
            kind = f'symbols below {self.vocab_size}' if self.vocab_size else 'real numbers'
            raise ValueError(f'x must be {kind} with vocab_size={self.vocab_size}, got {x.dtype}')
        if not self.vocab_size:
            return self.embedding(x.unsqueeze(-1))
        if x.device.type == 'cpu' and not torch.compiler.is_compiling():
            outside = x[(x < 0) | (x >= self.vocab_size)]
            if outside.numel():
                raise ValueError(f'symbols must be from 0 to {self.vocab_size - 1}, got {int(outside[0])}')
        return self.embedding(x)

    def _pool(self, normal: Tensor, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, d], of the positions of x that are no padding"""
        if self.padding is None:
            return normal.mean(dim=1) if self.pool == 'mean' else normal[:, -1]
        kept = x != self.padding
        if self.pool == 'last':
            place = kept * torch.arange(x.shape[1], device=x.device)
            return normal[torch.arange(x.shape[0], device=x.device), place.argmax(dim=1)]
        weight = kept.to(normal.dtype).unsqueeze(-1)
        return (normal * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def _names(layers: Sequence[Layer], mixers: Dict[str, Any]) -> List[Tuple[str, str]]:
    """Mixer and feed-forward of every block."""
    if isinstance(layers, str) or not len(layers):
        raise ValueError(f'layers must be a list of at least one layer, got {layers!r}')
    pairs = [(layer, 'none') if isinstance(layer, str) else tuple(layer) for layer in layers]
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f'a layer is the name of a mixer, or of a mixer and a feed-forward; got {pair}')
        check_choice(mixers, layer=pair[0])
        check_choice([*FEED_FORWARDS, 'none'], feed_forward=pair[1])
    return [(mixer, feed_forward) for mixer, feed_forward in pairs]


def _arguments(layer_cfg: Dict[str, Dict[str, Any]], used: Set[str]) -> Dict[str, Dict[str, Any]]:
    """Arguments by name of mixer or feed-forward."""
    unknown = [name for name in layer_cfg if name not in used]
    if unknown:
        raise ValueError(f'layer_cfg has arguments of {unknown[0]!r}, which is none of the layers {sorted(used)}')
    return {name: dict(layer_cfg.get(name, {})) for name in used}
