"""Masks per task, Neuron Specialization and Master-ASR: what the sheets say must hold exactly."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from helpers import digest
from torch import Tensor, nn
from weights.examples_masks import (
    CLASSES,
    FRAMES,
    NEURONS,
    FeedForward,
    Recogniser,
    recognition,
    samples,
    specialised,
    speech,
)

from transfuse import Transfer, transfer
from transfuse.core.batch import Batch
from transfuse.core.errors import InputError
from transfuse.core.run import Run
from transfuse.core.streams import Draw, as_data
from transfuse.losses import ctc
from transfuse.weights import MasterASR, NeuronSpecialization
from transfuse.weights.masks import (
    TaskBatches,
    key,
    overlap,
    packed,
    smallest_prefix,
    top_fraction,
    unpacked,
)
from transfuse.weights.master_asr import Artisan


def go(example: Any, listener: Any = None, **options: Any) -> Any:
    settings = {**example.options, **options}
    return transfer(
        example.method, None, example.target, example.data, test=example.test, listener=listener, **settings
    )


def state_by_update(example: Any, **options: Any) -> list[dict[str, Tensor]]:
    """What the method's parameters were before and after each update."""
    found: list[dict[str, Tensor]] = []

    def keep(arm: str, seed: int, trainer: Any, record: Any) -> None:
        found.append({n: p.detach().clone() for n, p in trainer.method.named_parameters()})

    transfer_ = Transfer(
        example.method, None, example.target, example.data, listener=keep, **{**example.options, **options}
    )
    trainer = transfer_.trainer(transfer_.arms[0], 0, transfer_.build_target(0))
    inner, first = trainer.method.begin_stage, []

    def begin(i: int, run: Run) -> bool:
        first.append({n: p.detach().clone() for n, p in trainer.method.named_parameters()})
        return inner(i, run)

    trainer.method.begin_stage = begin
    trainer.fit()
    return [first[0], *found]


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# Masks


def test_bits_hold_a_mask():
    mask = torch.rand(13) < 0.5
    assert packed(mask).shape == (2,)
    assert torch.equal(unpacked(packed(mask), 13), mask)


def test_overlap_is_symmetric_and_one_on_its_diagonal():
    found = overlap(torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]).bool())
    assert torch.equal(found, found.T) and torch.equal(found.diagonal(), torch.ones(3))
    assert found[0, 1] == pytest.approx(1 / 3) and found[0, 2] == 0


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 10), (0.3, 7), (0.35, 7), (0.95, 1)])
def test_a_top_fraction_keeps_exactly_as_many(sparsity, kept):
    assert top_fraction(torch.randn(2, 5), sparsity).sum() == kept


