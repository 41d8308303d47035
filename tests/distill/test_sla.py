"""SLA: views and their order, joint labels, what is averaged, and what is deployed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CLASSES, CNN, assert_equal_gradients, digest, images
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, LayerError, ShapeError
from transfuse.core.outputs import Outputs
from transfuse.core.streams import as_data
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training
from transfuse.core.watch import TransferWarning
from transfuse.distill import SLA, Labels
from transfuse.distill.views import Aggregated, Views
from transfuse.losses import cross_entropy, kl_divergence

TURNS, COLOURS = (0, 90, 180, 270), ("RGB", "GBR", "BRG")


def trainer(method: Any, target: nn.Module, data: Any = None, **options: Any) -> Trainer:
    run = {k: options.pop(k) for k in ("folder", "listener", "validate") if k in options}
    settings = {"steps": 4, "batch_size": 6, "optimizer": "sgd", "lr": 0.1, "checkpoint_every": 0.0} | options
    data = as_data(images(24) if data is None else data)
    return Trainer(method, {"target": target}, {"data": data}, Training(**settings), **run)


def prepared(method: SLA, target: nn.Module, count: int = 12) -> tuple[Outputs, Batch]:
    """A method that was set up, with the target's outputs for every view of a batch."""
    inputs, labels = images(count)
    run = trainer(method, target).run
    run.install(method.wants())
    run.set_modes(set())
    batch = Batch(inputs=inputs, labels=labels)
    method.setup(run, batch)
    return run("target", Batch(inputs=method.views(inputs))), batch


def values(method: SLA, outputs: Outputs, batch: Batch) -> dict[str, float]:
    terms = method.loss(outputs, Outputs(None), batch, Clock())
    return {name: (term.weight * term.mean).item() for name, term in terms.items()}


# Views


def test_four_quarter_turns_are_the_identity():
    inputs = images()[0]
    turned = inputs
    for _ in range(4):
        turned = Views((0, 90), ("RGB",))(turned)[1::2]
    assert torch.equal(turned, inputs)


