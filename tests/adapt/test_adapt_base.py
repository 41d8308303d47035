"""What every method of the family can rely on: no target labels, one pass over both domains, one cross-entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from domains import domains, source
from helpers import CLASSES, CNN, assert_equal_gradients, digest, first_gradients, images, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from transfuse.adapt import DANN, Adaptation, SourceOnly
from transfuse.adapt.base import extractor, run_domains
from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, MethodError, ShapeError
from transfuse.core.outputs import Outputs
from transfuse.core.run import Run
from transfuse.core.streams import Draw, as_data
from transfuse.losses import Term


class Spy(Adaptation):
    """Notes what a method gets to see of the target."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[Batch] = []

    def loss(self, source: Outputs, target: Outputs, source_batch: Batch, target_batch: Batch, clock: Clock) -> Any:
        self._seen.append(target_batch)
        return {}


def kinds_of_data() -> dict[str, Any]:
    pictures, labels = images(24)
    return {
        "tensors": (pictures, labels),
        "mapping": {"inputs": pictures, "labels": labels},
        "data set": [(p, y) for p, y in zip(pictures, labels, strict=True)],
        "mappings one by one": [{"image": p, "label": y} for p, y in zip(pictures, labels, strict=True)],
        "loader": DataLoader(TensorDataset(pictures, labels), batch_size=6),
        "batches": [(pictures[:12], labels[:12]), (pictures[12:], labels[12:])],
    }


@pytest.mark.parametrize("kind", kinds_of_data())
def test_no_method_sees_a_label_of_the_target_domain(kind):
    method, pictures = Spy(), source()[0]
    labelled = {"inputs": {"image": pictures}, "labels": source()[1]} if "mappings" in kind else None
    trainer(method, CNN(), None, domains(kinds_of_data()[kind], labelled), steps=2).fit()
    assert len(method._seen) == 2
    for batch in method._seen:
        assert batch.inputs is not None
        assert batch.labels is None and "label" not in batch


@pytest.mark.parametrize("kind", kinds_of_data())
def test_without_labels_data_is_otherwise_the_same(kind):
    data = as_data(kinds_of_data()[kind])
    draw = Draw(batch_size=8, micro_batch=None, shuffle=False, seed=0)
    for with_labels, without in zip(data.epoch(draw, 0), data.without_labels().epoch(draw, 0), strict=True):
        assert torch.equal(_tensor(with_labels[0].inputs), _tensor(without[0].inputs))
        assert with_labels[0].labels is not None and without[0].labels is None


def _tensor(inputs: Any) -> Tensor:
    return inputs["image"] if isinstance(inputs, dict) else inputs


@pytest.mark.parametrize("method", [SourceOnly, lambda: DANN(hidden=8)])
def test_other_target_labels_change_not_a_bit(method):
    pictures, labels = images(24)
    found = set()
    for given in ((pictures, labels), (pictures, (labels + 1) % CLASSES), pictures):
        run = trainer(method(), CNN(), None, domains(given), steps=4)
        found.add(digest(run.fit()))
    assert len(found) == 1


def test_source_only_is_training_on_the_source_and_never_runs_on_the_target():
    model = CNN(norm=True)
    found = first_gradients(SourceOnly(), model, None, domains(), micro_batch=None)
    pictures, labels = source(24)
    order = torch.arange(12)
    reference = CNN(norm=True)
    nn.functional.cross_entropy(reference(pictures[order]), labels[order]).backward()
    expected = {f"CNN.{n}": p.grad for n, p in reference.named_parameters()}
    assert_equal_gradients({n: g for n, g in found.items() if n.startswith("CNN")}, expected)
    assert torch.allclose(model.norm.running_mean, reference.norm.running_mean, atol=1e-6)


