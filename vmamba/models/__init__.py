"""timm models. Importing this package registers them."""

from .mambavision import MambaVision
from .vim import Vim
from .vmamba import VMamba

__all__ = ['MambaVision', 'VMamba', 'Vim']
