"""The commands and examples of README and docs.

Those of the pages in `RUN` are run as they stand, but with small random models, small images and one epoch. A block
after the comment `<!-- needs data -->` needs weights, data or GPUs that a test does not have; it is only parsed, as are
the commands of the other pages.
"""

import io
import re
import shlex
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import List, NamedTuple

import pytest
import torch
from PIL import Image

import vmamba_cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
RUN = (
    'README.md',
    'docs/index.md',
    'docs/migration.md',
    'docs/sequence.md',
    'docs/tutorials/classification.md',
    'docs/tutorials/compile.md',
)
BLOCK = re.compile(r'(<!-- needs data -->\n)?^```(\w*)\n(.*?)^```', re.MULTILINE | re.DOTALL)
SMALL_PYTHON = {
    "'vmamba_t'": "'vmamba_nano'",
    'pretrained=True': 'pretrained=False',
    '2048, 2048': '96, 128',
    'torch.compile(model)': "torch.compile(model, backend='eager')",
}
SMALL_OPTIONS = {
    'predict': '--device cpu --workers 0',
    'extract': '--device cpu --workers 0',
    'train': '--device cpu --workers 0 --epochs 1 --warmup-epochs 0 --img-size 32 --no-pretrained',
}


class Block(NamedTuple):
    """A block of a page: its language ('' for commands), its text, and whether it can run in a test."""

    language: str
    text: str
    runs: bool

    def commands(self) -> List[str]:
        joined = self.text.replace('\\\n', ' ')
        return [line.split('  #')[0] for line in joined.splitlines()] if self.language == '' else []


def blocks(page):
    return [Block(language, text, not mark) for mark, language, text in BLOCK.findall(page.read_text())]


def shown_commands():
    """(page, command) for every command in a block or between single backticks, and of the tools' own help."""
    for page in PAGES:
        text = page.read_text()
        inline = re.findall(r'(?<!`)`((?:vmamba|torchrun|make|pip|python) [^`\n]+)`', text)
        for command in (*inline, *(command for block in blocks(page) for command in block.commands())):
            yield page.relative_to(ROOT).as_posix(), command.strip()
    for tool in (ROOT / 'tools').glob('*.py'):
        for command in re.findall(r'^ *(vmamba [^`\n]+)$', tool.read_text().split('\nimport ')[0], re.MULTILINE):
            yield f'tools/{tool.name}', command


# Names of commands in the text; this one has no options.
BARE = {f'vmamba {name}' for name in vmamba_cli.COMMANDS if name != 'nnunet-trainers'}
COMMANDS = sorted(
    {
        (page, command)
        for page, command in shown_commands()
        if re.match(r'(vmamba|torchrun|make|pip|python|find) ', command) and 'COMMAND' not in command
        if command not in BARE and not command.endswith('--help')
    }
)


def check(command):
    """Fails unless a command line is one that its program takes."""
    program, *arguments = shlex.split(command.rpartition(' | ')[2])
    if program == 'vmamba':
        if arguments[0].startswith('--'):
            return
        name, rest = vmamba_cli.split(arguments)
        assert name is not None, command
        import_module(f'vmamba.tools.{vmamba_cli.COMMANDS[name][0]}').parse_args(rest)
    elif program == 'torchrun':
        module, rest = arguments[arguments.index('-m') + 1], arguments[arguments.index('-m') + 2 :]
        import_module(module).parse_args(rest)
    elif program == 'make':
        targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
        assert {argument for argument in arguments if '=' not in argument} <= set(targets)
    elif program == 'pip':
        section = (
            (ROOT / 'pyproject.toml').read_text().partition('[project.optional-dependencies]')[2].partition('\n\n')[0]
        )
        known = re.findall(r'^(\w+) = ', section, re.MULTILINE)
        extras = re.findall(r'\[([\w,]+)\]', command)
        assert arguments[0] in ('install', 'check') and {name for found in extras for name in found.split(',')} <= {
            *known
        }
    elif program == 'python' and arguments[0].endswith('.py'):
        assert (ROOT / arguments[0]).is_file()


@pytest.mark.parametrize('page, command', COMMANDS, ids=lambda text: text[:40])
def test_shown_commands_are_understood(page, command, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)  # options that need a GPU are refused without one
    check(command)


