"""LFTL: the sampler, the memory, the second pass, the budget, and labels that nobody sees before they are bought."""

from __future__ import annotations

import copy
import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import digest, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

from transfuse.adapt import LFTL
from transfuse.adapt.oracle import Oracle
from transfuse.adapt.query import query_scores
from transfuse.adapt.rounds import Labelled, Round, Unlabelled
from transfuse.core.errors import InputError, LayerError, ShapeError, StoreError
from transfuse.core.streams import Data, Draw, as_data
from transfuse.core.trainer import Trainer
from transfuse.losses import IGNORE, anchor_entropy, mutual_information

CLASSES, POOL = 3, 40


def model(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU())
    neck = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6) if norm else nn.Identity())
    return nn.Sequential(OrderedDict(backbone=backbone, neck=neck, head=nn.Linear(6, CLASSES)))


def pool() -> tuple[Tensor, Tensor]:
    x = torch.randn(POOL, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    return x, x.flatten(1)[:, :CLASSES].argmax(1)


def run(method: LFTL, data: Any = None, net: nn.Module | None = None, **settings: Any) -> Trainer:
    streams = data if isinstance(data, dict) else {"data": as_data(pool() if data is None else data)}
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.05} | settings
    return trainer(method, net or model(), None, streams, **options)


def small(**arguments: Any) -> LFTL:
    return LFTL(**{"rounds": 3, "ratio": 0.1, "topk": 10, **arguments})


def probabilities(seed: int, samples: int = 30) -> Tensor:
    return torch.randn(samples, CLASSES, generator=torch.Generator().manual_seed(seed)).softmax(1)


# The sampler


def test_a_worked_example_of_extrapolated_margins():
    now, before = (
        torch.tensor([[0.5, 0.4, 0.1], [0.98, 0.01, 0.01]]),
        torch.tensor([[0.6, 0.3, 0.1], [0.98, 0.01, 0.01]]),
    )
    scores = query_scores(now, before, contrast=0.03, balance=0.0)
    # u = (.497, .403, .1): a margin of .094, beside one of .97
    assert scores.tolist() == pytest.approx([0.094 / 0.97, 1.0], abs=1e-6)


def test_without_contrast_and_balance_it_is_margin_sampling():
    p = probabilities(0)
    top = p.topk(2, dim=1).values
    margins = top[:, 0] - top[:, 1]
    scores = query_scores(p, probabilities(1), contrast=0.0, balance=0.0)
    assert torch.equal(scores.argsort(), margins.argsort())


def test_the_first_round_is_the_one_without_contrast():
    p = probabilities(0)
    assert torch.equal(query_scores(p, None), query_scores(p, probabilities(1), contrast=0.0))
    assert not torch.equal(query_scores(p, None), query_scores(p, probabilities(1), contrast=0.5))


def test_samples_of_classes_that_easy_ones_are_rich_in_come_later():
    easy = torch.tensor([[0.9, 0.1]] * 8 + [[0.1, 0.9]] * 2)
    torn = torch.tensor([[0.51, 0.49], [0.49, 0.51]])
    scores = query_scores(torch.cat([easy, torn]), topk=10, balance=0.1)
    assert scores[-1] - scores[-2] == pytest.approx(0.1 * (2 / 8 - 1), abs=1e-5)
    assert query_scores(torch.cat([easy, torn]), topk=1000, balance=0.1).argmin() == 11


def test_naming_the_classes_otherwise_changes_no_score():
    now, before, order = probabilities(0), probabilities(1), torch.tensor([2, 0, 1])
    assert torch.allclose(query_scores(now, before), query_scores(now[:, order], before[:, order]))


def test_all_samples_alike_give_finite_scores():
    assert query_scores(torch.full((5, 4), 0.25)).isfinite().all()


