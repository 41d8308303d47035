from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CNN, digest, images, trainer
from processes import on_ranks
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.core.run import Run
from transfuse.core.streams import as_data
from transfuse.core.sync import sync_for
from transfuse.distill import KD, WCoRD
from transfuse.losses import nce

WIDTH = 6


def drawn(rows: int = 12, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


class Identity(nn.Module):
    """A model whose features and logits are its inputs, so that a test chooses them."""

    def forward(self, features: Tensor) -> Tensor:
        return features


def set_up(method: WCoRD, samples: int = 12, labels: Tensor | None = None) -> WCoRD:
    """A method that is ready to compare features `(samples, WIDTH)` under the tap `"out"`."""
    method._ids = torch.arange(samples)
    data = {"inputs": drawn(samples)} | ({} if labels is None else {"labels": labels})
    features = {"out": drawn(samples)}

    class Ready(Run):
        def __call__(self, *arguments: Any, **options: Any) -> Outputs:
            return Outputs(drawn(samples, 3), features)

    run = Ready({"target": Identity(), "source": Identity()}, {"data": as_data(data)})
    method.setup(run, Batch(data, index=torch.arange(samples)))
    return method


def wcord(**options: Any) -> WCoRD:
    return WCoRD("out", "out", width=8, **{"temperature": 0.5, **options})


def terms(method: WCoRD, student: Tensor, teacher: Tensor, index: Tensor | None = None) -> Losses:
    logits = torch.zeros(len(student), 3)
    batch = Batch(inputs=student, index=torch.arange(len(student)) if index is None else index)
    return method.loss(Outputs(logits, {"out": student}), Outputs(logits, {"out": teacher}), batch, Clock())


def same_projections(method: WCoRD) -> WCoRD:
    """Both sides with the same projection, the identity on what it does not cut off."""
    for side in (method.ours, method.theirs):
        for p in side.linear.parameters():
            p.data.zero_()
        weight = side.linear.parametrizations.weight.original if side.lipschitz else side.linear.weight
        weight.data[:WIDTH] = torch.eye(WIDTH)
        method.ours.linear.eval()
        for _ in range(20):
            side.advance(torch.arange(0), torch.zeros(0, 8))
    return method


# The critic


def test_both_projections_have_spectral_norm_one_after_some_updates():
    method = set_up(wcord())
    for side in (method.ours, method.theirs):
        side.linear.parametrizations.weight.original.data = 5 * drawn(8)
        for _ in range(50):
            side.advance(torch.arange(0), torch.zeros(0, 8))
        assert torch.linalg.matrix_norm(side.linear.weight, 2).item() == pytest.approx(1.0, abs=1e-3)


def test_the_critic_is_lipschitz_before_rows_get_length_one():
    method = set_up(wcord())
    for side in (method.ours, method.theirs):
        for _ in range(20):
            side.advance(torch.arange(0), torch.zeros(0, 8))
        a, b = drawn(100, seed=1), drawn(100, seed=2)
        directions = nn.functional.normalize(drawn(100, 8, seed=3), dim=1)  # of the other side
        critic = [(side.linear(x) * directions).sum(1) / method.temperature for x in (a, b)]
        assert ((critic[0] - critic[1]).abs() <= 1.001 * (a - b).norm(dim=1) / method.temperature).all()


def test_forward_passes_make_no_power_iteration_and_an_update_makes_one():
    method = set_up(wcord())
    norm = method.ours.linear.parametrizations.weight
    norm.original.data = torch.randn(8, WIDTH)
    before, v = norm[0]._u.clone(), norm[0]._v.clone()
    method.train()
    for _ in range(3):
        terms(method, drawn(), drawn(seed=1))
    assert torch.equal(norm[0]._u, before)
    method.ours.advance(torch.arange(0), torch.zeros(0, 8))
    expected = nn.functional.normalize(norm.original @ v, dim=0)
    assert torch.allclose(norm[0]._u, expected, atol=1e-6)


def test_without_the_norm_the_projections_are_plain():
    method = set_up(wcord(lipschitz=False))
    assert isinstance(method.ours.linear, nn.Linear) and not hasattr(method.ours.linear, "parametrizations")


# Global


def test_wasserstein_is_zero_on_the_whole_where_the_sides_are_independent():
    method = set_up(wcord(mode="wasserstein", local_weight=0, negatives=5), 40)
    torch.manual_seed(0)
    values = []
    for _ in range(200):
        for side in (method.ours, method.theirs):
            side.memory.update(torch.arange(40), torch.randn(40, 8), momentum=0)
        student, teacher = torch.randn(2, 40, WIDTH)
        for side in (method.ours, method.theirs):  # past embeddings of features as random as these
            side.memory.update(torch.arange(40), side(torch.randn(40, WIDTH)), momentum=0)
        values.append(terms(method, student, teacher)["global"].mean.item())
    values = torch.tensor(values)
    assert values.mean().abs() < 5 * values.std() / 200**0.5
    assert values.std() > 0.01


def test_wasserstein_is_negative_where_the_sides_agree():
    method = same_projections(set_up(wcord(mode="wasserstein")))
    features = drawn()
    assert terms(method, features, features)["global"].mean.item() < -0.5


@pytest.mark.parametrize("remembered", [False, True])
def test_wasserstein_is_the_mean_critic_of_negatives_less_that_of_the_pair_on_both_sides(remembered):
    method = set_up(wcord(mode="wasserstein", negatives=3, remembered=remembered))
    torch.manual_seed(0)
    found = terms(method, drawn(), drawn(seed=1))["global"].mean.item()
    torch.manual_seed(0)
    others = method.others.draw(torch.arange(12), 3)
    s, t = method.ours(drawn()), method.theirs(drawn(seed=1))
    total = 0.0
    for i in range(12):
        for anchor, partner, bank in (
            (s[i], t[i], method.theirs.memory["rows"]),
            (t[i], s[i], method.ours.memory["rows"]),
        ):
            critic = [(anchor @ bank[j] / 0.5).item() for j in others[i]]
            pair = anchor @ (bank[i] if remembered else partner) / 0.5
            total += (sum(critic) / 3 - pair.item()) / 12
    assert found == pytest.approx(total, rel=1e-4)


def test_nce_with_calibration_divides_by_the_mean_over_the_memory():
    torch.manual_seed(0)
    method = set_up(wcord(calibrate=True, negatives=11))
    s, bank = method.ours(drawn()), method.theirs.memory["rows"]
    expected = torch.log(12 * (s @ bank.T / 0.5).exp().mean())
    assert method.theirs.log_scale.item() == pytest.approx(expected.item(), rel=1e-5)
    found = terms(method, drawn(), drawn())["global"].mean.item()
    # A critic that knows nothing says of each of K + 1 that it is the partner with probability 1 / (K + 1).
    ignorant = 2 * nce(-torch.log(torch.tensor([12.0])), -torch.log(torch.full((1, 11), 12.0)), population=12).item()
    assert found == pytest.approx(ignorant, rel=0.25)


def test_negatives_come_from_other_classes_where_asked_for():
    labels = torch.arange(12) % 3
    method = set_up(wcord(other_classes=True), labels=labels)
    drawn_ones = method.others.draw(torch.arange(12), 200)
    assert (labels[drawn_ones] != labels[:, None]).all()


def test_the_global_term_depends_on_which_teacher_row_belongs_to_which_student_row_and_the_local_does_not():
    method = set_up(wcord())
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))

    def found(student: Tensor) -> tuple[float, float]:
        torch.manual_seed(0)
        values = terms(method, student, drawn(seed=1))
        return values["global"].mean.item(), values["local"].mean.item()

    straight, permuted = found(drawn()), found(drawn()[order])
    assert straight[0] != pytest.approx(permuted[0], rel=1e-3)
    assert straight[1] == pytest.approx(permuted[1], rel=1e-4)