def test_every_command_is_shown():
    shown = {vmamba_cli.split(shlex.split(command)[1:])[0] for _, command in COMMANDS if command.startswith('vmamba ')}
    assert set(vmamba_cli.COMMANDS) <= shown


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the examples take for granted: a photograph, folders of them and of classes of them."""
    pixels = torch.randint(0, 256, (16, 40, 48, 3), dtype=torch.uint8).numpy()
    names = ('photo', *(f'{kind}/{i}' for kind in ('photos', 'my_photos/cat', 'my_photos/dog') for i in range(5)))
    for name, image in zip(names, pixels):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / f'{name}.jpg')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command, monkeypatch):
    """Runs a command of the command line `vmamba`, with a small random model."""
    listing, _, command = command.rpartition(' | ')
    if listing:
        monkeypatch.setattr('sys.stdin', io.StringIO('\n'.join(map(str, Path('photos').glob('*.jpg')))))
    name, arguments = vmamba_cli.split(shlex.split(command)[1:])
    untrained = name in ('extract', 'predict') and '--checkpoint' not in arguments
    models = {'vmamba_t': 'vmamba_nano=untrained' if untrained else 'vmamba_nano'}
    arguments = [models.get(argument, argument.replace('vmamba_t=', 'vmamba_nano=')) for argument in arguments]
    arguments = [*name.split(), *arguments, *SMALL_OPTIONS.get(name, '').split()]
    monkeypatch.setattr(sys, 'argv', ['vmamba'])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        vmamba_cli.main(arguments)
    finally:
        for number, handler in handlers.items():  # training sets its own
            signal.signal(number, handler)


@pytest.mark.parametrize('page', RUN)
def test_the_examples_of_a_page_run(page, folder, monkeypatch):
    names, count = {}, 0
    for block in blocks(ROOT / page):
        if not block.runs:
            continue
        if block.language == 'python':
            source = block.text
            for written, small in SMALL_PYTHON.items():
                source = source.replace(written, small)
            exec(compile(source, page, 'exec'), names)
            count += 1
        for command in block.commands():
            if 'vmamba ' in command and not command.startswith('pip'):
                run(command, monkeypatch)
                count += 1
    assert count


def test_the_published_figures_of_the_page_are_those_of_the_tool():
    from vmamba.tools.published import PUBLISHED

    rows = re.findall(
        r'^\| `([\w.]+)` \| ([\d.]+) \| ([\d.]*) ?\|$', (ROOT / 'docs/evaluation.md').read_text(), re.MULTILINE
    )
    found = {name: (float(top1), float(top5) if top5 else None) for name, top1, top5 in rows}
    assert found == {name: (figures.top1, figures.top5) for name, figures in PUBLISHED.items()}


def test_the_model_zoo_shows_every_model_with_its_size_and_published_accuracy():
    import timm

    from vmamba.tools.published import PUBLISHED

    sizes = {
        name: f'{sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) / 1e6:.1f}'
        for name in PUBLISHED
    }
    rows = re.findall(r'^\| `([\w.]+)` \|(.*)\|$', (ROOT / 'docs/model_zoo.md').read_text(), re.MULTILINE)
    cells = {name: [cell.strip() for cell in row.split('|')] for name, row in rows}
    for name, (top1, *_) in PUBLISHED.items():
        assert sizes[name] in cells[name], name
        assert {f'{top1:.1f}', f'{top1:.3f}'} & set(cells[name]), name


def test_the_table_of_families_has_every_model_and_the_ranges_of_its_figures():
    import timm

    from vmamba.tools.published import PUBLISHED

    listed = set()
    for row in re.findall(r'^\|.*` \|.*\|$', (ROOT / 'README.md').read_text(), re.MULTILINE):
        _, _, models, params, top1, *_ = (cell.strip() for cell in row.split('|'))
        names = re.findall(r'`(\w+)`', models)
        sizes = [sum(p.numel() for p in timm.create_model(name, device='meta').parameters()) / 1e6 for name in names]
        assert params == f'{min(sizes):.1f} to {max(sizes):.1f}', names
        published = [figures.top1 for name, figures in PUBLISHED.items() if name.split('.')[0] in names]
        assert top1 == (f'{min(published):.1f} to {max(published):.1f}' if published else ''), names
        listed.update(names)
    modules = {name: timm.models.model_entrypoint(name).__module__ for name in timm.list_models()}
    assert listed == {name for name, module in modules.items() if module.startswith('vmamba.')}