def test_agrees_with_a_loop_written_from_the_formula():
    now, before = probabilities(0), probabilities(1)
    margins = []
    for p, q in zip(now.tolist(), before.tolist(), strict=True):
        u = sorted((a + 0.2 * (a - b) for a, b in zip(p, q, strict=True)), reverse=True)
        margins.append(u[0] - u[1])
    pseudo = [max(range(CLASSES), key=p.__getitem__) for p in now.tolist()]
    easy = sorted(range(30), key=lambda i: -margins[i])[:7]
    counts = [sum(pseudo[i] == k for i in easy) for k in range(CLASSES)]
    expected = [m / max(margins) + 0.3 * counts[k] / max(counts) for m, k in zip(margins, pseudo, strict=True)]
    assert query_scores(now, before, 0.2, 0.3, 7).tolist() == pytest.approx(expected, rel=1e-5)


# Losses


def test_information_is_zero_for_uniform_predictions_and_minus_log_k_for_sure_and_balanced_ones():
    assert -mutual_information(torch.zeros(6, CLASSES)).item() == pytest.approx(0.0, abs=1e-6)
    assert -mutual_information(100 * torch.eye(CLASSES).repeat(2, 1)).item() == pytest.approx(-math.log(CLASSES))


def test_a_single_anchor_leaves_nothing_undecided_and_equal_ones_leave_all():
    e = torch.randn(5, 4)
    assert anchor_entropy(e, torch.randn(1, 4)).abs().max() == 0
    assert torch.allclose(anchor_entropy(e, torch.ones(7, 4)), torch.full((5,), math.log(7)))


def test_the_anchor_loss_is_the_entropy_of_softmaxed_cosines():
    e, m = torch.randn(5, 4), torch.randn(3, 4)
    p = F.cosine_similarity(e[:, None], m[None], dim=2).softmax(1)
    assert torch.allclose(anchor_entropy(e, m), -(p * p.log()).sum(1), atol=1e-6)


def test_an_empty_memory_gives_a_number_and_not_nan():
    e = torch.randn(5, 4, requires_grad=True)
    anchor_entropy(e, torch.zeros(3, 4)).sum().backward()
    assert e.grad is not None and e.grad.isfinite().all()


@pytest.mark.parametrize("anchors", [torch.zeros(0, 4), torch.zeros(3, 5)])
def test_anchors_that_do_not_fit_are_refused(anchors):
    with pytest.raises(ValueError, match="anchors"):
        anchor_entropy(torch.zeros(2, 4), anchors)


# The rounds


def test_the_budget_is_met_and_no_sample_is_bought_twice():
    made = run(small(rounds=4, ratio=0.07))  # round(2.8) = 3 a round, round(11.2) = 11 in all
    made.fit()
    bought, labels = made.method.state["bought"], made.method.state["labels"]
    assert made.method.sizes(POOL) == [3, 3, 3, 2]
    assert len(bought) == len(bought.unique()) == 11
    assert torch.equal(labels, pool()[1][bought])


def test_probabilities_of_the_last_query_stay_with_their_samples():
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(LFTL):
        def begin_stage(self, i: int, run: Any) -> bool:
            bought = self.state["bought"].clone()
            went_on = super().begin_stage(i, run)
            if went_on:
                free = torch.tensor([k for k in range(POOL) if k not in bought.tolist()])
                with torch.no_grad():
                    expected = run["target"].eval()(pool()[0][free]).softmax(1)
                seen.append((self.state["previous"][free], expected))
            return went_on

    run(Watched(rounds=3, ratio=0.1, topk=10)).fit()
    assert [len(found) for found, _ in seen] == [40, 36, 32]
    for found, expected in seen:
        assert torch.allclose(found, expected, atol=1e-6)


