"""timm models. Importing this package registers them."""

from .vim import Vim
from .vmamba import VMamba

__all__ = ['VMamba', 'Vim']
