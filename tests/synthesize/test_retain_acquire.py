"""Learning to retain while acquiring: the student's objective, its limits, the memories, refusals."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from helpers import CNN, digest, trainer
from synthesize.examples_synthesize import OPTIONS, SMALL, teacher
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.errors import CapabilityError, InputError
from transfuse.core.run import Run
from transfuse.synthesize import RetainAcquire


def ready(method: RetainAcquire, student: nn.Module | None = None) -> Run:
    run = Run({"target": student or CNN(seed=2), "source": teacher()}, {})
    run.install(method.wants())
    run.set_modes(set())
    method.setup(run, None)
    run.set_modes({"target"})
    return run


def noise(count: int = 16) -> dict[str, Batch]:
    return {"noise": Batch(index=torch.arange(count))}


def run_of(method: RetainAcquire, student: nn.Module | None = None, **settings: Any) -> Any:
    return trainer(method, student or CNN(norm=True, seed=2), teacher(), {}, **OPTIONS | settings)


def objective(method: RetainAcquire, run: Run, *names: str) -> Tensor:
    torch.manual_seed(4)
    terms = method.student_loss(noise(), run)
    return sum(terms[name].weight * terms[name].mean for name in names or terms)


def gradient(value: Tensor, run: Run) -> Tensor:
    weights = list(run["target"].parameters())
    found = torch.autograd.grad(value, weights, allow_unused=True, retain_graph=True)
    return torch.cat(
        [(p.new_zeros(p.shape) if g is None else g).flatten() for g, p in zip(found, weights, strict=True)]
    )


def remembering(**settings: Any) -> tuple[RetainAcquire, Run]:
    method = RetainAcquire(**SMALL, **settings)
    run = ready(method)
    torch.manual_seed(9)
    method.ring.store(torch.randn(16, 1, 4, 4))
    return method, run


# The student's objective


def test_acquisition_and_replay_are_one_mean_over_both_kinds_of_images():
    method, run = remembering(retain=0)
    torch.manual_seed(4)
    new = method.made(16, run)
    torch.manual_seed(4)
    terms = method.student_loss(noise(), run)
    images = torch.cat([new, method.ring.pool["samples"][0]]).detach()
    assert len(images) == 18
    expected = (run["target"](images) - run["source"](images)).abs().mean()
    assert sum(t.weight * t.mean for t in terms.values()).item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms["acquire"].weight == pytest.approx(8 / 9) and terms["replay"].weight == pytest.approx(1 / 9)


def test_the_meta_term_is_the_distance_on_remembered_images_after_a_step_of_sgd():
    method, run = remembering(inner_lr=0.3, inner_decay=0.01)
    torch.manual_seed(4)
    new = method.made(16, run).detach()
    found = objective(method, run, "retain")
    stepped = CNN(seed=2)
    optimiser = torch.optim.SGD(stepped.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
    (stepped(new) - run["source"](new)).abs().mean().backward()
    optimiser.step()
    old = method.ring.pool["samples"][0]
    assert found.item() == pytest.approx((stepped(old) - run["source"](old)).abs().mean().item(), rel=1e-5)


def test_a_virtual_step_of_no_length_is_twice_the_replay():
    method, run = remembering(inner_lr=1e-12)
    total, parts = objective(method, run), objective(method, run, "acquire", "replay")
    replay = method.student_loss(noise(), run)["replay"].mean
    assert total.item() == pytest.approx((parts + replay).item(), rel=1e-5)


def test_to_first_order_the_objective_rewards_gradients_that_agree():
    student = CNN(seed=2).double()

    def at(lr: float) -> tuple[float, float]:
        method, run = remembering(inner_lr=lr, inner_decay=0.0)
        run.roles["target"], run.roles["source"] = student, run["source"].double()
        method.generator.double()
        method.ring.pool["samples"] = method.ring.pool["samples"].double()
        torch.set_default_dtype(torch.float64)
        try:
            torch.manual_seed(4)
            terms = method.student_loss(noise(), run)
        finally:
            torch.set_default_dtype(torch.float32)
        acquire, replay = (gradient(terms[name].mean, run) for name in ("acquire", "replay"))
        return terms["retain"].mean.item(), float(acquire @ replay)

    (near, agreement), (zero, _) = at(1e-6), at(1e-14)
    assert (near - zero) / 1e-6 == pytest.approx(-agreement, rel=1e-3)


def test_the_meta_term_alone_teaches_the_student():
    method, run = remembering()
    assert gradient(objective(method, run, "retain"), run).norm() > 1e-3


def test_second_derivatives_matter_and_can_be_left_out():
    full, first = both_orders()
    assert first.norm() > 1e-3 and (full - first).norm() > 1e-3 * full.norm()


def both_orders() -> tuple[Tensor, Tensor]:
    found = []
    for first_order in (False, True):
        method, run = remembering(first_order=first_order)
        found.append(gradient(objective(method, run, "retain"), run))
    return found[0], found[1]


def test_the_bug_of_the_release_makes_the_meta_term_plain_replay():
    method, run = remembering(release_bug=True)
    value = objective(method, run, "retain")
    assert value.requires_grad and gradient(value, run).eq(0).all()
    honest, other = remembering()
    assert value.item() == pytest.approx(objective(honest, other, "retain").item(), rel=1e-6)


def test_the_bug_of_the_release_would_have_been_reported():
    method = RetainAcquire(**SMALL | {"generator_steps": 1, "student_steps": 1}, release_bug=True)
    method.ring.store(torch.randn(8, 1, 4, 4))
    run = run_of(method, steps=51, batch_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit()
    assert "'retain' has had less than 1% of the gradient" in run.watch.messages["small gradient: student/retain"]


def test_a_run_with_the_bug_is_the_same_as_plain_replay():
    students = []
    for settings in ({"release_bug": True}, {"retain": 0}):
        student = CNN(norm=True, seed=2)
        run_of(RetainAcquire(**SMALL, every=1, **settings), student, steps=4).fit()
        students.append(digest(student))
    assert students[0] == students[1]


def test_while_nothing_is_remembered_the_step_is_plain():
    method = RetainAcquire(**SMALL)
    run = ready(method)
    torch.manual_seed(4)
    terms = method.student_loss(noise(), run)
    assert list(terms) == ["acquire"] and terms["acquire"].weight == 1


def test_the_generator_is_no_part_of_the_students_graph():
    method, run = remembering()
    objective(method, run).backward()
    assert all(p.grad is None for p in method.generator.parameters())


def test_the_virtual_step_moves_no_running_statistics():
    student = CNN(norm=True, seed=2)
    method = RetainAcquire(**SMALL)
    run = ready(method, student)
    method.ring.store(torch.randn(16, 1, 4, 4))
    before = digest(student)
    images = torch.randn(6, 1, 4, 4)
    method.retention(images[:4], images[4:], torch.randn(6, 3), run).backward()
    assert digest(student) == before


# The generator's objective


def test_the_generators_loss_is_the_sum_of_its_four_terms():
    method = RetainAcquire(**SMALL)
    run = ready(method)
    torch.manual_seed(4)
    images = method.made(16, run).detach()
    torch.manual_seed(4)
    terms = method.generator_loss(noise(), run)
    assert {n: t.weight for n, t in terms.items()} == {"one_hot": 1, "balance": 5, "activation": 0.1, "agreement": 1}
    t = run["source"](images)
    p = t.softmax(1)
    assert terms["one_hot"].mean.item() == pytest.approx(-p.amax(1).log().mean().item(), rel=1e-4)
    balance = sum(x * math.log10(x) for x in p.mean(0).tolist())
    assert terms["balance"].mean.item() == pytest.approx(balance, rel=1e-4)
    feature = run["source"].layer2(run["source"].norm(run["source"].layer1(images)).tanh()).tanh().mean((2, 3))
    assert terms["activation"].mean.item() == pytest.approx(-feature.abs().mean().item(), rel=1e-4)


def test_a_student_that_equals_its_teacher_leaves_nothing_to_disagree_on():
    method = RetainAcquire(**SMALL)
    run = ready(method, teacher().eval())
    run.set_modes(set())
    assert method.generator_loss(noise(), run)["agreement"].mean.item() == 1.0


class Indifferent(CNN):
    """A student that says the same to everything."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).detach() * 0 + self.fc.bias


