import csv
import os
import resource
import signal
import sys
import time

import pandas as pd
import pytest
import torch

from vmamba.tools import compare_highres
from vmamba.tools.benchmarks import highres
from vmamba.tools.benchmarks.highres import Case, Result, Worker, build_model, report_of, row_of, serve, write_picture
from vmamba.tools.benchmarks.timing import is_out_of_memory
from vmamba.tools.compare_highres import cases_of
from vmamba.tools.user_errors import UserError

from rich.console import Console


def chosen(*arguments):
    return cases_of(arguments)


@pytest.fixture
def console():
    return Console(record=True, width=200)


@pytest.fixture
def gpu(monkeypatch):
    """Options are read as on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)


@pytest.fixture
def scripted(monkeypatch):
    """Stands in for the processes: measures what the function says, and notes cases and stops."""
    events = []

    def install(measure):
        class Scripted(Worker):
            def measure(self, case):
                events.append((case.model, case.size))
                return measure(case)

            def stop(self):
                events.append('stop')

        monkeypatch.setattr(highres, 'Worker', Scripted)
        return events

    return install


@pytest.fixture
def compare(tmp_path, console):
    """Compares, and returns the rows."""
    return lambda cases: highres.compare(cases, 1, tmp_path / 'highres.csv', 'a command', console)


def frame_of(measurements):
    return pd.DataFrame(row_of(*measurement, 'a command') for measurement in measurements)


def read_rows(path):
    return list(csv.DictReader(path.open()))


def test_one_row_a_model_and_size(tmp_path):
    arguments = ['--sizes', '32', '64', '--batch-sizes', '2', '1', '--repeats', '1', '--device', 'cpu']
    docs = tmp_path / 'docs.md'
    compare_highres.main(['--models', 'vmamba_nano', *arguments, '--output', str(tmp_path / 'new'), f'--docs={docs}'])
    rows = read_rows(tmp_path / 'new' / 'highres.csv')
    assert [(row['model'], row['size'], row['batch_size'], row['status']) for row in rows] == [
        ('vmamba_nano', '32', '2', 'ok'),
        ('vmamba_nano', '64', '1', 'ok'),
    ]
    for row in rows:
        assert float(row['images_per_second']) == pytest.approx(1e3 / float(row['ms_per_image']))
        assert float(row['peak_mib']) >= 0
        assert torch.__version__ in row['versions'] and row['device_name']
        assert (row['precision'], row['device']) == ('fp32', 'cpu')
        assert row['command'].startswith(f'vmamba compare highres --models vmamba_nano {" ".join(arguments)} --output ')
    assert (tmp_path / 'new' / 'highres.png').read_bytes().startswith(b'\x89PNG')
    assert rows[0]['command'] in docs.read_text() and (tmp_path / 'highres.png').is_file()


def serve_with_little_memory(connection):
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (highres._status_bytes('VmData:') + 2**26, hard))
    serve(connection)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the limit is a Linux one')
def test_running_out_of_memory_is_a_result():
    worker = Worker(timeout=600, target=serve_with_little_memory)
    result = worker.measure(Case('vmamba_nano', 2048))
    worker.stop()
    assert (result.status, result.images_per_second, result.peak_mib) == ('OOM', None, None)
    assert result.device_name != ''


def test_failing_is_a_result_and_the_process_starts_again():
    failing, working = Case('no_such_model', 32), Case('vmamba_nano', 32, precision='bf16', repeats=1)
    worker = Worker(timeout=600)
    try:
        result = worker.measure(failing)
        assert result.status == 'failed' and 'no_such_model' in result.message
        assert worker.measure(working).status == 'ok'
        process = worker._process
        assert worker.measure(working).status == 'ok'
        assert worker._process is process
    finally:
        worker.stop()
    assert not process.is_alive()


def sleep(connection):
    time.sleep(60)


def kill(connection):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(connection):
    raise SystemExit(3)


@pytest.mark.parametrize('target, status', [(sleep, 'timeout'), (kill, 'OOM'), (leave, 'failed')])
def test_a_process_that_ends_badly_is_a_result(target, status):
    worker = Worker(timeout=2 if target is sleep else 600, target=target)
    assert worker.measure(Case('vmamba_nano', 32)).status == status


@pytest.mark.parametrize('device', ['cuda', 'cpu'])
def test_a_process_measures_a_model_on_a_gpu_and_a_case_on_a_cpu(scripted, compare, device):
    events = scripted(lambda case: Result('ok', 1.0, 1.0, 1.0))
    cases = [Case(model, size, device=device) for model in 'ab' for size in (32, 64)]
    assert len(compare(cases)) == 4
    if device == 'cuda':
        assert events == [('a', 32), ('a', 64), 'stop', ('b', 32), ('b', 64), 'stop']
    else:
        assert events == ['stop', ('a', 32), 'stop', ('a', 64), 'stop', ('b', 32), 'stop', ('b', 64), 'stop']


def test_a_run_that_is_cut_short_keeps_its_rows(scripted, compare, tmp_path, console):
    def measure(case):
        if case.size == 32:
            return Result('OOM', 1.0, 1000.0, 5.0)
        assert [row['size'] for row in read_rows(tmp_path / 'highres.csv')] == ['32']
        raise KeyboardInterrupt

    scripted(measure)
    rows = compare([Case('a', 32), Case('a', 64)])
    assert (rows.model.tolist(), rows.images_per_second.tolist()) == (['a'], [1.0])
    (row,) = read_rows(tmp_path / 'highres.csv')
    assert (row['model'], row['images_per_second'], row['command']) == ('a', '1.0', 'a command')
    assert '32  1  fp32  a  OOM' in console.export_text()


def test_an_interrupt_before_anything_is_measured_ends_the_run(scripted, compare):
    def measure(case):
        raise KeyboardInterrupt

    scripted(measure)
    with pytest.raises(KeyboardInterrupt):
        compare([Case('a', 32)])


MIXED = [
    (Case('a', 224, 4), Result('ok', 10.0, 100.0, 50.0, device_name='a device')),
    (Case('a', 448), Result('OOM')),
    (Case('b', 224, 4), Result('timeout', message='took more than 1 s')),
    (Case('b', 448, compile=True, cuda_graph=True), Result('ok', 2.0, 500.0, 200.0)),
]


def test_table_and_figure_of_mixed_results(tmp_path, console):
    report_of(frame_of(MIXED), 'highres', len(MIXED)).publish(console)
    text = console.export_text()
    assert 'OOM' in text and 'a device' in text
    assert 'b at 224, batch 4, fp32: timeout: took more than 1 s' in text
    write_picture(frame_of(MIXED), tmp_path / 'highres.png')
    assert (tmp_path / 'highres.png').read_bytes().startswith(b'\x89PNG')


def test_docs_get_a_section_each(tmp_path):
    path = tmp_path / 'benchmarks.md'
    for name in ('highres', 'highres_paper', 'highres'):
        rows = frame_of(MIXED).assign(command=f'a command of {name}')
        report_of(rows, name, len(MIXED) + 2).write_section(path)
    text = path.read_text()
    assert text.count('| 224 | 4 | fp32 | a | 10.0 | 100 | 50.0 |') == 2
    assert text.count('| 448 | 1 | fp32, compiled, CUDA graph | b | 2.00 | 500 | 200 |') == 2
    assert text.count('](highres.png)') == text.count('](highres_paper.png)') == 1
    assert '- machine: a device\n' in text and '`a command of highres_paper`' in text
    assert text.count(f'- cases measured: {len(MIXED)} of {len(MIXED) + 2}\n') == 2


def test_paired_batch_sizes_and_all_ways_to_run(gpu):
    arguments = ['--models', 'a', 'b', '--sizes', '224', '1248', '--batch-sizes', '128', '8']
    cases = chosen(*arguments, '--compile', 'off', 'on', '--cuda-graph', 'on')
    assert [(case.model, case.compile, case.size, case.batch_size) for case in cases] == [
        (model, compiled, *pair) for model in 'ab' for compiled in (False, True) for pair in ((224, 128), (1248, 8))
    ]
    assert all(case.cuda_graph and case.precision == 'bf16' and case.device == 'cuda' for case in cases)
    assert {case.batch_size for case in chosen('--batch-sizes', '2')} == {2}


def test_defaults():
    cases = chosen('--device', 'cpu')
    assert {(case.batch_size, case.run) for case in cases} == {(1, 'fp32')}
    sizes = {224: 256, 512: 64, 1024: 16, 1248: 8, 2048: 4, 4096: 1, 8192: 1}
    assert {size: compare_highres.default_batch_size(size, 'cuda') for size in sizes} == sizes


def test_the_paper_and_what_replaces_parts_of_it():
    cases = chosen('--paper', '--device', 'cpu')
    assert [case.size for case in cases] == [512, 640, 738, 1024, 1248] * 3
    assert {case.batch_size for case in cases} == {8}
    models = ['vim_t', 'deit_tiny_patch16_224:plain', 'deit_tiny_patch16_224:fused']
    assert list(dict.fromkeys(case.model for case in cases)) == models
    (case,) = chosen('--paper', '--models', 'vim_s', '--sizes', '512', '--batch-sizes', '2')
    assert (case.model, case.size, case.batch_size) == ('vim_s', 512, 2)


def test_the_latency_of_one_image(gpu):
    cases = chosen('--latency')
    assert [case.model for case in cases] == list(compare_highres.FAST_MODELS)
    assert {(case.size, case.batch_size, case.compile, case.cuda_graph) for case in cases} == {(224, 1, False, True)}
    assert not any(case.cuda_graph for case in chosen('--latency', '--cuda-graph', 'off'))


def test_one_image_on_the_cpu_of_a_machine_with_a_gpu(gpu):
    cases = chosen('--cpu')
    assert list(dict.fromkeys(case.model for case in cases)) == list(compare_highres.FAST_MODELS)
    assert {(case.size, case.batch_size) for case in cases} == {(224, 1), (448, 1), (672, 1)}
    assert {(case.device, case.precision) for case in cases} == {('cpu', 'fp32')}


def test_docs_of_one_size_have_no_picture():
    report = report_of(frame_of(pair for pair in MIXED if pair[0].size == 224), 'highres_latency', 1)
    assert (report.title, report.picture) == ('Latency of one image', '')


def test_the_benchmarks_keep_the_cases_of_a_model_together(gpu):
    cases = chosen('--benchmarks')
    models = [case.model for case in cases]
    assert [model for model, before in zip(models, [None, *models]) if model != before] == list(highres.MODELS)
    found = {(case.model, case.size, case.batch_size, case.compile, case.cuda_graph) for case in cases}
    for model in highres.MODELS:
        assert (model, 1248, 8, False, False) in found
        assert ((model, 224, 1, False, True) in found) is ((model, 224, 128, True, True) in found)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--sizes', '32', '64', '96', '--batch-sizes', '1', '2'], '--batch-sizes must be one or as many as the 3 siz'),
        (['--cuda-graph', 'off', 'on'], 'a CUDA graph needs a GPU'),
        (['--paper', '--benchmarks'], 'not allowed with'),
        (['--models', 'vim_t', 'vmamba_tt'], "unknown model 'vmamba_tt'; did you mean vmamba_t"),
        (['--models', 'vim_t:slow'], "attention must be 'plain' or 'fused', got 'slow'"),
    ],
)
def test_contradictions_are_clear_errors(capsys, arguments, message):
    with pytest.raises(SystemExit):
        compare_highres.main(['--device', 'cpu', *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('settings, repeats', [(dict(repeats=2), 2), (dict(seconds=0.0), 3), (dict(seconds=1e9), 30)])
def test_repeats_are_bounded_by_time(monkeypatch, settings, repeats):
    asked = []
    monkeypatch.setattr(highres, 'median_ms', lambda run, device, repeats, warm_ups: asked.append(repeats) or 1.0)
    result = highres.measure(Case('vmamba_nano', 32, batch_size=2, **settings))
    assert asked == [repeats]
    assert (result.ms_per_image, result.images_per_second) == (0.5, 2000.0)


def test_lower_precision_is_that_of_autocast(monkeypatch):
    seen = []
    monkeypatch.setattr(highres, 'median_ms', lambda run, *args: seen.append(run().dtype) or 1.0)
    monkeypatch.setattr(torch, 'compile', lambda model: seen.append('compiled') or model)
    for precision in ('fp32', 'bf16', 'fp16'):
        highres.measure(Case('deit_tiny_patch16_224', 32, precision=precision))
    highres.measure(Case('vmamba_nano', 32, compile=True))
    assert seen == [torch.float32, torch.float32, torch.float32, 'compiled', torch.float32]


def test_attention_is_chosen_by_the_label():
    plain, fused = (build_model(f'deit_tiny_patch16_224:{kind}', 32)[0] for kind in ('plain', 'fused'))
    assert not plain.blocks[0].attn.fused_attn
    assert fused.blocks[0].attn.fused_attn
    with pytest.raises(UserError, match="got 'other'"):
        build_model('deit_tiny_patch16_224:other', 32)


@pytest.mark.parametrize(
    'name, size, side',
    [
        ('vim_nano', 64, 64),
        ('vim_nano', 70, 68),
        ('vmamba_nano', 70, 70),
        ('deit_tiny_patch16_224', 70, 70),
        ('swin_tiny_patch4_window7_224', 70, 70),
    ],
)
def test_models_are_built_for_the_size_without_classifier(name, size, side):
    model, found = build_model(name, size)
    assert found == side
    assert model(torch.zeros(1, 3, side, side)).shape == (1, model.num_features)


def test_peak_is_at_least_the_largest_map():
    worker = Worker(timeout=600)
    result = worker.measure(Case('vmamba_nano', 512, repeats=1))
    worker.stop()
    assert result.peak_mib >= 16 * 256 * 256 * 4 / 2**20  # the output of the first convolution, which is fp32


@pytest.mark.parametrize(
    'error, expected',
    [
        (torch.OutOfMemoryError('CUDA out of memory'), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError('shapes do not match'), False),
    ],
)
def test_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected
