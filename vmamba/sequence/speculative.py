"""Speculative decoding: a small model drafts, a large one verifies a whole draft by one parallel scan.

MambaByte: Token-free Selective State Space Model, https://arxiv.org/abs/2401.13660
"""

from typing import Any, Callable, List, Optional, Protocol, Tuple

import torch
from torch import Tensor, nn

from ..layers.options import check_counts
from .generation import check_ids, in_evaluation, prefill

# Tokens that passed the verifier, but are not in its saved state yet, pass it again with every draft: at most so many.
_MOST_PENDING = 64


class Tokenizer(Protocol):
    """Of a drafter that does not read bytes, such as one of transformers'."""

    def encode(self, text: str) -> List[int]: ...

    def decode(self, ids: List[int]) -> str: ...


class _Drafter:
    """Drafts by steps from the state after the text; draws on a copy of it, so that the text alone counts.

    Args:
        model: A `LanguageModel`.
        tokenizer: None if the drafter has the verifier's vocabulary. Otherwise new text is tokenised by itself.
    """

    def __init__(self, model: nn.Module, tokenizer: Optional[Tokenizer], longest: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.cache = model.allocate_cache(1, longest)
        self.logits: Optional[Tensor] = None
        self.device = model.lm_head.weight.device

    def read(self, ids: List[int]) -> None:
        """Continues the text."""
        if self.tokenizer is not None:
            ids = self.tokenizer.encode(bytes(ids).decode('utf-8', errors='ignore'))
        if ids:
            self.logits = self.model(torch.tensor([ids], device=self.device), cache=self.cache, num_last_tokens=1)[
                :, -1
            ]

    def draft(self, tokens: int) -> List[int]:
        """The most probable continuation by so many of the drafter's tokens, in the verifier's."""
        if self.logits is None:
            return []
        cache, logits, ids = _copy(self.cache), self.logits, []
        for n in range(tokens):
            token = logits[:, : self.model.vocab_size].argmax(-1)
            ids.append(token)
            if n < tokens - 1:
                logits = self.model.step(token, cache)
        drafted = torch.cat(ids).tolist()
        return drafted if self.tokenizer is None else list(self.tokenizer.decode(drafted).encode())


@in_evaluation
def speculative_generate(
    model: nn.Module,
    drafter: nn.Module,
    ids: Tensor,
    max_new_tokens: int,
    draft_tokens: int = 3,
    accept_top: int = 1,
    tokenizer: Optional[Tokenizer] = None,
    callback: Optional[Callable[[Tensor], None]] = None,
) -> Tensor:
    """Continues a sequence as a large model would, with fewer passes of it.

    The drafter proposes tokens by steps. They pass the model in one parallel scan from its saved state; a token is
    accepted while it is among the model's `accept_top` most probable ones. At the first that is not, the model's own
    token is taken, the state before the draft restored, and the drafter continues from the text. With accept_top=1
    the result is that of `generate` with top_k=1.

    Args:
        model: A `LanguageModel`.
        drafter: Another, of the same vocabulary; or of any with a tokenizer, where model's are bytes.
        ids: Prompt [1, L].
        max_new_tokens: Tokens to add.
        draft_tokens: Tokens that the drafter proposes at a time.
        accept_top: A drafted token may be any of this many most probable ones.
        tokenizer: Of the drafter.
        callback: Called with new tokens, [1, n].

    Returns:
        ids with the new tokens, [1, L + max_new_tokens].

    Raises:
        ValueError: If the prompt is not one row, an id is out of range, or the vocabularies differ.
    """
    check_counts(draft_tokens=draft_tokens, accept_top=accept_top)
    check_counts(0, max_new_tokens=max_new_tokens)
    check_ids(model, ids)
    expected = 256 if tokenizer is not None else drafter.vocab_size
    if len(ids) != 1:
        raise ValueError(f'one prompt is needed, got {len(ids)}')
    if model.vocab_size != expected:
        what = "the drafter's" if tokenizer is None else 'that of bytes'
        raise ValueError(f'the vocabulary must be {what}, {expected} tokens, got {model.vocab_size}')
    end = ids.shape[1] + max_new_tokens
    longest = end + draft_tokens + _MOST_PENDING
    cache, reader = model.allocate_cache(1, longest), _Drafter(drafter, tokenizer, longest)
    text: List[int] = ids[0].tolist()
    prefill(model, [ids[0, :-1]], cache) if ids.shape[1] > 1 else None
    saved, read = ids.shape[1] - 1, 0  # tokens in the saved state of the model, and in that of the drafter
    while len(text) < end:
        reader.read(text[read:])
        read = len(text)
        draft = reader.draft(draft_tokens)[: end - len(text)]  # a token of a drafter's own may be many bytes
        accepted, work = _verify(model, cache, text[saved:], draft, accept_top)
        if len(accepted) > len(draft):  # the whole draft: its state is that of the text before the last token
            cache, saved = work, len(text) + len(draft)
        new = accepted[: end - len(text)]
        text += new
        if callback is not None:
            callback(torch.tensor([new], device=ids.device))
        if len(text) - saved > _MOST_PENDING:
            model(torch.tensor([text[saved:-1]], device=ids.device), cache=cache, num_last_tokens=1)
            saved = len(text) - 1
    return torch.tensor([text], device=ids.device)


def _verify(
    model: nn.Module, cache: List[Any], pending: List[int], draft: List[int], accept_top: int
) -> Tuple[List[int], List[Any]]:
    """The accepted tokens of the draft and one of the model's own, and the state after pending and draft."""
    work = _copy(cache)
    ids = torch.tensor([pending + draft], device=model.lm_head.weight.device)
    logits = model(ids, cache=work, num_last_tokens=len(draft) + 1)[0, :, : model.vocab_size]
    best = logits.topk(min(accept_top, model.vocab_size)).indices.tolist()  # [draft + 1, accept_top]
    accepted = 0
    while accepted < len(draft) and draft[accepted] in best[accepted]:
        accepted += 1
    return [*draft[:accepted], best[accepted][0]], work


def _copy(cache: List[Any]) -> List[Any]:
    return [type(own)(*(tensor if tensor is None else tensor.clone() for tensor in own)) for own in cache]