def test_the_gradient_of_disagreement_reaches_the_generator_through_the_student_alone():
    for student, reached in ((Indifferent(seed=2), False), (CNN(seed=2), True)):
        method = RetainAcquire(**SMALL, retain=0)
        run = ready(method, student)
        with torch.no_grad():
            student.fc.bias[:] = torch.tensor([3.0, 0.0, -3.0])
        value = method.generator_loss(noise(), run)["agreement"].mean
        assert value.item() < 1
        found = torch.autograd.grad(value, list(method.generator.parameters()), allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in found) is reached


# Memory


def test_the_first_eighth_of_the_last_images_is_remembered_every_so_many_rounds():
    method, seen = RetainAcquire(**SMALL, slots=2, every=2), []
    run_of(method, steps=6, listener=lambda run, record: seen.append(int(method.ring.pool["pushed"]))).fit()
    assert seen == [0, 1, 1, 2, 2, 3]
    assert method.ring.pool["samples"].shape == (2, 2, 1, 4, 4)


def test_without_a_memory_there_is_no_replay():
    run = run_of(RetainAcquire(**SMALL, memory="none", retain=0))
    run.fit()
    assert [name for name in run.history[-1]["terms"] if name.startswith("student")] == ["student/acquire"]


def test_a_generative_memory_is_trained_along_and_recalled_from_the_second_round_on():
    method = RetainAcquire(**SMALL, memory="generative", lr=0.01)
    seen = []

    def note(run: Any, record: Any) -> None:
        seen.append((sorted(run.run.optimizers), int(method.autoencoder.rounds)))

    run = run_of(method, steps=4, listener=note)
    run.fit()
    assert seen == [(["generator", "memory", "student"], i) for i in (1, 2, 3, 4)]
    assert {"student/replay", "student/retain", "memory/image"} <= set(run.history[-1]["terms"])
    assert run.run.optimizers == {} or run.rates["memory"] == pytest.approx(0.01 / 40)