def test_of_equal_scores_the_first_are_kept():
    assert torch.equal(top_fraction(torch.tensor([1.0, 2.0, 1.0, 1.0]), 0.5), torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_an_update_has_samples_of_one_task_and_is_drawn_by_size():
    pools = {"small": as_data(samples(0, 4)), "large": as_data(samples(1, 12))}
    draw = Draw(3, None, shuffle=True, seed=0)
    seen: Counter[int] = Counter()
    for micro in itertools.islice(TaskBatches(pools).epoch(draw, 0), 400):
        (batch,) = micro
        assert len(batch.domain.unique()) == 1 and batch.size == 3
        seen[int(batch.domain[0])] += 1
    assert 0.68 < seen[1] / 400 < 0.82
    even = TaskBatches(pools, temperature=1e9).probabilities
    assert torch.allclose(even, torch.tensor([0.5, 0.5], dtype=even.dtype), atol=1e-6)


# Neuron Specialization


@pytest.mark.parametrize(("percent", "chosen"), [(50, [0]), (80, [0, 1]), (90, [0, 1, 2]), (100, [0, 1, 2, 3])])
def test_the_fewest_neurons_that_make_up_the_share_are_chosen(percent, chosen):
    assert smallest_prefix(torch.tensor([5, 3, 1, 1, 0]), percent).nonzero().flatten().tolist() == chosen


def test_without_any_activity_nothing_can_be_chosen():
    with pytest.raises(InputError, match="no neuron was ever active"):
        smallest_prefix(torch.zeros(4), 50)


def ready(method: NeuronSpecialization, target: nn.Module, data: dict[str, Any]) -> Run:
    run = Run({"target": target}, {name: as_data(d) for name, d in data.items()})
    run.install({})
    run.set_modes(set())
    first = next(iter(run.data.values())).sample(4)
    method.setup(run, first)
    method.begin_stage(0, run)
    return run


def test_neurons_are_counted_over_positions_without_padding():
    model, (x, y) = FeedForward(), samples(2)
    mask = torch.ones(12, 3)
    mask[:, 2] = 0
    task = {"x": x, "attention_mask": mask, "labels": y}
    for padding in (False, True):
        method = NeuronSpecialization(count_padding=padding)
        run = ready(method, model, {"a": task, "b": task})
        counts = method._counts("a", run.data["a"], run)["layers.0.fc1"]
        inside = model.layers[0]["fc1"](x).relu()
        expected = sum((inside[i, j] > 0).long() for i in range(12) for j in range(3) if padding or mask[i, j])
        assert torch.equal(counts, expected)


def test_with_everything_chosen_the_model_is_the_dense_one():
    method, model = NeuronSpecialization(100.0), FeedForward()
    run = ready(method, model, {"a": samples(0), "b": samples(1)})
    for number in range(2):
        for path in ("layers.0.fc1", "layers.1.fc1"):
            method.chosen[key(number, path)] = torch.ones(NEURONS, dtype=torch.bool)
    deployed = method.deploy(run["target"])
    assert torch.equal(deployed(samples(5)[0], task="a"), model(samples(5)[0]))


def test_rows_outside_the_mask_get_no_gradient_and_shared_rows_get_both():
    method, model = NeuronSpecialization(60.0), FeedForward()
    run = ready(method, model, {"a": samples(0), "b": samples(1)})
    weight, grads = model.layers[0]["fc1"].weight, []
    for number in range(2):
        x, y = samples(number)
        batch = Batch(inputs=x, labels=y, domain=torch.full((12,), number))
        loss = method.losses({"data": batch}, run)["labels"].sum
        grads.append(torch.autograd.grad(loss, weight, retain_graph=True)[0])
        out = ~method.chosen[key(number, "layers.0.fc1")]
        assert out.any() and not grads[-1][out].any()
    both = method.chosen[key(0, "layers.0.fc1")] & method.chosen[key(1, "layers.0.fc1")]
    assert both.any() and grads[0][both].any() and grads[1][both].any()


def test_switching_tasks_and_back_changes_nothing():
    model = go(specialised()).model
    x = samples(6)[0]
    first = model(x, task="a")
    assert not torch.equal(model(x, task="b"), first)
    assert torch.equal(model(x, task=0), first)
    assert torch.allclose(model.of("a")(x), first) and type(model.of("a")) is FeedForward


def test_weights_are_kept_once_and_masks_as_bits():
    model = go(specialised()).model
    state = model.state_dict()
    assert sum(name.endswith("fc1.weight") for name in state if name.startswith("body.")) == 2
    bits = [t for name, t in state.items() if name.startswith("bits.") and not name.endswith("_learned")]
    assert len(bits) == 4 and all(t.dtype == torch.uint8 and t.shape == (2,) for t in bits)


def test_a_task_without_a_mask_gets_the_union():
    model = go(specialised()).model
    union = model.union(["a", "b"]).layers[0]["fc1"].weight
    mask = model.mask(0, "layers.0.fc1.weight") | model.mask(1, "layers.0.fc1.weight")
    assert torch.equal(union.abs().sum(1) > 0, mask)


def test_each_held_out_set_is_scored_with_its_own_mask():
    result = go(specialised())
    x, y = samples(5, 6)
    expected = (result.model.of("b")(x).argmax(1) == y).float().mean()
    found = result.arms[0].evaluations[0].by_set("accuracy")
    assert found["b"] == pytest.approx(float(expected))


def test_random_masks_are_as_sparse():
    models = [go(specialised(random=r)).model for r in (False, True)]
    sizes = [[int(m.mask(t, "layers.0.fc1.weight").sum()) for t in range(2)] for m in models]
    assert sizes[0] == sizes[1]
    assert not torch.equal(*(m.mask(0, "layers.0.fc1.weight") for m in models)) or sizes[0][0] == NEURONS


def test_the_bias_is_masked_on_request():
    model = go(specialised(mask_bias=True)).model
    out = ~model.mask(0, "layers.0.fc1.weight")
    assert not model.of("a").layers[0]["fc1"].bias[out].any()
    assert go(specialised()).model.of("a").layers[0]["fc1"].bias[out].any()


def test_the_share_may_depend_on_task_and_layer():
    example = specialised()
    example.method = NeuronSpecialization({"a/*": 30.0, "*": 100.0})
    model = go(example).model
    a, b = (int(model.mask(t, "layers.0.fc1.weight").sum()) for t in range(2))
    assert a < b


def test_an_activation_that_is_never_zero_is_refused():
    example = specialised()
    example.target = FeedForward(act=nn.GELU)
    with pytest.raises(InputError, match="no ReLU"):
        go(example)


@pytest.mark.parametrize("given", [{"percent": 0.0}, {"label_smoothing": 1.0}, {"temperature": 0.0}])
def test_arguments_of_neuron_specialization_are_checked(given):
    with pytest.raises(InputError, match=next(iter(given))):
        NeuronSpecialization(**given)


# Master-ASR


def artisan(experts: int = 3, sparsity: float = 0.3, seed: int = 0) -> Artisan:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Artisan(Recogniser(), ["blocks.0.attn.qkv", "blocks.0.attn.proj"], "head", experts, sparsity)
        model.append("one")
        model.append("other")
        return model


X = torch.randn(2, FRAMES, 4, generator=torch.Generator().manual_seed(7))
QKV = "blocks.0.attn.qkv"


def rows(model: Artisan, task: int, values: list[float]) -> None:
    for path in model.layers:
        model.rows[key(task, path)].data.copy_(torch.tensor(values))


def test_masks_keep_their_share_and_with_no_sparsity_all_weights():
    model = artisan()
    assert model.mask(0, QKV).sum() == math.ceil(0.7 * 24 * 8)
    full = artisan(sparsity=0.0)
    assert torch.equal(full.overrides(0)[f"{QKV}.weight"], full.body.blocks[0].attn.qkv.weight)


def test_with_one_selected_score_all_languages_share_the_mask():
    model = artisan(experts=1)
    for task in range(2):
        rows(model, task, [1.0])
    assert torch.equal(model.mask(0, QKV), model.mask(1, QKV))


def test_a_language_that_selects_nothing_gets_the_most_probable_score():
    model = artisan()
    rows(model, 0, [-2.0, -0.5, -1.0])
    rows(model, 1, [-2.0, 0.5, -1.0])
    assert torch.equal(model.mask(0, QKV), model.mask(1, QKV))


def test_scores_that_are_not_selected_do_not_matter_and_scale_does_not_either():
    model = artisan()
    rows(model, 0, [1.0, -1.0, 1.0])
    before = model(X, task=0)
    model.score(QKV).data[1] += torch.randn(24, 8)
    assert torch.equal(model(X, task=0), before)
    model.score(QKV).data[[0, 2]] *= 4.0
    assert torch.equal(model(X, task=0), before)


def test_gradients_go_straight_through():
    model = Artisan(
        nn.ModuleDict({"layer": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2)}), ["layer"], "head", 2, 0.5
    )
    model.append("one")
    rows(model, 0, [1.0, -1.0])
    upstream = torch.randn(2, 2)
    (model.overrides(0)["layer.weight"] * upstream).sum().backward()
    weight, score, row = model.body["layer"].weight, model.score("layer"), model.rows[key(0, "layer")]
    assert torch.allclose(score.grad[0], upstream * weight) and not score.grad[1].any()
    assert torch.allclose(weight.grad, upstream * model.mask(0, "layer"))
    slope = row.sigmoid() * (1 - row.sigmoid())
    assert torch.allclose(row.grad, slope * torch.einsum("ij,kij->k", upstream * weight, score))


