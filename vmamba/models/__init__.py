"""timm models. Importing this package registers them."""

from .mambavision import MambaVision
from .vim import Vim
from .vmamba import VMamba
from .vssd import VSSD

__all__ = ['MambaVision', 'VMamba', 'VSSD', 'Vim']
