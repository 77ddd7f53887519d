"""The routes over a map, written out, and their adjoint."""

import oracles
import pytest
import torch
from vmamba.kernels import cross_merge, cross_scan, reference

# Pixels of a map numbered row by row, in the order that each route visits them.
ROUTES = {
    (2, 3): [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]],
    (3, 2): [[0, 1, 2, 3, 4, 5], [0, 2, 4, 1, 3, 5], [5, 4, 3, 2, 1, 0], [5, 3, 1, 4, 2, 0]],
    (1, 4): [[0, 1, 2, 3], [0, 1, 2, 3], [3, 2, 1, 0], [3, 2, 1, 0]],
    (3, 1): [[0, 1, 2], [0, 1, 2], [2, 1, 0], [2, 1, 0]],
    (1, 1): [[0], [0], [0], [0]],
}
USED = {1: [0], 2: [0, 2], 4: [0, 1, 2, 3]}
SIZES = [(1, 1), (1, 7), (5, 1), (2, 3), (7, 5), (13, 6)]


@pytest.mark.parametrize('num_routes', USED)
@pytest.mark.parametrize('size', ROUTES, ids='{0[0]}x{0[1]}'.format)
def test_routes_visit_the_pixels_in_the_order_written_out(size, num_routes):
    x = torch.arange(size[0] * size[1], dtype=torch.float32).view(1, 1, *size)
    x = torch.cat([x, x + 100], dim=1)
    visited = cross_scan(x, num_routes)
    expected = torch.tensor([ROUTES[size][k] for k in USED[num_routes]], dtype=torch.float32)
    assert torch.equal(visited[0, :, 0], expected)
    assert torch.equal(visited[0, :, 1], expected + 100)


@pytest.mark.parametrize('num_routes', USED)
@pytest.mark.parametrize('size', ROUTES, ids='{0[0]}x{0[1]}'.format)
def test_merging_sums_the_routes_where_they_passed(size, num_routes):
    pixels = size[0] * size[1]
    y = torch.randn(2, num_routes, 3, pixels, dtype=torch.float64)
    expected = torch.zeros(2, 3, pixels, dtype=torch.float64)
    for i, k in enumerate(USED[num_routes]):
        for step, pixel in enumerate(ROUTES[size][k]):
            expected[:, :, pixel] += y[:, i, :, step]
    oracles.assert_matches(cross_merge(y, *size), expected.view(2, 3, *size), torch.float64)


@pytest.mark.parametrize('size', SIZES, ids='{0[0]}x{0[1]}'.format)
def test_the_reference_takes_the_same_routes(size):
    x, y = torch.randn(2, 3, *size), torch.randn(2, 4, 3, size[0] * size[1])
    assert torch.equal(reference.cross_scan(x), cross_scan(x))
    torch.testing.assert_close(reference.cross_merge(y, *size), cross_merge(y, *size))
    expected = [[h * size[1] + w for h, w in pixels] for pixels in oracles.route_pixels(*size)]
    assert reference.route_positions(*size).tolist() == expected


@pytest.mark.parametrize('num_routes', USED)
@pytest.mark.parametrize('size', SIZES, ids='{0[0]}x{0[1]}'.format)
def test_each_is_the_adjoint_of_the_other(size, num_routes):
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, num_routes, 3, size[0] * size[1], dtype=torch.float64, requires_grad=True)
    scanned, merged = cross_scan(x, num_routes), cross_merge(y, *size)
    torch.testing.assert_close((scanned * y).sum(), (x * merged).sum())
    (grad_x,) = torch.autograd.grad(scanned, x, y.detach())
    (grad_y,) = torch.autograd.grad(merged, y, x.detach())
    oracles.assert_matches(grad_x, merged, torch.float64)
    oracles.assert_matches(grad_y, scanned, torch.float64)


@pytest.mark.parametrize('num_routes', USED)
def test_memory_layout_and_empty_batches_do_not_matter(num_routes):
    x = torch.randn(2, 3, 5, 4)
    y = torch.randn(2, num_routes, 3, 20)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(cross_scan(last, num_routes), cross_scan(x, num_routes))
    moved = y.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert torch.equal(cross_merge(moved, 5, 4), cross_merge(y, 5, 4))
    assert cross_scan(x[:0], num_routes).shape == (0, num_routes, 3, 20)
    assert cross_merge(y[:0], 5, 4).shape == (0, 3, 5, 4)


@pytest.mark.parametrize(
    'call,value',
    [
        pytest.param(lambda: cross_scan(torch.zeros(3, 5, 4)), r'\(3, 5, 4\)', id='map-rank'),
        pytest.param(lambda: cross_scan(torch.zeros(1, 3, 5, 4), 3), '3', id='three-routes'),
        pytest.param(lambda: cross_scan(torch.zeros(1, 3, 5, 4), 0), '0', id='no-routes'),
        pytest.param(lambda: cross_merge(torch.zeros(1, 4, 3, 21), 5, 4), r'5x4 map, got \(1, 4, 3, 21\)', id='length'),
        pytest.param(lambda: cross_merge(torch.zeros(4, 3, 20), 5, 4), r'\(4, 3, 20\)', id='rank'),
        pytest.param(lambda: cross_merge(torch.zeros(1, 3, 3, 20), 5, 4), 'got 3', id='merge-three-routes'),
    ],
)
def test_bad_arguments_are_errors_that_show_them(call, value):
    with pytest.raises(ValueError, match=value):
        call()
