import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools'))


@pytest.fixture(autouse=True)
def own_visualizer():
    """mmengine keeps one visualizer for a process, which would write where the run of an earlier test did."""
    yield
    visualization = sys.modules.get('mmengine.visualization')
    if visualization is not None:
        for visualizer in visualization.Visualizer.__subclasses__():
            visualizer._instance_dict.clear()
