"""The causal convolutions against float64 loops over positions and taps."""

import oracles
import pytest
import torch
from vmamba.kernels import bidirectional_conv1d, causal_conv1d

NAMES = ('x', 'weight', 'bias')
ACTIVATIONS = {False: lambda u: u, None: lambda u: u, True: oracles.silu, 'silu': oracles.silu, 'swish': oracles.silu}


def arguments(batch=2, seqlen=9, dim=5, width=4, dtype=torch.float64):
    """Of bidirectional_conv1d."""
    shapes = (batch, seqlen, dim), (2, dim, width), (2, dim)
    return dict(zip(NAMES, (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)))


def causal_arguments(batch=2, seqlen=9, dim=5, width=4, dtype=torch.float64, bias=True, initial=False):
    """Of causal_conv1d; what is absent is None."""
    shapes = {'x': (batch, dim, seqlen), 'weight': (dim, width)}
    shapes.update({'bias': (dim,)} if bias else {}, **({'initial_states': (batch, dim, width - 1)} if initial else {}))
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def loop(x, weight, bias, silu=False):
    batch, seqlen, dim = x.shape
    width = weight.shape[-1]
    rows = []
    for position in range(seqlen):
        directions = []
        for direction, sign in enumerate((1, -1)):
            total = bias[direction].expand(batch, dim)
            for tap in range(width):
                source = position + sign * (tap - width + 1)
                if 0 <= source < seqlen:
                    total = total + weight[direction, :, tap] * x[:, source]
            directions.append(ACTIVATIONS[silu](total))
        rows.append(torch.stack(directions, dim=1))
    return torch.stack(rows, dim=1)


def causal_loop(x, weight, bias=None, initial_states=None, activation=None, seq_idx=None):
    """out and the final states, of one entry of the batch after the other."""
    batch, dim, seqlen = x.shape
    width = weight.shape[-1]
    entries, finals = [], []
    for entry in range(batch):
        past = x.new_zeros(dim, width - 1) if initial_states is None else initial_states[entry]
        past = list(past.unbind(-1)) + list(x[entry].unbind(-1))
        columns = []
        for position in range(seqlen):
            total = x.new_zeros(dim) if bias is None else bias
            for tap in range(width):
                source = position - (width - 1) + tap
                if seq_idx is None or (source >= 0 and seq_idx[entry, source] == seq_idx[entry, position]):
                    total = total + weight[:, tap] * past[position + tap]
            padding = seq_idx is not None and seq_idx[entry, position] < 0
            columns.append(torch.zeros_like(total) if padding else ACTIVATIONS[activation](total))
        entries.append(torch.stack(columns, dim=-1))
        finals.append(torch.stack(past[len(past) - width + 1 :], dim=-1) if width > 1 else x[entry, :, :0])
    return torch.stack(entries), torch.stack(finals)