# Local


@pytest.mark.parametrize("solver", ["ipot", "sinkhorn"])
def test_two_exchanged_points_are_carried_onto_each_other_for_nothing(solver):
    method = same_projections(set_up(wcord(solver=solver), 2))
    points = torch.eye(WIDTH)[:2]
    s, t = method.ours(points), method.theirs(points.flip(0))
    assert terms(method, points, points.flip(0))["local"].mean.item() == pytest.approx(0.0, abs=1e-3)
    assert (1 - (s * t).sum(1)).mean().item() == pytest.approx(1.0), "the cost of the pairs as they come"


def test_the_local_cost_lies_between_the_cheapest_and_that_of_the_pairs():
    from scipy.optimize import linear_sum_assignment

    method = set_up(wcord())
    s, t = method.ours(drawn()), method.theirs(drawn(seed=1))
    cost = (1 - t @ s.T).detach()
    cheapest = cost.numpy()[linear_sum_assignment(cost.numpy())].mean()
    found = terms(method, drawn(), drawn(seed=1))["local"].mean.item()
    assert cheapest - 1e-4 <= found <= cheapest + 0.02 < cost.diagonal().mean().item()


def test_cutting_the_cost_makes_near_pairs_free():
    method, cut = set_up(wcord()), set_up(wcord(cut=0.5))
    cut.load_state_dict(method.state_dict())
    values = [terms(m, drawn(), drawn(seed=1))["local"].mean.item() for m in (method, cut)]
    assert 0 <= values[1] < values[0]


