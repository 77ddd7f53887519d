"""Without OpenMMLab's packages there is nothing here to test."""

from importlib.util import find_spec

PACKAGES = ('mmengine', 'mmcv', 'mmdet', 'mmseg')
collect_ignore_glob = [] if all(map(find_spec, PACKAGES)) else ['test_*.py']
