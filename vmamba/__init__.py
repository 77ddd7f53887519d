"""Vision Mamba (Vim) and VMamba backbones; importing this package registers them with timm."""

from .models import Vim, VMamba
from .models.trained import load

__all__ = ['VMamba', 'Vim', 'load', '__version__']
__version__ = '0.1.0'
