"""ParetoDA: what each group of parameters gets, what the solver is asked, and the invariants of its sheet."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from domains import domains, source
from helpers import CLASSES, CNN, assert_equal_gradients, digest, first_gradients, images, trainer
from torch import Tensor
from torch.nn import functional as F

from transfuse.adapt import ParetoDA
from transfuse.adapt.discriminator import refined
from transfuse.core.errors import DivergenceError, InputError, MethodError
from transfuse.core.solvers import guided_descent
from transfuse.core.streams import as_data
from transfuse.losses import mutual_information

SETTINGS: dict[str, Any] = {"batch_size": 8, "shuffle": False}
OPTIONS: dict[str, Any] = {"hidden": 8, "held_out": 1 / 3, "extractor_lr": 1.0}


class Watched(ParetoDA):
    """Notes what the solver was given and what it gave, at every update."""

    def __init__(self, **options: Any):
        super().__init__(**{**OPTIONS, **options})
        self._rows: list[dict[str, Tensor]] = []
        self._solved: list[tuple[Tensor, Tensor, bool]] = []
        self._batches: list[dict[str, Tensor]] = []

    def losses(self, batches: Any, run: Any) -> Any:
        self._batches.append({name: batch.index for name, batch in batches.items()})
        return super().losses(batches, run)

    def direction(self, rows: Any, run: Any) -> Any:
        self._rows.append({name: torch.cat([g.flatten() for g in row]).double() for name, row in rows.items()})
        return super().direction(rows, run)

    def _solve(self, products: Tensor, guide: float) -> Any:
        found = super()._solve(products, guide)
        self._solved.append((products, found[0], found[1]))
        return found


def run(method: ParetoDA, model: CNN | None = None, **settings: Any) -> CNN:
    settings = SETTINGS | {"steps": 5} | settings
    made: CNN = trainer(method, model or CNN(), None, domains(), **settings).fit()
    return made


# The refined prediction


def test_a_discriminator_that_cannot_tell_refines_nothing():
    logits = torch.randn(5, 4)
    assert torch.allclose(refined(logits, torch.zeros(5, 4, 2)).exp(), logits.softmax(1))


def test_refined_probabilities_are_those_of_bayes_rule():
    logits, domains_ = torch.randn(5, 4).double(), torch.randn(5, 4, 2).double()
    joint = logits.softmax(1) * domains_.softmax(2)[..., 1]
    found = refined(logits, domains_).exp()
    assert torch.allclose(found, joint / joint.sum(1, keepdim=True))
    assert torch.allclose(found.sum(1), torch.ones(5).double())


def test_the_released_code_multiplies_logits_instead():
    logits, domains_ = torch.randn(5, 4), torch.randn(5, 4, 2)
    assert torch.allclose(refined(logits, domains_, multiply_logits=True), logits * domains_.softmax(2)[..., 1])


def test_no_gradient_flows_into_the_discriminators_through_a_refined_prediction():
    logits, domains_ = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, 2, requires_grad=True)
    for multiply in (False, True):
        mutual_information(refined(logits, domains_, multiply)).backward()
        assert logits.grad is not None and logits.grad.abs().max() > 0
        assert domains_.grad is None


# The losses and who gets which gradient


def class_domains(method: ParetoDA, f: Tensor) -> Tensor:
    """The probabilities of every D_k, one network after the other."""
    found, inner = [], method.class_domains
    for k in range(CLASSES):
        x = f
        for i, (w, b) in enumerate(zip(inner.weights, inner.biases, strict=True)):
            x = F.linear(x if i == 0 else x.relu(), w[k].T, b[k, 0])
        found.append(x.softmax(1))
    return torch.stack(found, 1)


def by_hand(method: ParetoDA, model: CNN, batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """L1, L2 without its reversal, L3, Lv and L_cd, written out from the docstring."""
    pictures, labels = source()
    x_s, y, x_t, x_v = (
        pictures[batches["source"]],
        labels[batches["source"]],
        *(images(24)[0][batches[n]] for n in ("target", "held out")),
    )
    f_s, f_t, f_v = (model.layer2(model.layer1(x).tanh()).tanh().mean((2, 3)) for x in (x_s, x_t, x_v))
    o_s, o_t, o_v = (model.fc(f) for f in (f_s, f_t, f_v))
    d_s, d_t = (method.domains(f)[:, 0].sigmoid() for f in (f_s, f_t))
    c_s, c_t, c_v = (class_domains(method, f.detach()) for f in (f_s, f_t, f_v))

    def r(logits: Tensor, c: Tensor) -> Tensor:
        joint = logits.softmax(1) * c[..., 1].detach()
        return joint / joint.sum(1, keepdim=True)

    def information(p: Tensor) -> Tensor:
        mean = p.mean(0)
        return -(mean * mean.log()).sum() + (p * p.log()).sum(1).mean()

    own = torch.stack([(y == k).float() * -c_s[:, k, 0].log() for k in range(CLASSES)]).mean(1)
    other = torch.stack([r(o_t, c_t).detach()[:, k] * -c_t[:, k, 1].log() for k in range(CLASSES)]).mean(1)
    return {
        "L1": F.cross_entropy(o_s, y),
        "L2": (-(1 - d_s).log().mean() - d_t.log().mean()) / 2,
        "L3": -information(r(o_t, c_t)),
        "Lv": -information(r(o_v, c_v)),
        "Lcd": (own + other).sum() / CLASSES,
    }


def flat(value: Tensor, params: list[Any]) -> Tensor:
    found = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(params, found, strict=True)])


def parameters(method: ParetoDA, model: CNN) -> dict[str, list[Any]]:
    return {
        "extractor": [*model.layer1.parameters(), *model.layer2.parameters()],
        "heads": [*model.fc.parameters(), *method.domains.parameters(), *method.class_domains.parameters()],
    }


class Checked(Watched):
    """Computes the losses by hand, and their gradients, at the moment the direction is solved for."""

    def direction(self, rows: Any, run_: Any) -> Any:
        model = run_["target"]
        values = by_hand(self, model, self._batches[-1])
        groups = parameters(self, model).items()
        self._hand = {f"{n}/{group}": flat(v, params) for n, v in values.items() for group, params in groups}
        return super().direction(rows, run_)


def one_update(method: ParetoDA) -> dict[str, Tensor]:
    """The gradients of one update."""
    model, found = CNN(), {}

    def take(*_: Any) -> None:
        for group, params in parameters(method, model).items():
            found[group] = torch.cat([p.grad.flatten() for p in params])

    trainer(method, model, None, domains(), listener=take, steps=1, **SETTINGS).fit()
    return found


def test_rows_and_the_heads_gradient_are_those_of_the_losses_written_out():
    method = Checked(mode="descent")
    found, rows, hand = one_update(method), method._rows[0], method._hand
    assert torch.allclose(rows["labels"].float(), hand["L1/extractor"], atol=1e-6)
    assert torch.allclose(rows["surrogate"].float(), hand["L3/extractor"], atol=1e-6)
    assert torch.allclose(rows["guide"].float(), hand["Lv/extractor"], atol=1e-6)
    assert rows["source domain"].abs().max() == 0  # the reversal starts with strength 0
    assert rows["source class domain"].abs().max() == 0 and rows["target class domain"].abs().max() == 0
    expected = hand["L1/heads"] + hand["L2/heads"] + hand["Lcd/heads"]
    assert torch.allclose(found["heads"], expected, atol=1e-6)
    assert hand["L3/heads"].abs().max() > 1e-5  # they would get it if it were not left out


def test_the_alignment_row_is_reversed_by_the_warm_start():
    class Later(Checked):
        def losses(self, batches: Any, run_: Any) -> Any:
            run_.clock.step += 500
            try:
                return super().losses(batches, run_)
            finally:
                run_.clock.step -= 500

    method = Later(mode="descent", warmup=250.0)
    one_update(method)
    found = (method._rows[0]["source domain"] + method._rows[0]["target domain"]) / 2
    strength = 2 / (1 + math.exp(-500 / 250)) - 1
    assert torch.allclose(found.float(), -strength * method._hand["L2/extractor"], atol=1e-7)
    assert found.abs().max() > 1e-5


def objectives(rows: dict[str, Tensor]) -> Tensor:
    return torch.stack([rows["labels"], (rows["source domain"] + rows["target domain"]) / 2, rows["surrogate"]])


@pytest.mark.parametrize("mode", ["auto", "guidance", "descent", "fixed"])
def test_the_extractor_gets_three_times_the_weighted_gradients(mode):
    method = Watched(mode=mode)
    found = one_update(method)
    g = objectives(method._rows[0])
    products, v = g @ g.T, method._rows[0]["guide"]
    if mode == "fixed":
        expected = g.sum(0)
    else:
        expected = 3 * guided_descent(products, g @ v, follow=mode != "descent").weights @ g
    assert torch.allclose(found["extractor"].double(), expected, atol=1e-6)
    assert found["extractor"].abs().max() > 1e-4


def test_the_released_code_adds_two_gradients_and_is_always_in_descent():
    method = Watched(mode="auto", release_mode=True)
    found = one_update(method)
    g = objectives(method._rows[0])
    solved = guided_descent(g @ g.T, g @ method._rows[0]["guide"], follow=False)
    weights = torch.ones(3).double() if solved.dropped else solved.weights
    assert torch.allclose(found["extractor"].double(), 3 * weights @ g + g[0] + g[1], atol=1e-6)
    assert int(method.guided) == 0


def test_normalised_gradients_have_the_mean_length_before_they_are_weighed():
    method = Watched(mode="descent", normalise=True)
    found = one_update(method)
    g = objectives(method._rows[0])
    length = g.norm(dim=1)
    scale = torch.where(length > 0, length.mean() / length.clamp(min=1e-30), 0.0)
    even = g * scale[:, None]
    weights = guided_descent(even @ even.T, even @ method._rows[0]["guide"], follow=False).weights
    assert torch.allclose(found["extractor"].double(), 3 * weights @ even, atol=1e-6)


def test_the_extractor_may_learn_more_slowly():
    moved = {}
    for factor in (1.0, 0.1):
        model = CNN()
        method = ParetoDA(**{**OPTIONS, "extractor_lr": factor, "mode": "fixed"})
        run(method, model, steps=1, weight_decay=0.0, momentum=0.0)
        moved[factor] = [p.detach() - q.detach() for p, q in zip(model.parameters(), CNN().parameters(), strict=True)]
    for i, (full, slow) in enumerate(zip(moved[1.0], moved[0.1], strict=True)):
        factor = 0.1 if i < 4 else 1.0  # the head comes last
        assert torch.allclose(slow, factor * full, atol=1e-7)


# The direction


def test_in_descent_no_step_raises_an_objective_and_fixed_weights_do():
    descent, fixed = Watched(mode="descent"), Watched(mode="fixed", warmup=10.0)
    for method in (descent, fixed):
        run(method, steps=40, lr=0.3)
        assert int(method.updates) == 40
    assert int(descent.conflicts) == 0
    for products, weights, _ in descent._solved:
        assert (weights >= 0).all() and float(weights.sum()) == pytest.approx(3.0)
        assert (products[:3, :3] @ weights >= -1e-8 * products.abs().max()).all()
    assert int(fixed.conflicts) > 0


def test_auto_follows_the_guide_until_it_is_good_enough():
    poor, good = Watched(mode="auto"), Watched(mode="auto", eps=10.0)
    for method in (poor, good):
        run(method)
    assert int(poor.guided) == 5 and int(good.guided) == 0
    assert all(follow for _, _, follow in poor._solved)


def test_what_the_solver_gives_up_is_counted(monkeypatch):
    answers = iter([0, 1, 2, 2, 1])
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    monkeypatch.setattr("transfuse.adapt.paretoda.guided_descent", lambda *_: (uniform, next(answers)))
    method = ParetoDA(mode="descent", **OPTIONS)
    run(method)
    assert method.dropped.tolist() == [2, 2] and int(method.updates) == 5


def test_gradients_that_are_not_finite_stop_the_run():
    class Broken(ParetoDA):
        def direction(self, rows: Any, run_: Any) -> Any:
            rows["surrogate"][0].fill_(float("nan"))
            return super().direction(rows, run_)

    with pytest.raises(DivergenceError, match="not finite"):
        run(Broken(**OPTIONS))


# The held-out split


def test_a_tenth_of_the_target_is_held_out_and_never_trained_on():
    method = Watched(held_out=0.1)
    data = {"data": as_data(images(80)), "source": as_data(source())}
    trainer(method, CNN(), None, data, steps=30, batch_size=8).fit()
    trained, held = (torch.cat([b[name] for b in method._batches]).unique() for name in ("target", "held out"))
    assert len(held) == 8 and len(trained) == 72
    assert not set(held.tolist()) & set(trained.tolist())


def test_the_split_is_drawn_by_the_seed():
    def held(seed: int) -> list[int]:
        method = ParetoDA(**OPTIONS)
        run(method, seed=seed, steps=1)
        return method.order.tolist()

    assert held(0) == held(0) != held(1)


def test_held_out_batches_move_no_running_statistics():
    """With their weights at zero, only the pass over both domains may move them."""
    model = CNN(norm=True)
    method = Watched(mode="descent")
    trainer(method, model, None, domains(), steps=1, **SETTINGS).fit()
    reference = CNN(norm=True)
    batches = method._batches[0]
    reference.train()(torch.cat([source()[0][batches["source"]], images(24)[0][batches["target"]]]))
    assert torch.allclose(model.norm.running_mean, reference.norm.running_mean, atol=1e-6)
    assert int(model.norm.num_batches_tracked) == 1


def test_target_labels_change_not_a_bit():
    pictures, labels = images(24)
    found = set()
    for given in (pictures, (pictures, labels), (pictures, labels.flip(0))):
        method = ParetoDA(**OPTIONS)
        model = trainer(method, CNN(), None, domains(given), steps=4, **SETTINGS).fit()
        found.add(digest(model))
    assert len(found) == 1


def test_micro_batches_change_the_gradient_by_what_couples_samples_alone():
    """The surrogate is of a micro-batch; without it the gradients on heads are equal, however batches are cut."""
    whole, cut = (
        first_gradients(ParetoDA(mode="fixed", **OPTIONS), CNN(), None, domains(), micro_batch=m, batch_size=8)
        for m in (None, 4)
    )
    heads = [n for n in whole if "layer" not in n]
    assert len(heads) == 2 + 6 + 6
    assert_equal_gradients({n: whole[n] for n in heads}, {n: cut[n] for n in heads})


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "descend"}, "did you mean 'descent'"),
        ({"held_out": 0.0}, "share between 0 and 1"),
        ({"held_out": 1.0}, "share between 0 and 1"),
        ({"hidden": 0}, "must be positive"),
        ({"warmup": 0.0}, "must be positive"),
        ({"extractor_lr": 0.0}, "must be positive"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ParetoDA(**options)


def test_data_that_cannot_be_held_out_is_refused():
    with pytest.raises(InputError, match="holds out none"):
        trainer(ParetoDA(held_out=0.01), CNN(), None, domains(), **SETTINGS).fit()
    batches = [images(12), images(12, seed=1)]
    with pytest.raises(InputError, match="pass a data set or tensors"):
        trainer(ParetoDA(), CNN(), None, domains(batches), **SETTINGS).fit()
    with pytest.raises(InputError, match="'held out' has 2 samples, fewer than one batch of 8"):
        trainer(ParetoDA(held_out=0.1), CNN(), None, domains(), **SETTINGS).fit()


def test_it_cannot_be_added_to_what_has_one_phase():
    with pytest.raises(MethodError, match="stages of its own"):
        ParetoDA() + ParetoDA()
