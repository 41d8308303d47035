"""Texts that models write while they learn: what is a prompt, what is scored, and who learns from it."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import language_model, ragged_tokens, trainer

from transfuse.core.batch import Batch, align_tokens
from transfuse.core.clock import Clock
from transfuse.core.decoding import generate
from transfuse.core.errors import InputError, VocabularyError
from transfuse.core.outputs import Outputs
from transfuse.core.run import Run
from transfuse.distill import GKD, SeqKD
from transfuse.distill.on_policy import answered, prompts, written
from transfuse.losses import IGNORE, cross_entropy, jensen_shannon, kl_divergence

TOKENS = torch.tensor([[4, 5, 6, 7, 8, 9], [1, 2, 3, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def batch(labels: torch.Tensor | None = None) -> Batch:
    inputs = {"input_ids": TOKENS, "attention_mask": MASK}
    return align_tokens(Batch(inputs=inputs) if labels is None else Batch(inputs=inputs, labels=labels))


def test_the_prompt_is_what_comes_before_the_first_scored_token():
    labels = TOKENS.masked_fill(MASK == 0, IGNORE)
    labels[0, :4] = IGNORE
    labels[1, :1] = IGNORE
    asked, real = prompts(batch(labels), 1)
    assert asked.tolist() == [[4, 5, 6, 7], [0, 0, 0, 1]]
    assert real.tolist() == [[True] * 4, [False, False, False, True]]


def test_plain_text_is_cut_after_as_many_tokens_as_asked():
    asked, real = prompts(batch(), 2)
    assert asked.tolist() == [[4, 5], [1, 2]]
    assert real.all()


def test_only_the_answer_is_scored_its_end_included_and_nothing_after_it():
    texts = torch.tensor([[0, 4, 5, 9, 9], [6, 7, 8, 1, 2]])
    found = answered(texts, torch.tensor([[False, True], [True, True]]), end=9)
    assert found.inputs["attention_mask"].tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert found.labels.tolist() == [[IGNORE, 5, 9, IGNORE, IGNORE], [IGNORE, 8, 1, 2, IGNORE]]
    assert found.mask.sum() == 5


def test_scrambled_prompts_labels_change_nothing_in_what_is_scored():
    texts = torch.tensor([[6, 7, 8, 1, 2]])
    found = answered(texts, torch.tensor([[True, True]]), None)
    assert found.inputs is texts
    assert found.labels.tolist() == [[IGNORE, 8, 1, 2, IGNORE]]


def run_of() -> Run:
    run = Run({"target": language_model(), "source": language_model(1)}, {}, task="language-model")
    run.clock = Clock()
    return run


def test_gkd_on_the_data_is_the_divergence_that_it_names():
    run, one = run_of(), batch()
    s, t = run("target", one), run("source", one, grad=False)
    for beta, wanted in (
        (0.5, jensen_shannon(s.logits, t.logits)),
        (0.1, jensen_shannon(s.logits, t.logits, beta=0.1)),
        (0.0, kl_divergence(s.logits, t.logits)),
        (1.0, kl_divergence(s.logits, t.logits, direction="student_to_teacher")),
    ):
        term = GKD(share=0.0, beta=beta).losses({"data": one}, run)["gkd"]
        assert term.mean.item() == pytest.approx(wanted[one.mask].mean().item(), rel=1e-4)


def test_gkd_learns_from_what_the_student_writes_and_both_read_the_same():
    run, one = run_of(), batch()
    method = GKD(share=1.0, prompt=2)
    torch.manual_seed(3)
    own = written("target", one, run, 2, None, None)
    torch.manual_seed(3)
    wanted = generate(run["target"], TOKENS[:, :2], new_tokens=4, temperature=1.0)
    assert torch.equal(own.inputs, wanted)
    assert own.mask.sum() == 8
    torch.manual_seed(3)
    term = method.losses({"data": one}, run)["gkd"]
    s, t = Outputs(run("target", own).logits), Outputs(run("source", own, grad=False).logits)
    assert term.sum.item() == pytest.approx(jensen_shannon(s.logits, t.logits)[own.mask].sum().item(), rel=1e-4)
    assert term.unit == "late:token"


def test_gkd_reduces_the_divergence():
    run = trainer(
        GKD(prompt=2), language_model(), language_model(1), ragged_tokens(), task="language-model", steps=60,
        optimizer="adam", lr=0.01,
    )  # fmt: skip
    run.fit()
    first, last = (run.history[i]["terms"]["gkd"]["raw"] for i in (0, -1))
    assert last < 0.8 * first


def test_seqkd_trains_on_the_teacher_s_text_alone_and_asks_it_once():
    teacher, text = language_model(1), {"input_ids": TOKENS.repeat(3, 1)}
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    run = trainer(SeqKD(prompt=2, writes=4), language_model(), teacher, text, task="language-model", steps=5)
    run.fit()
    assert len(calls) == 10  # two batches of prompts, four tokens each; two looks at its output layer before
    written = run.method.texts["input_ids"]
    assert torch.equal(written, generate(language_model(1), text["input_ids"][:, :2], new_tokens=4))
    assert run.method.texts["labels"].tolist() == [[IGNORE, IGNORE, *row[2:]] for row in written.tolist()]
    before = copy.deepcopy(language_model())
    one = align_tokens(Batch(inputs=written, labels=run.method.texts["labels"]))
    values = [cross_entropy(m(written), one.labels)[one.mask].mean() for m in (run.run["target"], before)]
    assert values[0] < values[1]


def test_seqkd_refuses_a_teacher_of_other_tokens():
    student, teacher = language_model(), language_model(1)
    student.tokenizer, teacher.tokenizer = list("abcdefghijk"), list("bacdefghijk")
    with pytest.raises(VocabularyError, match="mean different tokens"):
        trainer(SeqKD(prompt=2), student, teacher, {"input_ids": TOKENS}, task="language-model").fit()


def test_wrong_arguments_and_data_are_refused():
    for wrong in ({"share": 2.0}, {"beta": -1.0}, {"temperature": 0.0}, {"prompt": 0}, {"length": 0}):
        with pytest.raises(InputError, match="GKD"):
            GKD(**wrong)
    with pytest.raises(InputError, match="SeqKD"):
        SeqKD(writes=0)
    with pytest.raises(InputError, match="leave nothing to write"):
        trainer(SeqKD(prompt=9), language_model(), language_model(1), ragged_tokens(), task="language-model").fit()
    with pytest.raises(InputError, match="pass a data set"):
        trainer(SeqKD(), language_model(), language_model(1), [TOKENS], task="language-model").fit()
