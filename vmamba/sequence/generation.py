"""Generation: a parallel pass over the prompts, then one step per token with caches of constant size."""

import functools
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

import torch
from torch import Tensor, nn

from ..layers.options import check_counts

# A graph takes several steps to capture: fewer tokens are generated without.
_MIN_GRAPH_STEPS = 8
_STEPS_BETWEEN_CHECKS = 16  # of whether all sequences have ended, which waits for a GPU


class Sampling(NamedTuple):
    """How the next token is chosen from logits; the filters apply in this order.

    Attributes:
        repetition_penalty: Positive logits of tokens that are in the sequence are divided by this, negative ones
            multiplied; 1 for none.
        top_k: Keep this many tokens; 0 for all. 1 takes the most probable token.
        temperature: Divides the logits; 0 takes the most probable token.
        top_p: Of what is left, keep the most probable tokens that together have at least this probability; 0 for all.
        min_p: Keep tokens of at least this share of the highest probability.
    """

    repetition_penalty: float = 1.0
    top_k: int = 0
    temperature: float = 1.0
    top_p: float = 0.0
    min_p: float = 0.0

    def check(self) -> None:
        """Raises ValueError for a value out of range."""
        check_counts(0, top_k=self.top_k)
        if not self.temperature >= 0:
            raise ValueError(f'temperature must be at least 0, got {self.temperature}')
        if not self.repetition_penalty > 0:
            raise ValueError(f'repetition_penalty must be above 0, got {self.repetition_penalty}')
        for name in ('top_p', 'min_p'):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f'{name} must be between 0 and 1, got {getattr(self, name)}')

    @property
    def is_greedy(self) -> bool:
        return self.top_k == 1 or self.temperature == 0


def sample(
    logits: Tensor, sampling: Sampling, seen: Optional[Tensor] = None, generator: Optional[torch.Generator] = None
) -> Tensor:
    """Chooses tokens: logits [B, V] -> ids [B]

    Args:
        logits: Of the vocabulary, without its padding.
        sampling: How.
        seen: Whether a token is in the sequence [B, V], for the repetition penalty.
        generator: Of random numbers; PyTorch's own by default.
    """
    if seen is not None:
        penalty, logits = sampling.repetition_penalty, logits.float()
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.is_greedy:
        return logits.argmax(dim=-1)
    logits = logits.float()
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[..., -1:], -torch.inf)
    p = torch.softmax(logits / sampling.temperature, dim=-1)
    if 0 < sampling.top_p < 1:
        ascending, order = p.sort(dim=-1)
        dropped = ascending.cumsum(dim=-1) <= 1 - sampling.top_p
        dropped[..., -1] = False
        p = p.masked_fill(dropped.scatter(-1, order, dropped), 0)
    if sampling.min_p > 0:
        p = p.masked_fill(p < sampling.min_p * p.amax(dim=-1, keepdim=True), 0)
    return torch.multinomial(p, 1, generator=generator).squeeze(-1)


Function = TypeVar('Function', bound=Callable[..., Any])


