"""Speed and memory of generation by presets with random weights.

Tokens per second beside transformers and the limit of reading the weights once per token; or one step against the
length of the text before it, also as a picture.

vmamba bench generation --batch 1 64 --peer --output generation.csv
vmamba bench generation --models mamba_130m mamba2_130m --lengths 1024 16384 262144 --docs docs/benchmarks.md
"""

import argparse
import gc
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import pandas as pd
import torch
from torch import nn

from vmamba.sequence import PRESETS, LanguageModel, create_language_model, generate
from vmamba.sequence.generation import Decoder
from vmamba.tools.benchmarks.report import Report, facts_of
from vmamba.tools.benchmarks.timing import wall_ms
from vmamba.tools.devices import DTYPES, add_device_option, device_name
from vmamba.tools.figures.plots import plot_generation
from vmamba.tools.output_files import write_csv
from vmamba.tools.terminal import open_console
from vmamba.tools.user_errors import Parser, UserError, at_least, file_name, one_line_errors, positive

PROMPT = 64  # tokens
TRANSFORMER = 'transformer'  # in place of a preset: attention and MLPs of the width and depth of mamba_130m
NOTES = """\
{precision} with random weights; greedy, every token one step, a CUDA graph on a GPU. `transformer` has 12 layers of
attention and MLP, about the parameters of `mamba_130m`."""
OF_LENGTHS = """\
One step after a text of each length, whose cache has just the room, and the memory of weights and cache.
"""
OF_SPEED = """\
Tokens per second of all sequences, without prompt and preparation. The limit is to read the weights once per token.
transformers' models run without their CUDA kernels where those packages are missing.
"""


def create(name: str, args: argparse.Namespace) -> LanguageModel:
    if name == TRANSFORMER:
        layers = [['attention', 'mlp']] * 12  # as many parameters as 24 Mamba layers
        cfg = {'attention': {'num_heads': 12, 'rotary_emb_dim': 64}, 'mlp': {'d_hidden': 2048}}
        model = LanguageModel(768, layers=layers, layer_cfg=cfg, device=args.device)
    else:
        model = create_language_model(name, device=args.device)
    return model.eval().cast(DTYPES[args.precision])


