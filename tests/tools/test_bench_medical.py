import torch

from vmamba.models import UMamba
from vmamba.tools import bench_medical


def test_networks_are_measured_and_written(monkeypatch, tmp_path, capsys):
    docs = tmp_path / 'benchmarks.md'
    options = '--device cpu --shrink 32 --repeats 1 --networks none bot enc-mamba2 --patches abdomen-ct-3d'.split()
    bench_medical.main([*options, '--docs', str(docs)])
    rows = [line.split(' | ') for line in docs.read_text().splitlines() if line.startswith('| abdomen-ct-3d')]
    assert [row[4] for row in rows] == ['none', 'bot', 'enc-mamba2']
    assert all(float(row[5]) > 0 and float(row[7]) > 0 for row in rows)
    assert '`vmamba bench medical --device cpu --shrink 32' in docs.read_text()
    assert 'U-Mamba' in capsys.readouterr().out


def test_running_out_of_memory_is_a_result(monkeypatch):
    def build(*args):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(bench_medical, 'build', build)
    plan = bench_medical.PLANS['abdomen-ct-3d']
    row = bench_medical.measure('none', 'abdomen-ct-3d', plan, 'fp32', False, torch.device('cpu'), 1)
    assert row['training, ms'] == 'OOM'


def test_plans_are_the_published_ones():
    counts = {'microscopy-2d': 64_797_301, 'abdomen-ct-3d': 41_945_158, 'abdomen-mr-3d': 41_945_158}
    for name, plan in bench_medical.PLANS.items():
        model = UMamba('bot', **plan.sizes(), device='meta')
        assert sum(parameter.numel() for parameter in model.parameters()) == counts[name]
        small = bench_medical.shrunk(plan, 8)
        assert small.batch == 1 and small.patch_size < plan.patch_size