def test_both_domains_go_through_the_model_in_one_pass():
    model = CNN(norm=True)
    run = Run({"target": model}, {})
    run.install({"target": ["penultimate", "layer*"]})
    run.set_modes({"target"})
    here, there = Batch(inputs=source(5)[0]), Batch(inputs=images(7)[0])
    run("target", here)  # the taps are traced
    model.calls.clear()
    first, second = run_domains(run, here, there)
    assert len(model.calls) == 1
    whole = model(torch.cat([here.inputs, there.inputs]))
    assert torch.allclose(torch.cat([first.logits, second.logits]), whole)
    assert first.features["penultimate"].shape == (5, 8) and second.features["penultimate"].shape == (7, 8)
    assert [f.shape[0] for f in second.features["layer*"]] == [7, 7]


@pytest.mark.parametrize(
    ("layer", "layers"),
    [("penultimate", ["layer1", "norm", "layer2"]), ("norm", ["layer1", "norm"]), ("layer1", ["layer1"])],
)
def test_the_extractor_is_all_that_the_features_depend_on(layer, layers):
    model = CNN(norm=True, dropout=0.5)
    model.layer1.bias.requires_grad_(False)
    run = Run({"target": model}, domains())
    run.install({"target": [layer]})
    run.set_modes({"target"})
    before, state = digest(model), torch.get_rng_state()
    found = {n for n, p in model.named_parameters() if any(p is q for q in extractor(run, layer, "DANN"))}
    assert found == {n for n, p in model.named_parameters() if n.split(".")[0] in layers and p.requires_grad}
    assert digest(model) == before and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_token_sequences_of_different_length_are_padded_to_one():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1, CLASSES)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.fc((input_ids * attention_mask).sum(1, keepdim=True).float())

    def tokens(length: int) -> Batch:
        ids = torch.ones(2, length, dtype=torch.long)
        return Batch(inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    model = Counting()
    first, second = run_domains(Run({"target": model}, {}), tokens(3), tokens(5))
    assert torch.allclose(first.logits, model(**tokens(3).inputs))
    assert torch.allclose(second.logits, model(**tokens(5).inputs))


def test_a_sum_has_the_cross_entropy_once():
    found: list[dict[str, Any]] = []
    method = 0.5 * DANN(hidden=8) + 2 * DANN(hidden=4)
    trainer(method, CNN(), None, domains(), steps=1, listener=lambda t, r: found.append(r["terms"])).fit()
    assert found[0]["labels"]["weighted"] == found[0]["labels"]["raw"]
    assert set(found[0]) == {"labels", "source domain", "target domain", "source domain.1", "target domain.1"}


def test_a_baseline_cannot_be_added():
    with pytest.raises(MethodError, match="SourceOnly has stages of its own"):
        SourceOnly() + DANN()


def test_what_a_user_can_get_wrong_is_said_before_training():
    pictures, labels = source()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"data": as_data(pictures)}, InputError, "pass source="),
        (domains(labelled=pictures), InputError, "the source data has none"),
        (domains(labelled=(pictures, labels + 1)), ShapeError, "labels must lie in 0..2"),
        (domains(target=torch.randn(24, 1, 8, 8)), ShapeError, "a source sample is .1, 4, 4., a target sample .1, 8"),
    ]
    for data, error, message in cases:
        with pytest.raises(error, match=message):
            trainer(DANN(hidden=8), CNN(), None, data).fit()
    with pytest.raises(ShapeError, match="inputs of the source are named .'a'., those of the target .'b'."):
        run_domains(Run({"target": CNN()}, {}), Batch(inputs={"a": pictures}), Batch(inputs={"b": pictures}))


def test_the_family_chooses_by_a_validator_without_labels():
    assert Adaptation.select == "mutual_information"
    assert SourceOnly().stage(0, Run({"target": CNN()}, domains())).keep == "best"


def test_terms_of_the_source_count_the_source():
    class Counted(Adaptation):
        def loss(self, source: Outputs, target: Outputs, *rest: Any) -> Any:
            return {"s": Term.of(source.logits[:, 0], unit="source/sample"), "t": Term.of(target.logits[:, 0])}

    few = tuple(t[:16] for t in source())
    one = trainer(Counted(), CNN(), None, domains(labelled=few), steps=3, micro_batch=3)
    two = trainer(Counted(), CNN(), None, domains(labelled=few), steps=3)
    first, second = one.fit(), two.fit()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
