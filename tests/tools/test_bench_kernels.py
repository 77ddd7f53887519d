import csv
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from vmamba.tools import bench_kernels
from vmamba.tools.benchmarks import kernel_cases, kernel_report, timing
from vmamba.tools.benchmarks.kernel_cases import HostCase, Reference, ScanCase, SS2DCase, Workload
from vmamba.tools.benchmarks.kernel_report import Result, Run, number, records, write_docs
from vmamba.tools.benchmarks.sections import replace_section
from vmamba.tools.benchmarks.timing import Ceilings

CPU = ['--device', 'cpu', '--batch-size', '1', '--repeats', '1']
SCAN = ScanCase('scan_tiny', 2, Reference('mamba_ssm', 1.0, 8.0), dim=8, length=10, dstate=3, groups=2)
SS2D = SS2DCase('ss2d_tiny', 2, None, dim=8, size=3, dstate=2, dt_rank=1)
OURS = HostCase('host_vmamba_nano', 1, None, 'vmamba_nano', True, False, size=32, beside='test_vit')
THEIRS = HostCase('host_test_vit', 1, None, 'test_vit', True, False, size=160)
CEILINGS = Ceilings(copy=1e6, matmul=1e9, exp2=1e6)


def result_of(case=SCAN, **measured):
    return Result(case, **{'forward_ms': 2.0, 'backward_ms': 4.0, 'forward_backward_ms': 6.0, **measured})


def run_of(*results, device='NVIDIA H100 80GB HBM3'):
    return Run(device, CEILINGS, 1, 'vmamba bench kernels', results)


def selective_scan_fn(u, delta, A, B, C, D, delta_bias, delta_softplus):
    return u


selective_scan_fn.__module__ = 'mamba_ssm.ops.selective_scan_interface'


def test_each_case_is_a_row(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_kernels, 'scan_cases', lambda: [SCAN])
    monkeypatch.setattr(bench_kernels, 'ss2d_cases', lambda: [SS2D])
    output, docs = tmp_path / 'new' / 'kernels.csv', tmp_path / 'docs' / 'benchmarks.md'
    bench_kernels.main([*CPU, '--only', 'scan', 'ss2d', '--output', str(output), f'--docs={docs}'])
    rows = list(csv.DictReader(output.open()))
    assert [(row['case'], row['kind'], row['batch']) for row in rows] == [
        ('scan_tiny', 'scan', '1'),
        ('ss2d_tiny', 'ss2d', '1'),
    ]
    for row in rows:
        assert row['status'] == 'ok' and row['implementation'] == 'vmamba' and row['backward_timed'] == 'alone'
        for name in ('forward', 'backward', 'forward_backward'):
            assert float(row[f'{name}_ms']) > 0
        for name in ('forward_graph_ms', 'forward_peak_mib', 'training_peak_mib', 'peer', 'exp2_share'):
            assert row[name] == ''  # they need a GPU, or the registered batch
        assert row['torch'] == torch.__version__ and row['triton'] == kernel_report.triton_version()
        assert row['device'] and float(row['copy_bytes_per_second']) > 0
        assert row['command'] == f'vmamba bench kernels {" ".join(CPU)} --only scan ss2d'
    text = docs.read_text()
    assert '| scan_tiny |' in text and '| ss2d_tiny |' in text and rows[0]['command'] in text
    assert 'scan_tiny' in capsys.readouterr().out


def test_models_are_measured(tmp_path):
    output = tmp_path / 'models.csv'
    arguments = [*CPU, '--models', 'vmamba_nano', '--case', 'model_*_inference', 'model_*_training']
    bench_kernels.main([*arguments, '--csv', str(output)])
    inference, training = csv.DictReader(output.open())
    assert (inference['case'], training['case']) == ('model_vmamba_nano_inference', 'model_vmamba_nano_training')
    assert inference['implementation'] == 'vmamba' and inference['status'] == training['status'] == 'ok'
    assert float(inference['images_per_second']) == pytest.approx(1e3 / float(inference['forward_ms']))
    assert float(training['images_per_second']) == pytest.approx(1e3 / float(training['forward_backward_ms']))