def test_selection_moves_every_beta_updates_and_weights_and_scores_take_turns():
    example = recognition()  # beta=3, gamma=2
    states = state_by_update(example, optimizer="sgd")
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        found = moved(before, after)
        assert any(n.startswith("model.rows") for n in found) == (step % 3 == 0), step
        first = step // 2 % 2 == 0
        assert any(n.startswith("model.body.blocks.0.attn") for n in found) == first, step
        assert any(n.startswith("model.scores") for n in found) == (not first), step
        assert any(n.startswith("model.heads") for n in found), step


def test_selection_has_ten_times_the_rate_and_no_schedule():
    rates = []

    def keep(arm: str, seed: int, trainer: Any, record: Any) -> None:
        rates.append((trainer._optimizers["weights"].param_groups[0]["lr"], trainer.rates["selection"]))

    go(recognition(), keep, schedule="cosine", lr=0.01, steps=7)
    assert rates[0] == (pytest.approx(0.01), pytest.approx(0.1))
    assert rates[6][0] < 0.002 and rates[6][1] == pytest.approx(0.1)


def test_a_new_language_trains_its_rows_and_head_alone():
    first = go(recognition()).model
    before, answers = first.state_dict(), [first(X, task=t) for t in range(2)]
    method = MasterASR()
    grown = transfer(
        method, None, first, {"new": speech(2)}, steps=6, batch_size=6, lr=0.05, task="token-classification"
    ).model
    after = grown.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items() if not name.endswith("_learned"))
    assert all(torch.equal(grown(X, task=t), answers[t]) for t in range(2))
    assert grown.tasks == ["one", "other", "new"] and torch.equal(grown(X), grown(X, task="new"))
    new = [t.numel() for name, t in after.items() if name not in before]
    assert sum(new) == 2 * 3 + 8 * CLASSES + CLASSES  # layers * K + head


