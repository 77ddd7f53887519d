"""Language models on state-space mixers.

Mamba: Linear-Time Sequence Modeling with Selective State Spaces, https://arxiv.org/abs/2312.00752
Transformers are SSMs, https://arxiv.org/abs/2405.21060
An Empirical Study of Mamba-based Language Models, https://arxiv.org/abs/2406.07887

State-dict names and initialisation are those of mamba_ssm's `MambaLMHeadModel`.
"""

import math
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Type, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import add_norm
from ..layers import H3, S4D, Attention, BlockState, LayerNorm, Mamba, Mamba2, RmsNorm, SwitchMoE, auxiliary_loss
from ..layers.options import check_choice, check_counts
from .checkpoint import fit_weights, read_pretrained, write_pretrained
from .generation import generate

IGNORED = -100  # target of a position that has no loss
# Mixers by name: modules [B, L, d] -> [B, L, d] with `allocate_cache` and `step`.
MIXERS: Dict[str, Type[nn.Module]] = {
    'mamba': Mamba,
    'mamba2': Mamba2,
    's4d': S4D,
    'h3': H3,
    'attention': Attention,
    'block_state': BlockState,
}
OFFICIAL_NAMES = {'Mamba1': 'mamba', 'Mamba2': 'mamba2'}  # of ssm_cfg
N_LAYER = 64  # official default
NEEDED = {'attention': 'num_heads', 'mlp': 'd_hidden', 'moe': 'num_experts'}  # arguments without a default

# A_log, D and dt's bias stay in fp32, as do the kernels of S4D and H3 and the router of experts.
_FP32 = re.compile(r'(^|\.)(A_log|D|ssm_k_D|dt_bias|dt_proj\.bias|router_weight)$|(^|\.)kernel\.')
_NO_DECAY = re.compile(r'(^|\.)(A_log|D|ssm_k_D|dt_bias|bias)$|(^|\.)norm\w*\.weight$')

Layer = Union[str, Sequence[str]]


