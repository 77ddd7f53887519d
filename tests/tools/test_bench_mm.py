import pytest

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

from mm_runs import unformatted  # noqa: E402, F401 - the fixture

from vmamba.tools import bench_mm  # noqa: E402

SHALLOW = {
    'swin_t': dict(bench_mm.SWIN, depths=[1, 1, 1, 1]),
    'vmamba_t': dict(bench_mm.BACKBONES['vmamba_t'], model_options=dict(depths=(1, 1, 1, 1))),
}

THIN = {
    'detection': {'model.roi_head.bbox_head.fc_out_channels': 32, 'model.roi_head.mask_head.conv_out_channels': 16},
    'segmentation': {'model.decode_head.channels': 16, 'model.auxiliary_head.channels': 8},
}


def test_both_frameworks_are_measured_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_mm, 'BACKBONES', SHALLOW)
    monkeypatch.setattr(bench_mm, 'BATCHES', 1)
    load_config = bench_mm.load_config
    monkeypatch.setattr(bench_mm, 'load_config', lambda path: load_config(path, THIN[path.parent.name]))
    docs = tmp_path / 'benchmarks.md'
    options = ['--device', 'cpu', '--shrink', '8', '--repeats', '1']
    bench_mm.main([*options, '--docs', str(docs)])
    text = docs.read_text()
    rows = [line for line in text.splitlines() if line.startswith(('| Mask R-CNN', '| UPerNet'))]
    assert [row.split(' | ')[3] for row in rows] == ['swin_t', 'vmamba_t'] * 2
    assert '`vmamba bench mm --device cpu --shrink 8 --repeats 1 ' in text
    assert all(float(row.split(' | ')[4]) > 0 for row in rows)
    assert 'mmdet' in text and 'mmseg' in text
    assert 'UPerNet' in capsys.readouterr().out


def test_running_out_of_memory_is_a_result(monkeypatch):
    def build(*args):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(bench_mm, 'build', build)
    task = bench_mm.TASKS['detection']
    result = bench_mm.measure(task, 'vmamba_t', [], bench_mm.torch.device('cpu'), 1)
    (table,) = bench_mm.report_of([result], bench_mm.torch.device('cpu'), 1, []).tables
    assert table.loc[0, 'images/s'] == 'OOM' and table.loc[0, 'ms per step'] is None


def test_wrong_options_are_refused(capsys):
    with pytest.raises(SystemExit) as error:
        bench_mm.parse_args(['--repeats', '0'])
    assert error.value.code == 2
    assert "--repeats: must be a whole number above 0, got '0'" in capsys.readouterr().err
