import pytest
import torch

from transfuse.core.errors import InputError
from transfuse.weights.gptq import Grid, Quantised, gptq, pack_bits, unpack_bits


def draw(seed: int, rows: int = 8, columns: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs of its layer, `(samples, columns)`."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=g)
    return torch.randn(rows, columns, generator=g), torch.randn(200, columns, generator=g) @ mixing


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_packed_into_as_few_bytes_as_they_need(bits):
    codes = torch.randint(2**bits, (37,), generator=torch.Generator().manual_seed(0))
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-37 * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, 37), codes)


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_entry_is_rounded_to_within_half_a_step_of_its_group(symmetric):
    weight, _ = draw(0)
    grid = Grid.of(weight, 4, group=10, symmetric=symmetric)
    assert grid.scale.shape == (8, 3)
    error = (Quantised.of(weight, grid).dense() - weight).abs()
    assert (error <= 0.51 * grid.scale.float()[:, torch.arange(24) // 10] + 1e-3).all()


def test_what_is_stored_is_read_back():
    weight, inputs = draw(1)
    for bits in (3, 16, 32):
        whole = gptq(weight, inputs.mT @ inputs, bits, group=8)
        again = Quantised.read(whole.tensors("a/"), "a/")
        assert torch.equal(again.dense(), whole.dense())
    assert torch.equal(whole.dense(), weight)


@pytest.mark.parametrize("act_order", [False, True])
def test_with_inputs_that_are_not_correlated_it_is_rounding_to_nearest(act_order):
    weight, _ = draw(2)
    found = gptq(weight, torch.eye(24), 3, act_order=act_order)
    assert torch.equal(found.dense(), Quantised.of(weight, Grid.of(weight, 3)).dense())


def test_with_correlated_inputs_its_error_is_not_above_that_of_rounding():
    for seed in range(20):
        weight, inputs = draw(seed)
        errors = [
            ((weight - q.dense()) @ inputs.mT).norm()
            for q in (gptq(weight, inputs.mT @ inputs, 3), Quantised.of(weight, Grid.of(weight, 3)))
        ]
        assert errors[0] <= errors[1], seed


def test_more_bits_have_smaller_errors():
    total = {}
    for bits in (2, 3, 4, 8):
        draws = [draw(seed) for seed in range(5)]
        total[bits] = sum(((w - gptq(w, x.mT @ x, bits).dense()) @ x.mT).norm().item() for w, x in draws)
    assert total[2] > total[3] > total[4] > total[8]


def test_a_layer_input_that_never_varies_does_no_harm():
    weight, inputs = draw(3)
    inputs[:, 5] = 0
    assert gptq(weight, inputs.mT @ inputs, 4).dense().isfinite().all()


def test_unknown_bits_are_refused():
    with pytest.raises(InputError, match="bits is 5, known are 2, 3, 4, 8, 16, 32"):
        gptq(torch.ones(2, 2), torch.eye(2), 5)