def test_the_memory_holds_nine_tenths_of_the_embeddings_when_training_begins_and_follows_by_momentum():
    states: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(LFTL):
        def begin_epoch(self, run: Any) -> None:
            super().begin_epoch(run)
            states.append(self.state["memory"].clone())

        def after_update(self, phase: Any, values: Any, run: Any) -> None:
            assert not any(e.requires_grad for _, e in self._seen)
            seen.extend(self._seen)
            super().after_update(phase, values, run)
            states.append(self.state["memory"].clone())

    net = model()
    reference = copy.deepcopy(net).eval()
    made = run(Watched(rounds=1, ratio=0.1, topk=10, mixup=0.0), net=net, epochs=None, steps=2)
    made.fit()
    bought = made.method.state["bought"]
    embeddings = reference.neck(reference.backbone(pool()[0][bought])).detach()
    assert torch.allclose(states[0], 0.9 * embeddings, atol=1e-6)
    expected = states[0]
    for (rows, e), after in zip(seen, states[1:], strict=True):
        expected = expected.clone()
        expected[rows] = 0.1 * expected[rows] + 0.9 * e
        assert torch.allclose(after, expected, atol=1e-6)
    assert len(seen) == 2


def test_an_update_is_the_gradient_of_the_three_terms_written_out():
    net = model(norm=False)
    made = run(small(rounds=1, mixup=0.0, information=0.7, persistence=0.3), net=net, epochs=None, steps=1)
    before = copy.deepcopy(net)
    batches: dict[str, Any] = {}
    method = made.method
    honest = method.losses
    method.losses = lambda b, r: batches.update(b) or honest(b, r)  # type: ignore[method-assign]
    gradients: list[Tensor] = []
    made.listener = lambda trainer, record: gradients.extend(p.grad.clone() for p in net.parameters())
    made.fit()
    x, known, y = batches["target"].inputs, batches["labelled"].inputs, batches["labelled"].labels
    e = before.neck(before.backbone(x))
    anchors = before.neck(before.backbone(known)).detach()
    memory = 0.1 * 0.9 * anchors + 0.9 * anchors  # refreshed when the epoch began, and by this batch
    p = before.head(e).softmax(1)
    mean = p.mean(0)
    information = -(p * p.log()).sum(1).mean() + (mean * mean.log()).sum()
    loss = F.cross_entropy(before.head(before.neck(before.backbone(known))), y)
    loss = loss + 0.7 * information + 0.3 * anchor_entropy(e, memory).mean()
    for found, expected in zip(gradients, torch.autograd.grad(loss, list(before.parameters())), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)


