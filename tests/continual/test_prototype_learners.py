"""SimpleCIL and ADAM: rows are class means, encoders stay what they were, and modules start as the identity."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from continual.examples_continual import Net, ready, tasks, trainer
from helpers import digest
from sklearn.neighbors import NearestCentroid
from torch import Tensor, nn

from transfuse.continual import ADAM, PrototypeModel, SimpleCIL
from transfuse.continual.heads import Prototypes
from transfuse.continual.pet import Adapter, Prompted, ScaleShift, with_pet
from transfuse.core.errors import InputError, LayerError, ShapeError
from transfuse.core.head import headless
from transfuse.core.trainer import Trainer
from transfuse.losses.clustering import cosine_logits
from transfuse.models import ViTTiny

DISJOINT = ((0, 1), (2, 3), (4,))


def vit(**options: Any) -> ViTTiny:
    torch.manual_seed(0)
    return ViTTiny(6, 3, dim=8, depth=2, heads=2, classes=5, **options)


def features(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return headless(net, "head" if isinstance(net, ViTTiny) else "fc").eval()(x)


def run_of(method: SimpleCIL, data: Any, net: nn.Module | None = None, **options: Any) -> tuple[Trainer, Any]:
    run = trainer(method, Net() if net is None else net, data, **options)
    return run, run.fit().eval()


# Prototypes


def test_rows_are_class_means_in_float64():
    data, net = tasks(DISJOINT), Net()
    run, model = run_of(SimpleCIL(), data, net)
    assert model.prototypes["classes"].tolist() == [0, 1, 2, 3, 4]
    for row, label in enumerate(range(5)):
        mine = torch.cat([features(net, x)[y == label].double() for x, y in data])
        assert torch.allclose(run.method.prototypes.weight[row], mine.mean(0), atol=1e-7)
    assert run.method.prototypes["sum"].dtype == torch.float64
    assert run.method.prototypes["count"].tolist() == [12.0] * 5


def test_means_are_of_raw_features_unless_asked():
    data, net = tasks(DISJOINT), Net()
    run, _ = run_of(SimpleCIL(normalise=True), data, net)
    mine = nn.functional.normalize(features(net, data[0][0])[data[0][1] == 0].double(), dim=1)
    assert torch.allclose(run.method.prototypes.weight[0], mine.mean(0), atol=1e-7)


def test_rows_do_not_depend_on_the_order_of_tasks_or_samples():
    data, net = tasks(DISJOINT), Net()
    turned = [(x.flip(0), y.flip(0)) for x, y in reversed(data)]
    (one, _), (other, _) = (
        run_of(SimpleCIL(), data, copy.deepcopy(net)),
        run_of(SimpleCIL(), turned, copy.deepcopy(net)),
    )
    order = other.method.prototypes["classes"].argsort()
    assert other.method.prototypes["classes"][0] == 4
    assert torch.allclose(one.method.prototypes.weight, other.method.prototypes.weight[order], atol=1e-6)


@pytest.mark.parametrize("method", [SimpleCIL(), ADAM()], ids=repr)
def test_old_rows_never_change(method):
    rows: list[Tensor] = []

    class Spy(type(method)):  # type: ignore[misc]
        def remember(self, task: int, run: Any) -> None:
            super().remember(task, run)
            rows.append(self.prototypes.weight.clone())

    method.__class__ = Spy
    run_of(method, tasks(DISJOINT))
    assert [len(r) for r in rows] == [2, 4, 5]
    assert torch.equal(rows[0], rows[2][:2]) and torch.equal(rows[1], rows[2][:4])


def test_predictions_are_those_of_nearest_centroids_on_the_sphere():
    data, net = tasks(DISJOINT, noise=2.0), Net()
    run, model = run_of(SimpleCIL(), data, net)
    oracle = NearestCentroid()
    centroids = nn.functional.normalize(run.method.prototypes.weight, dim=1).numpy()
    oracle.fit(centroids, np.arange(5))  # one sample each: the centroids themselves
    x = tasks(DISJOINT, seed=5, noise=2.0)[1][0]
    ours = model(x).argmax(1)
    theirs = oracle.predict(nn.functional.normalize(features(net, x).double(), dim=1).numpy())
    assert ours.tolist() == theirs.tolist() and len(set(ours.tolist())) > 1


def test_scores_are_cosines_and_unseen_classes_are_ruled_out():
    halves: list[PrototypeModel] = []

    class Spy(SimpleCIL):
        def remember(self, task: int, run: Any) -> None:
            super().remember(task, run)
            halves.append(self.deploy(run["target"]))

    data = tasks(DISJOINT)
    run_of(Spy(), data)
    first = halves[0].eval()(data[0][0])
    assert first.shape == (24, 5) and torch.isneginf(first[:, 2:]).all()
    assert first[:, :2].abs().max() <= 1 + 1e-6
    assert halves[-1].eval()(data[0][0]).isfinite().all()


def test_a_class_that_comes_back_is_averaged_over_all_its_samples_or_refused():
    data, net = tasks(((0, 1), (1, 2))), Net()
    run, _ = run_of(SimpleCIL(), data, net)
    mine = torch.cat([features(net, x)[y == 1].double() for x, y in data])
    assert run.method.prototypes["classes"].tolist() == [0, 1, 2]
    assert torch.allclose(run.method.prototypes.weight[1], mine.mean(0), atol=1e-7)
    assert run.method.prototypes["count"].tolist() == [12, 24, 12]
    with pytest.raises(InputError, match=r"the classes \[1\] come back in task '1': returning='mean'"):
        run_of(SimpleCIL(returning="reject"), data)


def test_asking_for_classes_that_were_not_seen_is_an_error():
    _, model = run_of(SimpleCIL(), tasks(((0, 1), (3,))))
    x = tasks(((0, 1), (3,)))[1][0]
    assert model.predict(x, classes=[0, 3]).unique().tolist() == [3]
    assert set(model.predict(x, classes=[0, 1]).tolist()) <= {0, 1}
    with pytest.raises(InputError, match=r"the classes \[2, 9\] have no prototype yet; seen were \[0, 1, 3\]"):
        model.predict(x, classes=[0, 2, 9])


def test_features_of_another_width_are_refused():
    prototypes = Prototypes()
    prototypes.add(torch.randn(3, 4), torch.tensor([0, 0, 1]))
    with pytest.raises(ShapeError, match="the prototypes have 4 features, found 5"):
        prototypes.add(torch.randn(3, 5), torch.tensor([0, 0, 1]))


def test_a_task_without_samples_of_a_class_is_an_error():
    data = tasks(DISJOINT)
    data[2] = (data[2][0], torch.full_like(data[2][1], -100))
    with pytest.raises(InputError, match="task '2' has no labelled sample"):
        run_of(SimpleCIL(), data)


def test_a_model_that_returns_no_features_of_its_own_is_refused():
    with pytest.raises(LayerError, match="no linear layer"):
        run_of(SimpleCIL(), tasks(DISJOINT), nn.Sequential(nn.Conv2d(1, 5, 6), nn.Flatten()))


@pytest.mark.parametrize("method", [SimpleCIL(), ADAM()], ids=repr)
def test_what_is_validated_is_what_is_deployed(method):
    scores: list[float] = []
    data = tasks(DISJOINT)

    def validate(model: nn.Module) -> float:
        scores.append(float((model.eval()(data[1][0]).argmax(1) == data[1][1]).float().mean()))
        return scores[-1]

    run_of(method, data, steps=3, validate=validate)
    assert scores[0] == 0.0 and scores[1] > 0.8 and len(scores) == 3


# What stays


@pytest.mark.parametrize("method", [SimpleCIL(), ADAM(), ADAM(pet="bn"), ADAM(pet="ssf")], ids=repr)
def test_the_encoder_stays_bit_identical_and_so_do_its_statistics(method):
    net = Net()
    before = digest(net)
    run_of(method, tasks(DISJOINT), net, steps=10)
    assert digest(net) == before


def test_prototypes_are_computed_in_eval_mode():
    net = Net(dropout=0.9)
    one, other = (run_of(SimpleCIL(), tasks(DISJOINT), net, seed=seed)[0] for seed in (0, 1))
    assert torch.equal(one.method.prototypes.weight, other.method.prototypes.weight)


@pytest.mark.parametrize("pet", ["full", "ssf"])
def test_the_adapted_copy_moves_in_the_first_task_and_never_after(pet):
    states: list[str] = []

    class Spy(ADAM):
        def end_task(self, task: int, run: Any) -> None:
            super().end_task(task, run)
            states.append(digest(self.adapted))

    method = Spy(pet=pet)
    net = Net()
    run = trainer(method, net, tasks(DISJOINT), steps=10)
    run.fit()
    assert len(set(states)) == 1
    inner = method.adapted.linear if pet == "full" else method.adapted.linear.layer
    assert torch.equal(inner.weight, net.linear.weight) == (pet == "ssf")
    assert run.updates == 10 + 1 + 1  # nothing is trained after the first task


def test_the_head_of_the_first_task_is_thrown_away():
    method = ADAM()
    run_of(method, tasks(DISJOINT))
    assert "rows" not in method.cosine_head and "scale" not in method.cosine_head


def test_the_first_task_is_learned_by_scaled_cosines():
    found: list[dict[str, Tensor]] = []

    class Spy(ADAM):
        def _adapting(self, batches: Any, run: Any) -> Any:
            terms = super()._adapting(batches, run)
            batch = batches["data"]
            if not found:
                with torch.no_grad():
                    f = run("adapted", batch).logits
                    rows, scale = self.cosine_head["rows"], self.cosine_head["scale"]
                    cosine = nn.functional.cosine_similarity(f[:, None], rows[None], dim=2)
                    expected = nn.functional.cross_entropy(scale * cosine, batch.labels)
                found.append({"ours": terms["labels"].mean.detach(), "expected": expected, "scale": scale.clone()})
            return terms

    run_of(Spy(), tasks(DISJOINT), Net(norm=False, dropout=0.0), steps=10)
    assert found[0]["scale"] == 1.0
    assert torch.allclose(found[0]["ours"], found[0]["expected"], atol=1e-6)


# Both branches


def test_with_modules_at_their_start_the_ranking_is_that_of_simplecil():
    """cos([a; a], [b; b]) = cos(a, b)"""

    class Untrained(ADAM):
        def stage(self, i: int, run: Any) -> Any:
            return SimpleCIL.stage(self, i, run)

        def learns(self, i: int) -> Any:
            yield from ()

    x = torch.cat([t[0] for t in tasks(DISJOINT, seed=3)])
    _, plain = run_of(SimpleCIL(), tasks(DISJOINT), vit())
    for pet in ("adapter", "ssf", "full"):
        _, both = run_of(Untrained(pet=pet), tasks(DISJOINT), vit())
        assert torch.allclose(both(x), plain(x), atol=1e-5)


def test_the_two_branches_stand_side_by_side():
    data = tasks(DISJOINT)
    run, model = run_of(ADAM(), data, Net(), steps=10)
    assert run.method.prototypes.weight.shape == (5, 16)
    original, adapted = (encoder(data[0][0]) for encoder in model.encoders)
    assert original.shape == adapted.shape == (24, 8) and not torch.allclose(original, adapted)
    means = torch.cat([original, adapted], 1)[data[0][1] == 0].double().mean(0)
    assert torch.allclose(run.method.prototypes.weight[0], means, atol=1e-6)


def test_branches_can_be_brought_to_the_same_length():
    data = tasks(DISJOINT)
    run, model = run_of(ADAM(balance=True), data, Net(), steps=10)
    branches = [nn.functional.normalize(encoder(data[0][0]), dim=1) for encoder in model.encoders]
    means = torch.cat(branches, 1)[data[0][1] == 0].double().mean(0)
    assert torch.allclose(run.method.prototypes.weight[0], means, atol=1e-6)


# The modules


@pytest.mark.parametrize("pet", ["ssf", "adapter", "full", "bn"])
def test_modules_start_as_the_identity(pet):
    net, x = vit().eval() if pet == "adapter" else Net().eval(), tasks()[0][0]
    adapted = with_pet(net, pet, x, layers=None, width=4, prompts=3, seed=0).eval()
    assert torch.allclose(adapted(x), net(x), atol=1e-6)


def test_only_the_modules_learn():
    net, x = vit(), tasks()[0][0]
    for pet, words in (("ssf", ("gamma", "beta")), ("adapter", ("up", "down")), ("vpt-deep", ("prompts",))):
        adapted = with_pet(net, pet, x, layers=None, width=4, prompts=3, seed=0)
        learning = [n for n, p in adapted.named_parameters() if p.requires_grad]
        assert learning and all(any(word in n for word in words) for n in learning)
        assert all(p.requires_grad for p in net.parameters())
    assert not any(
        p.requires_grad for p in with_pet(Net(), "bn", x, layers=None, width=4, prompts=3, seed=0).parameters()
    )


def test_scale_and_shift_work_on_channels_and_on_tokens():
    for layer, x, shape in (
        (nn.Conv2d(1, 3, 1), torch.randn(2, 1, 4, 4), (1, 3, 1, 1)),
        (nn.Linear(5, 3), torch.randn(2, 4, 5), (3,)),
    ):
        module = ScaleShift(layer, 3)
        with torch.no_grad():
            module.gamma.copy_(torch.tensor([1.0, 2.0, 3.0])), module.beta.copy_(torch.tensor([0.0, -1.0, 1.0]))
        expected = layer(x) * module.gamma.view(shape) + module.beta.view(shape)
        assert torch.allclose(module(x), expected)


def test_adapters_are_parallel_bottlenecks():
    layer = nn.Linear(6, 4)
    module = Adapter(layer, 6, 4, 2, maps=False)
    nn.init.normal_(module.up.weight)
    x = torch.randn(3, 5, 6)
    hidden = (x @ module.down.weight.T + module.down.bias).clamp(min=0)
    assert torch.allclose(module(x), layer(x) + hidden @ module.up.weight.T + module.up.bias, atol=1e-6)
    assert module.down.weight.shape == (2, 6)


@pytest.mark.parametrize(("pet", "counts"), [("vpt-shallow", [8, 8]), ("vpt-deep", [8, 8])])
def test_prompts_stand_behind_the_class_token_and_are_gone_after_the_last_block(pet, counts):
    net, x = vit(), tasks()[0][0][:2]
    adapted = with_pet(net, pet, x, layers=None, width=4, prompts=3, seed=0)
    seen: list[int] = []
    for block in adapted.blocks:
        assert isinstance(block, Prompted)
        block.block.register_forward_hook(lambda _m, _a, out: seen.append(out.shape[1]))
    out: list[int] = []
    adapted.blocks[-1].register_forward_hook(lambda _m, _a, o: out.append(o.shape[1]))
    adapted(x)
    assert seen == counts and out == [5]
    prompts = [block.prompts for block in adapted.blocks]
    assert prompts[0].shape == (3, 8) and (prompts[1] is None) == (pet == "vpt-shallow")


def test_batch_statistics_are_those_of_the_first_task():
    data, net = [(2 * x + 1, y) for x, y in tasks(DISJOINT, count=20)], Net(dropout=0.5)
    method = ADAM(pet="bn")
    run_of(method, data, net)
    with torch.no_grad():
        inputs = net.conv(data[0][0])
    norm = method.adapted.norm
    assert torch.allclose(norm.running_mean, inputs.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, inputs.var((0, 2, 3)), rtol=1e-4)
    assert not torch.allclose(norm.running_mean, net.norm.running_mean, atol=1e-2)
    assert norm.momentum == net.norm.momentum == 0.1


@pytest.mark.parametrize("pet", ["adapter", "vpt-deep", "vpt-shallow"])
def test_a_target_without_the_layers_of_a_module_is_told_to_name_some(pet):
    with pytest.raises(InputError, match=f"'{pet}' looks for layers called .* name others with layers="):
        run_of(ADAM(pet=pet), tasks())


def test_layers_can_be_named_and_must_fit():
    _, model = run_of(ADAM(pet="adapter", layers=["linear"], width=4), tasks(), steps=4)
    assert isinstance(model.encoders[1].linear, Adapter)
    with pytest.raises(InputError, match="an adapter beside 'conv' needs outputs of the inputs' size"):
        run_of(ADAM(pet="adapter", layers=["conv"]), tasks())
    with pytest.raises(InputError, match="prompts need tokens .* 'conv' reads"):
        run_of(ADAM(pet="vpt-deep", layers=["conv"]), tasks())
    with pytest.raises(LayerError, match="no layer 'convolution'"):
        run_of(ADAM(pet="ssf", layers=["convolution"]), tasks())


def test_statistics_need_batch_normalisation():
    with pytest.raises(InputError, match="this target has none"):
        run_of(ADAM(pet="bn"), tasks(), Net(norm=False))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ADAM(pet="lora"), "pet is 'lora'"),
        (lambda: ADAM(width=0), "width is 0"),
        (lambda: ADAM(prompts=0), "prompts is 0"),
        (lambda: SimpleCIL(returning="ignore"), "returning is 'ignore'"),
    ],
)
def test_unknown_words_and_numbers_out_of_range_are_refused(build, words):
    with pytest.raises(InputError, match=words):
        build()


def test_cosines_do_not_depend_on_lengths():
    f, rows = torch.randn(3, 4), torch.randn(2, 4)
    assert torch.allclose(cosine_logits(f, rows), cosine_logits(3 * f, 0.5 * rows), atol=1e-6)
    assert torch.allclose(cosine_logits(f, rows, 2.0)[1, 1], 2 * torch.cosine_similarity(f[1], rows[1], dim=0))


def test_a_run_is_set_up_with_the_adapted_copy_as_a_role():
    method = ADAM()
    run = ready(method, Net(), tasks())
    assert run["adapted"] is method.adapted and not run["adapted"].training
