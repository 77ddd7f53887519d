import csv

import numpy as np
import pytest
import timm
import torch
from folders import full_disk, truncate, write_photographs

import vmamba  # noqa: F401
from vmamba.kernels import bidirectional_scan, ss2d_scan
from vmamba.layers import SS2D, BiMamba
from vmamba.tools import visualize
from vmamba.tools.features.receptive_field import sides_holding
from vmamba.tools.features.scan_rows import inputs_of, mixers_of, routes_of, scan_rows, token_of_patch


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp('photographs') / 'images')


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Weights of a vmamba_nano other than the untrained one."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp('checkpoint') / 'nano.pth'
    torch.save(timm.create_model('vmamba_nano').state_dict(), path)
    return path


def run(*arguments):
    visualize.main([*map(str, arguments), '--workers', '0', '--device', 'cpu'])


def is_png(path):
    return path.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('dstate, gate', [(1, False), (3, True)])
@torch.no_grad()
def test_rows_times_x_are_the_scan_of_ss2d(dstate, gate):
    mixer = SS2D(8, d_state=dstate, gate=gate)
    torch.nn.init.normal_(mixer.D)
    seen = {}
    hidden = torch.randn(1, 5, 7, 8)

    def scan(x, *args):
        x_dbl = torch.nn.functional.linear(x, mixer.x_proj.weight).unflatten(-1, (4, -1))
        seen['y'] = ss2d_scan(x, x_dbl, mixer.dt_proj_weight, mixer.dt_proj_bias, -mixer.A_log.exp(), mixer.D)
        return seen['y']

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('vmamba.layers.ss2d.ss2d_core', scan)  # what the layer itself gives to its scan
        mixer(hidden)
    routes = routes_of(mixer, hidden)
    for position in (0, 3, 17, 34):
        rows = scan_rows(routes, position)  # [4, D, L]
        y = torch.einsum('kdl,kld->d', rows, routes.x) + (routes.D * routes.x[:, position]).sum(dim=0)
        torch.testing.assert_close(y.float(), seen['y'].flatten(1, 2)[0, position], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_times_x_are_the_scans_of_vim():
    mixer = BiMamba(8, d_state=4)
    torch.nn.init.normal_(mixer.D)
    hidden = torch.randn(1, 11, 8)
    routes = routes_of(mixer, hidden)
    u = routes.x.transpose(0, 1)[None]
    x_dbl = torch.einsum('blkd,kpd->blkp', u, mixer.x_proj_weight.double())
    parameters = (p.double() for p in (mixer.dt_proj_weight, mixer.dt_proj_bias, -mixer.A_log.exp(), mixer.D))
    expected = bidirectional_scan(u, x_dbl, *parameters)[0]
    y = torch.stack(
        [
            torch.einsum('kdl,kld->d', scan_rows(routes, i), routes.x) + (routes.D * routes.x[:, i]).sum(dim=0)
            for i in range(11)
        ]
    )
    torch.testing.assert_close(y, expected)
    gated = y[None] / 2 * torch.nn.functional.silu(mixer.in_proj(hidden).chunk(2, dim=-1)[1])
    torch.testing.assert_close(mixer.out_proj(gated.float()), mixer(hidden), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_routes_see_only_what_they_have_visited():
    rows = scan_rows(routes_of(SS2D(4), torch.randn(1, 4, 6, 4)), 2 * 6 + 3)  # row 2, column 3
    seen = rows.abs().sum(dim=1).unflatten(-1, (4, 6)) > 0
    pixels = torch.arange(24).view(4, 6)
    columns = torch.arange(24).view(6, 4).T
    expected = pixels <= 15, columns <= columns[2, 3], pixels >= 15, columns >= columns[2, 3]
    for found, mask in zip(seen, expected):
        assert torch.equal(found, mask)


@torch.no_grad()
def test_mixers_are_found_with_what_they_take():
    model = timm.create_model('vim_nano', num_classes=0).eval()
    mixers = mixers_of(model)
    assert list(mixers) == [f'blocks.{i}' for i in range(4)]
    images = torch.randn(1, 3, 32, 32)
    inputs = inputs_of(model, images, ['blocks.0'])
    tokens = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: tokens.extend(args))
    model(images)
    torch.testing.assert_close(inputs['blocks.0'], model.blocks[0].norm(*tokens))
    assert not any(mixer._forward_pre_hooks for mixer in mixers.values())


def test_tokens_of_patches_step_over_the_class_token():
    assert [token_of_patch(patch, 5) for patch in range(5)] == [0, 1, 3, 4, 5]


def test_receptive_fields_before_and_after_loading(photographs, checkpoint, tmp_path):
    run('erf', photographs, '--model', f'vmamba_nano={checkpoint}', '--img-size', 64, '--output', tmp_path)
    assert is_png(tmp_path / 'erf.png')
    rows = list(csv.DictReader((tmp_path / 'erf.csv').open()))
    assert len(rows) == 2 * 4 * 3 and {row['images'] for row in rows} == {'2'}
    assert {row['weights'] for row in rows} == {'untrained, seed 0', str(checkpoint)}
    fields = np.load(tmp_path / 'erf.npz')
    before, after = fields['untrained, seed 0: stages.1'], fields[f'{checkpoint}: stages.1']
    assert before.shape == (64, 64) and (before >= 0).all() and before.sum() > 0
    assert not np.allclose(before, after)


def test_receptive_fields_of_vim(photographs, tmp_path):
    run('erf', photographs, '--model', 'vim_nano=untrained', '--features', 'blocks.0', '--output', tmp_path)
    field = np.load(tmp_path / 'erf.npz')['untrained, seed 0: blocks.0']
    row, column = np.unravel_index(field.argmax(), field.shape)
    assert 12 <= row < 20 and 12 <= column < 20  # the patch of the centre: 7 patches a side, at a stride of 4
    rows = list(csv.DictReader((tmp_path / 'erf.csv').open()))
    assert [row['share'] for row in rows] == ['0.2', '0.5', '0.9']


def test_squares_that_hold_a_share():
    values = np.zeros((8, 8))
    values[3:5, 3:5] = 1
    values[0, 0] = 1
    assert sides_holding(values, 4, (0.5, 0.8, 0.9)) == {0.5: 2, 0.8: 2, 0.9: 8}
    assert sides_holding(np.eye(8), 2, (0.25, 1.0)) == {0.25: 2, 1.0: 12}  # reaching over the edge


def test_attention_of_vmamba(photographs, tmp_path):
    common = 'attention', photographs / 'astronaut.png', '--model', 'vmamba_nano=untrained', '--img-size', 64
    run(*common, '--pixel', 40, 20, '--output', tmp_path)
    assert is_png(tmp_path / 'attention.png')
    maps = np.load(tmp_path / 'attention.npz')
    assert {name: maps[name].shape for name in maps} == {
        'stages.0.blocks.0': (5, 16, 16),
        'stages.1.blocks.0': (5, 8, 8),
        'stages.2.blocks.1': (5, 4, 4),
        'stages.3.blocks.0': (5, 2, 2),
    }
    drawn = maps['stages.0.blocks.0']
    assert (drawn[0, 6:] == 0).all() and (drawn[2, :5] == 0).all() and (drawn[0, 5, 11:] == 0).all()
    assert (drawn[1, :, 11:] == 0).all() and (drawn[3, :, :10] == 0).all()
    run(*common, '--layers', 'stages.2.blocks.0', '--channel', 5, '--output', tmp_path)
    assert list(np.load(tmp_path / 'attention.npz')) == ['stages.2.blocks.0']


@pytest.mark.parametrize('options', [('--pixel', '31', '31'), ('--class-token',)])
def test_attention_of_vim(photographs, tmp_path, options):
    image = photographs / 'astronaut.png'
    run('attention', image, '--model', 'vim_nano=untrained', *options, '--output', tmp_path)
    maps = np.load(tmp_path / 'attention.npz')
    assert {name: maps[name].shape for name in maps} == {f'blocks.{i}': (3, 7, 7) for i in range(4)}
    forward, backward, _ = maps['blocks.0'].reshape(3, -1)
    position = 24 if options == ('--class-token',) else 49
    assert (forward[:position] > 0).all() and (forward[position:] == 0).all()
    assert (backward[min(position, 48) :] > 0).all() and (backward[: min(position, 48)] == 0).all()


@pytest.mark.parametrize('model, layer, shape', [('vmamba', 'stages.1.blocks.0', (6, 4)), ('vim', 'blocks.1', (10, 7))])
def test_attention_over_a_whole_image(photographs, tmp_path, model, layer, shape):
    image = photographs / 'deep' / 'coffee.png'  # 100 rows of 70 pixels, reduced to 46 (Vim 44) of 32
    common = 'attention', image, '--model', f'{model}_nano=untrained', '--layers', layer, '--output', tmp_path
    run(*common, '--whole', '--pixel', 2, 43)
    maps = np.load(tmp_path / 'attention.npz')[layer]
    assert maps.shape[1:] == shape and maps.shape[0] == (5 if model == 'vmamba' else 3)
    forward = maps[0].reshape(-1)
    position = np.flatnonzero(forward)[-1]  # the pixel itself, the last that the first route has seen
    assert position == (shape[0] - 1) * shape[1]


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['attention', 'folder', '--model', 'vmamba_nano=untrained'], 'images holds 2: name one, such as'),
        (['attention', '.', '--model', 'vmamba_nano=untrained', '--whole', '--pixel', '5', '50'], 'of the 46 x 32 i'),
        (['erf', 'absent', '--model', 'vmamba_nano=untrained'], 'there is no image, folder or list of images absent'),
        (['erf', '.', '--model', 'vmamba_nano=untrained', '--features', 'stages.7'], "no feature 'stages.7'; did you"),
        (['erf', '.', '--model', 'vmamba_nano'], 'vmamba_nano has no published weights'),
        (['attention', '.', '--model', 'vmamba_nano=untrained', '--layers', 'stages.2.blocks.9'], 'has no layer'),
        (['attention', '.', '--model', 'vmamba_nano=untrained', '--pixel', '5', '32'], '--pixel 5 32 is outside'),
        (['attention', '.', '--model', 'vmamba_nano=untrained', '--channel', '64'], 'the channels 0 to 63'),
        (['attention', '.', '--model', 'vmamba_nano=untrained', '--class-token'], '--class-token is for Vim'),
        (['attention', '.', '--model', 'resnet10t=untrained'], 'ResNet has no selective scans'),
    ],
)
def test_failures_are_one_line(photographs, tmp_path, capsys, arguments, message):
    named = {'.': photographs / 'astronaut.png', 'folder': photographs}
    arguments = [str(named.get(text, text)) for text in arguments]
    with pytest.raises(SystemExit) as error:
        run(*arguments, '--output', tmp_path)
    printed = capsys.readouterr().err
    assert error.value.code == 2 and message in printed and printed.count('\n') == 1


