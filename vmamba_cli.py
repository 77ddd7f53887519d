"""The command `vmamba`, which runs the tools of the library.

The module is outside the package because importing the package takes seconds, and `vmamba --help` does not need it.
"""

import sys
from difflib import get_close_matches
from importlib import import_module, metadata
from typing import List, Optional, Tuple

# Name of a command, one or two words: its module in vmamba.tools, and what it does.
COMMANDS = {
    'train': ('train', 'train or fine-tune a classifier or a language model'),
    'generate': ('generate', 'continue a text by a language model'),
    'bits-per-byte': ('evaluate_bytes', 'bits per byte of files under a byte model'),
    'validate': ('validate', 'accuracy on folders of images'),
    'predict': ('predict', 'classify images'),
    'extract': ('extract_features', 'write the features of images'),
    'knn': ('evaluate_features', 'k-NN and a linear probe on extracted features'),
    'visualize': ('visualize', 'effective receptive fields and scan attention'),
    'convert': ('convert', 'convert a checkpoint to safetensors'),
    'export onnx': ('export_onnx', 'write a model as ONNX'),
    'export pt2': ('export_pt2', 'compile a model ahead of time'),
    'push': ('push', 'upload a model to the Hugging Face Hub'),
    'configs': ('configurations', 'list, show and copy the installed configurations'),
    'mm-train': ('mm_train', 'train a detector of mmdet or a segmentor of mmseg'),
    'mm-test': ('mm_test', 'test a detector or segmentor'),
    'mm-infer': ('mm_infer', 'predict and draw boxes, masks or segmentation'),
    'nnunet-trainers': ('nnunet_trainers', 'folder of the trainers for nnU-Net'),
    'make-scenes': ('make_scenes', 'compose a small data set for detection and segmentation'),
    'validate-sequences': ('validate_sequences', 'accuracy on long-range tasks, at several lengths'),
    'make-sequences': ('make_sequences', 'make the data of a long-range task'),
    'bench kernels': ('bench_kernels', 'time and memory of the operators and models, beside peers'),
    'bench scaling': ('bench_scaling', 'training speed on several GPUs'),
    'bench generation': ('bench_generation', 'speed and memory of generation by language models'),
    'bench export': ('bench_export', 'size and time of models as ONNX files'),
    'bench plan': ('bench_plan', 'time, storage, network and memory of training on many GPUs'),
    'bench medical': ('bench_medical', 'time and memory of U-Mamba'),
    'bench mm': ('bench_mm', 'time and memory of detectors and segmentors'),
    'compare highres': ('compare_highres', 'time and memory of feature extraction by image size'),
    'compare sequences': ('compare_sequences', 'mixers on long-range tasks and bytes'),
    'compare training': ('compare_training', 'accuracy of models trained with the same recipe'),
}


HELP = '-h', '--help'
USAGE = """usage: vmamba COMMAND ...

State-space models for images and sequences: training, evaluation, features, generation.

{}

`vmamba COMMAND --help` lists the options of a command, `vmamba --version` prints the version.
On several GPUs: torchrun --nproc-per-node 8 -m vmamba.tools.train CONFIG"""


def usage(group: str = '') -> str:
    """The help of the command itself, or of the commands that begin with a word."""
    shown = {name: summary for name, (_, summary) in COMMANDS.items() if f'{name} '.startswith(group)}
    return USAGE.format('\n'.join(f'  {name:<20}{summary}' for name, summary in shown.items()))


def split(argv: List[str]) -> Tuple[Optional[str], List[str]]:
    """The command at the beginning of the arguments, None if there is none, and the arguments after it."""
    for words in (2, 1):
        if ' '.join(argv[:words]) in COMMANDS:
            return ' '.join(argv[:words]), argv[words:]
    return None, argv


def seconds(first: str) -> List[str]:
    """The words that may follow the first one of a command of two."""
    return [name.partition(' ')[2] for name in COMMANDS if name.startswith(f'{first} ')]


def unknown(argv: List[str]) -> str:
    """The error message for arguments that begin with no command."""
    second = seconds(argv[0])
    if second:
        near = get_close_matches(' '.join(argv[1:2]), second, n=1)
        return f'{argv[0]} is followed by one of {", ".join(second)}' + (f'; did you mean {near[0]}?' if near else '')
    near = get_close_matches(argv[0], {name.partition(' ')[0] for name in COMMANDS}, n=1)
    return f'unknown command {argv[0]!r}; ' + (f'did you mean {near[0]}?' if near else '`vmamba --help` lists them')


def main(argv: Optional[List[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in HELP:
        print(usage())
        return
    if seconds(argv[0]) and argv[1:2] and argv[1] in HELP:
        print(usage(f'{argv[0]} '))
        return
    if argv[0] == '--version':
        print(f'vmamba {metadata.version("vmamba")}')
        return
    name, rest = split(argv)
    if name is None:
        print(f'vmamba: error: {unknown(argv)}', file=sys.stderr)
        raise SystemExit(2)
    from vmamba.tools.user_errors import one_line_errors

    sys.argv = [f'vmamba {name}', *rest]  # argparse and errors name the command by the first
    with one_line_errors(name):
        tool = import_module(f'vmamba.tools.{COMMANDS[name][0]}')
    tool.main(rest)


if __name__ == '__main__':
    main()