def peer_of(model: LanguageModel, name: str, args: argparse.Namespace) -> nn.Module:
    """transformers' model of the same sizes, with random weights.

    Raises:
        UserError: If it has no such model.
    """
    import transformers

    kind = name.partition('_')[0]
    if kind not in ('mamba', 'mamba2'):
        raise UserError(f'--peer has mamba and mamba2 models only, got {name}')
    options = dict(hidden_size=model.config['d_model'], num_hidden_layers=model.config['n_layer'])
    options['vocab_size'] = model.lm_head.out_features
    if kind == 'mamba2':
        options.update(num_heads=2 * options['hidden_size'] // 64, n_groups=1, tie_word_embeddings=True)
    config = transformers.AutoConfig.for_model(kind, **options)
    peer = transformers.AutoModelForCausalLM.from_config(config)
    return peer.eval().to(args.device, DTYPES[args.precision])


def seconds(run: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Of the fastest of several runs, after one that does not count."""
    times = [wall_ms(run, device)[0] for _ in range(repeats + 1)]
    return min(times[1:]) / 1e3


def per_token(run: Callable[[int], Any], tokens: int, device: torch.device) -> float:
    """Seconds per token, without the prompt and what is prepared once: by the difference of two lengths."""
    few = max(tokens // 4, 1)
    return (seconds(lambda: run(tokens), device) - seconds(lambda: run(few), device)) / (tokens - few)


def read_rate(device: torch.device) -> float:
    """Bytes per second that the device reads: of a sum of 2 GiB, or of less on a CPU."""
    numbers = torch.ones(2**29 if device.type == 'cuda' else 2**24, device=device)
    return numbers.nbytes / seconds(numbers.sum, device)


def speed(name: str, args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Rows of a model and its peer, greedy, at every batch size."""
    model = create(name, args)
    peer = peer_of(model, name, args) if args.peer else None
    limit = sum(p.nbytes for p in model.parameters()) / read_rate(args.device)
    rows = []
    for batch in args.batch:
        ids = torch.randint(model.vocab_size, (batch, PROMPT), device=args.device)
        ours = per_token(lambda n: generate(model, ids, n, top_k=1), args.tokens, args.device)  # noqa: B023
        found = {'vmamba': ours}
        if peer is not None:
            options = dict(attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=-1, pad_token_id=0)
            found['transformers'] = per_token(
                lambda n: peer.generate(ids, max_new_tokens=n, min_new_tokens=n, **options),  # noqa: B023
                args.tokens // 4,
                args.device,
            )
        for source, taken in found.items():
            rates = dict(tokens_per_second=round(batch / taken, 1), ms_per_token=round(1e3 * taken, 4))
            rows.append(dict(model=name, source=source, batch=batch, **rates, share_of_limit=round(limit / taken, 3)))
    return rows


@torch.no_grad()
def against_length(name: str, args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Rows of one step after texts of several lengths, whose caches have just the room."""
    model, rows = create(name, args), []
    weights = sum(p.nbytes for p in model.parameters())
    for length in args.lengths:
        batch = args.batch[0]
        gc.collect()
        cache = model.allocate_cache(batch, length + 1)
        decoder = Decoder(model, cache, batch, graph=True)
        ids = torch.zeros(batch, dtype=torch.long, device=args.device)

        def step() -> None:
            for own in cache:  # noqa: B023
                if hasattr(own, 'position'):
                    own.position.fill_(length)  # noqa: B023
                    own.length.fill_(length)  # noqa: B023
            decoder(ids)  # noqa: B023

        taken = seconds(step, args.device, repeats=20)
        held = sum(tensor.nbytes for own in cache for tensor in own if tensor is not None)
        megabytes = dict(cache_mib=round(held / 2**20, 2), weights_mib=round(weights / 2**20, 1))
        rows.append(dict(model=name, batch=batch, length=length, ms_per_step=round(1e3 * taken, 4), **megabytes))
    return rows


@one_line_errors('bench_generation.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    print(f'{device_name(args.device)}, torch {torch.__version__}, {args.precision}')
    rows = []
    for name in args.models:
        found = against_length(name, args) if args.lengths else speed(name, args)
        for row in found:
            print(', '.join(f'{key} {value}' for key, value in row.items()), flush=True)
        rows += found
    if args.output:
        write_csv(args.output, rows)
    if args.docs:
        publish(rows, args, facts_of(args.device, 'bench generation', argv))


def publish(rows: List[Dict[str, Any]], args: argparse.Namespace, facts: Dict[str, str]) -> None:
    """Writes the section of the documentation, with a picture of steps against lengths."""
    notes = (OF_LENGTHS if args.lengths else OF_SPEED) + NOTES.format(precision=args.precision)
    table = pd.DataFrame(rows)
    if not args.lengths:
        report = Report('bench_generation speed', 'Speed of generation', facts, [table], notes)
        return report.publish(open_console(), args.docs)
    report = Report('bench_generation lengths', 'Generation by length', facts, [table], notes, (), 'generation.png')
    report.publish(open_console(), args.docs)
    plot_generation(table, args.docs.with_name('generation.png'))


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    models = dict(nargs='+', choices=(*PRESETS, TRANSFORMER), metavar='NAME')
    parser.add_argument('--models', **models, default=['mamba_130m'], help=f'presets, or {TRANSFORMER}')
    parser.add_argument('--batch', nargs='+', type=positive, default=[1], help='sequences at a time')
    parser.add_argument('--tokens', type=at_least(8), default=512, help='new tokens')
    parser.add_argument('--lengths', nargs='*', type=positive, default=[], help='measure one step after such texts')
    parser.add_argument('--peer', action='store_true', help="measure transformers' model too")
    parser.add_argument('--precision', choices=tuple(DTYPES), default='bf16')
    parser.add_argument('--output', type=file_name('.csv'), help='CSV file of the results')
    parser.add_argument('--docs', type=Path, help='Markdown file in which to write or renew the table and the picture')
    add_device_option(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    main()
