import csv
from types import SimpleNamespace

import pytest
import torch

from vmamba.tools import bench_kernels
from vmamba.tools.benchmarks import cases as bench_cases
from vmamba.tools.benchmarks import timing
from vmamba.tools.benchmarks.cases import Case, Workload, model_case, scan_case, ss2d_case, ssd_case, ssd_scans

CPU = ['--device', 'cpu', '--batch-size', '1', '--repeats', '1']
SIZES = dict(dim=8, length=10, dstate=3, groups=2)
SCAN = scan_case('scan_tiny', 2, **SIZES)
SSD = ssd_case('ssd_tiny', 2, length=10, heads=2, dim=3, dstate=4, function=ssd_scans(torch.device('cpu'))['vmamba'])
SS2D = ss2d_case('ss2d_tiny', 2, dim=8, size=3, dstate=2, dt_rank=1)
OURS = model_case('host', 'host_vmamba_nano', 1, 'vmamba_nano', training=True, size=32, beside=('test_vit',))
THEIRS = model_case('host', 'host_test_vit', 1, 'test_vit', training=True, size=160)


def test_each_case_is_a_row(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_cases, 'scan_cases', lambda device: [SCAN])
    monkeypatch.setattr(bench_cases, 'ssd_cases', lambda device: [SSD])
    monkeypatch.setattr(bench_cases, 'ss2d_cases', lambda: [SS2D])
    output, docs = tmp_path / 'new' / 'kernels.csv', tmp_path / 'docs' / 'benchmarks.md'
    bench_kernels.main([*CPU, '--only', 'scan', 'ssd', 'ss2d', '--output', str(output), f'--docs={docs}'])
    rows = list(csv.DictReader(output.open()))
    assert [(row['case'], row['kind'], row['batch']) for row in rows] == [
        ('scan_tiny', 'scan', '1'),
        ('ssd_tiny', 'ssd', '1'),
        ('ss2d_tiny', 'ss2d', '1'),
    ]
    for row in rows:
        assert (row['status'], row['by']) == ('ok', 'vmamba')
        assert all(float(row[f'{name}_ms']) > 0 for name in ('forward', 'backward', 'both'))
        assert row['forward_peak_mib'] == ''  # needs a GPU
        assert torch.__version__ in row['versions'] and 'copy' in row['machine']
        assert row['command'].startswith(f'vmamba bench kernels {" ".join(CPU)} --only scan ssd ss2d --output ')
    text = docs.read_text()
    assert '| scan_tiny |' in text and '| ss2d_tiny |' in text and rows[0]['command'] in text
    assert 'scan_tiny' in capsys.readouterr().out


def test_an_interrupt_keeps_what_is_measured(monkeypatch, tmp_path, capsys):
    def measure(case, *others):
        if case is SSD:
            raise KeyboardInterrupt
        return run(case, *others)

    run = bench_kernels.measure
    monkeypatch.setattr(bench_kernels, 'measure', measure)
    monkeypatch.setattr(bench_kernels, 'cases_of', lambda args: [SCAN, SSD, SS2D])
    bench_kernels.main(['--device', 'cpu', '--repeats', '1', '--output', str(tmp_path / 'kernels.csv')])
    assert [row['case'] for row in csv.DictReader((tmp_path / 'kernels.csv').open())] == ['scan_tiny']
    assert 'interrupted: 1 of 3 cases are measured' in capsys.readouterr().out


def test_models_are_measured(tmp_path):
    output = tmp_path / 'models.csv'
    arguments = [*CPU, '--models', 'vmamba_nano', '--case', 'model_*_inference', 'model_*_training']
    bench_kernels.main([*arguments, '--output', str(output)])
    inference, training = csv.DictReader(output.open())
    assert (inference['case'], training['case']) == ('model_vmamba_nano_inference', 'model_vmamba_nano_training')
    assert inference['by'] == 'vmamba' and inference['status'] == training['status'] == 'ok'
    assert float(inference['images_per_second']) == pytest.approx(1e3 / float(inference['forward_ms']))
    assert float(training['images_per_second']) == pytest.approx(1e3 / float(training['both_ms']))


def test_host_times_of_models_are_written_beside_those_of_their_peers(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_cases, 'host_cases', lambda: [OURS, THEIRS])
    output, docs = tmp_path / 'host.csv', tmp_path / 'benchmarks.md'
    bench_kernels.main([*CPU, '--only', 'host', '--output', str(output), '--docs', str(docs)])
    ours, theirs = csv.DictReader(output.open())
    for row in (ours, theirs):
        assert (row['status'], row['kind'], row['batch']) == ('ok', 'host', '1')
    total = [float(row['forward_ms']) + float(row['backward_ms']) for row in (ours, theirs)]
    assert float(ours['over test_vit']) == pytest.approx(total[0] / total[1]) and theirs['over test_vit'] == ''
    assert 'over test_vit' in docs.read_text() and 'models take turns' in docs.read_text()


def test_host_times_are_taken_in_turn_with_the_device_idle_around_each(monkeypatch):
    events, clock = [], iter(range(99))

    def host_case(model, **more):
        def forward():
            events.append(f'forward {model}')
            if model == 'b' and events.count('forward b') == 2:
                raise ValueError('broken')
            y = torch.ones(3, requires_grad=True) + 0
            y.register_hook(lambda grad: events.append(f'backward {model}'))
            return y

        return Case('host', f'host_{model}', 1, '', lambda batch, device: Workload(forward, ()), **more)

    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: events.append('idle'))
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: next(clock) ** 2)
    monkeypatch.setattr(bench_kernels, 'TURN', 2)
    cases = [host_case('a', beside=('b',)), host_case('b')]
    a, b = bench_kernels.measure_in_turn(cases, torch.device('cuda'), 2)
    turn = ('forward a', 'backward a') * 3
    names = *turn, 'forward b', 'backward b', 'forward b', *turn
    expected = [event for name in names for event in ('idle', name, 'idle')]
    del expected[3 * len(turn) + 8]  # where b broke
    assert events == expected
    # Of the last turn, after its first pass: 22^2 - 21^2 and 26^2 - 25^2 forward, 24^2 - 23^2 and 28^2 - 27^2 backward.
    assert (a['forward_ms'], a['backward_ms']) == (1e3 * (43 + 51) / 2, 1e3 * (47 + 55) / 2)
    assert (b['status'], b['message']) == ('failed', 'broken') and 'forward_ms' not in b and 'over b' not in a


