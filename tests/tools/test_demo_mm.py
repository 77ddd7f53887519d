import json
from pathlib import Path

import pytest

from vmamba.tools import demo_mm


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """Stands in for the tools: notes how they are called, and lets a test give these metrics."""
    calls, metrics = [], {'coco/bbox_mAP': 0.5, 'coco/segm_mAP': 0.35, 'mIoU': 60.0}

    def run(tool, *arguments):
        calls.append((tool, *arguments))
        options = dict(zip(arguments, arguments[1:]))
        if tool == 'mm_train.py':
            options['--output'].mkdir(parents=True)
            (options['--output'] / 'last_checkpoint').write_text('last.pth')
        if tool == 'mm_test.py':
            options['--output'].write_text(json.dumps(metrics))

    monkeypatch.setattr(demo_mm, 'run', run)
    monkeypatch.chdir(tmp_path)
    return calls, metrics


def test_demo_makes_trains_and_tests(tools, capsys):
    calls, _ = tools
    demo_mm.main(['--output', 'out', '--cfg-options', 'a.b=1'])
    names = ['make_scenes.py', *2 * ['mm_train.py', 'mm_test.py']]
    assert [tool for tool, *_ in calls] == names
    assert all(Path(config).is_file() for tool, config, *_ in calls if tool.startswith('mm_'))
    assert all('--cfg-options' in call and call[-1] == 'a.b=1' for call in calls[1:])
    assert [call[2] for call in calls if call[0] == 'mm_test.py'] == ['last.pth', 'last.pth']
    assert '0.350' in capsys.readouterr().out


@pytest.mark.parametrize('value', [0.29, float('nan')])
def test_demo_fails_below_what_is_required(tools, value):
    _, metrics = tools
    metrics['coco/segm_mAP'] = value
    with pytest.raises(SystemExit, match='below what is required: coco/segm_mAP'):
        demo_mm.main([])


def test_a_tool_that_fails_ends_the_demo(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        demo_mm.run('make_scenes.py', '--output', tmp_path / 'new', '--size', '1')
    assert error.value.code == 2
