"""timm models, which importing this package registers, and U-Mamba, a network for segmentation."""

from .adventurer import Adventurer
from .mambavision import MambaVision
from .umamba import UMamba
from .vim import Vim
from .vmamba import VMamba
from .vssd import VSSD

__all__ = ['Adventurer', 'MambaVision', 'UMamba', 'VMamba', 'VSSD', 'Vim']
