"""Backbones for OpenMMLab's mmdet and mmseg.

`custom_imports = dict(imports=['vmamba.mm'])` in a config registers them and lets mmdet run without mmcv's compiled
operators.
"""

from importlib.util import find_spec

_missing = [name for name in ('mmengine', 'mmcv') if find_spec(name) is None]
if _missing:
    raise ModuleNotFoundError(f"vmamba.mm needs {' and '.join(_missing)}: pip install 'vmamba[mm]'")

from . import ops  # noqa: E402

ops.install()  # must precede any import of mmcv.ops

from .backbones import StageBackbone, TokenBackbone, VimBackbone, VMambaBackbone  # noqa: E402
from .official import MM_VSSM  # noqa: E402
from .optim import LayerDecayConstructor  # noqa: E402

__all__ = [
    'MM_VSSM',
    'LayerDecayConstructor',
    'StageBackbone',
    'TokenBackbone',
    'VMambaBackbone',
    'VimBackbone',
]