def test_mixed_inputs_lie_nearer_to_the_first_and_labels_are_mixed_alike():
    calls: list[tuple[Any, float]] = []

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(CLASSES, CLASSES, bias=False)
            nn.init.eye_(self.head.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    class Watched(LFTL):
        def _mixed(self, labelled: Any, run: Any) -> Any:
            terms = super()._mixed(labelled, run)
            calls.append((labelled, terms["mixup"].mean.item()))
            return terms

    # The input is the one-hot label, so the mixed label is the mixed input: CE(mixed x, mixed y) from x alone.
    x = torch.eye(CLASSES).repeat(14, 1)
    inputs: list[Tensor] = []
    net = Linear()
    net.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    made = run(Watched(rounds=1, ratio=0.2, topk=10), (x, x.argmax(1)), net, epochs=1, lr=1e-9, weight_decay=0.0)
    made.fit()
    assert calls
    for (labelled, found), mixed in zip(calls, inputs[-len(calls) :], strict=True):
        expected = -(mixed * mixed.log_softmax(1)).sum(1).mean().item()
        assert found == pytest.approx(expected, rel=1e-5)
        own = mixed.gather(1, labelled.labels[:, None])
        assert (own >= 0.5 - 1e-6).all()


def draw(world: int = 1, rank: int = 0, batch_size: int = 8) -> Draw:
    return Draw(batch_size=batch_size, micro_batch=None, shuffle=True, seed=3, rank=rank, world=world)


def a_round(labelled: int = 12, limit: int | None = None, again: bool = True) -> Round:
    samples = torch.arange(POOL)
    data = as_data(pool())
    bought = samples[:labelled]
    return Round(data, samples[labelled:], limit or POOL - labelled, bought, pool()[1][bought], again)  # type: ignore[arg-type]


def test_an_epoch_is_a_pass_over_the_pool_and_a_second_one_over_the_labelled_samples_it_drew():
    now = a_round()
    free = [b for (b,) in Unlabelled(now).epoch(draw(), 0)]
    known = [b for (b,) in Labelled(now).epoch(draw(), 0)]
    first, second = now.lengths(8)
    assert (first, second) == (4, 3)  # 28 samples; 4 batches of 6 are 24 labelled ones
    assert len(free) == len(known) == Unlabelled(now).updates(8) == Labelled(now).updates(8) == 7
    assert torch.cat([b.index for b in free[:first]]).sort().values.tolist() == list(range(12, 40))
    assert all(b.inputs is None for b in free[first:])
    drawn = torch.cat([b.row for b in known[:first]])
    assert drawn.bincount().tolist() == [2] * 12  # it cycles
    assert torch.equal(torch.cat([b.row for b in known[first:]]).sort().values, drawn.sort().values)
    for b in known:
        assert torch.equal(b.labels, pool()[1][b.index]) and torch.equal(b.index, b.row)
    assert not any("labels" in b for b in free)


def test_a_resumed_epoch_draws_what_an_unbroken_one_would_have():
    now = a_round()
    for stream in (Unlabelled(now), Labelled(now)):
        whole, rest = list(stream.epoch(draw(), 0)), list(stream.epoch(draw(), 3))
        assert len(rest) == len(whole) - 3
        for (one,), (other,) in zip(whole[3:], rest, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[k], other[k]) for k in one)


def test_two_processes_share_every_update():
    now = a_round()
    for stream in (Unlabelled(now), Labelled(now)):
        shares = [[b.get("index") for (b,) in stream.epoch(draw(2, rank), 0)] for rank in (0, 1)]
        whole = [b.get("index") for (b,) in stream.epoch(draw(), 0)]
        for one, other, both in zip(*shares, whole, strict=True):
            assert both is one is other is None or torch.equal(torch.cat([one, other]), both)


def test_unlabelled_samples_are_capped_by_the_number_of_labels():
    limits = []

    class Watched(LFTL):
        def stage(self, i: int, run: Any) -> Any:
            stage = super().stage(i, run)
            limits.append(stage.streams["target"].round.limit)
            return stage

    run(Watched(rounds=3, ratio=0.1, topk=10, cap=True)).fit()
    # 4, 8, 12 labels of 12 in the end: (ceil(24 / n) - 1) * n
    assert limits == [20, 16, 12]


def test_the_backbone_learns_at_a_tenth_of_the_rate_and_the_rate_starts_anew_in_every_round():
    rates: list[tuple[float, list[float], int]] = []

    def listener(trainer: Trainer, record: Any) -> None:
        groups = trainer._optimizers["adapt"].param_groups
        rates.append((trainer.clock.step, [g["lr"] for g in groups], trainer.clock.steps))
        assert all(g["nesterov"] for g in groups)

    made = run(small(backbone="backbone"))
    made.listener = listener
    made.fit()
    for step, (slow, fast), steps in rates:
        assert slow == pytest.approx(fast / 10)
        assert fast == pytest.approx(0.05 * (1 + 10 * (step - 1) / steps) ** -0.75)
    assert sum(step == 1 for step, _, _ in rates) == 3


def test_labels_alone_do_not_run_the_pool():
    sizes = []
    net = model()
    made = run(small(information=0.0, persistence=0.0, mixup=0.0, query="random"), net=net)
    net.head.register_forward_hook(lambda m, a, o: sizes.append(len(o)) if m.training else None)
    made.fit()
    assert set(sizes) <= {4, 8, 6}


def test_batches_smaller_than_the_number_of_classes_are_warned_of():
    with pytest.warns(match="evenly over 3 classes, and one of 2 samples cannot hold them all"):
        run(small(rounds=1), batch_size=2, epochs=None, steps=1).fit()


