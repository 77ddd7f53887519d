"""The fixtures do what the other tests rely on."""

import pytest
import torch


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    'allocate',
    [
        pytest.param(lambda t: torch.empty(5, 7, dtype=t.dtype), id='empty'),
        pytest.param(torch.empty_like, id='empty_like'),
        pytest.param(lambda t: torch.empty_like(t.t(), memory_format=torch.contiguous_format), id='empty_like-format'),
        pytest.param(lambda t: t.new_empty(5, 7), id='new_empty'),
        pytest.param(lambda t: torch.empty_strided((5, 7), (1, 5), dtype=t.dtype), id='empty_strided'),
    ],
)
def test_uninitialised_memory_is_poisoned(allocate, dtype):
    assert allocate(torch.zeros(5, 7, dtype=dtype)).isnan().all()


def test_an_operator_that_leaves_its_output_unwritten_shows():
    @torch.library.custom_op('vmamba_tests::forgetful', mutates_args=())
    def forgetful(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        out[:-1] = x[:-1]
        return out

    assert forgetful(torch.zeros(3)).isnan().tolist() == [False, False, True]


def test_random_numbers_and_threads_are_fixed():
    assert torch.get_num_threads() == 1
    assert torch.initial_seed() == 0
