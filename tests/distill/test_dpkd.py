"""DPKD against the numbers of its sheet."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import digest, language_model, ragged_tokens, trainer

from transfuse.core.batch import line_up
from transfuse.core.errors import InputError
from transfuse.core.streams import as_data
from transfuse.distill import DPKD
from transfuse.distill.on_policy import written
from transfuse.losses import preference, token_margin


def rows(count: int = 12, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    student, teacher = torch.randn(count, classes), torch.randn(count, classes)
    teacher[:3] = student[:3] * 1.5  # the same first choice
    return student.requires_grad_(), teacher


def test_a_preference_costs_log_2_at_least_and_exactly_where_both_say_the_same():
    student, teacher = rows()
    values = preference(token_margin(student, teacher))
    same = student.argmax(-1) == teacher.argmax(-1)
    assert same[:3].all()
    assert (~same).any()
    assert torch.allclose(values[same], torch.tensor(math.log(2)))
    assert (values[~same] > math.log(2)).all()
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert (gradient[same] == 0).all()
    assert (gradient[~same] != 0).any(-1).all()


def test_only_two_logits_move_by_the_formula():
    student, teacher = rows()
    margin = token_margin(student, teacher)
    (gradient,) = torch.autograd.grad(preference(margin).sum(), student)
    a, c = teacher.argmax(-1), student.argmax(-1)
    pull = 0.1 * torch.sigmoid(-0.1 * margin.detach())
    wanted = torch.zeros_like(gradient)
    wanted[torch.arange(12), c] += pull
    wanted[torch.arange(12), a] -= pull
    assert torch.allclose(gradient, wanted, atol=1e-6)
    assert gradient.sum(-1).abs().max() < 1e-6


def test_the_example_of_the_sheet():
    h = token_margin(torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 0.0]]), reference=False)
    assert h.item() == pytest.approx(-1.0)
    assert preference(h).item() == pytest.approx(0.744397, abs=1e-6)


def test_constants_change_nothing_and_a_swap_turns_the_margin():
    student, teacher = rows()
    shifted = token_margin(student + torch.randn(12, 1), teacher + torch.randn(12, 1))
    assert torch.allclose(shifted, token_margin(student, teacher), atol=1e-5)
    h = torch.tensor([-1.3, 0.0, 0.4])
    assert torch.allclose(preference(-h, label_smoothing=0.0) - preference(h), 0.1 * h, atol=1e-6)
    assert preference(torch.tensor(0.0)).item() == pytest.approx(math.log(2))


def test_the_variants():
    h = torch.tensor([-2.0])
    assert preference(h, beta=0.5, shape="squared").item() == pytest.approx(9.0)
    smooth = preference(h, label_smoothing=0.25)
    assert smooth.item() == pytest.approx(0.75 * math.log(1 + math.exp(0.2)) + 0.25 * math.log(1 + math.exp(-0.2)))
    student, teacher = rows()
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    a = teacher.argmax(-1, keepdim=True)
    lost = (log_t.gather(-1, a) - log_s.gather(-1, a))[:, 0].clamp(min=0)
    found = token_margin(student, teacher, positive=50.0)
    assert torch.allclose(found, token_margin(student, teacher) - 50 * lost, atol=1e-4)
    for wrong in ({"beta": 0.0}, {"label_smoothing": 0.5}, {"shape": "hinge"}):
        with pytest.raises(ValueError, match=r"beta|shape"):
            preference(h, **wrong)


def test_plain_text_beside_the_answers_is_a_stream_of_its_own():
    streams: Any = {"data": as_data(ragged_tokens()), "pretraining": as_data(ragged_tokens(24, seed=3))}
    run = trainer(DPKD(), language_model(), language_model(1), streams, task="language-model", steps=3)
    run.fit()
    terms = run.history[-1]["terms"]
    assert set(terms) == {"preference", "labels", "plain", "plain labels"}
    assert terms["plain"]["weighted"] == pytest.approx(0.25 * terms["plain"]["raw"])


def test_agreement_with_the_teacher_rises():
    text = ragged_tokens(24)
    student, teacher = language_model(), language_model(1)

    def agreement() -> float:
        first, second = (m(**text).argmax(-1)[text["attention_mask"].bool()] for m in (student, teacher))
        return float((first == second).float().mean())

    before = agreement()
    run = trainer(
        DPKD(alpha=0.95),
        student,
        teacher,
        text,
        task="language-model",
        steps=80,
        optimizer="adam",
        lr=0.01,
        batch_size=24,
    )
    run.fit()
    assert agreement() > before + 0.1


def test_wrong_arguments_are_refused():
    for wrong in ({"alpha": 1.0}, {"beta": 0.0}, {"label_smoothing": 0.6}, {"shape": "hinge"}, {"plain": -1.0}):
        with pytest.raises(InputError, match="DPKD"):
            DPKD(**wrong)


def test_of_whole_sequences_the_margin_is_that_of_the_formula():
    student, teacher = language_model(1), language_model(2)
    method = DPKD(level="sequence", prompt=2, length=3)
    run = trainer(method, student, teacher, ragged_tokens(), task="language-model").run
    batch = line_up(as_data(ragged_tokens(4)).sample(4), "language-model")
    torch.manual_seed(3)
    ratio = method._log_ratio("source", batch, run)
    torch.manual_seed(3)
    answers = written("source", batch, run, 2, 3, None)
    for i in range(4):
        total, text = 0.0, answers.inputs[i]  # all prompts are of one length, so nothing is padded
        for sign, model in ((1, student), (-1, teacher)):
            log_p = model(text[None])[0].log_softmax(-1)
            total += sign * sum(float(log_p[t, text[t + 1]]) for t in range(1, 4))
        assert float(ratio[i]) == pytest.approx(total, abs=1e-5)
    torch.manual_seed(3)
    shorter = DPKD(level="sequence", prompt=2, length=3, per_token=True)._log_ratio("source", batch, run)
    assert torch.allclose(shorter, ratio / answers.mask.sum(1))


def test_sequences_of_equal_models_cost_log_2_and_teach_nothing():
    student = language_model(1)
    method = DPKD(level="sequence", prompt=2)
    run = trainer(method, student, copy.deepcopy(student), ragged_tokens(), task="language-model").run
    terms = method._all({"data": line_up(as_data(ragged_tokens(4)).sample(4), "language-model")}, run)
    assert float(terms["preference"].sum) == pytest.approx(4 * math.log(2), abs=1e-5)


def test_whole_sequences_are_learned_from_in_training():
    student = language_model(1)
    before = digest(student)
    method = DPKD(level="sequence", prompt=2)
    model = trainer(method, student, language_model(2), ragged_tokens(), task="language-model", steps=3).fit()
    assert digest(model) != before
    for wrong in ({"reference": False}, {"positive": 1.0}, {"prompt": 0}):
        with pytest.raises(InputError, match="DPKD"):
            DPKD(level="sequence", **wrong)