# Memory


def test_after_an_update_the_rows_of_the_batch_have_moved_half_way_and_no_others():
    student, teacher = CNN(), CNN(width=6, seed=1)
    method = WCoRD(width=8)
    seen: list[Any] = []

    class Noting(WCoRD):
        def after_update(self, phase: Any, values: Any, run: Any) -> None:
            rows, s, _ = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
            before = self.ours.memory["rows"].clone()
            super().after_update(phase, values, run)
            seen.append((rows, s, before, self.ours.memory["rows"].clone()))

    method = Noting(width=8)
    trainer(method, student, teacher, images(12), micro_batch=3).fit()
    for rows, s, before, after in seen:
        assert len(rows.unique()) == 6, "the whole update, over both micro-batches"
        assert torch.allclose(after[rows], nn.functional.normalize(0.5 * before[rows] + 0.5 * s, dim=1), atol=1e-6)
        rest = torch.ones(12, dtype=torch.bool).index_fill(0, rows, False)
        assert torch.equal(after[rest], before[rest])
        assert torch.allclose(after.norm(dim=1), torch.ones(12))
    assert method._seen == []


def two_processes(folder: Path, rank: int) -> None:
    found = {}
    for name, options in {"whole": {}, "labels alone": {"global_weight": 0, "local_weight": 0}}.items():
        method, student = WCoRD(width=8, **options), CNN()
        trainer(method, student, CNN(width=6, seed=1), images(12), sync=sync_for("cpu")).fit()
        found[name] = digest(student), digest(method), method.ours.memory["rows"].tolist()
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()


def test_processes_remember_the_same_and_what_one_alone_would(tmp_path):
    one, other = on_ranks(two_processes, tmp_path)
    assert one == other
    method = WCoRD(width=8, global_weight=0, local_weight=0)
    trainer(method, CNN(), CNN(width=6, seed=1), images(12)).fit()
    assert torch.allclose(method.ours.memory["rows"], torch.tensor(one["labels alone"][2]), atol=1e-5)