def test_an_unknown_option_gets_the_nearest_of_its_command(capsys):
    with pytest.raises(SystemExit):
        run('attention', '.', '--model', 'vmamba_nano', '--layer', 'stages.0.blocks.0')
    assert "unknown option '--layer'; did you mean --layers" in capsys.readouterr().err


@pytest.mark.parametrize('command, options', [('erf', ('--count', 1)), ('attention', ())])
@pytest.mark.parametrize('ending', ['png', 'npz'])
def test_a_full_disk_is_one_line_with_the_file(photographs, tmp_path, capsys, monkeypatch, command, options, ending):
    if ending == 'npz':
        monkeypatch.setattr(visualize, f'plot_{"attention" if command == "attention" else "receptive_fields"}', print)
    image = photographs / 'astronaut.png'
    with full_disk(2000), pytest.raises(SystemExit) as error:
        run(command, image, '--model', 'vmamba_nano=untrained', *options, '--output', tmp_path)
    assert error.value.code == 2
    assert f'cannot write {tmp_path / command}.{ending}: File too large' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unreadable_images_are_named(tmp_path, capsys):
    images = write_photographs(tmp_path / 'images')
    broken = truncate(images / 'astronaut.png')
    common = 'erf', images, '--model', 'vmamba_nano=untrained', '--features', 'stages.0', '--output', tmp_path
    with pytest.raises(SystemExit):
        run(*common)
    assert str(broken) in capsys.readouterr().err
    run(*common, '--skip-bad-images')
    assert 'skipped 1 unreadable image(s)' in capsys.readouterr().out