class GatedMlp(nn.Module):
    """fc2(y * silu(g)) with y, g = fc1(x), without biases: the official model's `GatedMLP`.

    Args:
        d_model: Channels d.
        d_hidden: Hidden channels, rounded up to a multiple of 128.
    """

    def __init__(self, d_model: int, d_hidden: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_counts(d_model=d_model, d_hidden=d_hidden)
        d_hidden = math.ceil(d_hidden / 128) * 128
        self.fc1 = nn.Linear(d_model, 2 * d_hidden, bias=False, **dd)
        self.fc2 = nn.Linear(d_hidden, d_model, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ..., d] -> [B, ..., d]"""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * F.silu(gate))


# Feed-forwards by name: modules [B, ..., d] -> [B, ..., d].
FEED_FORWARDS: Dict[str, Type[nn.Module]] = {'mlp': GatedMlp, 'moe': SwitchMoE}


class Block(nn.Module):
    """residual = residual + hidden; hidden = mixer(norm(residual)); the same with the feed-forward, if there is one.

    The last branch's output is added by the next block's norm.

    Args:
        mixer: [B, L, d] -> [B, L, d].
        mlp: [B, ..., d] -> [B, ..., d], or None.
        make_norm: Makes an `RmsNorm` or `LayerNorm`.
        residual_in_fp32: Keep the residual in at least fp32, otherwise in the dtype of the activations.
    """

    def __init__(
        self, mixer: nn.Module, mlp: Optional[nn.Module], make_norm: Callable[[], nn.Module], residual_in_fp32: bool
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.norm = make_norm()
        self.mixer = mixer
        if mlp is not None:
            self.norm2 = make_norm()
        self.mlp = mlp

    def forward(self, hidden: Tensor, residual: Optional[Tensor], **mixer_args: Any) -> Tuple[Tensor, Tensor]:
        """[B, L, d] -> [B, L, d], with the residual"""
        return self._run(hidden, residual, lambda x: self.mixer(x, **mixer_args), self.mlp)

    def step(self, hidden: Tensor, residual: Optional[Tensor], cache: Any) -> Tuple[Tensor, Tensor]:
        """The same for one more token: [B, d] -> [B, d]"""
        # Experts have a step of their own, which drops no token.
        return self._run(hidden, residual, lambda x: self.mixer.step(x, cache), getattr(self.mlp, 'step', self.mlp))

    def _run(
        self,
        hidden: Tensor,
        residual: Optional[Tensor],
        mix: Callable[[Tensor], Tensor],
        mlp: Optional[Callable[[Tensor], Tensor]],
    ) -> Tuple[Tensor, Tensor]:
        normal, residual = self._add_norm(self.norm, hidden, residual)
        hidden = mix(normal)
        if mlp is not None:
            normal, residual = self._add_norm(self.norm2, hidden, residual)
            hidden = mlp(normal)
        return hidden, residual

    def _add_norm(self, norm: nn.Module, hidden: Tensor, residual: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        normal, summed = normalise(norm, hidden, residual)
        return normal, summed if self.residual_in_fp32 else summed.to(hidden.dtype)


def normalise(norm: nn.Module, hidden: Tensor, residual: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """norm(residual + hidden), and that sum."""
    out_dtype = norm.out_dtype(hidden.device.type)
    return add_norm(hidden, residual, norm.weight, getattr(norm, 'bias', None), norm.eps, out_dtype)


class Backbone(nn.Module):
    """Embedding, blocks and last norm."""

    def __init__(self, embedding: nn.Embedding, layers: Sequence[Block], norm_f: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(layers)
        self.norm_f = norm_f


class LanguageModel(nn.Module):
    """Predicts the next token, with the options and parameter names of mamba_ssm's `MambaLMHeadModel`.

    h = embedding(ids); for every block `h, residual = block(h, residual)`; logits = lm_head(norm_f(h + residual))

    Args:
        d_model: Token channels d.
        d_intermediate: Hidden channels of an MLP in every block; 0 for none.
        n_layer: Number of blocks; 64 by default, or as many as `layers`.
        vocab_size: Number of different tokens.
        ssm_cfg: Arguments of the mixer, and as `layer` its name: 'Mamba1' (default), 'Mamba2' or one of `MIXERS`.
        attn_layer_idx: Blocks whose mixer is attention.
        attn_cfg: Arguments of attention.
        rms_norm: RMSNorm, otherwise LayerNorm.
        residual_in_fp32: Keep the residual in fp32, otherwise in the dtype of the activations.
        fused_add_norm: Without effect: additions and norms are fused where there is a kernel.
        pad_vocab_size_multiple: The vocabulary is padded to a multiple of this.
        tie_embeddings: Use the embedding's weight as that of lm_head.
        layers: For stacks that the official options cannot describe: of every block the name of its mixer, or the
            names of mixer and feed-forward, one of `FEED_FORWARDS` or 'none'. Replaces n_layer and attn_layer_idx.
        layer_cfg: Further arguments by name of mixer or feed-forward, such as {'h3': {'head_dim': 8}}.
        norm_epsilon: Added to mean squares and variances.

    Attributes:
        config: These options, in plain values.

    Raises:
        TypeError: If an option or an argument of a mixer is unknown.
        ValueError: If a value is wrong, or a mixer would see later tokens.
    """

    def __init__(
        self,
        d_model: int = 2560,
        d_intermediate: int = 0,
        n_layer: Optional[int] = None,
        vocab_size: int = 50277,
        ssm_cfg: Optional[Dict[str, Any]] = None,
        attn_layer_idx: Sequence[int] = (),
        attn_cfg: Optional[Dict[str, Any]] = None,
        rms_norm: bool = True,
        residual_in_fp32: bool = True,
        fused_add_norm: bool = True,
        pad_vocab_size_multiple: int = 8,
        tie_embeddings: bool = True,
        layers: Optional[Sequence[Layer]] = None,
        layer_cfg: Optional[Dict[str, Dict[str, Any]]] = None,
        norm_epsilon: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_counts(d_model=d_model, vocab_size=vocab_size, pad_vocab_size_multiple=pad_vocab_size_multiple)
        check_counts(0, d_intermediate=d_intermediate)
        ssm_cfg, attn_cfg, layer_cfg = dict(ssm_cfg or {}), dict(attn_cfg or {}), dict(layer_cfg or {})
        names = _layer_names(n_layer, ssm_cfg, attn_layer_idx, d_intermediate, layers)
        self.config: Dict[str, Any] = dict(
            d_model=d_model,
            d_intermediate=d_intermediate,
            n_layer=len(names),
            vocab_size=vocab_size,
            ssm_cfg=ssm_cfg,
            attn_layer_idx=list(attn_layer_idx),
            attn_cfg=attn_cfg,
            rms_norm=rms_norm,
            residual_in_fp32=residual_in_fp32,
            fused_add_norm=fused_add_norm,
            pad_vocab_size_multiple=pad_vocab_size_multiple,
            tie_embeddings=tie_embeddings,
        )
        # Options that mamba_ssm does not have are left out where they are not used.
        if layers is not None:
            self.config['layers'] = [list(pair) for pair in names]
        if layer_cfg:
            self.config['layer_cfg'] = layer_cfg
        if norm_epsilon != 1e-5:
            self.config['norm_epsilon'] = norm_epsilon
        self.vocab_size, self.grad_checkpointing = vocab_size, False
        arguments = _arguments(ssm_cfg, attn_cfg, layer_cfg, d_intermediate, {name for pair in names for name in pair})
        norm_cls = RmsNorm if rms_norm else LayerNorm

        def make_norm() -> nn.Module:
            return norm_cls(d_model, eps=norm_epsilon, autocast=True, **dd)

        blocks = []
        for mixer, feed_forward in names:
            make_mlp = FEED_FORWARDS.get(feed_forward)
            mlp = make_mlp and make_mlp(d_model, **arguments[feed_forward], **dd)
            blocks.append(Block(MIXERS[mixer](d_model, **arguments[mixer], **dd), mlp, make_norm, residual_in_fp32))
        padded = math.ceil(vocab_size / pad_vocab_size_multiple) * pad_vocab_size_multiple
        self.backbone = Backbone(nn.Embedding(padded, d_model, **dd), blocks, make_norm())
        self.lm_head = nn.Linear(d_model, padded, bias=False, **dd)
        self.tie_weights()
        self.reset_parameters()

    def tie_weights(self) -> None:
        """Makes lm_head use the embedding's weight, if the model is so configured."""
        if self.config['tie_embeddings']:
            self.lm_head.weight = self.backbone.embedding.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises as mamba_ssm does, on top of what mixers do: the embedding by N(0, 0.02), biases of linear layers
        except that of dt by 0, and the last weights of branches by U(-1, 1) / sqrt(fan_in * n_layer)."""
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        init_blocks_(self.backbone.layers)

    def forward(
        self,
        ids: Tensor,
        seq_idx: Optional[Tensor] = None,
        cache: Optional[Sequence[Any]] = None,
        num_last_tokens: int = 0,
    ) -> Tensor:
        """[B, L] -> logits [B, L, V], where V is the padded vocabulary.

        An id out of range is an error on a CPU. On other devices, where looking at values would wait for the device,
        it makes the logits of its row NaN from there on.

        Args:
            ids: Tokens [B, L], integers below vocab_size.
            seq_idx: Integers [B, L], the number of the packed sequence of each token; for mamba, mamba2 and attention,
                and not together with a cache.
            cache: What precedes ids, of `allocate_cache`; updated to what precedes the next token. Carries no
                gradients.
            num_last_tokens: Return the logits of this many last positions only; 0 for all.

        Raises:
            ValueError: If ids are empty or out of range, or a mixer does not take seq_idx.
        """
        if ids.ndim != 2 or ids.shape[1] == 0 or ids.is_floating_point():
            found = f'{tuple(ids.shape)} {ids.dtype}'
            raise ValueError(f'ids must be integers [B, L] with at least one token, got {found}')
        if seq_idx is not None:
            self._check_packable()
        hidden = self._embed(ids)
        residual: Any = None
        shared = {} if seq_idx is None else {'seq_idx': seq_idx}
        caches = [{}] * len(self.backbone.layers) if cache is None else [{'cache': own} for own in cache]
        for block, own in zip(self.backbone.layers, caches):
            arguments = {**shared, **own}
            if self.grad_checkpointing and torch.is_grad_enabled():
                hidden, residual = checkpoint(block, hidden, residual, use_reentrant=False, **arguments)
            else:
                hidden, residual = block(hidden, residual, **arguments)
        if num_last_tokens:
            hidden, residual = (tensor[:, -num_last_tokens:] for tensor in (hidden, residual))
        return self.lm_head(normalise(self.backbone.norm_f, hidden, residual)[0])

    @torch.no_grad()
    def step(self, ids: Tensor, cache: Sequence[Any]) -> Tensor:
        """Logits for one more token [B] -> [B, V], equal to those of whole sequences; without gradients.

        Args:
            ids: Tokens [B].
            cache: What precedes them, of `allocate_cache`; updated.
        """
        return self.step_embedded(self._embed(ids), cache)

    @torch.no_grad()
    def step_embedded(self, hidden: Tensor, cache: Sequence[Any]) -> Tensor:
        """`step` from embeddings [B, d], for callers whose ids need no check."""
        residual = None
        for block, own in zip(self.backbone.layers, cache):
            hidden, residual = block.step(hidden, residual, own)
        return self.lm_head(normalise(self.backbone.norm_f, hidden, residual)[0])

    def allocate_cache(self, batch_size: int, max_seqlen: int = 0) -> List[Any]:
        """The caches of all blocks for sequences that have not begun.

        Args:
            batch_size: Number of sequences.
            max_seqlen: Most tokens of a sequence, for the keys and values of attention; other caches do not grow.
        """
        mixers = [block.mixer for block in self.backbone.layers]
        return [
            mixer.allocate_cache(batch_size, max_seqlen)
            if isinstance(mixer, Attention)
            else mixer.allocate_cache(batch_size)
            for mixer in mixers
        ]

    def loss(self, ids: Tensor, seq_idx: Optional[Tensor] = None) -> Tensor:
        """Mean cross-entropy in nats of every next token of ids [B, L], in fp32; in training with auxiliary losses.

        Args:
            ids: Tokens [B, L].
            seq_idx: As for `forward`; first tokens of packed sequences are not predicted.

        Raises:
            ValueError: If there are fewer than two tokens, or as for `forward`.
        """
        if ids.ndim == 2 and ids.shape[1] < 2:
            raise ValueError(f'a loss needs at least two tokens [B, L], got {tuple(ids.shape)}')
        targets = ids[:, 1:].long()
        if seq_idx is not None:
            targets = targets.masked_fill(seq_idx[:, 1:] != seq_idx[:, :-1], IGNORED)
        return next_token_loss(self(ids, seq_idx)[:, :-1], targets) + auxiliary_loss(self)

    generate = generate

    def cast(self, dtype: torch.dtype) -> 'LanguageModel':
        """Casts the weights in place, except A_log, D, dt's bias and the kernels of S4D and H3; returns the model."""
        for name, parameter in self.named_parameters():
            if not _FP32.search(name):
                parameter.data = parameter.data.to(dtype)
        return self

    def no_weight_decay(self) -> Set[str]:
        """Names of A_log, D, dt_bias, norms, biases, and of what mixers name themselves."""
        return undecayed(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Sets whether to recompute each block's activations in the backward pass."""
        self.grad_checkpointing = enable

    @classmethod
    def from_pretrained(
        cls, source: Union[str, Path], device: Any = None, dtype: Optional[torch.dtype] = None
    ) -> 'LanguageModel':
        """Loads a model of mamba_ssm's, of transformers' Mamba or Mamba-2, or of `save_pretrained`.

        Args:
            source: Folder with config.json and model.safetensors or pytorch_model.bin, or the id of such a model on
                the Hugging Face Hub.
            device: Of the weights; default: the CPU.
            dtype: As for `cast`; default: fp32.

        Raises:
            FileNotFoundError: If there is no such folder or model, or a file of it is missing.
            RuntimeError: If the weights do not fit the configuration.
            ValueError: If the configuration has an unknown key or value.
        """
        config, state_dict = read_pretrained(source)
        model = cls(**config, device='meta')
        model.load_state_dict(fit_weights(state_dict, model, source), assign=True)
        model.tie_weights()
        model = model.to(device=device).eval()
        return model if dtype is None else model.cast(dtype)

    def save_pretrained(self, folder: Union[str, Path]) -> None:
        """Writes config.json and model.safetensors, with official names, for `from_pretrained`."""
        write_pretrained(Path(folder), self.config, self.state_dict())

    def _check_packable(self) -> None:
        mixers = (type(block.mixer) for block in self.backbone.layers)
        unpacked = sorted({mixer.__name__ for mixer in mixers if mixer not in (Mamba, Mamba2, Attention)})
        if unpacked:
            raise ValueError(f'seq_idx is for Mamba, Mamba2 and Attention, but the model has {", ".join(unpacked)}')

    def _embed(self, ids: Tensor) -> Tensor:
        """[...] -> [..., d]"""
        ids = ids.long()
        outside = (ids < 0) | (ids >= self.vocab_size)
        if ids.device.type == 'cpu' and not torch.compiler.is_compiling():
            if outside.any():
                found = int(ids[outside][0])
                raise ValueError(f'ids must be from 0 to {self.vocab_size - 1}, the vocabulary; got {found}')
            return self.backbone.embedding(ids)
        embedded = self.backbone.embedding(ids.masked_fill(outside, 0))
        return embedded.masked_fill(outside.unsqueeze(-1), math.nan)


@torch.no_grad()
def init_blocks_(blocks: nn.ModuleList) -> None:
    """Initialises linear layers as mamba_ssm does: biases except that of dt by 0, and the last weights of branches by
    U(-1, 1) / sqrt(fan_in * number of blocks)."""
    for name, module in blocks.named_modules():
        if isinstance(module, nn.Linear):
            last = name.rpartition('.')[2]
            if module.bias is not None and last != 'dt_proj':
                nn.init.zeros_(module.bias)
            if last in ('out_proj', 'fc2'):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                module.weight /= math.sqrt(len(blocks))


def undecayed(model: nn.Module) -> Set[str]:
    """Names of A_log, D, dt_bias, norms, biases, and of what mixers name themselves."""
    names = {name for name, _ in model.named_parameters() if _NO_DECAY.search(name)}
    for path, module in model.named_modules():
        if path and hasattr(module, 'no_weight_decay'):
            names |= {f'{path}.{name}' for name in module.no_weight_decay()}
    return names


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits [..., V] for targets [...], in fp32; targets of `IGNORED` do not count."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED)


def _layer_names(
    n_layer: Optional[int],
    ssm_cfg: Dict[str, Any],
    attn_layer_idx: Sequence[int],
    d_intermediate: int,
    layers: Optional[Sequence[Layer]],
) -> List[Tuple[str, str]]:
    """Mixer and feed-forward of every block."""
    default = 'mlp' if d_intermediate else 'none'
    if layers is None:
        n_layer = N_LAYER if n_layer is None else n_layer
        check_counts(n_layer=n_layer)
        outside = [i for i in attn_layer_idx if not 0 <= i < n_layer]
        if outside:
            raise ValueError(f'attn_layer_idx must be below the {n_layer} layers, got {outside[0]}')
        ssm = ssm_cfg.get('layer', 'Mamba1')
        layers = ['attention' if i in attn_layer_idx else ssm for i in range(n_layer)]
    elif not layers or n_layer not in (None, len(layers)):
        raise ValueError(f'n_layer must be the number of layers, at least 1: got {n_layer} for {len(layers)}')
    elif len(attn_layer_idx):
        raise ValueError("give attn_layer_idx or layers, not both: layers may contain 'attention'")
    pairs = [(layer, default) if isinstance(layer, str) else tuple(layer) for layer in layers]
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f'a layer is the name of a mixer, or of a mixer and a feed-forward; got {pair}')
        check_choice([*OFFICIAL_NAMES, *MIXERS], layer=pair[0])
        check_choice([*FEED_FORWARDS, 'none'], feed_forward=pair[1])
    return [(OFFICIAL_NAMES.get(mixer, mixer), feed_forward) for mixer, feed_forward in pairs]


def _arguments(
    ssm_cfg: Dict[str, Any],
    attn_cfg: Dict[str, Any],
    layer_cfg: Dict[str, Dict[str, Any]],
    d_intermediate: int,
    used: Set[str],
) -> Dict[str, Dict[str, Any]]:
    """Arguments by name of mixer or feed-forward."""
    unknown = [name for name in layer_cfg if name not in used]
    if unknown:
        raise ValueError(f'layer_cfg has arguments of {unknown[0]!r}, which is none of the layers {sorted(used)}')
    arguments = {name: dict(layer_cfg.get(name, {})) for name in used}
    ssm = ssm_cfg.get('layer', 'Mamba1')
    ssm = OFFICIAL_NAMES.get(ssm, ssm)
    if ssm in used:
        arguments[ssm] = {**{k: v for k, v in ssm_cfg.items() if k != 'layer'}, **arguments[ssm]}
    if 'attention' in used:
        arguments['attention'] = {'causal': True, **attn_cfg, **arguments['attention']}
    if 'mlp' in used and d_intermediate:
        arguments['mlp'] = {'d_hidden': d_intermediate, **arguments['mlp']}
    for name, needed in NEEDED.items():
        if name in used and needed not in arguments[name]:
            option = 'attn_cfg' if name == 'attention' else 'layer_cfg'
            raise ValueError(f'{name} needs {needed}: give it in {option}, got {arguments[name]}')
    for name, given in arguments.items():
        if given.get('bidirectional') or not given.get('causal', True):
            raise ValueError(f'a language model must not see later tokens, got arguments of {name}: {given}')
    return arguments