def test_random_queries_do_not_depend_on_the_model():
    bought = []
    for seed in (0, 1):
        net = model()
        torch.manual_seed(seed)
        nn.init.normal_(net.head.weight)
        made = run(small(query="random"), net=net, epochs=None, steps=1)
        made.fit()
        bought.append(made.method.state["bought"].tolist())
    assert bought[0] == bought[1]


def test_one_label_a_round_is_skipped_by_batch_normalisation_until_there_are_two():
    terms = []
    made = run(LFTL(rounds=2, ratio=1 / POOL), epochs=1)
    made.listener = lambda trainer, record: terms.append(
        (trainer.clock.stage, set(record["terms"]) if record else None)
    )
    made.fit()
    assert not any("labels" in found for stage, found in terms if stage == 0 and found)
    assert any("labels" in found for stage, found in terms if stage == 1 and found)


# Labels that are not bought


def test_labels_that_were_not_bought_change_nothing():
    made = run(small())
    expected = digest(made.fit())
    x, y = pool()
    hidden = torch.full_like(y, 1000)
    bought = made.method.state["bought"]
    hidden[bought] = y[bought]
    assert digest(run(small(), (x, hidden)).fit()) == expected


class Asked(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Answers that are written down."""

    def __init__(self) -> None:
        self.samples: list[int] = []

    def __len__(self) -> int:
        return POOL

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.samples.append(i)
        return torch.zeros(1), pool()[1][i]


def with_oracle(answers: Any) -> dict[str, Data]:
    return {"data": as_data(pool()[0]), "oracle": as_data(answers)}


def test_a_separate_oracle_is_asked_for_what_is_bought_and_nothing_else():
    answers = Asked()
    made = run(small(), with_oracle(answers))
    assert digest(made.fit()) == digest(run(small()).fit())
    assert answers.samples == made.method.state["bought"].tolist()


class Killed(BaseException):
    pass


def test_killed_in_the_middle_of_buying_nothing_is_paid_for_twice(tmp_path):
    class Failing(Asked):
        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            if len(self.samples) == 6:  # two of the second round are paid for
                raise Killed
            return super().__getitem__(i)

    ledger = str(tmp_path / "labels" / "ledger.jsonl")
    whole = run(small(ledger=ledger + "-other"))
    expected = digest(whole.fit())
    first, second = Failing(), Asked()
    with pytest.raises(Killed):
        run(small(ledger=ledger), with_oracle(first), folder=tmp_path / "run").fit()
    torch.manual_seed(99)
    again = run(small(ledger=ledger), with_oracle(second), folder=tmp_path / "run")
    assert digest(again.fit(resume=True)) == expected
    assert first.samples + second.samples == whole.method.state["bought"].tolist()
    lines = [json.loads(line) for line in Path(ledger).read_text().splitlines()]
    assert lines[0] == {"pool": POOL}
    assert [line["sample"] for line in lines[1:]] == whole.method.state["bought"].tolist()


# The oracle


def oracle(ledger: Path | None = None, sold: Any = (), budget: int = 5, answers: Any = None) -> Oracle:
    data = as_data(pool() if answers is None else answers)
    return Oracle(data, budget, CLASSES, torch.tensor(sold, dtype=torch.long), ledger)  # type: ignore[arg-type]


def test_a_ledger_whose_last_line_was_cut_off_is_used_up_to_it(tmp_path):
    path = tmp_path / "ledger"
    oracle(path).buy(torch.tensor([3, 4]))
    path.write_bytes(path.read_bytes()[:-5])
    second = oracle(path)
    assert second.buy(torch.tensor([3, 4, 5])).tolist() == pool()[1][[3, 4, 5]].tolist()
    assert second.asked == 2
    assert [json.loads(line).get("sample") for line in path.read_text().splitlines()] == [None, 3, 4, 5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: oracle(budget=POOL + 1), "budget of 41 labels is larger than the pool, which has 40"),
        (lambda: oracle().buy(torch.tensor([1, 2, 3, 4, 5, 6])), "6 more are too many"),
        (lambda: oracle(sold=[1, 2, 3]).buy(torch.tensor([4, 5, 6])), "3 labels of a budget of 5 are bought"),
        (lambda: oracle(sold=[1]).buy(torch.tensor([1])), r"bought once, asked again for \[1\]"),
        (lambda: oracle().buy(torch.tensor([1, 1])), "bought once"),
        (lambda: oracle().buy(torch.tensor([POOL])), "the samples 0 to 39"),
        (lambda: oracle(answers=pool()[0]).buy(torch.tensor([0])), "sample 0 is missing"),
        (lambda: oracle(answers=(pool()[0], pool()[1] + 7)).buy(torch.tensor([0])), "expected a class of the target"),
    ],
)
def test_what_an_oracle_does_not_sell(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_ledger_of_another_pool_and_other_files_are_refused(tmp_path):
    oracle(tmp_path / "ledger").buy(torch.tensor([0]))
    with pytest.raises(StoreError, match="a pool of 40 samples, this one has 10"):
        oracle(tmp_path / "ledger", answers=(pool()[0][:10], pool()[1][:10]))
    (tmp_path / "notes").write_text("bought some labels\n")
    with pytest.raises(StoreError, match="no ledger"):
        oracle(tmp_path / "notes")


# What cannot work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"ratio": 0.0}, r"it must lie in \(0, 1\]"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"persistence": -1.0}, "must not be negative"),
        ({"query": "contrast"}, "did you mean 'contrastive'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        LFTL(**arguments)


@pytest.mark.parametrize(("rounds", "ratio"), [(10, 0.2), (2, 0.5), (10, 0.001), (10, 0.015)])
def test_rounds_that_buy_more_than_the_pool_or_nothing_are_refused_before_training(rounds, ratio):
    with pytest.raises(InputError, match="a round must buy one at least, and all fewer than the pool has"):
        run(LFTL(rounds=rounds, ratio=ratio)).fit()


def test_a_pool_in_another_order_is_noticed_when_a_run_goes_on(tmp_path):
    data = TensorDataset(*pool())

    def at(order: list[int], listener: Any = None) -> Trainer:
        made = run(small(), {"data": as_data(Subset(data, order))}, folder=tmp_path)
        made.listener = listener
        return made

    def kill(trainer: Trainer, record: Any) -> None:
        if trainer.clock.stage == 1:
            raise Killed

    with pytest.raises(Killed):
        at(list(range(POOL)), kill).fit()
    with pytest.raises(InputError, match="the pool is not the one that labels were bought for"):
        at(list(reversed(range(POOL)))).fit(resume=True)


def test_pools_that_cannot_be_indexed_and_models_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="labels of single samples"):
        run(small(), [pool()]).fit()
    wide = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(32, CLASSES))
    with pytest.raises(ShapeError, match="tap another layer"):
        run(small(features="0"), net=wide).fit()
    with pytest.raises(InputError, match="has 3 answers for a pool of 40"):
        run(small(), {"data": as_data(pool()), "oracle": as_data(torch.zeros(3, 1))}).fit()
    with pytest.raises(InputError, match="one tensor of real numbers"):
        run(small(), (pool()[0].long(), pool()[1])).fit()
    with pytest.raises(LayerError, match="has no layer 'body'"):
        run(small(backbone="body")).fit()


def test_a_label_that_is_no_class_is_refused_when_it_is_bought():
    with pytest.raises(InputError, match="expected a class of the target, 0 to 2"):
        run(small(), (pool()[0], pool()[1] + 5)).fit()
    with pytest.raises(InputError, match="is missing"):
        run(small(), (pool()[0], torch.full((POOL,), IGNORE))).fit()
