"""Generator, pool, memories and the eye on collapse, and what every data-free method shares."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from helpers import CNN, digest, trainer
from synthesize.examples_synthesize import EXAMPLES, OPTIONS, SMALL, teacher
from torch import Tensor, nn

from transfuse import transfer
from transfuse.core.batch import Batch
from transfuse.core.errors import InputError, ShapeError, VocabularyError
from transfuse.core.run import Run
from transfuse.core.watch import TransferWarning
from transfuse.synthesize import CAEDFKD, DataFree, RetainAcquire
from transfuse.synthesize.generator import CollapseWatch, Generator, Pool, redraw
from transfuse.synthesize.memory import GenerativeMemory, RingMemory

METHODS: list[type[DataFree]] = [CAEDFKD, RetainAcquire]
every_method = pytest.mark.parametrize("cls", METHODS, ids=lambda c: c.__name__)


def run_of(method: DataFree, student: nn.Module | None = None, source: nn.Module | None = None, **settings: Any) -> Any:
    student = CNN(norm=True, seed=2) if student is None else student
    return trainer(method, student, teacher() if source is None else source, {}, **OPTIONS | settings)


# The generator


@pytest.mark.parametrize("shape", [(1, 14, 14), (3, 32, 32), (1, 4, 4), (2, 9, 5)])
def test_a_generator_makes_images_of_any_shape_within_the_limits(shape):
    made = Generator(shape, latent=7, width=4, limits=(-1, 3))(10 * torch.randn(5, 7))
    assert made.shape == (5, *shape)
    assert made.min() >= -1 and made.max() <= 3


def test_making_images_moves_nothing_in_a_generator():
    generator = Generator((1, 8, 8), 7, 4)
    before = digest(generator)
    generator(torch.randn(5, 7))
    assert digest(generator) == before


def test_a_redrawn_network_is_new_the_same_everywhere_and_leaves_the_random_numbers_alone():
    one, other = Generator((1, 8, 8), 7, 4), Generator((1, 8, 8), 7, 4)
    before, state = digest(one), torch.get_rng_state()
    for network in (one, other):
        redraw(network, torch.Generator().manual_seed(5))
    assert digest(one) == digest(other) != before
    assert torch.equal(torch.get_rng_state(), state)


# The pool


def test_a_pool_is_a_ring_and_its_eleventh_batch_takes_the_first_slot():
    pool = Pool(slots=10)
    for i in range(11):
        pool.push(torch.full((3, 1), float(i)))
    assert len(pool) == 10
    assert pool["samples"][:, 0, 0].tolist() == [10, 1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_pool_keeps_no_graph_and_no_alias():
    pool, made = Pool(2), torch.zeros(2, 1, requires_grad=True)
    for _ in range(3):
        pool.push(made * 1)
    assert not pool["samples"].requires_grad
    given = torch.zeros(2, 1)
    pool.push(given)
    given.fill_(7)
    assert pool["samples"].eq(0).all()


def test_a_pool_becomes_what_was_saved():
    pool, other = Pool(4), Pool(4)
    for i in range(3):
        pool.push(torch.full((2, 1), float(i)))
    other.load_state_dict(pool.state_dict())
    for p in (pool, other):
        p.push(torch.full((2, 1), 3.0))
        p.push(torch.full((2, 1), 4.0))
    assert digest(pool) == digest(other)


def chi_square(counts: Counter[Any], kinds: int) -> float:
    expected = sum(counts.values()) / kinds
    return sum((counts[k] - expected) ** 2 / expected for k in range(kinds))


def test_samples_and_slots_are_drawn_uniformly():
    pool = Pool(5)
    for i in range(5):
        pool.push(torch.tensor([[2.0 * i], [2.0 * i + 1]]))
    torch.manual_seed(0)
    assert chi_square(Counter(pool.draw(20_000).flatten().int().tolist()), 10) < 27.9  # 0.1 % of such draws exceed it
    memory = RingMemory(5, every=1)
    memory.pool = pool
    run = Run({}, {})
    slots: Counter[int] = Counter()
    for step in range(5000):
        run.clock.step = step
        slots[int(memory.recall(Batch(index=torch.arange(16)), run)[0]) // 2] += 1
    assert chi_square(slots, 5) < 18.5


def test_the_micro_batches_of_an_update_share_one_slot_of_the_memory():
    memory, run = RingMemory(4, every=3), Run({}, {})
    assert memory.recall(Batch(index=torch.arange(8)), run) is None
    for i in range(4):
        memory.store(torch.arange(32.0) + 100 * i)
    parts = [memory.recall(Batch(index=torch.arange(i, i + 8)), run) for i in range(0, 32, 8)]
    whole = memory.recall(Batch(index=torch.arange(32)), run)
    assert torch.equal(torch.cat(parts), whole)
    assert (whole % 100).tolist() == [0, 1, 2, 3]  # an eighth of 32 images, the first ones
    assert [step for step in range(9) if memory.due(at(run, step))] == [2, 5, 8]


def at(run: Run, step: int) -> Run:
    run.clock.step = step
    return run


def test_a_generative_memory_learns_to_reconstruct():
    torch.manual_seed(0)
    memory, run = GenerativeMemory((1, 4, 4), 8, (0.0, 1.0), latent=4), Run({"source": teacher()}, {})
    images = torch.rand(4, 1, 4, 4).repeat(8, 1, 1, 1)
    optimiser = torch.optim.Adam(memory.parameters(), lr=0.01)
    run.set_modes(set())
    values = []
    for _ in range(60):
        terms = memory.loss(images, run)
        values.append(terms["image"].sum.item())
        optimiser.zero_grad()
        sum(term.weight * term.sum for term in terms.values()).backward()
        optimiser.step()
    assert values[-1] < 0.6 * values[0]
    assert set(terms) == {"image", "answer", "divergence"}
    assert terms["divergence"].weight == 1e-5


# Collapse


def looks(images: Tensor, logits: Tensor, times: int) -> list[str]:
    watch, run = CollapseWatch(patience=5, advice="Do something."), Run({}, {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            watch.look(images, logits, run)
    assert [str(w.message) for w in caught if issubclass(w.category, TransferWarning)] == list(
        run.watch.messages.values()
    )
    return [*run.watch.messages]


healthy = torch.randn(30, 1, 4, 4), 9 * torch.eye(10).repeat(3, 1)


def test_a_healthy_generator_is_not_called_collapsed():
    assert looks(*healthy, times=20) == []


@pytest.mark.parametrize("logits", [9 * torch.eye(10)[[3] * 30], torch.zeros(30, 10)], ids=["one class", "no class"])
def test_images_that_all_get_one_answer_are_a_collapse_after_some_rounds(logits):
    assert looks(healthy[0], logits, times=4) == []
    assert looks(healthy[0], logits, times=20) == ["collapse: classes"]


def test_one_image_per_class_is_a_collapse():
    assert looks(torch.randn(10, 1, 4, 4).repeat(3, 1, 1, 1), healthy[1], times=5) == ["collapse: images"]


def test_one_good_round_ends_the_count():
    watch, run = CollapseWatch(patience=3, advice=""), Run({}, {})
    for logits in (torch.zeros(30, 10), torch.zeros(30, 10), healthy[1], torch.zeros(30, 10), torch.zeros(30, 10)):
        watch.look(healthy[0], logits, run)
    assert run.watch.messages == {}
    assert watch.bad.tolist() == [2, 0]


honest = Generator.forward


def collapsed(self: Generator, latent: Tensor) -> Tensor:
    """What a generator makes that looks at nothing."""
    return honest(self, 0 * latent)


@every_method
def test_a_generator_that_collapses_is_reported_with_cause_and_advice(cls, monkeypatch):
    monkeypatch.setattr(Generator, "forward", collapsed)
    run = run_of(cls(**SMALL), steps=24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit()
    message = run.watch.messages["collapse: classes"]
    assert (
        "the generator has collapsed: for 20 rounds, the teacher tells only 1.0 of at most 3 classes apart" in message
    )
    assert "Lower lr" in message


@every_method
def test_the_count_of_bad_rounds_is_saved(cls):
    assert "collapse.bad" in cls(**SMALL).state_dict()


# What moves, and what does not


@every_method
def test_the_teacher_is_bit_identical_without_gradients_and_never_in_train_mode(cls):
    source, student = teacher(), CNN(norm=True, seed=2)
    before, own = digest(source), digest(student)
    run_of(cls(**SMALL, **({"every": 1} if cls is RetainAcquire else {})), student, source).fit()
    assert digest(source) == before and digest(student) != own
    assert all(p.grad is None for p in source.parameters())
    assert not any(source.calls)


@every_method
def test_the_generators_updates_move_nothing_of_the_student(cls, monkeypatch):
    seen: list[tuple[str, str]] = []
    student = CNN(norm=True, seed=2)
    inner = cls.generator_loss

    def watched(self: Any, batches: Any, run: Any) -> Any:
        seen.append(("before", digest(student)))
        terms = inner(self, batches, run)
        seen.append(("after", digest(student)))
        return terms

    monkeypatch.setattr(cls, "generator_loss", watched)
    run_of(cls(**SMALL), student).fit()
    assert all(a == b for (_, a), (_, b) in zip(seen[::2], seen[1::2], strict=True))


@every_method
def test_the_students_running_statistics_move_once_per_update(cls):
    student = CNN(norm=True, seed=2)
    method = cls(**SMALL, **({"every": 1} if cls is RetainAcquire else {}))
    run_of(method, student, steps=8).fit()
    rounds = 6 if cls is CAEDFKD else 8  # a quarter of the rounds fills the pool
    assert int(student.norm.num_batches_tracked) == rounds * method.student_steps


@every_method
def test_the_arguments_are_kept_and_shown(cls):
    assert repr(cls(**SMALL)) == repr(eval(repr(cls(**SMALL))))


# Refusals


@every_method
@pytest.mark.parametrize("shape", [[4, 4], [1, 4], [1, 0, 4], [1.0, 4, 4], "144"])
def test_a_shape_that_is_no_image_is_refused(cls, shape):
    with pytest.raises(InputError, match="must be \\[channels, height, width\\]"):
        cls(**SMALL | {"shape": shape})


@every_method
@pytest.mark.parametrize("wrong", [{"limits": [1, 0]}, {"limits": [0]}, {"width": 0}, {"student_steps": 0}])
def test_settings_that_mean_nothing_are_refused(cls, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        cls(**SMALL | wrong)


@every_method
def test_a_shape_that_the_models_do_not_take_is_refused_before_training(cls):
    with pytest.raises(ShapeError, match=r"the target, CNN, cannot run on images of shape=\[3, 4, 4\]"):
        run_of(cls(**SMALL | {"shape": [3, 4, 4]})).fit()


@every_method
def test_other_classes_are_refused(cls):
    student = CNN(norm=True)
    student.fc = nn.Linear(8, 5)
    with pytest.raises(VocabularyError, match="5 classes"):
        run_of(cls(**SMALL), student).fit()


@every_method
def test_dense_outputs_are_refused(cls):
    pixels = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 3, 1))
    with pytest.raises(InputError, match="needs a classifier|has no linear layer that gives its"):
        run_of(cls(**SMALL, **({"contrast": 0} if cls is CAEDFKD else {})), pixels, pixels).fit()


# The one call, and its control arm


@every_method
def test_the_one_call_needs_no_data_and_compares_with_a_shuffled_teacher(cls):
    example = EXAMPLES[cls.__name__]()
    result = transfer(
        example.method,
        example.source,
        example.target,
        test=example.test,
        compare=["shuffled teacher"],
        progress=False,
        **example.options,
    )
    assert [arm.role for arm in result.report.arms] == ["method", "control"]


@every_method
def test_a_shuffled_teacher_still_guides_the_generator(cls):
    """What is dealt out to the wrong images is what the student hears; else the control would have no images."""
    method = cls(**SMALL)
    run = Run({"target": CNN(norm=True, seed=2), "source": teacher()}, {})
    run.install(method.wants())
    run.set_modes(set())
    method.setup(run, None)
    rows = []
    for run.shuffled in (False, True):
        method._drawn = {}
        torch.manual_seed(1)
        terms = method.generator_loss({"noise": Batch(index=torch.arange(16))}, run)
        rows.append([term.mean.item() for term in terms.values()])
    assert rows[0] == rows[1]
