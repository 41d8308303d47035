"""aTLAS: what the sheet says must hold exactly, for every objective."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import CLASSES, CNN, VOCABULARY, digest, images, language_model, ragged_tokens
from torch import Tensor, nn
from weights.composing import INPUTS, LABELS, logits, plain, put, ready, total, tuned

from transfuse import transfer
from transfuse.core.batch import Batch
from transfuse.core.errors import InputError
from transfuse.core.run import Run
from transfuse.core.watch import TransferWarning
from transfuse.weights import ATLAS
from transfuse.weights.scaling import Linearised, partition

# Composition


def test_without_coefficients_it_is_the_base_bit_for_bit():
    run = ready(method := ATLAS())
    assert torch.equal(logits(method, run), plain(run["target"]))


def test_a_row_of_ones_is_that_source_and_equal_rows_are_the_average():
    run = ready(method := ATLAS())
    put(method, 0)
    with torch.no_grad():
        method.coefficients[1] = 1
    assert torch.allclose(logits(method, run), plain(run["source.1"]), atol=1e-6)
    put(method, 1 / 3)
    average = method.deploy(run["target"])
    for name, p in average.named_parameters():
        mean = torch.stack([run[f"source.{i}"].get_parameter(name) for i in range(3)]).mean(0)
        assert torch.allclose(p, mean, atol=1e-6), name


def test_the_gradient_of_a_coefficient_is_the_inner_product_with_its_vector():
    run = ready(method := ATLAS())
    put(method, torch.randn_like(method.coefficients) * 0.3)
    batch = {"data": Batch(inputs=INPUTS, labels=LABELS)}
    (found,) = torch.autograd.grad(total(method.loss(batch, run)), method.coefficients)
    composed = {n: p.requires_grad_() for n, p in method.deploy(run["target"]).named_parameters()}
    known = LABELS >= 0
    value = nn.functional.cross_entropy(run("target", batch["data"], params=composed).logits[known], LABELS[known])
    slopes = torch.autograd.grad(value, list(composed.values()))
    for j, (name, slope) in enumerate(zip(composed, slopes, strict=True)):
        for i in range(3):
            tau = run[f"source.{i}"].get_parameter(name) - run["target"].get_parameter(name)
            assert found[i, j, 0] == pytest.approx((slope * tau).sum().item(), abs=1e-6)


def test_the_isotropic_gradient_is_the_sum_over_blocks():
    batch, found = {"data": Batch(inputs=INPUTS, labels=LABELS)}, {}
    for blockwise in (True, False):
        run = ready(method := ATLAS(blockwise=blockwise))
        (found[blockwise],) = torch.autograd.grad(total(method.loss(batch, run)), method.coefficients)
    assert found[False].shape == (3, 1, 1)
    assert torch.allclose(found[True].sum(1), found[False][:, 0], atol=1e-6)


def test_one_group_is_blockwise_and_groups_are_disjoint_and_cover():
    shape = (5, 7)
    members = partition(shape, 4, seed=1)
    assert torch.equal(members, partition(shape, 4, seed=1))
    assert not torch.equal(members, partition(shape, 4, seed=2))
    assert torch.stack([members == k for k in range(4)]).sum(0).eq(1).all()
    one, two = ATLAS(), ATLAS(groups=2)
    ready(one), ready(two)
    values = torch.randn(3, one.coefficients.shape[1], 1)
    put(one, values), put(two, values.expand(-1, -1, 2))
    for name, step in one.offsets().items():
        assert torch.allclose(step, two.offsets()[name], atol=1e-6)
    put(two, torch.cat([values, 0 * values], 2))
    block, tau = "layer2.weight", two._vectors[0]["layer2.weight"]
    expected = torch.einsum("i,i...->...", values[:, list(one.offsets()).index(block), 0], tau)
    assert torch.allclose(two.offsets()[block], expected * (partition(tau.shape[1:], 2, 0) == 0), atol=1e-6)


def test_what_is_deployed_answers_as_the_composition_and_sources_are_as_they_were():
    base = CNN(norm=True)
    sources = [tuned(base, s) for s in (1, 2)]
    before = [digest(m) for m in (base, *sources)]
    result = transfer(
        ATLAS(groups=2), sources, base, (INPUTS, LABELS), test=(INPUTS, LABELS), epochs=3, lr=0.1, batch_size=12
    )
    assert [digest(m) for m in (base, *sources)] == before
    assert all(p.grad is None for m in (base, *sources) for p in m.parameters())
    assert type(result.model) is CNN
    assert torch.equal(result.model.norm.running_mean, base.norm.running_mean)
    assert not torch.equal(result.model.fc.weight, base.fc.weight)
    assert [panel.title for panel in result.report.panels][:1] == ["Coefficients of the task vectors"]


def test_the_output_layer_of_a_language_model_is_composed_too():
    base = language_model()
    sources = [language_model(seed=1)]
    method = ATLAS()
    run = ready(method, base, sources, {"data": ragged_tokens()}, task="language-model")
    put(method, 1.0)
    tokens = ragged_tokens()
    outputs = method.run_composed(run, Batch(inputs=tokens))
    assert hasattr(outputs.raw, "weight"), "the output layer is applied in the loss"
    real = tokens["attention_mask"].bool()
    assert torch.allclose(outputs.logits[real], sources[0](**tokens)[real], atol=1e-5)
    outputs.logits[real].sum().backward()
    head = list(method._vectors[0]).index("head.weight")
    assert method.coefficients.grad[0, head].abs() > 1e-3
    assert outputs.logits.shape[-1] == VOCABULARY


# Variants


def test_of_a_linear_model_the_tangent_is_the_model():
    class Linear(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.fc = nn.Linear(16, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1))

    values = torch.randn(2, 2, 1)
    found = {}
    for linearised in (False, True):
        method = ATLAS(linearised=linearised)
        run = ready(method, Linear(0), [Linear(1), Linear(2)])
        put(method, values)
        found[linearised] = logits(method, run)
        assert torch.allclose(plain(method.deploy(run["target"])), found[linearised], atol=1e-6)
    assert torch.allclose(found[False], found[True], atol=1e-6)


def test_the_tangent_of_a_network_is_its_derivative_and_learns():
    base = CNN(norm=True)
    sources = [tuned(base, 1)]
    method = ATLAS(linearised=True)
    run = ready(method, base, sources)
    put(method, 1.0)
    steps = {n: s - p for (n, p), s in zip(base.named_parameters(), sources[0].parameters(), strict=True)}
    size = 1e-3
    moved = {n: p + size * steps[n] for n, p in base.named_parameters()}
    slope = (torch.func.functional_call(base, moved, (INPUTS,)) - plain(base)) / size
    assert torch.allclose(logits(method, run), plain(base) + slope, atol=2e-2)
    result = transfer(
        ATLAS(linearised=True), sources, base, (INPUTS, LABELS), test=(INPUTS, LABELS), epochs=2, lr=0.1, batch_size=12
    )
    assert isinstance(result.model, Linearised)


def test_a_budget_keeps_the_sources_with_the_largest_gradient_in_each_block():
    run = ready(whole := ATLAS())
    (slopes,) = torch.autograd.grad(
        total(whole.loss({"data": Batch(inputs=INPUTS, labels=LABELS)}, run)), whole.coefficients
    )
    ready(method := ATLAS(budget=2))
    best = slopes[:, :, 0].abs().topk(2, dim=0).indices.sort(0).values
    assert torch.equal(method.chosen, best)
    assert method.coefficients.shape == (2, len(best[0]), 1)
    tau = run["source.0"].fc.bias - run["target"].fc.bias
    place = list(method._vectors[0]).index("fc.bias")
    for row, model in enumerate(best[:, place].tolist()):
        tau = run[f"source.{model}"].fc.bias - run["target"].fc.bias
        assert torch.equal(method._vectors[0]["fc.bias"][row], tau)
    ready(ATLAS(budget=2, l1=0.1))
    ready(one := ATLAS(blockwise=False, budget=1))
    assert one.chosen.unique().tolist() == [int(slopes.sum((1, 2)).abs().argmax())]


def test_a_head_of_the_task_is_trained_itself():
    base = CNN()
    sources = [CNN(seed=1), CNN(seed=2)]
    sources[1].fc = nn.Linear(8, 7)
    result = transfer(
        ATLAS(head="fc"), sources, base, (INPUTS, LABELS), test=(INPUTS, LABELS), epochs=2, lr=0.1, batch_size=12
    )
    assert not torch.equal(result.model.fc.weight, base.fc.weight)
    method = ATLAS(head="fc", head_lr_scale=0.5)
    run = ready(method, base, sources)
    stage = method.stage(0, run)
    assert "fc.weight" not in method.offsets()
    assert [g.get("lr_scale") for g in stage.trained[0].groups] == [None, 0.5]


def test_penalties_are_sums_over_coefficients():
    run = ready(method := ATLAS(l1=0.5, l2=0.25))
    put(method, -2.0)
    losses = method.loss({"data": Batch(inputs=INPUTS, labels=LABELS)}, run)
    count = method.coefficients.numel()
    assert losses["l1"].weight * losses["l1"].sum == 0.5 * 2 * count
    assert losses["l2"].weight * losses["l2"].sum == 0.25 * 4 * count


# Objectives


def test_addition_is_the_sum_of_the_tasks_losses():
    one, other = images(12, seed=1), images(12, seed=2)
    method = ATLAS()
    run = ready(method, data={"one": one, "other": other})
    batches = {"one": Batch(inputs=one[0], labels=one[1]), "other": Batch(inputs=other[0], labels=other[1])}
    losses = method.loss(batches, run)
    for name, batch in batches.items():
        known = batch.labels >= 0
        expected = nn.functional.cross_entropy(run["target"](batch.inputs)[known], batch.labels[known])
        assert losses[name].mean.item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_model_with_a_head_for_each_task_is_told_the_task():
    class Heads(CNN):
        def __init__(self, seed: int = 0) -> None:
            super().__init__(seed=seed)
            self.other = nn.Linear(8, CLASSES)

        def forward(self, images: Tensor, task: int = 0) -> Tensor:
            logits = super().forward(images)
            return logits if task == 0 else logits + 100

    method = ATLAS("entropy")
    run = ready(method, Heads(), [Heads(1)], {"one": INPUTS, "two": INPUTS})
    seen = []
    run["target"].register_forward_hook(lambda m, a, output: seen.append(output.mean().item()))
    method.loss({name: Batch(inputs=INPUTS) for name in ("one", "two")}, run)
    assert seen[1] - seen[0] == pytest.approx(100, abs=1e-3)


def test_negation_raises_one_loss_and_lowers_the_other_and_keeps_the_best_within_bounds():
    inputs, labels = images(90)
    first, second = labels == 0, labels == 1
    data = {"forget": (inputs[first], labels[first]), "keep": (inputs[second], labels[second])}
    method = ATLAS("negation")
    run = ready(method, data=data)
    batches = {n: Batch(inputs=x, labels=y) for n, (x, y) in data.items()}
    losses = method.loss(batches, run)
    assert losses["forget"].weight == -1 and losses["keep"].weight == 1
    streams = method.stage(0, run).streams
    assert [s.batch_size for s in streams.values()] == [4, 4]

    accuracies = iter([(0.9, 0.8), (0.5, 0.77), (0.2, 0.76), (0.1, 0.7), (0.0, 0.8)])
    current: dict[str, float] = {}

    def accuracy(name: str, run: Run) -> float:
        if name == "forget":
            current["forget"], current["keep"] = next(accuracies)
        return current[name]

    method._accuracy = accuracy
    method.begin_stage(0, run)
    for epoch in (1, 2, 3):
        put(method, float(epoch))
        run.clock.step = epoch
        method.begin_epoch(run)
    put(method, 4.0)
    method.end_stage(0, run)
    assert method.coefficients.unique().tolist() == [2.0]  # 0.7 < 0.95 * 0.8, and what comes after is not considered
    assert float(method.kept["forget"]) == pytest.approx(0.2)


def test_ufm_trusts_the_most_confident_of_every_class_and_reads_no_label():
    inputs, labels = images(120)
    method = ATLAS("ufm")
    run = ready(method, data={"data": (inputs, labels)})
    method.begin_stage(0, run)
    with torch.no_grad():
        sure, guess = run["target"](inputs).softmax(-1).max(-1)
    expected = sorted(
        i
        for c in range(CLASSES)
        for i in sorted((guess == c).nonzero().flatten().tolist(), key=lambda i: -sure[i])[: 120 // 30]
    )
    assert method.trusted["ids"].tolist() == expected
    assert torch.equal(method.trusted["labels"], guess[method.trusted["ids"]])
    streams = method.stage(0, run).streams
    assert [s.batch_size for s in streams.values()] == [4, 4]
    assert sum(s.data.size for s in streams.values()) == 120
    assert all(s.data.sample(2).labels is None for s in streams.values())


def test_ufm_without_a_sure_sample_is_zero_with_zero_gradient():
    class Unsure(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, x: Tensor) -> Tensor:
            odds = torch.tensor([0.98, 0.02]).log().expand(len(x), 2)
            return odds * self.scale

    method = ATLAS("ufm")
    run = ready(method, Unsure(1.0), [Unsure(1.5)], {"data": INPUTS})
    losses = method.loss({"data": Batch(inputs=INPUTS)}, run)
    assert losses["ufm"].sum == 0 and losses["ufm"].count == 0
    (gradient,) = torch.autograd.grad(losses["ufm"].sum, method.coefficients)
    assert gradient.abs().max() == 0
    put(method, 1.0)  # now 0.997
    assert method.loss({"data": Batch(inputs=INPUTS)}, run)["ufm"].count == len(INPUTS)


@pytest.mark.parametrize("objective", ["ufm", "entropy"])
def test_test_time_objectives_run_from_end_to_end_on_inputs_alone(objective):
    base = CNN(norm=True)
    inputs, _ = images(120)
    result = transfer(ATLAS(objective), [tuned(base, 1)], base, inputs, test=images(), epochs=2, batch_size=20, lr=1e-2)
    assert not torch.equal(result.model.fc.weight, base.fc.weight)


def test_the_best_validated_coefficients_are_deployed():
    base = CNN(norm=True)
    sources = [tuned(base, s) for s in (1, 2)]
    known = LABELS >= 0
    held_out = INPUTS[known], LABELS[known]
    result = transfer(
        ATLAS(),
        sources,
        base,
        (INPUTS, LABELS),
        validate=held_out,
        epochs=13,
        lr=1.0,
        batch_size=8,
        schedule="constant",
    )
    curve = [r.validation for r in result.report.arms[0].runs[0].curve if r.validation is not None]
    final = result.report.arms[0].runs[0].metrics["accuracy"]
    assert final == pytest.approx(max(curve), abs=1e-6)
    assert max(curve) > curve[-1], "nothing to choose"


# What is refused


def test_arguments_and_data_that_cannot_be_used():
    for wrong in (
        {"objective": "forget"},
        {"groups": 0},
        {"budget": 0},
        {"l1": -1.0},
        {"confidence": 1.0},
        {"objective": "ufm", "head": "fc"},
    ):
        with pytest.raises(InputError, match="ATLAS"):
            ATLAS(**wrong)
    with pytest.raises(InputError, match="'forget' and|'forget': "):
        ready(ATLAS("negation"))
    with pytest.raises(InputError, match="one data set of samples"):
        ready(ATLAS("ufm"), data={"data": [Batch(inputs=INPUTS)]})
    with pytest.raises(InputError, match="no loss to choose"):
        ready(ATLAS("ufm", budget=1))
    with pytest.raises(InputError, match="shuffled"):
        ready(ATLAS(), shuffled=True)


def test_equal_sources_are_reported():
    base = CNN(norm=True)
    one = tuned(base, 1)
    with pytest.warns(TransferWarning, match="only the sum of their coefficients"):
        ready(ATLAS(), base, [one, copy.deepcopy(one)])
