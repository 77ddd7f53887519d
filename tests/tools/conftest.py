import sys

import pytest
from training_runs import ROOT, signals_kept

from vmamba.tools import train


@pytest.fixture(autouse=True)
def own_visualizer():
    """mmengine keeps one visualizer for a process, which would write where the run of an earlier test did."""
    yield
    visualization = sys.modules.get('mmengine.visualization')
    if visualization is not None:
        for visualizer in visualization.Visualizer.__subclasses__():
            visualizer._instance_dict.clear()


@pytest.fixture
def run_alone(monkeypatch):
    """Runs the command line of train.py in this process, without torchrun."""
    monkeypatch.chdir(ROOT)

    def call(*args):
        with signals_kept():
            train.main([str(arg) for arg in args])

    return call