def run(function, tensors, **options):
    """Results and the gradients of all tensors, which keep their memory layouts."""
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
    results = function(**leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    torch.manual_seed(1)
    weights = [torch.randn(u.shape, dtype=torch.float64).to(torch.bfloat16).to(u) for u in results]
    grads = torch.autograd.grad(results, list(leaves.values()), weights, materialize_grads=True)
    return {**{f'u{i}': u for i, u in enumerate(results)}, **{f'grad_{k}': g for k, g in zip(leaves, grads)}}


def check(tensors, dtype, silu=False):
    expected = run(loop, {k: t.double() for k, t in tensors.items()}, silu=silu)
    oracles.assert_all_match(run(bidirectional_conv1d, tensors, silu=silu), expected, dtype)


def without_states(function):
    """The first result of a function."""
    return lambda **arguments: function(**arguments)[0]


def check_causal(tensors, dtype, states=False, **options):
    expected = run(
        causal_loop if states else without_states(causal_loop), {k: t.double() for k, t in tensors.items()}, **options
    )
    options.update({'return_final_states': True} if states else {})
    oracles.assert_all_match(run(causal_conv1d, tensors, **options), expected, dtype)


@pytest.mark.parametrize('silu', [False, True], ids=['linear', 'silu'])
@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
@pytest.mark.parametrize('seqlen,width,batch', [(9, 4, 2), (1, 4, 1), (3, 7, 2), (6, 1, 3)])
def test_both_directions(seqlen, width, batch, dtype, silu):
    check(arguments(batch, seqlen, width=width, dtype=dtype), dtype, silu)


@pytest.mark.parametrize('activation', [None, 'silu', 'swish'])
@pytest.mark.parametrize('bias', [False, True], ids=['', 'bias'])
@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
@pytest.mark.parametrize('seqlen,width', [(9, 4), (1, 3), (5, 1), (3, 6)])
def test_one_direction(seqlen, width, dtype, bias, activation):
    check_causal(causal_arguments(seqlen=seqlen, width=width, dtype=dtype, bias=bias), dtype, activation=activation)


@pytest.mark.parametrize('initial', [False, True], ids=['', 'initial'])
@pytest.mark.parametrize('seqlen,width', [(9, 4), (2, 4), (3, 4), (1, 2), (4, 1)])
def test_initial_and_final_states(seqlen, width, initial):
    """Of sequences shorter than the states too, which then hold what there was before."""
    tensors = causal_arguments(seqlen=seqlen, width=width, initial=initial)
    check_causal(tensors, torch.float64, states=True, activation='silu')


def test_final_states_are_written_where_they_shall_be():
    tensors = causal_arguments()
    given = torch.full((3, 2, 5), float('nan'), dtype=torch.float64).permute(1, 2, 0)
    out, states = causal_conv1d(**tensors, return_final_states=True, final_states_out=given)
    assert states is given and torch.equal(states, tensors['x'][..., -3:])
    given = given.fill_(7)
    assert torch.equal(causal_conv1d(**tensors, final_states_out=given), out)
    assert given.eq(7).all()


def test_final_states_are_their_own_memory():
    tensors = causal_arguments()
    _, states = causal_conv1d(**tensors, return_final_states=True)
    before = tensors['x'].clone()
    states.zero_()
    assert torch.equal(tensors['x'], before)


def test_a_sequence_in_two_pieces_is_the_sequence():
    tensors = causal_arguments(seqlen=11)
    whole = causal_conv1d(**tensors, activation='silu')
    x = tensors.pop('x')
    first, states = causal_conv1d(x[..., :2], **tensors, activation='silu', return_final_states=True)
    second = causal_conv1d(x[..., 2:], **tensors, activation='silu', initial_states=states)
    oracles.assert_matches(torch.cat([first, second], dim=-1), whole, torch.float64)


SEQUENCES = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2, 2], [3, 3, 5, 5, 5, 3, -1, -1, -1]], dtype=torch.int32)


@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize('bias', [False, True], ids=['', 'bias'])
@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
def test_sequences_within_a_row(dtype, bias, activation):
    tensors = causal_arguments(dtype=dtype, bias=bias)
    check_causal(tensors, dtype, activation=activation, seq_idx=SEQUENCES)


def test_a_row_shorter_than_the_taps_with_sequences():
    check_causal(causal_arguments(seqlen=2), torch.float64, seq_idx=SEQUENCES[:, 4:6])


@pytest.mark.parametrize('silu', [False, True])
def test_no_batch(silu):
    tensors = arguments(batch=0)
    actual = run(bidirectional_conv1d, tensors, silu=silu)
    assert actual['u0'].shape == (0, 9, 2, 5) and not actual['grad_weight'].any() and not actual['grad_bias'].any()
    causal = causal_arguments(batch=0)
    actual = run(causal_conv1d, causal, activation='silu' if silu else None)
    assert actual['u0'].shape == (0, 5, 9) and not actual['grad_weight'].any() and not actual['grad_bias'].any()


def test_memory_layout_does_not_matter():
    tensors = arguments()
    expected = run(loop, tensors)
    wide = torch.randn(2, 9, 10, dtype=torch.float64)
    wide[..., 3:8] = tensors['x']
    views = dict(x=wide[..., 3:8], weight=tensors['weight'].mT.contiguous().mT, bias=tensors['bias'])
    actual = run(bidirectional_conv1d, views)
    assert actual['u0'].is_contiguous()
    oracles.assert_all_match(actual, expected, torch.float64)


