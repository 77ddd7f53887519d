"""Vision Mamba (Vim) and VMamba backbones; importing this package registers them with timm."""

from .models import Vim, VMamba

__all__ = ['VMamba', 'Vim', '__version__']
__version__ = '0.1.0'
