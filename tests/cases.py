"""What tests of several folders are run on."""

import pytest
import torch

from vmamba.kernels import _launch

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'  # on a CPU the kernels are interpreted, see conftest.py

needs_gpu = pytest.mark.skipif(DEVICE != 'cuda', reason='needs a CUDA device')
needs_triton = pytest.mark.skipif(not _launch.HAS_TRITON, reason='needs the package triton')
BACKENDS = [pytest.param(False, id='plain'), pytest.param(True, id='triton', marks=needs_triton)]
