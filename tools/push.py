"""Uploads a model to the Hugging Face Hub: weights, configuration and a model card.

The model loads there with timm, with transformers and with the commands of this library. A README.md that the
repository has already is kept. With --folder, the files are written there, and nothing is uploaded.

    vmamba push me/pets --checkpoint runs/pets/best.pt
    vmamba push me/pets --checkpoint runs/pets/best.pt --folder pets
    vmamba push me/vssd_t --model vssd_t=vssd_tiny.pth --license mit --private
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.models import save_for_hf
from torch import nn

import vmamba
from vmamba.models._pretrained import is_download_error, read_file
from vmamba.tools import weights
from vmamba.tools.model_card import license_of, make_card
from vmamba.tools.output_files import writing
from vmamba.tools.user_errors import Parser, UserError, one_line_errors


def write_files(
    model: nn.Module, folder: Path, repo: str, content: Optional[Dict[str, Any]], license_name: str
) -> None:
    """Writes model.safetensors, config.json and README.md.

    Args:
        model: Of `weights.load_model`.
        folder: New folder.
        repo: OWNER/NAME, for the card.
        content: Of the file that the weights are from; None if they are the published ones.
        license_name: The Hub's name of the weights' licence.
    """
    config = dict(label_names=model.class_names, pretrained_cfg=dict(license=license_name))
    save_for_hf(model, folder, model_config=config, safe_serialization=True)
    path = folder / 'config.json'
    saved = json.loads(path.read_text())
    saved['model_args'].pop('num_classes')  # is outside too, and transformers does not take both
    path.write_text(json.dumps(saved, indent=2))
    (folder / 'README.md').write_text(make_card(model, repo, content, license_name), encoding='utf-8')


def upload(folder: Path, repo: str, private: bool) -> str:
    """Uploads a folder to a repository, which is made if there is none; returns the address of the commit.

    Raises:
        UserError: If the Hub cannot be reached or refuses.
    """
    api = HfApi(library_name='vmamba', library_version=vmamba.__version__)
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        kept = ['README.md'] if api.file_exists(repo, 'README.md') else None
        message = f'Upload by vmamba {vmamba.__version__}'
        commit = api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=kept, commit_message=message)
    except Exception as error:
        if isinstance(error, OSError) or is_download_error(error):
            raise UserError(f'cannot upload to {repo}: {error}') from error
        raise
    if kept:
        print(f'Kept the README.md of {repo}; delete it there before uploading to get a new one')
    return commit.commit_url


@one_line_errors('push.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    spec = weights.spec_of(args.model, args.checkpoint)
    if spec.weights == 'untrained' or spec.name.startswith(weights.SOURCES):
        raise UserError(f'{spec} has no weights of its own to upload: give NAME=FILE, or NAME for the published ones')
    if not args.folder and get_token() is None:
        raise UserError('no token of the Hugging Face Hub: `hf auth login` stores one, or set HF_TOKEN')
    model = weights.load_model(spec, args)
    content = read_file(spec.weights) if spec.weights else None
    parent = args.folder.absolute().parent if args.folder else None
    with writing(args.folder or Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(dir=parent) as temporary:
        folder = Path(temporary, 'model')
        write_files(model, folder, args.repo, content, args.license or license_of(model, content))
        if args.folder:
            folder.rename(args.folder)
            print(f'Wrote {args.folder}: timm.create_model("local-dir:{args.folder}", pretrained=True)')
        else:
            print(f'Uploaded {upload(folder, args.repo, args.private)}')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('repo', type=_repo, metavar='OWNER/NAME', help='repository, made if there is none')
    weights.add_spec_options(parser)
    parser.add_argument(
        '--model-args', type=weights.parse_model_args, default={}, metavar='YAML', help="such as '{stride: 6}'"
    )
    parser.add_argument(
        '--license', metavar='NAME', help="the Hub's name of the weights' licence; default: of the published weights"
    )
    parser.add_argument('--private', action='store_true', help='make a private repository')
    parser.add_argument('--folder', type=Path, help='new folder to write the files into, instead of uploading them')
    parser.set_defaults(seed=0)
    args = parser.parse_args(argv)
    if args.folder and args.folder.exists():
        parser.error(f'{args.folder} exists; name another --folder')
    return args


def _repo(text: str) -> str:
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(f'must be OWNER/NAME: {error}') from error
    if '/' not in text:
        raise argparse.ArgumentTypeError(f'must be OWNER/NAME, got {text!r}')
    return text


if __name__ == '__main__':
    main()