def test_with_finetune_a_new_language_changes_everything_in_the_end_and_not_before():
    first = go(recognition()).model
    seen = []

    def keep(arm: str, seed: int, trainer: Any, record: Any) -> None:
        state = trainer.run["artisan"].state_dict()
        seen.append({name: t.clone() for name, t in state.items()})

    options = {"steps": 6, "batch_size": 6, "lr": 0.05, "task": "token-classification", "listener": keep}
    grown = transfer(MasterASR(finetune=0.5), None, first, {"new": speech(2)}, **options).model
    before, halfway, after = first.state_dict(), seen[2], grown.state_dict()
    kinds = ("body.", "scores.")
    for name, t in before.items():
        if name.startswith(kinds) and name.endswith(("weight", "_learned")) and "head" not in name:
            assert torch.equal(halfway[name], t), name
    assert any(not torch.equal(after[n], t) for n, t in before.items() if n.startswith("body."))
    assert any(not torch.equal(after[n], t) for n, t in before.items() if n.startswith("scores."))


def test_a_known_language_is_refused():
    first = go(recognition()).model
    with pytest.raises(InputError, match="knows one already"):
        transfer(MasterASR(), None, first, {"one": speech(2)}, steps=1, batch_size=6, task="token-classification")


def test_one_language_can_be_taken_out_as_a_plain_model():
    model = go(recognition()).model
    plain = model.of("other")
    assert type(plain) is Recogniser
    assert torch.allclose(plain(X), model(X, task="other"))
    assert (plain.blocks[0].attn.qkv.weight == 0).float().mean() == pytest.approx(0.3, abs=0.01)


def test_it_learns_transcripts():
    example = recognition()
    example.method = MasterASR(experts=3, gamma=5)
    target = digest(example.target)
    model = go(example, steps=60, batch_size=12, lr=0.03).model.eval()
    data = speech(0)

    def loss(logits: Tensor) -> float:
        return ctc(logits, data["labels"]).mean().item()

    with torch.no_grad():
        assert loss(model(data["inputs"], task="one")) < 0.7 * loss(example.target(data["inputs"]))
    assert digest(example.target) == target


@pytest.mark.parametrize(
    "given", [{"experts": 0}, {"sparsity": 1.0}, {"beta": 0}, {"gamma": 0}, {"finetune": 1.0}, {"loss": "other"}]
)
def test_arguments_of_master_asr_are_checked(given):
    with pytest.raises(InputError, match=next(iter(given))):
        MasterASR(**given)


def test_layers_and_head_must_be_there():
    example = recognition()
    example.method = MasterASR(head="classifier")
    with pytest.raises(InputError, match="no layer 'classifier'"):
        go(example)


# CTC


def test_ctc_of_one_frame_is_the_log_probability_of_the_label():
    logits = torch.randn(2, 1, 4)
    found = ctc(logits, torch.tensor([[2], [3]]))
    assert torch.allclose(found, -logits.log_softmax(-1)[[0, 1], 0, [2, 3]])


def test_ctc_sums_over_all_alignments():
    logits = torch.randn(1, 4, 3, dtype=torch.float64)
    p, total = logits[0].softmax(-1), 0.0
    for path in itertools.product(range(3), repeat=4):
        if [c for c, _ in itertools.groupby(path) if c] == [1, 2]:
            total += math.prod(float(p[t, c]) for t, c in enumerate(path))
    assert ctc(logits, torch.tensor([[1, 2, -100]])).item() == pytest.approx(-math.log(total))


def test_ctc_counts_only_the_frames_of_a_sample():
    logits = torch.randn(1, 6, 3)
    assert torch.allclose(ctc(logits, torch.tensor([[1]]), torch.tensor([4])), ctc(logits[:, :4], torch.tensor([[1]])))


@pytest.mark.parametrize(
    ("labels", "match"),
    [([[-100, -100]], "empty"), ([[0, 1]], "blank"), ([[1, 9]], "blank"), ([[1, 1]], "more frames")],
)
def test_ctc_refuses_what_has_no_alignment(labels, match):
    with pytest.raises(ValueError, match=match):
        ctc(torch.randn(1, 2, 3), torch.tensor(labels))


def test_inputs_stay_as_they_were():
    example = specialised()
    before = copy.deepcopy(example.target.state_dict())
    go(example)
    assert all(torch.equal(t, before[n]) for n, t in example.target.state_dict().items())
