import pandas as pd
import pytest

from vmamba.tools.benchmarks.report import Report, markdown_table, replace_section
from vmamba.tools.terminal import number

from rich.console import Console

TABLE = pd.DataFrame([{'case': 'a', 'n': 2, 'ms': 20.34}, {'case': 'b', 'n': 3, 'ms': None}])


def report(name='first', table=TABLE):
    return Report(name, 'A title', {'machine': 'a device', 'command': 'vmamba x'}, [table], 'Notes.', ['b: OOM'])


def test_a_section_keeps_the_rest_of_the_file(tmp_path):
    path = tmp_path / 'new' / 'benchmarks.md'
    report().write_section(path)
    assert path.read_text().startswith('# Benchmarks\n\n<!-- first: begin -->\n## A title\n\n- machine: a device\n')
    path.write_text(f'Before.\n\n{path.read_text()}\nAfter.\n')
    report('second').write_section(path)
    report(table=TABLE.assign(ms=7.0)).write_section(path)
    text = path.read_text()
    assert text.startswith('Before.\n') and 'After.\n' in text
    assert text.count('| a | 2 | 20.3 |') == 1 and text.count('| a | 2 | 7.00 |') == 1
    assert text.count('- command: `vmamba x`') == text.count('- b: OOM') == 2


def test_tables_and_messages_are_printed():
    console = Console(record=True, width=100)
    report().publish(console)
    text = console.export_text()
    assert 'A title' in text and 'a device' in text and '20.3' in text and 'b: OOM' in text


def test_numbers_are_aligned_to_the_right():
    assert markdown_table(TABLE).splitlines()[1:] == ['| --- | ---: | ---: |', '| a | 2 | 20.3 |', '| b | 3 | - |']


def test_a_marker_without_its_pair_is_an_error():
    with pytest.raises(ValueError, match='only one of'):
        replace_section('<!-- a: begin -->', 'a', 'body')


@pytest.mark.parametrize(
    'value, expected',
    [(None, '-'), (0.0, '0'), (0.003189, '0.00319'), (0.5578, '0.558'), (20.34, '20.3'), (13562.4, '13562'), (7, '7')],
)
def test_number(value, expected):
    assert number(value) == expected