@pytest.mark.parametrize('options', [{}, {'seq_idx': SEQUENCES}], ids=['', 'seq_idx'])
@pytest.mark.parametrize('channels_last', [False, True], ids=['channels-first', 'channels-last'])
def test_the_output_lies_as_the_input_does(channels_last, options):
    tensors = causal_arguments()
    if channels_last:
        tensors['x'] = tensors['x'].mT.contiguous().mT
    assert causal_conv1d(**tensors, **options).stride() == tensors['x'].stride()


@pytest.mark.parametrize('silu', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('directions,bias', [(2, True), (1, True), (1, False)])
def test_registration_of_the_operators(directions, bias, dtype, silu):
    x, weight, bias_ = (t.requires_grad_() for t in arguments(dtype=dtype).values())
    inputs = x, weight[:directions].detach().requires_grad_(), bias_[:directions].detach() if bias else None, silu
    torch.library.opcheck(torch.ops.vmamba.causal_conv1d, inputs, **oracles.OPCHECK_TOLERANCE)
    inputs = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
    grad = torch.randn(2, 9, directions, 5, dtype=dtype)
    torch.library.opcheck(torch.ops.vmamba.causal_conv1d_backward, (grad, *inputs))


def test_gradients_by_differences():
    tensors = [t.requires_grad_() for t in causal_arguments(batch=1, seqlen=4, dim=2, width=3, initial=True).values()]

    def function(x, weight, bias, initial_states):
        return causal_conv1d(x, weight, bias, None, initial_states, True, activation='silu')

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize(
    'name,shape',
    [
        ('x', (9, 5)),
        ('weight', (2, 5)),
        ('weight', (1, 5, 4)),
        ('weight', (2, 6, 4)),
        ('weight', (2, 5, 0)),
        ('bias', (5,)),
    ],
)
def test_a_bad_shape_is_an_error_that_shows_it(name, shape):
    with pytest.raises(ValueError, match=f'^{name} must be .*{str(shape)[1:-1]}'):
        bidirectional_conv1d(**{**arguments(), name: torch.randn(shape, dtype=torch.float64)})


@pytest.mark.parametrize(
    'name,shape',
    [
        ('x', (5, 9)),
        ('weight', (5, 1, 4)),
        ('weight', (6, 4)),
        ('weight', (5, 0)),
        ('bias', (4,)),
        ('initial_states', (2, 5, 4)),
        ('final_states_out', (2, 3, 5)),
    ],
)
def test_a_bad_shape_of_one_direction_is_an_error_that_shows_it(name, shape):
    with pytest.raises(ValueError, match=f'^{name} must be .*{str(shape)[1:-1]}'):
        causal_conv1d(**{**causal_arguments(), name: torch.randn(shape, dtype=torch.float64)})


@pytest.mark.parametrize(
    'options,shown',
    [
        (dict(activation='gelu'), "'gelu'"),
        (dict(seq_idx=SEQUENCES.long()[:, 1:]), '2, 8'),
        (dict(seq_idx=SEQUENCES.double()), 'float64'),
        (dict(seq_idx=SEQUENCES, return_final_states=True), 'return_final_states'),
        (dict(seq_idx=SEQUENCES, initial_states=torch.zeros(2, 5, 3, dtype=torch.float64)), 'initial_states'),
        (dict(initial_states=torch.zeros(2, 5, 3)), 'float32'),
    ],
)
def test_options_that_do_not_fit_are_an_error_that_shows_them(options, shown):
    with pytest.raises(ValueError, match=shown):
        causal_conv1d(**causal_arguments(), **options)


@pytest.mark.parametrize('function', [bidirectional_conv1d, causal_conv1d], ids=lambda f: f.__name__)
def test_integers_are_an_error(function):
    with pytest.raises(ValueError, match='int64'):
        function(**{**arguments(), 'x': torch.ones(2, 9, 5, dtype=torch.int64)})
