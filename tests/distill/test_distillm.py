"""DistiLLM: a bounded divergence, a share of own texts that validation decides, and a buffer of them."""

from __future__ import annotations

import pytest
import torch
from helpers import language_model, ragged_tokens, trainer

from transfuse.core.batch import Batch, align_tokens
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.run import Run
from transfuse.core.streams import as_data
from transfuse.distill import DistiLLM
from transfuse.losses import IGNORE, cross_entropy, skew_kl

TEXT = torch.arange(60).view(10, 6) % 11


def run_of(data: object = None) -> Run:
    streams = {"data": as_data(TEXT if data is None else data)}
    run = Run({"target": language_model(), "source": language_model(1)}, streams, task="language-model")
    run.clock = Clock(steps=10)
    return run


def batch(rows: int = 3) -> Batch:
    return align_tokens(Batch(inputs=TEXT[:rows]))


@pytest.mark.parametrize("reverse", [False, True])
def test_on_the_data_it_is_the_skew_divergence(reverse):
    run, one = run_of(), batch()
    term = DistiLLM(reverse=reverse).losses({"data": one}, run)["distillm"]
    s, t = run("target", one).logits, run("source", one, grad=False).logits
    direction = "student_to_teacher" if reverse else "teacher_to_student"
    wanted = skew_kl(s, t, skew=0.1, direction=direction)[one.mask].mean()
    assert term.mean.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_what_is_held_out_is_never_trained_on_and_gives_the_cross_entropy():
    run = run_of()
    method = DistiLLM(held_out=4, prompt=2)
    method.setup(run, batch())
    held, rest = method._split(run)
    assert method.stage(0, run).streams["data"].size == rest.size == 6
    assert sorted(held.ids.tolist() + rest.ids.tolist()) == list(range(10))
    texts = align_tokens(Batch(inputs=TEXT[held.ids]))
    wanted = cross_entropy(run["target"](texts.inputs), texts.labels)[texts.mask].mean()
    assert method.validate(run) == pytest.approx(wanted.item(), rel=1e-5)


def test_own_texts_become_more_frequent_only_where_validation_has_risen_by_the_margin(monkeypatch):
    run, method = run_of(), DistiLLM(every=2, margin=0.1, step=0.4, held_out=4)
    found = iter([2.0, 1.5, 2.05, 2.2, 2.25, 2.35, 3.0, 4.0])
    monkeypatch.setattr(method, "validate", lambda run: next(found))
    method.begin_stage(0, run)
    seen = []
    for step in range(14):
        run.clock.step = step
        method.after_update(None, {}, run)
        seen.append(round(float(method.phi), 3))
    assert seen[1::2] == [0.0, 0.0, 0.4, 0.4, 0.8, 1.0, 1.0]
    (panel,) = method.panels()
    assert panel["series"]["phi"][2] == (6.0, pytest.approx(0.4))


def test_own_texts_are_written_in_the_beginning_and_drawn_from_the_buffer_later(monkeypatch):
    run, method = run_of(), DistiLLM(start=1.0, held_out=4, prompt=2, every=100)
    written = []
    generate = run.generate
    monkeypatch.setattr(run, "generate", lambda *a, **o: written.append(run.clock.step) or generate(*a, **o))
    run.clock = Clock(steps=100)
    for step in range(100):
        run.clock.step = step
        method.losses({"data": batch()}, run)
        method.after_update(None, {}, run)
    assert written[0] == 0
    early, late = sum(step < 50 for step in written), sum(step >= 50 for step in written)
    assert 25 < early <= 50
    assert late < 0.6 * early


def test_the_buffer_keeps_the_newest_texts_and_what_was_prompt_or_padding_is_not_scored():
    run, method = run_of(), DistiLLM(start=1.0, capacity=5, prompt=2, held_out=4, length=3)
    for length in (3, 4):
        method.length = length
        own = method.own_texts(batch(), run, anew=True)
        assert own.mask.sum() == own.mask[:, 1:].sum() <= 3 * length
        last = method._fresh[-1]["input_ids"]
        method.after_update(None, {}, run)
    assert method.buffer["input_ids"].shape == (5, 6)
    assert torch.equal(method.buffer["input_ids"][2:], last)
    assert (method.buffer["labels"][:2, 4:] == IGNORE).all()
    assert method.buffer["attention_mask"][0].tolist() == [1, 1, 1, 1, 1, 0]
    old = method.own_texts(batch(), run, anew=False)
    assert not method._fresh
    rows = {tuple(row) for row in method.buffer["input_ids"].tolist()}
    assert {tuple(row) for row in old.inputs["input_ids"].tolist()} <= rows


def test_it_reduces_the_divergence_with_own_texts():
    run = trainer(
        DistiLLM(start=0.5, prompt=2, held_out=3), language_model(), language_model(1), ragged_tokens(),
        task="language-model", steps=60, optimizer="adam", lr=0.01,
    )  # fmt: skip
    run.fit()
    first, last = (run.history[i]["terms"]["distillm"]["raw"] for i in (0, -1))
    assert last < 0.8 * first


def test_wrong_arguments_and_data_are_refused():
    for wrong in ({"skew": 1.0}, {"start": 2.0}, {"step": -0.1}, {"every": 0}, {"capacity": 0}, {"temperature": 0.0}):
        with pytest.raises(InputError, match="DistiLLM"):
            DistiLLM(**wrong)
    models = language_model(), language_model(1)
    with pytest.raises(InputError, match="64 are held out"):
        trainer(DistiLLM(prompt=2), *models, ragged_tokens(), task="language-model").fit()
    with pytest.raises(InputError, match="pass a data set"):
        trainer(DistiLLM(prompt=2), *models, [TEXT], task="language-model").fit()
    with pytest.raises(InputError, match="leave nothing to write"):
        trainer(DistiLLM(prompt=9, held_out=2), *models, ragged_tokens(), task="language-model").fit()