def test_host_times_of_models_are_written_beside_those_of_their_peers(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_kernels, 'host_cases', lambda: [OURS, THEIRS])
    output, docs = tmp_path / 'host.csv', tmp_path / 'benchmarks.md'
    bench_kernels.main([*CPU, '--only', 'host', '--output', str(output), '--docs', str(docs)])
    ours, theirs = csv.DictReader(output.open())
    for row in (ours, theirs):
        assert (row['status'], row['kind'], row['batch']) == ('ok', 'host', '1')
        assert float(row['forward_ms']) > 0 and float(row['backward_ms']) > 0
    assert [(row['implementation'], row['peer']) for row in (ours, theirs)] == [('vmamba', 'test_vit'), ('timm', '')]
    for name in ('forward', 'backward'):
        assert ours[f'peer_{name}_ms'] == theirs[f'{name}_ms']
    ratios = [number(float(ours[f'{name}_ms']) / float(theirs[f'{name}_ms'])) for name in ('forward', 'backward')]
    for text in (docs.read_text(), capsys.readouterr().out):
        assert 'backward over its' in text and all(ratio in text for ratio in ratios)
        assert 'models take turns' in text and 'CUDA events' not in text


def test_host_times_are_taken_in_turn_with_the_device_idle_around_each(monkeypatch):
    events, clock = [], iter(range(99))

    def workload(case, device):
        def forward():
            events.append(f'forward {case.model}')
            if case.model == 'b' and events.count('forward b') == 2:
                raise ValueError('broken')
            y = torch.ones(3, requires_grad=True) + 0
            y.register_hook(lambda grad: events.append(f'backward {case.model}'))
            return y

        return Workload(forward, ())

    monkeypatch.setattr(HostCase, 'workload', workload)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: events.append('idle'))
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: next(clock) ** 2)
    monkeypatch.setattr(bench_kernels, 'TURN', 2)
    cases = [replace(THEIRS, name=f'host_{model}', model=model) for model in 'ab']
    a, b = bench_kernels.measure_in_turn(cases, torch.device('cuda'), 2)
    turn = ('forward a', 'backward a') * 3
    names = *turn, 'forward b', 'backward b', 'forward b', *turn
    expected = [event for name in names for event in ('idle', name, 'idle')]
    del expected[3 * len(turn) + 8]  # where b broke
    assert events == expected
    # Of the last turn, after its first pass: 22^2 - 21^2 and 26^2 - 25^2 forward, 24^2 - 23^2 and 28^2 - 27^2 backward.
    assert (a.forward_ms, a.backward_ms) == (1e3 * (43 + 51) / 2, 1e3 * (47 + 55) / 2)
    assert (b.status, b.message, b.forward_ms) == ('failed', 'broken', None)


def test_bytes_and_updates_of_a_scan():
    inputs = 2 * 320 + 2 * 240 + 96 + 2 * 32  # u and delta, B and C, A, D and delta_bias
    assert SCAN.forward_bytes() == inputs + 320
    assert SCAN.backward_bytes() == 2 * inputs + 320
    assert SCAN.updates() == 480


def test_bytes_and_updates_of_ss2d():
    inputs = 288 + 320 + 2 * 128 + 256 + 128 + 2 * 32  # x, x_proj, dt_weight and dt_bias, A, D, the norm's
    assert SS2D.forward_bytes() == inputs + 288
    assert SS2D.backward_bytes() == 2 * inputs + 288
    assert SS2D.updates() == 1152


def test_what_follows_from_the_times():
    (record,) = records(run_of(result_of()))
    assert record['forward_floor_ms'] == pytest.approx(1.6)
    assert record['forward_floor_share'] == pytest.approx(0.8)
    assert record['backward_floor_share'] == pytest.approx(2.88 / 4)
    assert record['updates_per_second'] == pytest.approx(240e3)
    assert record['exp2_share'] == pytest.approx(0.24)
    (record,) = records(run_of(result_of(forward_graph_ms=1.0)))
    assert record['forward_floor_share'] == pytest.approx(1.6)


def test_peers_of_earlier_are_compared_on_their_gpu_only():
    (record,) = records(run_of(result_of()))
    assert (record['forward_ratio'], record['backward_ratio'], record['forward_backward_ratio']) == (0.5, 2.0, None)
    assert record['peer_measured'] == 'earlier'
    (record,) = records(run_of(result_of(forward_graph_ms=0.5, forward_backward_graph_ms=2.5)))
    assert (record['forward_graph_ratio'], record['backward_graph_ratio']) == (2.0, 4.0)
    assert '0.500 (2.00) / 2.00 (4.00)' in kernel_report.tables_of('scan', [record])[0][1]
    (record,) = records(run_of(result_of(), device='another'))
    assert record['peer_forward_ms'] == 1.0 and record['forward_ratio'] is None


