"""timm models. Importing this package registers them."""

from .adventurer import Adventurer
from .mambavision import MambaVision
from .vim import Vim
from .vmamba import VMamba
from .vssd import VSSD

__all__ = ['Adventurer', 'MambaVision', 'VMamba', 'VSSD', 'Vim']
