"""Vision state-space backbones; importing this package registers them with timm."""

from .models import VSSD, Adventurer, MambaVision, UMamba, Vim, VMamba
from .models.trained import load

__all__ = ['Adventurer', 'MambaVision', 'UMamba', 'VMamba', 'VSSD', 'Vim', 'load', '__version__']
__version__ = '0.1.0'