def test_a_peer_in_the_same_run_takes_the_place_of_the_earlier_one():
    ours, theirs = bench_kernels.with_peer([SCAN], selective_scan_fn)
    assert ours is SCAN and theirs.implementation == 'mamba_ssm' and theirs.reference is None
    run = run_of(result_of(), result_of(theirs, forward_ms=6.0), device='another')
    record, peer = records(run)
    assert (record['peer_forward_ms'], record['forward_ratio'], record['peer_measured']) == (6.0, 3.0, 'this run')
    assert peer['peer'] == '' and peer['forward_ratio'] is None
    header = kernel_report.tables_of('scan', records(run))[0][0]
    assert 'mamba_ssm, in this run: forward / backward' in header
    header = kernel_report.tables_of('scan', records(run_of(result_of())))[0][0]
    assert f'{kernel_report.EARLIER}: forward / backward' in header


@pytest.mark.parametrize(
    'error, status', [(torch.OutOfMemoryError('CUDA out of memory'), 'OOM'), (ValueError('broken\nmore'), 'failed')]
)
def test_an_error_is_a_row(error, status):
    def raises(**inputs):
        raise error

    device = torch.device('cpu')
    result = bench_kernels.measure(replace(SCAN, function=raises), device, 1)
    assert (result.status, result.message) == (status, str(error).splitlines()[0])
    console = Console(record=True, width=200)
    kernel_report.write_report(run_of(result, result_of()), console)
    assert f'{status}: {result.message}' in console.export_text()


def test_backward_by_difference():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            ctx.used = False
            return u.clone()

        @staticmethod
        def backward(ctx, grad):
            if ctx.used:
                raise RuntimeError('backward a second time')
            ctx.used = True
            return grad

    case = replace(SCAN, function=lambda u, **others: Once.apply(u))
    result = bench_kernels.measure(case, torch.device('cpu'), 1)
    assert (result.status, result.backward_timed) == ('ok', 'difference')
    assert result.backward_ms == result.forward_backward_ms - result.forward_ms


def test_docs_keep_what_is_not_theirs(tmp_path):
    path = tmp_path / 'benchmarks.md'
    path.write_text('# Benchmarks\n\nBefore.\n\n<!-- other: begin -->\nOther.\n<!-- other: end -->\n')
    write_docs(run_of(result_of()), path)
    write_docs(run_of(result_of(SS2D)), path)
    first = path.read_text()
    path.write_text(first + '\nAfter.\n')
    write_docs(run_of(result_of(forward_ms=3.25)), path)
    text = path.read_text()
    assert text.startswith('# Benchmarks\n\nBefore.\n\n<!-- other: begin -->\nOther.\n<!-- other: end -->\n')
    assert text.endswith('\nAfter.\n')
    assert text.count('| scan_tiny |') == first.count('| scan_tiny |') == 2  # a table of times and one of limits
    assert text.count('| ss2d_tiny |') == 2
    assert '3.25' in text and '3.25' not in first
    assert 'NVIDIA H100 80GB HBM3' in text and torch.__version__ in text


def test_a_lonely_marker_is_an_error():
    with pytest.raises(ValueError, match='only one of'):
        replace_section('<!-- a: begin -->', 'a', 'body')


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--case', 'no_such_case'], "no case matches 'no_such_case'; there are scan_d384_l3136_n1_g4, "),
        (['--only', 'scan', '--case', 'ss2d_*'], "no case matches 'ss2d_"),
        (['--models', 'no_such_model'], 'timm knows no model no_such_model'),
        (['--repeats', '0'], '--repeats must be at least 1, got 0'),
        (['--activation-memory-budget', '1.5'], '--activation-memory-budget must be within [0, 1], got 1.5'),
    ],
)
def test_what_there_is_not_is_a_clear_error(capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench_kernels.main(['--device', 'cpu', *arguments])
    assert message in capsys.readouterr().err


def test_registry():
    cases = [*kernel_cases.scan_cases(), *kernel_cases.ss2d_cases(), *kernel_cases.host_cases()]
    cases += kernel_cases.model_cases(bench_kernels.MODELS, compile_training=True)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) == 7 + 12 + 12 + 4
    by_name = dict(zip(names, cases))
    stage = by_name['ss2d_vmamba_t_v0_stage2']
    assert (stage.batch, stage.dim, stage.size, stage.dstate, stage.dt_rank) == (64, 384, 28, 16, 12)
    assert by_name['ss2d_vmamba_t_stage4'].reference == Reference('official', 0.981, None, 2.812, 89, 102)
    assert by_name['model_vmamba_t_training'].reference.training_peak_mib == 6051
    beside = {case.model: case.beside for case in cases if case.kind == 'host' and case.beside}
    assert beside == {'vmamba_t': 'convnext_tiny', 'vim_t': 'deit_tiny_patch16_224'}


@pytest.mark.parametrize(
    'value, expected',
    [(None, '-'), (0.0, '0'), (0.003189, '0.00319'), (0.5578, '0.558'), (20.34, '20.3'), (13562.4, '13562')],
)
def test_number(value, expected):
    assert number(value) == expected
