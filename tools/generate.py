"""Continues a text by a language model, and prints it as it comes.

The model is a folder of `vmamba train` with task: language, of mamba_ssm or of transformers' Mamba and Mamba-2, or the
id of such a model on the Hugging Face Hub.

    vmamba generate --model runs/mambabyte_nano/best --prompt 'import '
    vmamba generate --model state-spaces/mamba-130m --tokenizer gpt-neox-20b --prompt 'State space models'
    vmamba generate --model mambabyte --draft mambabyte_small --prompt-file story.txt --max-new-tokens 1000
"""

import argparse
import codecs
from pathlib import Path
from typing import Any, List, Optional, Sequence

import torch
from torch import Tensor

from vmamba.sequence import LanguageModel, Sampling, generate, speculative_generate
from vmamba.tools.devices import add_device_option
from vmamba.tools.language_models import add_precision_option, load
from vmamba.tools.user_errors import Parser, UserError, as_user_error, at_least, one_line_errors, positive


class Bytes:
    """Text as the bytes of its UTF-8."""

    eos_token_id = None

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder('utf-8')('replace')

    def encode(self, text: bytes) -> List[int]:
        return list(text)

    def decode(self, ids: List[int]) -> str:
        """The text that new ids complete."""
        return self._decoder.decode(bytes(id for id in ids if id < 256))


class Tokens:
    """Text by a tokenizer of transformers."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer  # here: an extra of its own

        with as_user_error(f'cannot load the tokenizer {folder}'):
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.eos_token_id = self.tokenizer.eos_token_id
        self._ids: List[int] = []
        self._shown = ''

    def encode(self, text: bytes) -> List[int]:
        return self.tokenizer.encode(text.decode('utf-8', errors='replace'))

    def decode(self, ids: List[int]) -> str:
        """The text that new ids complete."""
        self._ids += ids
        text = self.tokenizer.decode(self._ids)
        if text.endswith('\ufffd'):  # the beginning of a character
            return ''
        new, self._shown = text[len(self._shown) :], text
        return new


def coding(args: argparse.Namespace, model: LanguageModel) -> Any:
    """How text becomes ids: as the options say, else bytes if the vocabulary is that, else the model's tokenizer."""
    if args.tokenizer:
        return Tokens(args.tokenizer)
    if args.bytes or model.vocab_size == 256:
        if model.vocab_size < 256:
            raise UserError(f'--bytes needs a vocabulary of 256, {args.model} has one of {model.vocab_size}')
        return Bytes()
    if Path(args.model, 'tokenizer_config.json').is_file():
        return Tokens(args.model)
    raise UserError(f'{args.model} has no tokenizer: give --tokenizer FOLDER, or --bytes')


def prompt_of(args: argparse.Namespace) -> bytes:
    text = args.prompt_file.read_bytes() if args.prompt_file else args.prompt.encode()
    if not text:
        raise UserError('the prompt is empty: give --prompt TEXT with at least one character')
    return text


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The options of sampling.

    Raises:
        UserError: If one is out of range, or of no effect on a draft.
    """
    sampling = Sampling(*(getattr(args, key) for key in Sampling._fields))
    with as_user_error():
        sampling.check()
    greedy = Sampling(), Sampling(top_k=1), Sampling(temperature=0.0)
    if args.draft and sampling not in greedy:
        raise UserError('--draft always takes the most probable token: leave out the options of sampling')
    return sampling


@one_line_errors('generate.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    text, sampling, device = prompt_of(args), sampling_of(args), args.device
    model = load(args.model, device, args.precision)
    coder = coding(args, model)
    ids = torch.tensor([coder.encode(text)], device=device)

    def show(new: Tensor) -> None:
        print(coder.decode(new.flatten().tolist()), end='', flush=True)

    if not args.only_new:
        print(text.decode('utf-8', errors='replace'), end='', flush=True)
    try:
        if args.draft:
            drafter = load(args.draft, device, args.precision)
            speculative_generate(model, drafter, ids, args.max_new_tokens, args.draft_tokens, callback=show)
        else:
            generator = torch.Generator(device).manual_seed(args.seed)
            generate(
                *(model, ids, args.max_new_tokens),
                **sampling._asdict(),
                eos_token_id=coder.eos_token_id,
                callback=show,
                generator=generator,
            )
    except (MemoryError, ValueError) as error:
        print()
        raise UserError(str(error)) from error
    print()


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--model', required=True, help='folder, or id on the Hugging Face Hub')
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument('--prompt', help='text to continue')
    prompts.add_argument('--prompt-file', type=Path, help='file with the text to continue')
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument('--bytes', action='store_true', help='text is bytes; the default for a vocabulary of 256')
    texts.add_argument('--tokenizer', help="folder or id of a tokenizer of transformers; default: the model's")
    parser.add_argument('--max-new-tokens', type=positive, default=200)
    parser.add_argument('--only-new', action='store_true', help='do not print the prompt')
    sampling = parser.add_argument_group('sampling')
    sampling.add_argument('--temperature', type=float, default=1.0, help='0 for the most probable token')
    sampling.add_argument('--top-k', type=at_least(0), default=0, help='most probable tokens to keep; 0 for all')
    sampling.add_argument('--top-p', type=float, default=0.0, help='probability of the tokens to keep; 0 for all')
    sampling.add_argument('--min-p', type=float, default=0.0, help='least share of the highest probability')
    sampling.add_argument('--repetition-penalty', type=float, default=1.0)
    sampling.add_argument('--seed', type=at_least(0), default=0)
    drafts = parser.add_argument_group('speculative decoding of the most probable tokens')
    drafts.add_argument('--draft', help='folder of a smaller model of the same vocabulary')
    drafts.add_argument('--draft-tokens', type=positive, default=3, help='tokens that it drafts at a time')
    add_device_option(parser)
    add_precision_option(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    main()
