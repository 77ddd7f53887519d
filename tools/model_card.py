"""Model cards: the README.md of a repository of the Hugging Face Hub."""

from pathlib import Path
from typing import Any, Dict, List, Optional

import yaml
from timm.data import resolve_data_config
from timm.models._hub import generate_readme
from torch import nn

import vmamba
from vmamba.models.trained import run_facts
from vmamba.tools.published import published
from vmamba.tools.training.config import Config

MOST_NAMES = 100  # of classes in a card; config.json has all
# Settings of a run that do not change the weights, and those that are paths, of which a card has the last part.
_LEFT_OUT = 'output', 'device', 'workers', 'log', 'log_every', 'checkpoint_every', 'keep_checkpoints'
_PATHS = 'checkpoint', 'teacher_checkpoint', 'data_dir'
# Title and authors of the papers that models name by `paper_ids`.
PAPERS = {
    '2401.09417': (
        'Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model',
        'Zhu, Lianghui and Liao, Bencheng and Zhang, Qian and Wang, Xinlong and Liu, Wenyu and Wang, Xinggang',
    ),
    '2401.10166': (
        'VMamba: Visual State Space Model',
        'Liu, Yue and Tian, Yunjie and Zhao, Yuzhong and Yu, Hongtian and Xie, Lingxi and Wang, Yaowei and '
        'Ye, Qixiang and Jiao, Jianbin and Liu, Yunfan',
    ),
    '2405.21060': (
        'Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality',
        'Dao, Tri and Gu, Albert',
    ),
    '2407.08083': (
        'MambaVision: A Hybrid Mamba-Transformer Vision Backbone',
        'Hatamizadeh, Ali and Kautz, Jan',
    ),
    '2407.18559': (
        'VSSD: Vision Mamba with Non-Causal State Space Duality',
        'Shi, Yuheng and Dong, Minjing and Li, Mingjia and Xu, Chang',
    ),
    '2410.07599': (
        'Adventurer: Optimizing Vision Mamba Architecture Designs for Efficiency',
        'Wang, Feng and Yang, Timing and Yu, Yaodong and Ren, Sucheng and Wei, Guoyizhe and Wang, Angtian and '
        'Shao, Wei and Zhou, Yuyin and Yuille, Alan and Xie, Cihang',
    ),
}
_USAGE = """
```
pip install vmamba
```

With timm; importing `vmamba` registers the architecture:

```python
import timm
import torch
import vmamba
from PIL import Image

model = timm.create_model('hf-hub:{repo}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open('photo.jpg').convert('{mode}'))
with torch.inference_mode():
    output = model(image[None])  # {output}
```

With transformers:

```python
import vmamba
from transformers import AutoImageProcessor, {kind}

processor = AutoImageProcessor.from_pretrained('{repo}')
model = {kind}.from_pretrained('{repo}').eval()
```

On the command line, after `pip install 'vmamba[tools]'`:

```
vmamba {command} --model hf-hub:{repo}
```
"""
_TRAINING = """
## Training

The settings of `vmamba train`, except those left at their defaults:

```yaml
{recipe}```
"""


def make_card(model: nn.Module, repo: str, content: Optional[Dict[str, Any]], license_name: str) -> str:
    """The model card, as Markdown with the Hub's metadata.

    Args:
        model: Of `weights.load_model`.
        repo: OWNER/NAME.
        content: Of the file that the weights are from, see `read_file`; None if they are the published ones.
        license_name: The Hub's name of the weights' licence.
    """
    recipe = recipe_of(content)
    if model.num_classes:
        task, kind, command = 'image-classification', 'AutoModelForImageClassification', 'predict photo.jpg'
        does, output = f'classifies images into {model.num_classes} classes', f'logits [1, {model.num_classes}]'
    else:
        task, kind, command = 'image-feature-extraction', 'AutoModel', 'extract photos/'
        does, output = 'extracts features of images', f'features [1, {model.head_hidden_size}]'
    mode = 'L' if model.pretrained_cfg['input_size'][0] == 1 else 'RGB'
    usage = _USAGE.format(repo=repo, mode=mode, kind=kind, output=output, command=command)
    facts = dict(
        tags=[task, 'timm', 'transformers', 'vmamba'],
        license=license_name,
        description=f'This model {does}.',
        details=_details(model, content, recipe),
        usage=usage + (_TRAINING.format(recipe=yaml.safe_dump(recipe, sort_keys=False)) if recipe else ''),
        citation=[_bibtex(paper) for paper in _papers(model)],
    )
    return generate_readme(facts, repo.partition('/')[2], task)