@pytest.mark.parametrize('case', [SCAN, SSD, SS2D], ids=['scan', 'ssd', 'ss2d'])
def test_floors_follow_from_the_bytes(case):
    # Bytes of u, delta, B and C, A, D, delta_bias; of x, dt, B and C, A, D, dt_bias; of x, x_proj, dt_weight and
    # dt_bias, A, D, the norm.
    inputs = {
        'scan': 2 * 320 + 2 * 240 + 96 + 2 * 32,
        'ssd': 240 + 80 + 2 * 160 + 3 * 8,
        'ss2d': 288 + 320 + 2 * 128 + 256 + 128 + 2 * 32,
    }[case.kind]
    output = {'scan': 320, 'ssd': 240, 'ss2d': 288}[case.kind]
    assert case.fewest_bytes() == (inputs + output, 2 * inputs + output)
    record = bench_kernels.derive(case, dict(forward_ms=2.0, forward_graph_ms=1.0, backward_ms=4.0), copy=1e6)
    assert record['forward_floor'] == pytest.approx((inputs + output) / 1e3)
    assert record['backward_floor'] == pytest.approx((2 * inputs + output) / 4e3)


def test_the_scan_of_mamba_2_as_linear_attention():
    """As fla's operator takes it."""

    def simple_gla(q, k, v, g, scale):
        state, rows = torch.zeros(2, 2, 4, 3), []
        for i in range(q.shape[1]):
            state = state * g[:, i].exp()[..., None, None] + k[:, i, :, :, None] * v[:, i, :, None]
            rows.append((q[:, i, :, :, None] * state).sum(dim=2) * scale)
        return torch.stack(rows, dim=1), state

    names = 'x', 'dt', 'A', 'B', 'C', 'D', 'dt_bias'
    inputs = {name: tensor.float() for name, tensor in zip(names, SSD.workload('cpu').inputs, strict=True)}
    ours = bench_cases.ssd_scans(torch.device('cpu'))['vmamba']
    torch.testing.assert_close(bench_cases._simple_gla(simple_gla, **inputs), ours(**inputs))


def test_the_scan_of_mamba_ssm_follows_each_of_ours(monkeypatch):
    def selective_scan_fn():
        """Stands in for the peer's."""

    selective_scan_fn.__module__ = 'mamba_ssm.ops.selective_scan_interface'
    monkeypatch.setattr(bench_cases, 'import_module', lambda name: SimpleNamespace(selective_scan_fn=selective_scan_fn))
    ours, theirs, *_ = bench_cases.scan_cases(torch.device('cuda'))
    assert ours.name == theirs.name and (ours.by, theirs.by) == ('vmamba', 'mamba_ssm')
    assert {case.by for case in bench_cases.scan_cases(torch.device('cpu'))} == {'vmamba'}


@pytest.mark.parametrize(
    'error, status', [(torch.OutOfMemoryError('CUDA out of memory'), 'OOM'), (ValueError('broken\nmore'), 'failed')]
)
def test_an_error_is_a_row(error, status):
    def raises(**inputs):
        raise error

    raises.__module__ = 'vmamba'
    record = bench_kernels.measure(scan_case('scan_tiny', 2, **SIZES, function=raises), torch.device('cpu'), 1)
    assert (record['status'], record['message']) == (status, str(error).splitlines()[0])
    (report,) = bench_kernels.reports_of([record], {})
    assert report.messages == [f'scan_tiny (vmamba): {status}: {record["message"]}']


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

    case = scan_case('scan_tiny', 2, **SIZES, function=lambda u, **others: Once.apply(u))
    record = bench_kernels.measure(case, torch.device('cpu'), 1)
    assert record['backward_ms'] == record['both_ms'] - record['forward_ms']


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--case', 'no_such_case'], "no case matches 'no_such_case'; there are scan_d384_l3136_n1_g4, "),
        (['--only', 'scan', '--case', 'ss2d_*'], "no case matches 'ss2d_"),
        (['--models', 'no_such_model'], 'timm knows no model no_such_model'),
        (['--repeats', '0'], "must be a whole number above 0, got '0'"),
    ],
)
def test_unknown_names_and_wrong_numbers_are_clear_errors(capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench_kernels.main(['--device', 'cpu', *arguments])
    assert message in capsys.readouterr().err


def test_registry():
    cases = [*bench_cases.scan_cases(torch.device('cpu')), *bench_cases.ss2d_cases(), *bench_cases.host_cases()]
    cases += bench_cases.model_cases(bench_kernels.MODELS)
    by_name = {(case.name, case.by): case for case in cases}
    assert len(by_name) == len(cases)
    stage = by_name['ss2d_vmamba_t_v0_stage2', 'vmamba']
    assert (stage.batch, stage.shape) == (64, 'D 384, 28x28, N 16, R 12')
    beside = {case.name: case.beside for case in cases if case.beside}
    assert beside['host_vmamba_t'][0] == 'convnext_tiny' and beside['host_vim_t'] == ('deit_tiny_patch16_224',)
