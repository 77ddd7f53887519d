"""Features of a folder of images, or of a list of them: pooled vectors and maps of any stage or block.

Images have the size of the model or --img-size, or with --native their own; --tile cuts them into tiles.
The same command continues after an interruption. Under torchrun the processes of one host share the images.
`features/store.py` describes the output; `vmamba knn` evaluates it.

    vmamba extract images/ --model vmamba_t
    vmamba extract images/ --model vim_s=vim_s.pth --features pooled blocks.11 blocks.23
    vmamba extract images/ --checkpoint runs/finetune/best.pt
    vmamba extract images/ --model vmamba_t --features stages.3 --native --format safetensors
    vmamba extract slides/ --model vmamba_t --features stages.3 --tile 1024 --overlap 256
    torchrun --nproc-per-node 8 -m vmamba.tools.extract_features images/ --model vmamba_t
"""

import argparse
import hashlib
import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import numpy as np
import timm
import torch
import torch.distributed as dist

from vmamba.tools import weights
from vmamba.tools.devices import device_name
from vmamba.tools.features import store as feature_store
from vmamba.tools.features.maps import (
    POOLED,
    check_tiles,
    extract,
    normalised,
    pad_to_patches,
    parse_wanted,
    patch_layout,
    tiled_maps,
)
from vmamba.tools.features.store import FORMATS, Files, Store, Table
from vmamba.tools.images.batches import add_loader_options, load_images
from vmamba.tools.images.decoding import READ_ERRORS, image_mode, read_pixels
from vmamba.tools.images.image_files import find_images
from vmamba.tools.output_files import write_text
from vmamba.tools.training.runtime import Runtime
from vmamba.tools.user_errors import Parser, UserError, at_least, one_line_errors, positive

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Extraction:
    """One run: a model, the images, and where their features go.

    Args:
        args: Of the command line.
        runtime: Place among the processes.
        console: Where to show progress.
    """

    def __init__(self, args: argparse.Namespace, runtime: Runtime, console: Console) -> None:
        self.args, self.runtime, self.console = args, runtime, console
        args.model = weights.spec_of(args.model, args.checkpoint)
        self.paths = find_images(args.images, ['.npy'] * args.native, without=args.output)
        model = weights.load_model(args.model, args, num_classes=0)
        if args.native and not weights.allow_any_size(model):
            raise UserError(
                f'{args.model.name} takes images of {weights.own_size(model)} pixels only: no --native, no --tile'
            )
        size = None if args.native else args.img_size or weights.own_size(model)
        self.model = (weights.at_size(model, size) if size else model).to(args.device)
        self.wanted = parse_wanted(self.model, args.features, args.norm)
        if args.tile:
            check_tiles(args.tile, args.overlap, self.wanted)
        self.config = weights.data_config(self.model, args, size)
        self.samples = load_images(self.paths, self.config, args).samples
        self.pixels = 0
        self.store = self._open(size)

    def _open(self, size: Optional[int]) -> Store:
        """The store, which the first of several processes makes, with its arrays, before the others open it."""
        args, primary = self.args, self.runtime.is_primary
        if not primary:
            self._meet()
        kind = Files if args.native or args.format != 'npy' else Table
        store = kind(args.output, self.paths, self._settings(size), args.overwrite and primary, lock=primary)
        if primary and self.runtime.world > 1:
            if isinstance(store, Table):
                with torch.inference_mode(), weights.autocast(args):
                    values = self._arrays(torch.zeros(1, *self.config['input_size'], device=args.device))
                for name, value in values.items():
                    store.array(name, value)
            self._meet()
        return store

    def _meet(self, values: Sequence[int] = (0,)) -> List[int]:
        """Waits for all processes; sums of their values.

        Raises:
            UserError: If one of them ended.
        """
        try:
            return self.runtime.sum(torch.tensor(values))
        except RuntimeError as error:
            raise UserError('another process failed, see its error') from error

    def _settings(self, size: Optional[int]) -> Dict[str, Any]:
        """What the features are of."""
        args = self.args
        keys = ('mean', 'std') if args.native else ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
        listing = '\n'.join(map(str, self.paths)).encode()
        file = Path(args.model.weights)
        return {
            'model': str(args.model),
            'weights_sha256': hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None,
            'features': self.wanted.all_names(),
            'norm': args.norm,
            'img_size': size or 'native',
            'tile': args.tile,
            'overlap': args.overlap if args.tile else None,
            'format': args.format,
            'precision': args.precision,
            'save_dtype': args.save_dtype,
            'model_args': args.model_args,
            'seed': args.seed if args.model.weights == 'untrained' else None,
            **{key: self.config[key] for key in keys},
            'images': len(self.paths),
            'images_sha256': hashlib.sha256(listing).hexdigest(),
        }

    def run(self) -> None:
        """Extracts what is still to do."""
        share = range(self.runtime.rank, len(self.paths), self.runtime.world)
        todo = [row for row in self.store.todo() if row in share]
        done = len(share) - len(todo)
        if done:
            self.console.print(f'{done} of {len(share)} images are done already')
        self._write_index()
        columns = TextColumn('Extracting'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        start = time.perf_counter()
        try:
            with (
                Progress(*columns, console=self.console) as progress,
                torch.inference_mode(),
                weights.autocast(self.args),
            ):
                task = progress.add_task('', total=len(share), completed=done)
                for count in self._native(todo) if self.args.native else self._batches(todo):
                    progress.advance(task, count)
            images, pixels = self._totals(len(todo) - int(self.samples.bad.sum()))
        except torch.OutOfMemoryError as error:
            tiles = 'take --tile, or a smaller one, with another --output'
            way_out = tiles if self.args.native else 'a smaller --batch-size continues with the rest'
            raise UserError(f'out of memory on {self.args.device}: {way_out}') from error
        finally:
            self._write_index()
        if self.runtime.is_primary:
            self._report(images, pixels, time.perf_counter() - start)

    def _totals(self, images: int) -> List[int]:
        """Images and pixels of all processes, once all are done; unreadable images of all are then in `samples`."""
        images, pixels, *bad = self._meet([images, self.pixels, *self.samples.bad.tolist()])
        self.samples.bad = torch.tensor(bad, dtype=torch.bool)
        self.samples.check()
        return [images, pixels]

    def _write_index(self) -> None:
        if self.runtime.is_primary:
            self.store.write_index(class_folders(self.paths, self.args.images))

    def _batches(self, todo: List[int]) -> Iterator[int]:
        """Images of one size, in batches; yields how many of each could be read."""
        images = load_images(self.paths, self.config, self.args, todo)
        self.samples = images.samples
        try:
            for rows, batch, _ in images:
                self.store.write(rows, self._arrays(batch))
                self.pixels += len(rows) * batch.shape[-1] * batch.shape[-2]
                yield len(rows)
        finally:
            self.store.mark(self.samples.bad.nonzero().flatten().tolist(), feature_store.UNREADABLE)

    def _native(self, todo: List[int]) -> Iterator[int]:
        """Images one after another, at their own sizes; yields 1 for each."""
        for row in todo:
            try:
                pixels = read_pixels(self.paths[row], image_mode(self.config['input_size'][0]))
            except READ_ERRORS:
                self.samples.bad[row] = True
                self.store.mark([row], feature_store.UNREADABLE)
                self.samples.check()
            else:
                self._extract_native(row, pixels)
                self.pixels += pixels.shape[0] * pixels.shape[1]
            yield 1

    def _extract_native(self, row: int, pixels: np.ndarray) -> None:
        if self.args.tile:
            dtype = np.dtype(self.args.save_dtype)
            sizes = self.args.tile, self.args.overlap
            maps = tiled_maps(
                self.model,
                pixels,
                self.config,
                self.wanted,
                *sizes,
                lambda name, shape: self.store.allocate(row, name, shape, dtype),
                self.args.device,
            )
            self.store.finish(row, maps)
        else:
            image = pad_to_patches(normalised(pixels, self.config, self.args.device), *patch_layout(self.model))
            self.store.write([row], self._arrays(image))

    def _arrays(self, images: torch.Tensor) -> Dict[str, np.ndarray]:
        """Features [n, ...] of images, as they are written."""
        found = extract(self.model, images, self.wanted)
        return {name: values.float().cpu().numpy().astype(self.args.save_dtype) for name, values in found.items()}

    def _report(self, images: int, pixels: int, seconds: float) -> None:
        """Prints what was done and writes run.json."""
        skipped = self.samples.report(absolute=True)
        if skipped:
            self.console.print(skipped, highlight=False, soft_wrap=True)
        figures = {
            'images': images,
            'seconds': seconds,
            'images_per_second': images / seconds,
            'megapixels_per_second': pixels / 1e6 / seconds,
            'processes': self.runtime.world,
            'device': device_name(self.args.device),
            'torch': torch.__version__,
            'timm': timm.__version__,
        }
        write_text(self.args.output / 'run.json', json.dumps(figures, indent=1))
        speed = f'{figures["images_per_second"]:.1f} images/s, {figures["megapixels_per_second"]:.2f} megapixels/s'
        self.console.print(f'{images} images in {seconds:.1f} s: {speed}; features are in {self.args.output}/')


def class_folders(paths: Sequence[Path], source: Path) -> List[str]:
    """Names of the images' folders; '' for those directly in the source."""
    return ['' if path.parent == source else path.parent.name for path in paths]


def join(device: torch.device) -> Runtime:
    """The place among the processes that torchrun started, and the device of this one; each has a GPU.

    They meet over gloo, and wait for each other only at the beginning and at the end, which may be days apart.

    Raises:
        UserError: If they are on several hosts, or more than there are GPUs.
    """
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world == 1:
        return Runtime(device)
    if int(os.environ.get('LOCAL_WORLD_SIZE', world)) < world:
        raise UserError(
            'processes on several hosts cannot write into one folder: run torchrun --standalone on every host, with '
            'a list of images and an --output of its own'
        )
    if device.type == 'cuda':
        if world > torch.cuda.device_count():
            raise UserError(f'{world} processes need as many GPUs, and there are {torch.cuda.device_count()}')
        device = torch.device('cuda', rank)
        torch.cuda.set_device(device)
    dist.init_process_group('gloo', timeout=timedelta(days=365))
    return Runtime(device, rank, world)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('images', type=Path, help='folder, or text file with a path a line')
    weights.add_spec_options(parser)
    parser.add_argument(
        '--features', nargs='+', default=[POOLED], help='pooled, and maps: stages.2, blocks.11 or their indices'
    )
    parser.add_argument('--norm', action='store_true', help='apply the final norm to the maps, where the model can')
    parser.add_argument('--output', type=Path, default=Path('features'), help='folder to write or to continue')
    parser.add_argument('--format', choices=FORMATS, default='npy', help='npy: memory-mapped; others: a file an image')
    parser.add_argument('--save-dtype', choices=('float32', 'float16'), default='float32', help='of what is written')
    parser.add_argument('--img-size', type=positive, help="side of the images; default: the model's own")
    parser.add_argument('--native', action='store_true', help='images keep their sizes; one at a time')
    parser.add_argument('--tile', type=positive, help='side of tiles, for images larger than memory; implies --native')
    parser.add_argument('--overlap', type=at_least(0), default=256, help='pixels around a tile that are computed, too')
    parser.add_argument('--overwrite', action='store_true', help='discard the features in the output')
    add_loader_options(parser)
    weights.add_model_options(parser)
    weights.add_precision_option(parser)
    args = parser.parse_args(argv)
    args.native |= args.tile is not None
    if args.native and args.img_size:
        parser.error('--img-size and --native or --tile exclude each other')
    return args


@one_line_errors('extract_features.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    runtime = join(args.device)
    args.device = runtime.device
    extraction = Extraction(args, runtime, Console(quiet=not runtime.is_primary))
    with extraction.store.lock:
        extraction.run()


if __name__ == '__main__':
    main()
