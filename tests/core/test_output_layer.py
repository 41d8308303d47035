"""A language model's output layer is left out where, and only where, that is the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import VOCABULARY, language_model, ragged_tokens
from torch import Tensor, nn
from torch.func import functional_call

from transfuse.core.batch import Batch
from transfuse.core.errors import CapabilityError
from transfuse.core.output_layer import find_output_layer, left_out
from transfuse.core.outputs import Outputs, call
from transfuse.core.run import Run
from transfuse.losses import Projection, TopK

TEXT = ragged_tokens()


class Wrapped(nn.Module):
    """A model whose logits pass through something."""

    def __init__(self, change: Any):
        super().__init__()
        self.model, self.change = language_model(), change

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.change(self.model(input_ids, attention_mask))


def run_of(model: nn.Module, task: str = "language-model", **options: Any) -> Run:
    return Run({"target": model, "source": language_model(1)}, {}, task=task, **options)


def test_it_is_found_and_the_projection_gives_the_same_logits():
    model = language_model()
    layer = find_output_layer(model, TEXT)
    assert layer is model.head
    with left_out(layer) as found:
        hidden = call(model, TEXT)
    assert hidden.shape[-1] == 8
    assert found[0].shape == (12, 9, VOCABULARY)
    assert torch.equal(found[0].dense(), call(model, TEXT))
    assert "forward" not in vars(model.head)


@pytest.mark.parametrize(
    "change",
    [lambda logits: 30 * torch.tanh(logits / 30), lambda logits: logits / 2, lambda logits: logits.clone()],
    ids=["soft-capped", "scaled", "copied"],
)
def test_it_stays_where_something_is_done_to_the_logits(change):
    assert find_output_layer(Wrapped(change), TEXT) is None


def test_it_is_found_inside_what_wraps_a_model_and_gives_an_object_or_a_mapping():
    wrapped = Wrapped(lambda logits: {"logits": logits, "loss": None})
    assert find_output_layer(wrapped, TEXT) is wrapped.model.head


def test_a_layer_that_is_watched_adapted_or_moved_is_not_left_out():
    watched = language_model()
    handle = watched.head.register_forward_hook(lambda *_: None)
    assert find_output_layer(watched, TEXT) is None
    handle.remove()
    assert find_output_layer(watched, TEXT) is watched.head
    placed = language_model()
    placed.head.forward = placed.head.forward
    assert find_output_layer(placed, TEXT) is None

    class Adapted(nn.Linear):
        pass

    adapted = language_model()
    adapted.head = Adapted(8, VOCABULARY)
    assert find_output_layer(adapted, TEXT) is None
    assert find_output_layer(nn.Flatten(), torch.zeros(2, 3)) is None


def test_a_compiled_model_keeps_it():
    assert find_output_layer(torch.compile(language_model(), backend="eager"), TEXT) is None


def test_a_run_leaves_it_to_the_loss_in_language_models_only():
    model = language_model()
    batch = Batch(inputs=TEXT)
    outputs = run_of(model)("target", batch)
    assert isinstance(outputs.scores, Projection)
    assert torch.equal(outputs.logits, call(model, TEXT))
    assert isinstance(outputs.scores, Tensor)  # once they are there
    assert isinstance(run_of(model, "token-classification")("target", batch).scores, Tensor)


def test_gradients_are_those_of_the_whole_model():
    model, batch = language_model(), Batch(inputs=TEXT)
    run_of(model)("target", batch).logits.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    call(model, TEXT).square().sum().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(found[name], p.grad, atol=1e-5), name


def test_other_parameters_reach_the_projection():
    model, batch = language_model(), Batch(inputs=TEXT)
    others = {name: 2 * p.detach() for name, p in model.named_parameters()}
    outputs = run_of(model)("target", batch, params=others)
    assert torch.equal(outputs.logits, functional_call(model, others, (), dict(TEXT)))


def test_a_tap_on_the_layer_keeps_it_and_one_before_it_does_not():
    model, batch = language_model(), Batch(inputs=TEXT)
    run = run_of(model)
    run.install({"target": ["head"]})
    outputs = run("target", batch)
    assert isinstance(outputs.raw, Tensor)
    assert torch.equal(outputs.features["head"], outputs.logits)
    run.remove_taps()
    run = run_of(model)
    run.install({"target": ["norm"]})
    outputs = run("target", batch)
    assert torch.equal(outputs.features["norm"], outputs.scores.hidden)


def test_half_precision_ends_in_float32():
    outputs = run_of(language_model(), precision="bf16")("target", Batch(inputs=TEXT))
    assert outputs.scores.hidden.dtype == torch.bfloat16
    assert outputs.logits.dtype == torch.float32


def test_a_shuffled_source_gives_every_sample_the_outputs_of_another():
    model = language_model()
    run = Run({"target": copy.deepcopy(model), "source": model}, {}, task="language-model", shuffled=True)
    batch = Batch(inputs=TEXT)
    plain, shuffled = call(model, TEXT), run("source", batch, grad=False).logits
    assert sorted(plain.sum((1, 2)).tolist()) == pytest.approx(sorted(shuffled.sum((1, 2)).tolist()), abs=1e-4)
    assert not any(torch.equal(a, b) for a, b in zip(plain, shuffled, strict=True))
    assert torch.equal(run("target", batch).logits, plain)


def test_what_is_shown_to_peers_has_no_graph():
    run = run_of(language_model())
    shown = run.shown("target", run("target", Batch(inputs=TEXT)))
    assert not shown.logits.requires_grad


def test_sparse_targets_have_no_logits():
    kept = TopK(torch.zeros(2, 3, 4, dtype=torch.long), torch.zeros(2, 3, 4), 11)
    assert Outputs(kept).scores is kept
    with pytest.raises(CapabilityError, match="TopK"):
        _ = Outputs(kept).logits