def test_codes_are_moved_by_one_step_of_adam_towards_what_is_typical_and_clear():
    method = RetainAcquire(**SMALL, memory="generative", lr=0.01)
    run = ready(method)
    codes: list[Tensor] = []
    honest = method.autoencoder.decoder.forward
    method.autoencoder.decoder.forward = lambda z: codes.append(z.detach()) or honest(z)
    images = method._imagined(6, run)
    assert images.shape == (6, 1, 4, 4) and not images.requires_grad
    moved = (codes[1] - codes[0]).abs()
    assert moved.max() <= 0.01 + 1e-6 and moved.mean() > 0.009


# Refusals


class Once(torch.autograd.Function):
    """Can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class SquaredOnce(CNN):
    def __init__(self) -> None:
        super().__init__(seed=2)
        self.layer1.register_forward_hook(lambda module, inputs, output: Once.apply(output))


def test_a_student_without_second_derivatives_is_refused_unless_first_order():
    with pytest.raises(CapabilityError, match="second derivatives of the target, SquaredOnce, .* Say first_order=True"):
        run_of(RetainAcquire(**SMALL), SquaredOnce()).fit()
    run_of(RetainAcquire(**SMALL, first_order=True, every=1), SquaredOnce()).fit()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"inner_lr": 0}, "inner_lr is 0, it must be positive"),
        ({"memory": "bufer"}, "did you mean 'buffer'"),
        ({"memory": "none"}, "nothing is remembered"),
        ({"slots": 0}, "nothing is remembered"),
        ({"every": 0}, "every is 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        RetainAcquire(**SMALL | wrong)