def test_rows_are_image_major_and_views_follow_the_order_of_the_names():
    inputs = torch.arange(3 * 3 * 2 * 2).view(3, 3, 2, 2).float()
    views = Views(TURNS, COLOURS)
    rows = views(inputs)
    assert rows.shape == (36, 3, 2, 2)
    assert views.names[:4] == [(0, "RGB"), (0, "GBR"), (0, "BRG"), (90, "RGB")]
    for i in range(3):
        for j, (degrees, colours) in enumerate(views.names):
            expected = inputs[i, ["RGB".index(c) for c in colours]].rot90(degrees // 90, (1, 2))
            assert torch.equal(rows[i * 12 + j], expected)


@pytest.mark.parametrize(
    ("turns", "colours", "count"), [((0, 180), COLOURS, 6), (TURNS, COLOURS, 12), ((0,), ("RGB",), 1)]
)
def test_rotations_and_colours_multiply(turns, colours, count):
    assert len(Views(turns, colours)) == count


def test_joint_labels_give_back_class_and_view():
    views, labels = Views(TURNS, ("RGB",)), torch.tensor([2, 0, -100, 1])
    joint = views.joint(labels)
    known = joint != -100
    assert known.view(4, 4).all(1).tolist() == [True, True, False, True]
    assert torch.equal(joint[known] // 4, labels.repeat_interleave(4)[known])
    assert torch.equal(joint[known] % 4, torch.arange(4).repeat(3))


def test_every_view_votes_with_its_own_joint_classes():
    views, labels = Views(TURNS, ("RGB",)), torch.tensor([2, 0, 1])
    oracle = nn.functional.one_hot(views.joint(labels), 3 * 4).float()
    assert views.aggregate(oracle).argmax(1).tolist() == labels.tolist()
    logits = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    expected = [[sum(logits[i * 4 + j, n * 4 + j] for j in range(4)) / 4 for n in range(3)] for i in range(3)]
    assert torch.allclose(views.aggregate(logits), torch.tensor(expected))


def test_probabilities_are_averaged_as_probabilities():
    views, logits = Views(TURNS, ("RGB",)), torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    own = [torch.stack([logits[j::4][i, j::4] for j in range(4)]).softmax(1).mean(0) for i in range(3)]
    assert torch.allclose(views.aggregate(logits, "probabilities").exp(), torch.stack(own), atol=1e-6)


def test_the_order_of_the_views_changes_neither_single_nor_aggregated_answers():
    one, other = Views(TURNS, ("RGB",)), Views((180, 0, 270, 90), ("RGB",))
    order = [one.names.index(name) for name in other.names]
    logits = torch.randn(3, 4, 3, 4, generator=torch.Generator().manual_seed(0))  # image, view, class, view
    plain, moved = logits.view(12, 12), logits[:, order][..., order].reshape(12, 12)
    assert torch.allclose(one.aggregate(plain), other.aggregate(moved), atol=1e-6)
    identity = [one.single(plain[0::4]), other.single(moved[1::4])]
    assert torch.equal(*identity)


def test_with_the_identity_alone_aggregated_is_single():
    views, logits = Views((0,), ("RGB",)), torch.randn(5, 3)
    assert torch.equal(views.aggregate(logits), views.single(logits))
    assert torch.equal(views.aggregate(logits), logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rotations": (0, 90, 90)}, "name each once"),
        ({"rotations": (90, 180)}, "must be among them"),
        ({"colours": ("GBR",)}, "must be among them"),
        ({"rotations": (0, 45)}, "among 0, 90, 180 and 270"),
        ({"colours": ("RGB", "RGG")}, "orders of the letters RGB"),
        ({"variant": "SD"}, "variant is 'SD'"),
        ({"temperature": 0.0}, "temperature is"),
        ({"inference": "all"}, "inference is"),
        ({"average": "labels"}, "average is"),
        ({"variant": "DA", "inference": "aggregated"}, "no joint head"),
    ],
)
def test_refuses_settings_out_of_range(options, words):
    with pytest.raises(InputError, match=words):
        SLA(**options)


@pytest.mark.parametrize(
    ("method", "data", "words"),
    [
        (lambda: SLA(), torch.zeros(6, 1, 4, 5), "turned by 90 degrees"),
        (lambda: SLA(rotations=(0, 180), colours=COLOURS), torch.zeros(6, 1, 4, 4), "three channels, found 1"),
        (lambda: SLA(), torch.zeros(6, 16), "images"),
    ],
    ids=["not square", "grey", "no images"],
)
def test_says_before_training_which_images_it_cannot_use(method, data, words):
    target = nn.Sequential(nn.Flatten(), nn.Linear(data[0].numel(), 3))
    with pytest.raises(ShapeError, match=words):
        trainer(method(), target, (data, torch.arange(6) % 3)).fit()


def test_half_turns_take_any_rectangle():
    images = torch.rand(6, 1, 4, 5)
    target = nn.Sequential(nn.Flatten(), nn.Linear(20, 3))
    trainer(SLA(rotations=(0, 180)), target, (images, torch.arange(6) % 3)).fit()


def test_needs_labels_and_a_linear_head_that_gives_the_logits():
    with pytest.raises(InputError, match="one label each"):
        trainer(SLA(), CNN(), images()[0]).fit()
    with pytest.raises(LayerError, match="no linear layer"):
        trainer(SLA(), nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten())).fit()
    scaled = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Hardtanh(-0.01, 0.01))
    with pytest.raises(InputError, match="gives the logits as they are"):
        trainer(SLA(), scaled).fit()


def test_views_that_do_nothing_are_reported_and_cannot_be_told_apart():
    grey = torch.rand(24, 1, 4, 4).expand(24, 3, 4, 4).contiguous()
    target = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3))
    method = SLA("MT", rotations=(0,), colours=COLOURS)
    run = trainer(method, target, (grey, torch.arange(24) % 3), steps=60)
    with pytest.warns(TransferWarning, match="of a whole batch are equal"):
        run.fit()
    logits = method.head(target[:3](method.views(grey)))
    assert torch.allclose(logits[0::3], logits[1::3])
    assert (
        logits.argmax(1) == method.views.numbers(torch.zeros(24, dtype=torch.long))
    ).float().mean().item() == pytest.approx(1 / 3)


# Losses


