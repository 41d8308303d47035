from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError, ShapeError
from transfuse.models import DecoderLM
from transfuse.models.lm import visible


@pytest.fixture
def model() -> DecoderLM:
    """A model whose weights are large enough for every influence to show."""
    torch.manual_seed(0)
    model = DecoderLM(vocabulary=50, dim=32, context=16)
    nn.init.normal_(model.embed_tokens.weight)
    nn.init.normal_(model.embed_positions.weight)
    return model.double()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(50, (3, 10), generator=torch.Generator().manual_seed(1))


def test_gives_one_row_of_logits_per_token(model: DecoderLM, ids: Tensor) -> None:
    assert model(ids).shape == (3, 10, 50)


@pytest.mark.parametrize("t", [0, 4, 9])
def test_changing_a_token_changes_its_logits_and_later_ones_only(model: DecoderLM, ids: Tensor, t: int) -> None:
    changed = ids.clone()
    changed[:, t] = (ids[:, t] + 1) % 50
    difference = (model(ids) - model(changed)).abs().amax(dim=(0, 2))
    assert (difference[:t] == 0).all()
    assert (difference[t:] > 1e-6).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [1, 6])
def test_padding_changes_nothing(model: DecoderLM, ids: Tensor, side: str, padding: int) -> None:
    filler = torch.full((3, padding), 7)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(filler)
    if side == "left":
        padded, mask = torch.cat([filler, ids], 1), torch.cat([zeros, ones], 1)
        found = model(padded, mask)[:, padding:]
    else:
        padded, mask = torch.cat([ids, filler], 1), torch.cat([ones, zeros], 1)
        found = model(padded, mask)[:, :10]
    torch.testing.assert_close(found, model(ids))


def test_rows_may_be_padded_on_different_sides(model: DecoderLM) -> None:
    ids = torch.tensor([[9, 1, 2, 3], [1, 2, 3, 9]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    logits = model(ids, mask)
    torch.testing.assert_close(logits[0, 1:], logits[1, :3])


def test_padding_gets_no_gradient_and_gives_none_that_is_not_finite() -> None:
    ids = torch.tensor([[7, 7, 1, 2, 3], [7, 7, 7, 7, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    untied = DecoderLM(vocabulary=50, dim=32, context=16, tie=False)
    logits = untied(ids, mask)
    logits[mask.bool()].square().sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in untied.parameters())
    assert (untied.embed_tokens.weight.grad[7] == 0).all()


def test_a_token_sees_itself_and_real_ones_before_it() -> None:
    seen = visible(torch.tensor([[False, True, True]]))
    assert seen.int().tolist() == [[[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]]


def test_the_order_of_tokens_matters(model: DecoderLM) -> None:
    a, b = model(torch.tensor([[1, 2, 3], [2, 1, 3]]))[:, -1]
    assert (a - b).abs().max() > 1e-3


def test_head_and_embedding_share_a_weight_only_if_tied() -> None:
    tied, untied = DecoderLM(), DecoderLM(tie=False)
    assert tied.head.weight is tied.embed_tokens.weight
    assert untied.head.weight is not untied.embed_tokens.weight
    extra = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert extra == 256 * 64


def test_starts_near_the_uniform_distribution() -> None:
    torch.manual_seed(0)
    ids = torch.randint(256, (4, 32))
    loss = nn.functional.cross_entropy(DecoderLM()(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - torch.log(torch.tensor(256.0)).item()) < 0.2


def test_refuses_more_tokens_than_its_context(model: DecoderLM) -> None:
    assert model(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 50)
    with pytest.raises(InputError, match="reads 16 tokens, found 17"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_refuses_a_mask_of_another_shape(model: DecoderLM, ids: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"attention_mask has shape \(3, 9\), input_ids has \(3, 10\)"):
        model(ids, torch.ones(3, 9))