def in_evaluation(function: Function) -> Function:
    """Runs a function without gradients and with the models among its arguments in evaluation mode."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        models = [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]
        modes = [(module, module.training) for model in models for module in model.modules()]
        try:
            for model in models:
                model.eval()
            with torch.no_grad():
                return function(*args, **kwargs)
        finally:
            for module, mode in modes:  # a part of a model may have another mode than the rest
                module.training = mode

    return call  # type: ignore[return-value]


@in_evaluation
def generate(
    model: nn.Module,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_token_id: Optional[int] = None,
    attention_mask: Optional[Tensor] = None,
    callback: Optional[Callable[[Tensor], None]] = None,
    generator: Optional[torch.Generator] = None,
    cuda_graph: bool = True,
) -> Tensor:
    """Continues sequences of tokens.

    The prompts pass the model in parallel; then every token takes one step, whose caches have a constant size (those
    of attention have room for all tokens). On a GPU the step is a CUDA graph.

    Args:
        model: A `LanguageModel`; it generates in evaluation mode.
        ids: Prompts [B, L].
        max_new_tokens: Most tokens to add.
        temperature: See `Sampling`, also for the next four. 0, or top_k=1, always takes the most probable token.
        top_k: See `Sampling`.
        top_p: See `Sampling`.
        min_p: See `Sampling`.
        repetition_penalty: See `Sampling`.
        eos_token_id: Token that ends a sequence; after it a row holds only this token.
        attention_mask: [B, L], 0 for padding, which is on the left only, and 1 for tokens: a prompt continues as it
            does alone.
        callback: Called with every new token of all rows, [B].
        generator: Of random numbers, on the device of ids.
        cuda_graph: Capture the step as a CUDA graph on a GPU.

    Returns:
        ids with the new tokens, [B, L + n], where n is below max_new_tokens if all rows have ended.

    Raises:
        ValueError: If a prompt is empty, an id is out of range, or an option is wrong.
        MemoryError: If the caches do not fit in memory.
    """
    sampling = Sampling(repetition_penalty, top_k, temperature, top_p, min_p)
    sampling.check()
    check_counts(0, max_new_tokens=max_new_tokens)
    lengths = check_ids(model, ids, attention_mask, eos_token_id)
    batch, longest = ids.shape
    if not max_new_tokens:
        return ids.long()
    rows = sorted(range(batch), key=lambda row: -lengths[row])  # of the caches, longest first
    order = torch.tensor(rows, device=ids.device)
    back, in_order = order.argsort(), rows == list(range(batch))
    prompts = [ids[row, longest - lengths[row] :] for row in rows]
    out, cache = _allocate(model, ids, max_new_tokens)
    decoder = Decoder(model, cache, batch, cuda_graph and max_new_tokens > _MIN_GRAPH_STEPS)
    logits = prefill(model, prompts, cache)[back]
    seen = _seen(ids, lengths, model.vocab_size) if repetition_penalty != 1 else None
    ended = torch.zeros(batch, dtype=torch.bool, device=ids.device)
    for n in range(max_new_tokens):
        token = sample(logits[:, : model.vocab_size], sampling, seen, generator)
        if eos_token_id is not None:
            token = torch.where(ended, eos_token_id, token)
            ended |= token == eos_token_id
        out[:, longest + n] = token
        if callback is not None:
            callback(token)
        if seen is not None:
            seen.scatter_(1, token.unsqueeze(1), True)
        if n == max_new_tokens - 1:
            break
        if eos_token_id is not None and (n + 1) % _STEPS_BETWEEN_CHECKS == 0 and ended.all():
            break
        logits = decoder(token) if in_order else decoder(token[order])[back]
    return out if eos_token_id is None else _trim(out, longest, n + 1, eos_token_id)


def prefill(model: nn.Module, prompts: Sequence[Tensor], cache: Sequence[Any]) -> Tensor:
    """Passes prompts of any lengths through the model: logits after each, [B, V].

    Rows advance together up to the end of the shortest prompt, the others from there to the next end, and so on: none
    ever sees padding.

    Args:
        model: A `LanguageModel`.
        prompts: Ids [length] of each row, the longest first.
        cache: Of all rows, of sequences that have not begun; updated.
    """
    rows, start, logits = len(prompts), 0, []
    while rows:
        end = len(prompts[rows - 1])
        part = torch.stack([prompt[start:end] for prompt in prompts[:rows]])
        last = model(part, cache=[_rows_of(own, rows) for own in cache], num_last_tokens=1)[:, -1]
        ending = sum(len(prompt) == end for prompt in prompts[:rows])
        logits.append(last[rows - ending :])
        rows, start = rows - ending, end
    return torch.cat(logits[::-1])


def _rows_of(cache: Any, rows: int) -> Any:
    """A view of the first rows of a cache; what has no rows is shared."""
    return type(cache)(*(t if t is None or t.ndim == 0 else t[:rows] for t in cache))


class Decoder:
    """The model's step: ids [B] -> logits [B, V], which the next call overwrites if it is a CUDA graph.

    Args:
        model: A `LanguageModel`.
        cache: Of sequences that have not begun; the steps update these very tensors.
        batch: Number of sequences.
        graph: Capture a CUDA graph if the model is on a GPU.
    """

    def __init__(self, model: nn.Module, cache: List[Any], batch: int, graph: bool) -> None:
        self.model, self.cache = model, cache
        self.graph: Any = None
        device = model.lm_head.weight.device
        if graph and device.type == 'cuda':
            self.ids = torch.zeros(batch, dtype=torch.long, device=device)
            self._capture(device)

    def __call__(self, ids: Tensor) -> Tensor:
        if self.graph is None:
            return self._step(ids)
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits

    def _step(self, ids: Tensor) -> Tensor:
        return self.model.step_embedded(self.model.backbone.embedding(ids), self.cache)

    def _capture(self, device: torch.device) -> None:
        """Warms the kernels up on another stream, captures, and takes the caches back to what they were.

        A step that waits for the GPU, as that of some mixtures of experts, cannot be captured and runs as it is.
        """
        tensors = [tensor for own in self.cache for tensor in own if tensor is not None]
        before = [tensor.clone() for tensor in tensors]
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step(self.ids)  # compiles kernels
                waits = self._waits()
            torch.cuda.current_stream().wait_stream(stream)
            _restore(tensors, before)
            if not waits:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.logits = self._step(self.ids)
                _restore(tensors, before)

    def _waits(self) -> bool:
        """Whether the step makes the host wait for the GPU."""
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode('error')
        try:
            self._step(self.ids)
        except RuntimeError as error:
            if 'synchronizing' not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        return False


def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values):
        tensor.copy_(value)


def _allocate(model: nn.Module, ids: Tensor, max_new_tokens: int) -> Tuple[Tensor, List[Any]]:
    """ids with room for the new tokens, and caches."""
    batch, longest = ids.shape[0], ids.shape[1] + max_new_tokens
    try:
        cache = model.allocate_cache(batch, longest)
        return torch.cat([ids.long(), ids.new_zeros(batch, max_new_tokens, dtype=torch.long)], dim=1), cache
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if 'memory' not in str(error):
            raise
        raise MemoryError(
            f'the caches of {batch} sequences of up to {longest} tokens do not fit in memory: generate fewer tokens or '
            'fewer sequences at a time'
        ) from error


def check_ids(
    model: nn.Module, ids: Tensor, attention_mask: Optional[Tensor] = None, eos_token_id: Optional[int] = None
) -> List[int]:
    """The length of every prompt without its padding.

    Raises:
        ValueError: If a prompt is empty, an id is out of range, or padding is not on the left.
    """
    if ids.ndim != 2 or ids.is_floating_point() or 0 in ids.shape:
        raise ValueError(f'ids must be integers [B, L] with at least one token, got {tuple(ids.shape)} {ids.dtype}')
    if eos_token_id is not None and not 0 <= eos_token_id < model.vocab_size:
        raise ValueError(f'eos_token_id must be below {model.vocab_size}, got {eos_token_id}')
    mask = torch.ones_like(ids, dtype=torch.bool)
    if attention_mask is not None:
        if attention_mask.shape != ids.shape:
            raise ValueError(f'attention_mask must be {tuple(ids.shape)} like ids, got {tuple(attention_mask.shape)}')
        mask = attention_mask.to(ids.device) != 0
    if not bool((mask[:, 1:] >= mask[:, :-1]).all()):
        raise ValueError('attention_mask must have its zeros on the left: pad the prompts on the left')
    outside = mask & ((ids < 0) | (ids >= model.vocab_size))
    if outside.any():
        raise ValueError(f'ids must be from 0 to {model.vocab_size - 1}, got {int(ids[outside][0])}')
    lengths = mask.sum(dim=1).tolist()
    if 0 in lengths:
        raise ValueError(f'row {lengths.index(0)} of attention_mask is all zeros: a prompt must have a token')
    return lengths


def _seen(ids: Tensor, lengths: Sequence[int], vocab_size: int) -> Tensor:
    """Which tokens are in each prompt, [B, vocab_size]"""
    seen = torch.zeros(len(ids), vocab_size, dtype=torch.bool, device=ids.device)
    for row, length in enumerate(lengths):
        seen[row, ids[row, -length:].long()] = True
    return seen


def _trim(out: Tensor, longest: int, generated: int, eos_token_id: int) -> Tensor:
    """Leaves out what was not generated, and columns in which all rows had ended before."""
    new = out[:, longest : longest + generated]
    ended = (new == eos_token_id).cumsum(dim=1) > 0
    running = int((~ended).any(dim=0).sum())  # columns in which some row has not ended
    return out[:, : longest + min(running + 1, generated)]