def test_the_terms_are_those_of_the_equations():
    method = SLA(temperature=2.0)
    outputs, batch = prepared(method, CNN())
    features, logits = outputs.features["penultimate"], outputs.logits
    joint = method.head(features).double()
    rows = [(i, j) for i in range(12) for j in range(4) if batch.labels[i] != -100]
    sla = sum(-joint[i * 4 + j].log_softmax(0)[batch.labels[i] * 4 + j] for i, j in rows) / len(rows)
    together = torch.stack([sum(joint[i * 4 + j, j::4] for j in range(4)) / 4 for i in range(12)])
    found = values(method, outputs, batch)
    assert found["joint"] == pytest.approx(sla.item(), rel=1e-5)
    known = batch.labels != -100
    assert found["labels"] == pytest.approx(cross_entropy(logits[::4], batch.labels)[known].mean().item(), rel=1e-5)
    assert found["sd"] == pytest.approx(
        kl_divergence(logits[::4].double(), together, temperature=2.0).mean().item(), rel=1e-4
    )


def test_the_baselines_are_those_of_the_equations():
    method = SLA("MT")
    outputs, batch = prepared(method, CNN())
    found = values(method, outputs, batch)
    rows = [(i, j) for i in range(12) for j in range(4) if batch.labels[i] != -100]
    views = method.head(outputs.features["penultimate"]).log_softmax(1)
    same = outputs.logits.log_softmax(1)
    assert found["labels"] == pytest.approx(-sum(same[i * 4 + j, batch.labels[i]] for i, j in rows).item() / len(rows))
    assert found["views"] == pytest.approx(-sum(views[i * 4 + j, j] for i, j in rows).item() / len(rows))
    method = SLA("DA")
    outputs, batch = prepared(method, CNN())
    assert values(method, outputs, batch) == {"labels": pytest.approx(found["labels"])}


def test_with_one_view_sla_is_the_cross_entropy_and_sd_learns_from_the_joint_head():
    method = SLA(rotations=(0,))
    outputs, batch = prepared(method, CNN())
    joint = method.head(outputs.features["penultimate"])
    known = batch.labels != -100
    found = values(method, outputs, batch)
    assert found["joint"] == pytest.approx(cross_entropy(joint, batch.labels)[known].mean().item())
    assert found["sd"] == pytest.approx(kl_divergence(outputs.logits, joint).mean().item())


def test_sd_is_zero_where_the_single_head_says_what_all_views_say_up_to_a_constant():
    method = SLA()
    outputs, batch = prepared(method, CNN())
    together = method.views.aggregate(method.head(outputs.features["penultimate"]))
    raw = (together + 5.0).repeat_interleave(4, 0)
    found = values(method, Outputs(raw, outputs.features), batch)
    assert found["sd"] == pytest.approx(0.0, abs=1e-6)


def test_sd_teaches_the_single_head_and_never_the_joint_one():
    target, method = CNN(), SLA()
    outputs, batch = prepared(method, target)
    method.loss(outputs, Outputs(None), batch, Clock())["sd"].mean.backward()
    assert all(p.grad is None for p in method.parameters())
    assert target.fc.weight.grad.abs().max() > 0
    seen = target.layer1.weight.grad.clone()
    feature = outputs.features["penultimate"].detach().requires_grad_()
    plain = target.fc(feature[::4])
    kl_divergence(plain, method.views.aggregate(method.head(feature)).detach()).mean().backward()
    rest = torch.ones(len(feature), dtype=torch.bool)
    rest[::4] = False
    assert (feature.grad[rest] == 0).all()  # only the identity's feature is taught
    assert seen.abs().max() > 0


def test_large_loss_multiplies_the_gradient_by_the_number_of_views():
    def gradient(large: bool) -> Tensor:
        torch.manual_seed(0)
        target, method = CNN(), SLA("SLA", large_loss=large)
        outputs, batch = prepared(method, target)
        term = method.loss(outputs, Outputs(None), batch, Clock())["joint"]
        return torch.autograd.grad(term.weight * term.mean, target.layer1.weight)[0]

    assert torch.allclose(gradient(True), 4 * gradient(False))


