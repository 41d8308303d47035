"""Neural Nuggets: what the sheet says must hold exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import digest, language_model, ragged_tokens, trainer
from torch import Tensor, nn

from transfuse import transfer
from transfuse.core.adapters import factors
from transfuse.core.batch import Batch, align_tokens
from transfuse.core.errors import DivergenceError, InputError, ShapeError, TransferError, VocabularyError
from transfuse.core.outputs import find_logits
from transfuse.core.sensitivity import add_sensitivity, leaves
from transfuse.core.trainer import Trainer
from transfuse.losses.windows import best_rows_columns, best_window, low_rank
from transfuse.models import DecoderLM
from transfuse.weights import NeuralNuggets

TEXT = align_tokens(Batch(inputs=ragged_tokens()))


def nuggets(
    method: NeuralNuggets | None = None, source: nn.Module | None = None, target: nn.Module | None = None, **given: Any
) -> Trainer:
    source = language_model(1, dim=12, depth=3) if source is None else source
    target = language_model(depth=2) if target is None else target
    settings: dict[str, Any] = {"optimizer": "adam", "lr": 1e-2, "task": "language-model", **given}
    return trainer(method or NeuralNuggets(rank=2), target, source, ragged_tokens(), **settings)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return find_logits(model.eval()(**TEXT.inputs))


def begun(run: Trainer) -> nn.Module:
    """The adapted model when the first update begins."""
    run._start(False)
    run._enter_stage()
    return run.run["adapted"].eval()


# Sensitivity


def test_sensitivity_of_a_linear_model_is_its_closed_form_and_samples_do_not_cancel():
    w, total = torch.tensor([0.7]), {"w": torch.zeros(1)}
    expected = 0.0
    for x, y in ((2.0, 3.0), (2.0, -1.0)):  # gradients of opposite sign
        params = leaves({"w": w})
        add_sensitivity(total, ((params["w"] * x - y) ** 2).sum(), params)
        expected += abs(0.7 * 2 * (0.7 * x - y) * x)
        assert params["w"].grad is None
    assert total["w"].item() == pytest.approx(expected, rel=1e-6)
    assert expected > 0.7 * abs(2 * (1.4 - 3) * 2 + 2 * (1.4 + 1) * 2) + 1, "they would cancel in the sum"


def test_sensitivity_of_half_precision_weights_is_kept_in_full():
    w = torch.full((1,), 1e-3, dtype=torch.bfloat16)
    total, params = {"w": torch.zeros(1)}, leaves({"w": w})
    add_sensitivity(total, (params["w"] * 1e-30).sum(), params)
    assert total["w"].dtype == torch.float32
    assert 0 < total["w"].item() < 1e-32


# Windows and factors


def test_the_best_window_is_that_of_brute_force():
    for seed in range(20):
        scores = torch.rand(9, 7, generator=torch.Generator().manual_seed(seed))
        sums = {(i, j): float(scores[i : i + 4, j : j + 3].sum()) for i in range(6) for j in range(5)}
        rows, columns = best_window(scores, (4, 3))
        assert (int(rows[0]), int(columns[0])) == max(sums, key=lambda at: sums[at])
        assert rows.tolist() == list(range(int(rows[0]), int(rows[0]) + 4))
        assert len(columns) == 3


def test_of_equal_windows_the_first_is_taken():
    rows, columns = best_window(torch.full((9, 7), 0.1), (4, 3))
    assert (rows.tolist(), columns.tolist()) == ([0, 1, 2, 3], [0, 1, 2])


def test_rows_and_columns_may_be_chosen_apart():
    scores = torch.zeros(4, 4)
    scores[[0, 3]] += 1.0
    scores[:, [1, 3]] += 1.0
    rows, columns = best_rows_columns(scores, (2, 2))
    assert (rows.tolist(), columns.tolist()) == ([0, 3], [1, 3])


def test_the_factors_are_the_closest_of_their_rank():
    matrix = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(matrix)
    for rank in (1, 3, 5, 7):
        for balanced in (False, True):
            b, a = low_rank(matrix, rank, balanced)
            assert (b.shape, a.shape) == ((6, rank), (rank, 5))
            error = ((matrix - b @ a) ** 2).sum()
            assert error.item() == pytest.approx(float((values[rank:] ** 2).sum()), abs=1e-5)
    b, a = low_rank(matrix, 3)
    assert torch.allclose(a @ a.T, torch.eye(3), atol=1e-5), "all of S is in B"


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not fit"):
        best_window(torch.zeros(3, 3), (4, 2))


# Where it starts


@pytest.mark.parametrize("alpha", [None, 7.0])
@pytest.mark.parametrize("window", ["sensitive", "rows_cols", "random"])
def test_at_first_the_adapted_target_answers_as_the_target(window, alpha):
    target = language_model(depth=2)
    run = nuggets(NeuralNuggets(rank=3, alpha=alpha, window=window), target=copy.deepcopy(target))
    model = begun(run)
    assert (logits(model) - logits(target)).abs().max() < 1e-4
    layer: Any = model.get_submodule("blocks.0.attn.proj")
    moved = layer.base_layer.weight - target.blocks[0].attn.proj.weight
    b, a, scale = factors(layer)
    assert scale == (1.0 if alpha is None else 7 / 3)
    assert moved.abs().max() > 1e-2
    assert torch.allclose(moved, -scale * b @ a, atol=1e-6)


def test_of_the_target_itself_with_full_rank_all_weights_go_into_the_adapter():
    target = language_model(depth=2)
    model = begun(nuggets(NeuralNuggets(rank=32), source=copy.deepcopy(target), target=copy.deepcopy(target)))
    for path in ("blocks.1.attn.qkv", "blocks.0.mlp.fc2", "head"):
        layer: Any = model.get_submodule(path)
        b, a, _ = factors(layer)
        assert torch.allclose(b @ a, target.get_submodule(path).weight, atol=1e-5)
        assert layer.base_layer.weight.abs().max() < 1e-5
    tokens: Any = model.get_submodule("embed_tokens")
    b, a, _ = factors(tokens)
    assert torch.allclose((b @ a).T, target.embed_tokens.weight, atol=1e-5)


def test_a_layer_that_the_task_does_not_depend_on_is_never_kept():
    for deaf in range(3):
        source = language_model(1, dim=12, depth=3)
        with torch.no_grad():
            for p in source.blocks[deaf].parameters():
                p.mul_(0.0 if p.dim() > 1 else 1.0)
            source.blocks[deaf].mlp.fc2.weight.zero_()
            source.blocks[deaf].attn.proj.weight.zero_()
            source.blocks[deaf].mlp.fc2.bias.zero_()
            source.blocks[deaf].attn.proj.bias.zero_()
        run = nuggets(source=source)
        begun(run)
        kept = run.method.nuggets["layers"].tolist()
        assert kept == [i for i in range(3) if i != deaf]
        b = run.method.nuggets["B blocks/0/mlp/fc1"]
        assert b.abs().max() > 0


def test_the_window_is_cut_out_of_the_layer_that_was_kept():
    source = language_model(1, dim=12, depth=3)
    run = nuggets(NeuralNuggets(rank=8, window="rows_cols"), source=copy.deepcopy(source))
    begun(run)
    kept = run.method.nuggets["layers"].tolist()
    product = run.method.nuggets["B blocks/1/attn/proj"] @ run.method.nuggets["A blocks/1/attn/proj"]
    weight = source.blocks[kept[1]].attn.proj.weight
    assert product.shape == (8, 8)
    assert torch.isin(product.flatten().round(decimals=3), weight.flatten().round(decimals=3)).float().mean() > 0.9


def test_the_shuffled_teacher_has_the_same_singular_values_in_other_directions():
    true, control = nuggets(), nuggets(shuffled=True)
    begun(true), begun(control)
    assert torch.equal(true.method.nuggets["layers"], control.method.nuggets["layers"])
    products = [r.method.nuggets["B head"] @ r.method.nuggets["A head"] for r in (true, control)]
    values = [torch.linalg.svdvals(p)[:2] for p in products]
    assert torch.allclose(*values, atol=1e-4)
    assert (products[0] - products[1]).norm() > 0.5 * products[0].norm()


# Where it ends


def test_what_is_deployed_is_a_plain_model_that_answers_as_the_adapted_one():
    target = language_model(depth=2)
    run = nuggets(NeuralNuggets(rank=2, dropout=0.0), target=copy.deepcopy(target))
    model = run.fit()
    assert type(model) is DecoderLM
    assert (logits(model) - logits(run.run["adapted"])).abs().max() < 1e-5
    assert (logits(model) - logits(target)).abs().max() > 1e-2
    assert digest(run.run["target"]) == digest(target), "the caller's weights are not shifted"


def test_it_learns_and_other_streams_and_reports_work(tmp_path):
    data = {"data": ragged_tokens(), "seeds": ragged_tokens(5, 3)}
    result = transfer(
        NeuralNuggets(rank=2, dropout=0.0), language_model(1, dim=12, depth=3), language_model(depth=2), data,
        test=ragged_tokens(), compare=["shuffled teacher"], task="language-model", steps=20, batch_size=6, lr=2e-2,
        out=tmp_path / "run",
    )  # fmt: skip
    text = (tmp_path / "run" / "report.json").read_text()
    assert "What the windows hold" in text
    before = transfer(
        NeuralNuggets(rank=2), language_model(1, dim=12, depth=3), language_model(depth=2), data, test=ragged_tokens(),
        task="language-model", steps=1, batch_size=6, lr=1e-9,
    )  # fmt: skip
    first, last = (r.arms[0].evaluations[0].metrics["nll"] for r in (before, result))
    assert last < first - 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_llamas_of_two_sizes_with_grouped_heads(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama(dim: int, depth: int, inner: int) -> nn.Module:
        torch.manual_seed(dim)
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=11, hidden_size=dim, intermediate_size=inner, num_hidden_layers=depth,
                        num_attention_heads=dim // 4, num_key_value_heads=dim // 8, max_position_embeddings=16,
                        head_dim=4, tie_word_embeddings=tied)
        )  # fmt: skip

    target = llama(8, 1, 12)
    run = nuggets(NeuralNuggets(rank=2, dropout=0.0), source=llama(16, 2, 20), target=copy.deepcopy(target))
    model = run.fit()
    assert type(model) is LlamaForCausalLM
    layers = run.method._lora[1]
    assert len(layers) == (7 if tied else 9), "a weight that two layers share gets no adapter"
    assert (logits(model) - logits(run.run["adapted"])).abs().max() < 1e-5


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"rank": 0}, "rank is 0"), ({"alpha": 0}, "alpha is 0"), ({"window": "best"}, "unknown window"),
     ({"dropout": 1.0}, "dropout is 1"), ({"samples": 0}, "samples 0")],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        NeuralNuggets(**arguments)


class Other(nn.Module):
    """No layers in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(11, 12), nn.Linear(12, 12), nn.Linear(12, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(input_ids)))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (language_model(dim=12, depth=1), ShapeError, "the source has 1 layers, the target 2"),
        (language_model(dim=4, depth=2), ShapeError, "the source must be larger"),
        (DecoderLM(13, dim=12, depth=2, heads=2, context=16, tie=False), VocabularyError, "knows 13 tokens"),
        (Other(), InputError, "has no list of layers"),
    ],
)
def test_sources_that_do_not_fit_are_refused_before_training(source, error, message):
    with pytest.raises(error, match=message):
        nuggets(source=source).fit()


def test_a_source_that_is_not_finite_is_refused():
    source = language_model(1, dim=12, depth=3)
    with torch.no_grad():
        source.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises((DivergenceError, TransferError), match="not finite"):
        nuggets(source=source).fit()


def test_a_moving_average_is_refused_and_data_of_other_names():
    with pytest.raises(InputError, match=r"ema is 0\.9"):
        nuggets(ema=0.9).fit()
    with pytest.raises(InputError, match="tuned on one data set"):
        transfer(
            NeuralNuggets(rank=2), language_model(1, dim=12, depth=3), language_model(depth=2), {"a": ragged_tokens()},
            test=ragged_tokens(), task="language-model", steps=1, batch_size=6,
        )  # fmt: skip
