"""Only where the packages of the extra `medical` are installed; see `make test-medical`."""

from importlib.util import find_spec

PACKAGES = ('monai', 'nnunetv2')
collect_ignore_glob = [] if all(map(find_spec, PACKAGES)) else ['test_*.py']