@pytest.mark.parametrize("variant", ["SLA+SD", "SLA", "DA", "MT"])
def test_micro_batches_change_no_gradient(variant):
    def gradients(**options: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        target, method = CNN(), SLA(variant)

        def take(run: Trainer, record: Any) -> None:
            for module in (target, method):
                found.update(
                    {
                        f"{type(module).__name__}.{n}": p.grad.clone()
                        for n, p in module.named_parameters()
                        if p.grad is not None
                    }
                )

        trainer(method, target, images(12), steps=1, batch_size=12, shuffle=False, listener=take, **options).fit()
        return found

    assert_equal_gradients(gradients(), gradients(micro_batch=5))


# What is deployed


def fitted(variant: str = "SLA", **options: Any) -> tuple[SLA, nn.Module, nn.Module]:
    method, target = SLA(variant, **options), CNN(norm=True)
    return method, target, trainer(method, target, steps=8).fit().eval()


def joint_logits(method: SLA, target: nn.Module, inputs: Tensor) -> Tensor:
    body = copy.deepcopy(target).eval()
    body.fc = nn.Identity()
    with torch.no_grad():
        return method.head(body(inputs))


def test_a_single_view_is_answered_by_the_identitys_part_of_the_joint_head():
    method, target, model = fitted()
    inputs = images(12, seed=3)[0]
    assert type(model) is CNN
    assert torch.allclose(model(inputs), joint_logits(method, target, inputs)[:, ::4], atol=1e-6)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("variant", ["SLA", "SLA+SD"])
def test_aggregated_inference_averages_over_all_views(variant, average):
    method, target, model = fitted(variant, inference="aggregated", average=average)
    inputs = images(12, seed=3)[0]
    assert isinstance(model, Aggregated)
    expected = method.views.aggregate(joint_logits(method, target, method.views(inputs)), average)
    assert torch.allclose(model(inputs), expected, atol=1e-6)


@pytest.mark.parametrize("variant", ["SLA+SD", "DA", "MT"])
def test_a_head_of_the_targets_own_is_deployed_as_it_is(variant):
    _, target, model = fitted(variant)
    assert model is target


def test_deploying_changes_nothing_and_can_be_repeated():
    method, target, model = fitted(inference="aggregated")
    before = digest(target), digest(method)
    again = method.deploy(target).eval()
    inputs = images(12)[0]
    assert torch.equal(again(inputs), model(inputs))
    assert (digest(target), digest(method)) == before


def test_the_head_that_will_be_replaced_is_not_trained_and_nothing_is_said_about_it():
    target = CNN()
    before = target.fc.weight.clone()
    run = trainer(SLA("SLA"), target, steps=12)
    run.fit()
    assert torch.equal(target.fc.weight, before)
    assert not run.watch.messages


def test_validation_scores_what_will_be_deployed():
    seen = []
    method, target = SLA("SLA", inference="aggregated"), CNN()

    def validate(model: nn.Module) -> float:
        seen.append(type(model))
        return 0.0

    trainer(method, target, validate=validate, validate_every=2).fit()
    assert seen == [Aggregated, Aggregated]


def test_cannot_be_added_to_a_method_that_sees_the_batch_as_it_is():
    with pytest.raises(Exception, match="run it in sequence with Then"):
        SLA() + Labels()


# Resume


class Killed(BaseException):
    pass


def kill_at(update: int) -> Callable[..., None]:
    def listener(run: Trainer, record: Any) -> None:
        if run.updates == update:
            raise Killed

    return listener


@pytest.mark.parametrize("variant", ["SLA+SD", "SLA", "MT"])
def test_is_resumed_bit_equal(variant, tmp_path):
    def run(**options: Any) -> Trainer:
        return trainer(SLA(variant), CNN(norm=True, dropout=0.3), steps=6, optimizer="adamw", **options)

    whole = run()
    expected = digest(whole.fit())
    with pytest.raises(Killed):
        run(folder=tmp_path, listener=kill_at(3)).fit()
    torch.manual_seed(99)
    resumed = run(folder=tmp_path)
    assert digest(resumed.fit(resume=True)) == expected
    assert digest(resumed.method) == digest(whole.method)


def test_the_joint_head_counts_every_class_in_every_view():
    method = SLA()
    prepared(method, CNN())
    assert method.head.out_features == CLASSES * 4