def test_the_memory_is_keyed_by_the_ids_of_the_root_data_set():
    inputs, labels = images(20)
    subset = torch.utils.data.Subset(torch.utils.data.TensorDataset(inputs, labels), [3, 5, 7, 11, 13, 17])
    method = WCoRD(width=8)
    trainer(method, CNN(), CNN(width=6, seed=1), subset, batch_size=3).fit()
    assert method.ours.memory["ids"].tolist() == [3, 5, 7, 11, 13, 17]


def test_gradients_reach_the_student_and_both_projections_but_neither_teacher_nor_memory():
    student, teacher = CNN(), CNN(width=6, seed=1)
    method = WCoRD(width=8, labels=0)
    before = digest(teacher)
    trainer(method, student, teacher, images(12), steps=1).fit()
    assert digest(teacher) == before
    assert {n.split(".")[0] for n, _ in method.named_parameters()} == {"ours", "theirs"}
    assert not any("memory" in n for n, _ in method.named_parameters())


@pytest.mark.parametrize("options", [{"calibrate": True}, {"mode": "wasserstein"}])
def test_each_sample_learns_to_find_its_own_teacher(options):
    """The nearest of 24 teacher rows is the right one for one sample in 24 by chance."""
    method = WCoRD(width=16, labels=0, local_weight=0, **options)
    trainer(method, CNN(), CNN(width=6, seed=1), images(24)[0], steps=200, optimizer="adam", lr=0.01).fit()
    nearest = (method.ours.memory["rows"] @ method.theirs.memory["rows"].T).argmax(1)
    assert (nearest == torch.arange(24)).float().mean() > 0.2


def test_a_teacher_of_other_classes_and_another_modality_is_welcome():
    class Both(nn.Module):
        """Two networks that each look at their own part of a sample."""

        def __init__(self, part: str, classes: int):
            super().__init__()
            self.part, self.net = part, CNN()
            self.net.fc = nn.Linear(8, classes)

        def forward(self, image: Tensor, edges: Tensor) -> Tensor:
            return self.net({"image": image, "edges": edges}[self.part])

    pairs = {"image": images(12)[0], "edges": images(12, seed=1)[0]}
    run = trainer(WCoRD(width=8, labels=0), Both("edges", 3), Both("image", 5), pairs)
    run.fit()
    assert set(run.history[0]["terms"]) == {"global", "local"}


def test_adds_with_other_methods():
    run = trainer(KD(4) + 0.5 * WCoRD(labels=0, width=8), CNN(), CNN(width=6, seed=1), images(12))
    run.fit()
    assert set(run.history[0]["terms"]) == {"kd", "labels", "global", "local"}


# What does not fit


def fit(method: WCoRD, data: Any, **options: Any) -> None:
    trainer(method, CNN(), CNN(width=6, seed=1), data, **options).fit()


def test_says_what_does_not_fit_before_training():
    with pytest.raises(InputError, match="12 negatives need more samples than that, found 12"):
        fit(WCoRD(negatives=12), images(12))
    with pytest.raises(InputError, match="pass a data set or tensors"):
        fit(WCoRD(), [images(4), images(4)])
    with pytest.raises(InputError, match="found one: use larger"):
        fit(WCoRD(), images(4), batch_size=1)
    with pytest.raises(InputError, match="found 4 with 3 different ids"):
        fit(WCoRD(), {"inputs": images(4)[0], "index": torch.tensor([0, 1, 2, 2])})
    with pytest.raises(InputError, match="data has no labels"):
        fit(WCoRD(other_classes=True), images(4)[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "nse"}, "unknown mode 'nse': did you mean 'nce'"),
        ({"solver": "emd"}, "unknown solver 'emd'"),
        ({"mode": "wasserstein", "lipschitz": False}, "has no bound"),
        ({"temperature": 0.0}, "must be positive"),
        ({"negatives": 0}, "must be positive"),
    ],
)
def test_refuses_arguments_out_of_range(wrong, message):
    with pytest.raises(InputError, match=message):
        WCoRD(**wrong)
