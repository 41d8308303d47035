"""The study of fidelity: extractors, metrics, statistics, noise, and a grid that is not trained twice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from transfuse.core.errors import InputError
from transfuse.core.outputs import call, find_logits
from transfuse.distill.fidelity_study import FidelityStudy, NoisyLogits, Outcome, fidelity_study, tokens_of
from transfuse.measure.answers import AnswerFidelity, Coder, Item, choice, compare, free_text, number, write
from transfuse.models import DecoderLM

LETTERS = "\n0123456789+= "
CODER = Coder(
    lambda text: [LETTERS.index(c) for c in text], lambda ids: "".join(LETTERS[i] for i in ids), LETTERS.index("\n")
)
ITEMS = [Item(f"{a}+{b}=", str(a + b), str(a + b)) for a in range(4) for b in range(4)]


def model(seed: int = 0, dim: int = 8) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = DecoderLM(len(LETTERS), dim=dim, depth=1, heads=2, context=12)
        nn.init.normal_(made.embed_tokens.weight, std=1.0)
        return made


def outcome(**given: object) -> Outcome:
    values = {"teacher": "t", "student": "s", "arm": "KD", "tau": 1.0, "sigma": 0.0, "seed": 0, "size": 1,
              "accuracy": 0.5, "agreement": 0.5, "when_right": 0.5, "when_wrong": 0.5, "fidelity": 50.0,
              "teacher_accuracy": 0.9}  # fmt: skip
    return Outcome(**{**values, **given})


def test_answers_are_extracted():
    assert number("5*3=15 ; 7+15=22") == "22"
    assert number("so 1,200.50 it is") == "1200.5"
    assert number("no") is None
    assert choice("A or rather (C).") == "C"
    assert choice("Certainly") is None
    assert free_text("  The CAT, sat!") == "the cat sat"
    assert free_text("...") is None


def test_a_student_that_writes_what_its_teacher_writes_is_faithful_right_or_wrong():
    pytest.importorskip("sacrebleu")
    items = [Item("", "", "22"), Item("", "", "3")]
    texts = ["first 5 * 3 = 15 and then 7 + 15 = 22", "it is 1 + 1 and that makes 4"]
    found = compare(texts, texts, items)
    assert found["agreement"] == 1
    assert found["fidelity"] == pytest.approx(100)
    assert found["accuracy"] == found["teacher_accuracy"] == 0.5
    assert (found["when_right"], found["when_wrong"]) == (1, 1)
    other = compare(["", "3"], texts, items)
    assert other["accuracy"] == 0.5  # no answer is wrong, not dropped
    assert other["agreement"] == 0
    assert other["fidelity"] < 1
    with pytest.raises(InputError, match="one each per item"):
        compare(texts, texts[:1], items)


def test_accuracies_differ_by_no_more_than_answers_do():
    pytest.importorskip("sacrebleu")
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        ours, theirs, truth = ([str(int(i)) for i in row] for row in torch.randint(3, (3, 8), generator=draw))
        found = compare(ours, theirs, [Item("", "", t) for t in truth])
        assert abs(found["accuracy"] - found["teacher_accuracy"]) <= 1 - found["agreement"] + 1e-9


def test_statistics_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    sizes, plain, taught, other = [1, 2, 3, 4], [0.2, 0.4, 0.5, 0.7], [0.5, 0.5, 0.7, 0.7], [0.1, 0.6, 0.6, 0.8]
    rows = []
    for arm, values in (("SFT", plain), ("KD", taught), ("GKD", other)):
        rows += [outcome(arm=arm, student=str(n), size=n, accuracy=a) for n, a in zip(sizes, values, strict=True)]
    study = FidelityStudy(rows)
    gains = [a - b for values in (taught, other) for a, b in zip(values, plain, strict=True)]
    assert study.correlation("size", "gain") == pytest.approx(tuple(stats.spearmanr(sizes * 2, gains)))
    assert study.t_test("KD") == pytest.approx(tuple(stats.ttest_rel(taught, plain)))
    assert study.anova() == pytest.approx(tuple(stats.f_oneway(taught, other)))
    assert str(study).count("\n") == 12
    with pytest.raises(InputError, match="same in every outcome"):
        FidelityStudy([outcome(), outcome(arm="SFT"), outcome(arm="GKD")]).correlation("size", "accuracy")
    with pytest.raises(InputError, match="did not hold"):
        study.t_test("LoRA")


def test_noise_flattens_the_teacher_and_without_it_nothing_changes():
    teacher, inputs = model(), {"input_ids": torch.randint(13, (64, 8), generator=torch.Generator().manual_seed(0))}
    clean = find_logits(call(teacher, inputs)).detach()
    assert torch.equal(call(NoisyLogits(teacher, 0.0), inputs), clean)
    torch.manual_seed(0)
    flips, entropy = [], []
    for sigma in (0.0, 1.0, 2.0, 5.0):
        draws = torch.stack([call(NoisyLogits(teacher, sigma), inputs).detach() for _ in range(30)])
        flips.append(float((draws.argmax(-1) != clean.argmax(-1)).float().mean()))
        mean = draws.softmax(-1).mean(0)
        entropy.append(float(-(mean * mean.log()).sum(-1).mean()))
    assert flips == sorted(set(flips))
    assert entropy[1] > entropy[0]
    with pytest.raises(InputError, match="negative"):
        NoisyLogits(teacher, -1)


def test_only_rationales_are_scored():
    rows = tokens_of([Item("1+1=", "2", "2"), Item("1+10=", "11", "11")], CODER)
    assert rows["inputs"]["attention_mask"].tolist() == [[1] * 6 + [0] * 2, [1] * 8]
    assert rows["labels"][0].tolist() == [-100] * 4 + [LETTERS.index("2"), 0, -100, -100]


def test_a_grid_is_trained_once_and_cells_that_are_the_same_only_once(tmp_path, monkeypatch):
    pytest.importorskip("sacrebleu")
    teachers, students = {"big": model(1, 12), "other": model(2, 12)}, {"small": lambda: model(3)}
    grid = {"taus": (1.0, 2.0), "sigmas": (0.0, 2.0), "length": 3, "steps": 2, "batch_size": 8}
    study = fidelity_study(teachers, students, ITEMS, ITEMS, CODER, tmp_path, **grid)
    count = {arm: sum(o.arm == arm for o in study.outcomes) for arm in ("SFT", "SeqKD", "FKL", "RevKD", "GKD")}
    assert count == {"SFT": 1, "SeqKD": 2, "FKL": 8, "RevKD": 4, "GKD": 4}
    assert all(math.isfinite(study.gain(o)) for o in study.outcomes)
    lost = next(tmp_path.glob("cell-small-gkd-*.json"))
    before = lost.read_text()
    lost.unlink()
    trained = []
    from transfuse.distill import fidelity_study as module

    fit = module.Trainer.fit
    monkeypatch.setattr(module.Trainer, "fit", lambda self: trained.append(1) or fit(self))
    again = fidelity_study(teachers, students, ITEMS, ITEMS, CODER, tmp_path, **grid)
    assert len(trained) == 1
    assert lost.read_text() == before  # bit for bit what it was
    assert str(again) == str(study)


def test_a_model_writes_until_the_end():
    texts = write(model(), ITEMS, CODER, 3)
    assert len(texts) == 16
    assert all(len(t) <= 3 and "\n" not in t for t in texts)


def test_an_empty_grid_or_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match="needs teachers"):
        fidelity_study({}, {"s": model}, ITEMS, ITEMS, CODER, tmp_path, steps=1)
    odd = [Item("1", "1", "1", "poem")]
    with pytest.raises(InputError, match="kind 'poem'"):
        fidelity_study({"t": model()}, {"s": model}, ITEMS, odd, CODER, tmp_path, steps=1)


def test_the_measure_is_the_comparison_of_what_both_write():
    pytest.importorskip("sacrebleu")
    teacher, student = model(1), model(2)
    found = AnswerFidelity(CODER, 3).measure(source=teacher, target=student, data=ITEMS).numbers
    texts = write(student, ITEMS, CODER, 3)
    wanted = compare(texts, write(teacher, ITEMS, CODER, 3), ITEMS)
    assert all(found[name] == wanted[name] for name in ("agreement", "accuracy", "fidelity"))
    assert found["unanswered"] == sum(number(t) is None for t in texts) / len(texts)
    assert found["empty"] == sum(not t.strip() for t in texts) / len(texts)
    same = AnswerFidelity(CODER, 3).measure(source=teacher, target=teacher, data=ITEMS).numbers
    assert same["agreement"] == 1
    with pytest.raises(InputError, match="looks at questions"):
        AnswerFidelity(CODER).measure(source=teacher, target=student, data=[])
    with pytest.raises(InputError, match="kind 'poem'"):
        AnswerFidelity(CODER).measure(source=teacher, target=student, data=[Item("1", "1", "1", "poem")])
    with pytest.raises(InputError, match="length"):
        AnswerFidelity(CODER, 0)
