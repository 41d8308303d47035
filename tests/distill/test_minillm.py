"""MiniLLM: its expected gradient is that of the reverse KL between whole answers."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import language_model, ragged_tokens, trainer

from transfuse import transfer
from transfuse.core.batch import Batch, align_tokens
from transfuse.core.clock import Clock
from transfuse.core.decoding import generate
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.run import Run
from transfuse.distill import MiniLLM
from transfuse.distill.minillm import _mixed, later
from transfuse.losses import cross_entropy, kl_divergence

TEXT = torch.arange(24).view(4, 6) % 11


def run_of() -> Run:
    run = Run({"target": language_model(), "source": language_model(1)}, {}, task="language-model")
    run.clock = Clock()
    return run


def batch() -> Batch:
    return align_tokens(Batch(inputs=TEXT))


class Table:
    """A language model of two tokens out of three: logits of the first, and of the second after each first."""

    def __init__(self, seed: int):
        draw = torch.Generator().manual_seed(seed)
        self.first = torch.randn(3, generator=draw, dtype=torch.float64, requires_grad=True)
        self.second = torch.randn(3, 3, generator=draw, dtype=torch.float64, requires_grad=True)

    def logits(self, text: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([self.first, self.second[text[0]]])[None, : len(text)]

    def log_probability(self, text: tuple[int, ...]) -> torch.Tensor:
        rows = self.logits(text)[0].log_softmax(-1)
        return sum(rows[t, token] for t, token in enumerate(text))


def expected_gradient(method: MiniLLM, student: Table, teacher: Table, length: int) -> list[torch.Tensor]:
    """Over every answer, by the probability with which it is drawn."""
    total = [torch.zeros_like(p) for p in (student.first, student.second)]
    for text in itertools.product(range(3), repeat=length):
        q, p = student.logits(text)[0].softmax(-1), teacher.logits(text)[0].softmax(-1)
        mixed = method.mix * p + (1 - method.mix) * q
        drawn = float(torch.stack([mixed[t, token] for t, token in enumerate(text)]).prod())
        one = Batch(inputs=None, labels=torch.tensor([text]), mask=torch.ones(1, length, dtype=torch.bool))
        outputs = Outputs(student.logits(text)), Outputs(teacher.logits(text).detach())
        loss = method.loss(*outputs, one, Clock())["minillm"].sum
        found = torch.autograd.grad(loss, (student.first, student.second), allow_unused=True)
        total = [a + drawn * (0 if g is None else g) for a, g in zip(total, found, strict=True)]
    return total


def reverse_kl_gradient(student: Table, teacher: Table, length: int) -> list[torch.Tensor]:
    value = 0.0
    for text in itertools.product(range(3), repeat=length):
        ours, theirs = student.log_probability(text), teacher.log_probability(text).detach()
        value = value + ours.exp() * (ours - theirs)
    found = torch.autograd.grad(value, (student.first, student.second), allow_unused=True)
    both = zip((student.first, student.second), found, strict=True)
    return [torch.zeros_like(p) if g is None else g for p, g in both]


def test_its_expected_gradient_is_that_of_the_reverse_kl_of_answers():
    student, teacher = Table(0), Table(1)
    found = expected_gradient(MiniLLM(mix=0.0, normalised=False), student, teacher, 2)
    wanted = reverse_kl_gradient(student, teacher, 2)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-10)
    assert float(wanted[0].abs().max()) > 0.01


def test_without_what_comes_later_it_is_another_gradient():
    student, teacher = Table(0), Table(1)
    whole, single = reverse_kl_gradient(student, teacher, 2), reverse_kl_gradient(student, teacher, 1)
    assert not torch.allclose(whole[0], single[0], atol=1e-3)


def test_importance_weights_undo_the_teacher_s_part_in_the_drawing():
    student, teacher = Table(0), Table(1)
    for mix in (0.0, 0.2, 0.9):
        found = expected_gradient(MiniLLM(mix=mix), student, teacher, 1)
        assert torch.allclose(found[0], reverse_kl_gradient(student, teacher, 1)[0], atol=1e-10)


def test_what_comes_later_is_summed_or_averaged_within_the_answer():
    rewards = torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.0]])
    mask = torch.tensor([[False, True, True, True, False]])
    assert later(rewards, mask, normalised=False).tolist() == [[6.0, 5.0, 3.0, 0.0, 0.0]]
    assert later(rewards, mask).tolist() == [[2.0, 2.5, 3.0, 0.0, 0.0]]


def test_answers_are_drawn_from_the_mixture_of_both_distributions():
    ours, theirs = torch.randn(4, 5), torch.randn(4, 5)
    wanted = 0.2 * theirs.softmax(-1) + 0.8 * ours.softmax(-1)
    assert torch.allclose(_mixed([ours, theirs], 0.2).softmax(-1), wanted, atol=1e-6)
    run, method = run_of(), MiniLLM(prompt=2, mix=0.5)
    models = [run["target"], run["source"]]
    torch.manual_seed(0)
    found = method.answers(batch(), run).inputs
    torch.manual_seed(0)
    options = {"new_tokens": 4, "temperature": 1.0, "fuse": lambda logits: _mixed(logits, 0.5)}
    assert torch.equal(found, generate(models, TEXT[:, :2], **options))


def test_the_control_arm_does_not_hear_the_teacher_s_words():
    run, method = run_of(), MiniLLM(prompt=2, mix=0.9)
    run.shuffled = True
    torch.manual_seed(0)
    found = method.answers(batch(), run).inputs
    torch.manual_seed(0)
    assert torch.equal(found, generate(run["target"], TEXT[:, :2], new_tokens=4, temperature=1.0))


def test_text_keeps_its_own_term_from_the_data_or_from_a_stream_of_its_own():
    run, one = run_of(), batch()
    other = align_tokens(Batch(inputs=TEXT.flip(0)))
    for batches, text, unit in (
        ({"data": one}, one, "labelled"),
        ({"data": one, "pretrain": other}, other, "pretrain/labelled"),
    ):
        term = MiniLLM(prompt=2, labels=0.5).losses(batches, run)["labels"]
        wanted = cross_entropy(run["target"](text.inputs), text.labels)[text.mask].mean()
        assert term.mean.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert term.weight == 0.5
        assert term.unit == unit
    assert "labels" not in MiniLLM(prompt=2, labels=0.0).losses({"data": one}, run)
    models = language_model(), language_model(1)
    data = {"data": ragged_tokens(), "pretrain": ragged_tokens(seed=1)}
    found = transfer(MiniLLM(prompt=2), models[1], models[0], data, task="language-model", steps=2, batch_size=4)
    assert found.model is not None


def test_it_brings_the_student_s_own_texts_to_where_the_teacher_finds_them_likely():
    student, teacher = language_model(), language_model(1)

    def divergence(model: torch.nn.Module) -> float:
        torch.manual_seed(0)
        texts = generate(model, TEXT[:, :2].repeat(16, 1), new_tokens=6, temperature=1.0)
        return float(kl_divergence(model(texts), teacher(texts), direction="student_to_teacher")[:, 1:-1].mean())

    before = divergence(student)
    run = trainer(
        MiniLLM(prompt=2, labels=0.0), student, teacher, {"input_ids": TEXT.repeat(3, 1)}, task="language-model",
        steps=80, optimizer="adam", lr=0.01,
    )  # fmt: skip
    assert divergence(run.fit()) < 0.6 * before


def test_wrong_arguments_are_refused():
    for wrong in ({"mix": 1.0}, {"labels": -1.0}, {"temperature": 0.0}, {"prompt": 0}, {"length": 0}):
        with pytest.raises(InputError, match="MiniLLM"):
            MiniLLM(**wrong)
    streams = {"data": ragged_tokens(), "more": ragged_tokens()}
    with pytest.raises(InputError, match="perhaps 'pretrain', found data, more"):
        transfer(MiniLLM(prompt=2), language_model(1), language_model(), streams, task="language-model", steps=1)