def license_of(model: nn.Module, content: Optional[Dict[str, Any]]) -> str:
    """The licence of published weights, also of those fine-tuned from them; else 'unknown'."""
    derived = content is None or recipe_of(content).get('pretrained')
    stated = model.pretrained_cfg.get('license', 'none')
    return stated if derived and stated != 'none' else 'unknown'


def recipe_of(content: Any) -> Dict[str, Any]:
    """The settings of the run that wrote a checkpoint, without defaults and folders; empty for other files."""
    if not run_facts(content):
        return {}
    settings = content.get('recipe') or (content['config'] if 'data' in content else {})
    defaults = vars(Config())
    chosen = {key: value for key, value in settings.items() if key not in _LEFT_OUT and value != defaults.get(key)}
    return {key: Path(value).name if key in _PATHS else value for key, value in chosen.items()}


def _details(model: nn.Module, content: Optional[Dict[str, Any]], recipe: Dict[str, Any]) -> Dict[str, Any]:
    cfg, images = model.pretrained_cfg, resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    channels, height, width = images['input_size']
    size = sum(p.numel() for p in model.parameters()) / 1e6
    details = {
        'Architecture': f'`{cfg["architecture"]}`, {size:.1f} M parameters (vmamba {vmamba.__version__})',
        'Weights': _origin(cfg, content, recipe),
        'Images': f'{height} x {width} pixels, {channels} channel(s); crop {images["crop_pct"]:g} '
        f'({images["crop_mode"]}), {images["interpolation"]}, mean {list(images["mean"])}, std {list(images["std"])}',
        'Classes': ', '.join(model.class_names) if 0 < len(model.class_names or ()) <= MOST_NAMES else '',
        'Accuracy': _accuracy(model, content),
        'Papers': [f'[{PAPERS[paper][0]}](https://arxiv.org/abs/{paper})' for paper in _papers(model)],
    }
    return {key: value for key, value in details.items() if value}


def _origin(cfg: Dict[str, Any], content: Optional[Dict[str, Any]], recipe: Dict[str, Any]) -> str:
    official = f'{cfg.get("origin_url", "timm")} (licence: {cfg.get("license", "none")})'
    if content is None:
        return f'the official ones, {official}'
    if recipe.get('pretrained'):
        return f'fine-tuned from the official ones, {official}'
    if recipe.get('checkpoint'):
        return f'fine-tuned from `{recipe["checkpoint"]}`'
    return 'trained by `vmamba train`' if recipe else 'of a checkpoint'


def _accuracy(model: nn.Module, content: Optional[Dict[str, Any]]) -> str:
    """What a best.pt holds of its run's validation, or what is published for published weights."""
    if content is None:
        cfg = model.pretrained_cfg
        figures = published(f'{cfg["architecture"]}.{cfg["tag"]}', cfg['input_size'][-1], model.num_classes)
        return f'{figures.top1:.2f} % top-1 on ImageNet-1K, published, not measured here' if figures else ''
    kind = 'ema' if content.get('averaged') else 'val'
    if 'averaged' not in content or f'{kind}_top1' not in content:
        return ''
    top1, top5 = content[f'{kind}_top1'], content[f'{kind}_top5']
    where = f'on the validation images of its training, after epoch {content["epoch"]}'
    return f'{top1:.2f} % top-1, {top5:.2f} % top-5 {where}'


def _papers(model: nn.Module) -> List[str]:
    """arXiv's numbers of the papers of a model, those in `PAPERS`."""
    papers = model.pretrained_cfg.get('paper_ids') or ()
    numbers = [paper.partition(':')[2] for paper in ([papers] if isinstance(papers, str) else papers)]
    return [number for number in numbers if number in PAPERS]


def _bibtex(paper: str) -> str:
    title, authors = PAPERS[paper]
    key = f'{authors.partition(",")[0].lower()}{paper}'
    fields = f'title={{{title}}},\n  author={{{authors}}},\n  journal={{arXiv:{paper}}},\n  year={{20{paper[:2]}}}'
    return f'@article{{{key},\n  {fields}\n}}'
