"""A store gives every sample its own answer, or says why it cannot."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CNN, VOCABULARY, digest, images, language_model, ragged_tokens
from torch import Tensor
from torch.utils.data import Subset

from transfuse import Transfer, transfer
from transfuse.core.batch import Batch
from transfuse.core.checkpoint import load_state
from transfuse.core.errors import CapabilityError, InputError, ShapeError, StoreError
from transfuse.core.outputs import call
from transfuse.core.store import Dense, Draws, Form, Layers, TeacherStore, TopKept, import_openai, import_vllm
from transfuse.core.store.forms import draw_tokens
from transfuse.core.streams import as_data
from transfuse.distill import KD, RSKD, TAID, Hints
from transfuse.losses import Sampled, TopK

TEXT = ragged_tokens(10)
FORMS = [Dense("float32"), TopKept(4, "float32"), Draws(20)]


class Rows(torch.utils.data.Dataset):
    """The texts one by one, so that a subset keeps its numbers."""

    def __init__(self, text: dict[str, Tensor] = TEXT):
        self.text = text

    def __len__(self) -> int:
        return len(self.text["input_ids"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: value[i] for name, value in self.text.items()}


class Tokenizer:
    def __init__(self, *tokens: str):
        self.tokens = tokens or tuple("abcdefghijk")

    def get_vocab(self) -> dict[str, int]:
        return {t: i for i, t in enumerate(self.tokens)}


def quiet(*_: Any) -> None:
    pass


def build(folder: Path, keep: Form | None = None, **options: Any) -> TeacherStore:
    given = {"batch_size": 4, "shard_size": 3, "say": quiet, **options}
    store = TeacherStore.build(folder, language_model(1), Rows(), keep, **given)
    assert store is not None
    return store


def batch(rows: list[int], text: dict[str, Tensor] = TEXT) -> Batch:
    return as_data(Rows(text)).fetch(torch.tensor(rows))


@pytest.mark.parametrize("keep", FORMS, ids=lambda f: f.name)
def test_every_sample_gets_its_own_answer_in_any_order(keep, tmp_path):
    store = build(tmp_path / "s", keep)
    rows = [7, 0, 9, 3]
    outputs, one = store.read(batch(rows)), batch(rows)
    log_p = call(language_model(1), one.inputs).log_softmax(-1)
    real = one.inputs["attention_mask"].bool()
    if isinstance(keep, Dense):
        assert torch.allclose(outputs.logits.log_softmax(-1)[real], log_p[real], atol=1e-5)
    elif isinstance(keep, TopKept):
        assert isinstance(outputs.raw, TopK)
        assert torch.allclose(outputs.raw.log_probabilities[real], log_p.topk(4).values[real], atol=1e-5)
    else:
        assert isinstance(outputs.raw, Sampled)
        assert (outputs.raw.counts.sum(-1) == 20 * real).all()
        ids = outputs.raw.ids[real]
        assert all(
            len(set(row[c > 0].tolist())) == (c > 0).sum() for row, c in zip(ids, outputs.raw.counts[real], strict=True)
        )


def test_padding_changes_nothing_on_either_side(tmp_path):
    store = build(tmp_path / "s", Dense("float32"))
    one = batch([2, 5])
    wide = {k: torch.nn.functional.pad(v, (3, 2)) for k, v in one.inputs.items()}
    padded = store.read(Batch(inputs=wide, index=one.index)).logits
    assert torch.equal(padded[:, 3:-2], store.read(one).logits)


def test_draws_are_a_function_of_seed_and_sample_and_unbiased():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf, 0.5]]).expand(2000, -1).clone()
    p = logits[0].softmax(-1).double()
    drawn = draw_tokens(logits, 50, torch.Generator().manual_seed(0))
    shares = torch.nn.functional.one_hot(drawn, 6).double().mean(1)
    error = (p * (1 - p) / 50 / 2000).sqrt()
    assert ((shares.mean(0) - p).abs() <= 4 * error + 1e-12).all()
    assert shares.var(0)[:4] == pytest.approx((p * (1 - p) / 50)[:4].tolist(), rel=0.15)
    assert (drawn != 4).all()


def test_draws_reach_every_block_of_a_large_vocabulary():
    logits = torch.full((3, 1000), -torch.inf)
    logits[0, 999], logits[1, 256], logits[2, [0, 700]] = 0.0, 3.0, 0.0
    drawn = draw_tokens(logits.clone(), 40, torch.Generator().manual_seed(1))
    assert set(drawn[0].tolist()) == {999}
    assert set(drawn[1].tolist()) == {256}
    assert set(drawn[2].tolist()) == {0, 700}


@pytest.mark.parametrize("shift", [-1000.0, -30.0, 300.0])
def test_draws_do_not_depend_on_a_constant_in_the_logits(shift):
    logits = torch.randint(-8, 8, (200, 130), generator=torch.Generator().manual_seed(0)) / 2
    plain, shifted = (draw_tokens(x, 50, torch.Generator().manual_seed(1)) for x in (logits, logits + shift))
    assert (plain == shifted).double().mean() > 0.999


def test_counts_and_ids_survive_their_three_bytes():
    form = Draws(127)
    entries = {
        "ids": torch.tensor([0, 2**17 - 1, 5, 77]),
        "counts": torch.tensor([127, 1, 126, 127]),
        "distinct": torch.tensor([1, 2, 1]),
    }
    record = form.pack(entries)
    assert len(record) == 3 + 3 * 4
    found = form.unpack([memoryview(record)], [3], 2**17, 1.0)
    assert found.ids.tolist() == [[0, 0], [2**17 - 1, 5], [77, 0]]
    assert found.counts.tolist() == [[127, 0], [1, 126], [127, 0]]


def contents(folder: Path) -> dict[str, Any]:
    """The files of a store; of an index what it says, for its own bytes hold a mapping in no order."""
    states = {p.name: load_state(p)["rows"].tolist() for p in sorted(folder.glob("*.safetensors"))}
    return states | {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in states}


def test_killed_and_called_again_it_goes_on_with_identical_bytes(tmp_path):
    build(tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        if done == 9:
            raise Killed

    with pytest.raises(Killed):
        build(tmp_path / "cut", progress=kill)
    assert len(list((tmp_path / "cut").glob("*.bin"))) == 2
    with pytest.raises(StoreError, match="2 of 4 shards are missing"):
        TeacherStore(tmp_path / "cut")
    seen: list[tuple[int, int]] = []
    build(tmp_path / "cut", progress=lambda *a: seen.append(a))
    assert seen[-1] == (4, 4)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_several_processes_write_one_store(tmp_path):
    build(tmp_path / "one")
    given = {"batch_size": 4, "shard_size": 3, "say": quiet, "world": 2}
    assert TeacherStore.build(tmp_path / "two", language_model(1), Rows(), rank=1, **given) is None
    assert TeacherStore.build(tmp_path / "two", language_model(1), Rows(), rank=0, **given) is not None
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_it_says_size_and_time_before_it_begins(tmp_path):
    said: list[str] = []
    build(tmp_path / "s", say=said.append)
    assert len(said) == 1
    assert "10 samples: about" in said[0]
    assert "MB" in said[0] and "minutes" in said[0]


def test_another_teacher_form_or_tokenizer_is_refused(tmp_path):
    build(tmp_path / "s", tokenizer=Tokenizer())
    with pytest.raises(StoreError, match="another teacher"):
        TeacherStore.build(tmp_path / "s", language_model(2), Rows(), shard_size=3, say=quiet, tokenizer=Tokenizer())
    with pytest.raises(StoreError, match="another keep"):
        build(tmp_path / "s", Draws(3), tokenizer=Tokenizer())
    with pytest.raises(StoreError, match="another tokenizer"):
        TeacherStore(tmp_path / "s", tokenizer=Tokenizer(*"bacdefghijk"))
    TeacherStore(tmp_path / "s", tokenizer=Tokenizer())
    with pytest.raises(StoreError, match="there is no store"):
        TeacherStore(tmp_path / "nowhere")


def test_a_teacher_is_known_by_where_its_weights_stand(tmp_path):
    teacher = language_model(1)
    TeacherStore.build(tmp_path / "s", teacher, Rows(), say=quiet)
    matrix = next(p for p in teacher.parameters() if p.dim() == 2)
    with torch.no_grad():
        matrix.copy_(matrix.flip(0))  # the same numbers in other rows
    with pytest.raises(StoreError, match="another teacher"):
        TeacherStore.build(tmp_path / "s", teacher, Rows(), say=quiet)


def test_a_build_goes_on_only_with_the_same_data(tmp_path):
    build(tmp_path / "s")
    (tmp_path / "s" / "shard-000001.safetensors").unlink()
    other = {k: v.flip(0) for k, v in TEXT.items()}
    with pytest.raises(StoreError, match="another data"):
        TeacherStore.build(tmp_path / "s", language_model(1), Rows(other), batch_size=4, shard_size=3, say=quiet)


@pytest.mark.parametrize("keep", [*FORMS, Layers(("blocks.0",)), Layers(("blocks.0",), pooled=True)], ids=str)
def test_a_sample_without_tokens_has_an_empty_answer(keep, tmp_path):
    text = {k: v.clone() for k, v in TEXT.items()}
    text["attention_mask"][2] = 0
    store = TeacherStore.build(tmp_path / "s", language_model(1), Rows(text), keep, say=quiet)
    for rows in ([2], [1, 2]):
        found = store.read(batch(rows, text))
        values = [*found.features.values()] if isinstance(keep, Layers) else [found.raw]
        assert all(v.isfinite().all() for v in values if isinstance(v, Tensor))


def test_answers_that_are_no_numbers_and_temperatures_that_mean_nothing_are_refused(tmp_path):
    broken = language_model(1)
    with torch.no_grad():
        next(p for p in broken.parameters() if p.dim() == 2).fill_(torch.nan)
    for i, keep in enumerate(FORMS):
        with pytest.raises((StoreError, InputError), match="not numbers"):
            TeacherStore.build(tmp_path / str(i), broken, Rows(), keep, say=quiet)
    for keep, temperature in ((Draws(), 0.0), (Draws(), -1.0), (Dense(), 2.0), (Layers(), 2.0)):
        with pytest.raises(InputError, match=f"temperature is {temperature}"):
            build(tmp_path / "t", keep, temperature=temperature)


def test_edited_text_and_unknown_samples_are_named(tmp_path):
    store = build(tmp_path / "s")
    edited = {k: v.clone() for k, v in TEXT.items()}
    edited["input_ids"][4, 0] = (edited["input_ids"][4, 0] + 1) % VOCABULARY
    store.read(batch([3, 5], edited))
    with pytest.raises(StoreError, match="sample 4 is not what the teacher"):
        store.read(batch([3, 4], edited))
    with pytest.raises(StoreError, match="no answer for sample 17"):
        store.read(Batch(batch([1]), index=torch.tensor([17])))
    with pytest.raises(StoreError, match="found in a store by their number"):
        store.read(Batch(inputs=batch([1]).inputs))


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "index", "header"])
def test_damage_is_found_and_named(how, tmp_path):
    build(tmp_path / "s")
    records = tmp_path / "s" / "shard-000001.bin"
    content = bytearray(records.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
        records.write_bytes(content)
        store = TeacherStore(tmp_path / "s")
        with pytest.raises(StoreError, match=r"the answer for sample [345] in .*shard-000001.bin is damaged"):
            store.read(batch([3, 4, 5]))
        store.read(batch([0, 9]))
        return
    if how == "header":
        header = tmp_path / "s" / "store.json"
        header.write_text(header.read_text().replace(f'"classes": {VOCABULARY}', f'"classes": {VOCABULARY + 1}'))
        with pytest.raises(StoreError, match="store.json does not agree with its checksum"):
            TeacherStore(tmp_path / "s")
        return
    if how == "truncated":
        records.write_bytes(content[:-1])
    elif how == "missing":
        records.unlink()
    else:
        records.with_suffix(".safetensors").write_bytes(b"nothing")
    with pytest.raises(StoreError, match="shard-000001"):
        TeacherStore(tmp_path / "s")


@pytest.mark.parametrize(
    ("keep", "method"),
    [
        (Dense("float32"), TAID()),
        (TopKept(VOCABULARY, "float32"), KD(temperature=1.0, alpha=0.5)),
        (Draws(), RSKD(alpha=0.5)),
        (Draws(), KD(temperature=1.0)),
        (Layers(("blocks.0",), dtype="float32"), Hints("blocks.0", "blocks.0")),
    ],
    ids=str,
)
def test_a_student_learns_from_it_as_from_a_teacher(keep, method, tmp_path):
    store = build(tmp_path / "s", keep)
    given: dict[str, Any] = {
        "target": language_model(0),
        "data": Subset(Rows(), [8, 1, 4, 6, 2, 3]),
        "test": TEXT,
        "task": "language-model",
        "compare": ["scratch", "shuffled teacher"],
        "batch_size": 3,
        "steps": 6,
        "out": tmp_path / "run",
    }
    result = transfer(copy.deepcopy(method), source=store, **given)
    assert result.report.source is not None
    assert digest(result.model) != digest(given["target"])
    whole = isinstance(keep, Dense | Layers) or keep == TopKept(VOCABULARY, "float32")
    if whole:  # the same as from the teacher itself
        live = transfer(copy.deepcopy(method), source=language_model(1), **{**given, "out": None})
        for a, b in zip(result.model.parameters(), live.model.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-4)


def test_runs_of_several_seeds_in_micro_batches_go_on_where_they_were_killed(tmp_path):
    store = build(tmp_path / "s", Draws(9))

    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        seen.append(0)
        if len(seen) == 9:
            raise Killed

    def prepared(folder: str, **more: Any) -> Transfer:
        given = {"data": Subset(Rows(), [8, 1, 4, 6, 2, 3]), "task": "language-model", "seeds": [0, 1], "steps": 6}
        given |= {"batch_size": 3, "micro_batch": 2, "checkpoint_every": 1, "out": tmp_path / folder}
        return Transfer(RSKD(), TeacherStore(store.folder), lambda: language_model(0), **given, **more)

    seen: list[int] = []
    with pytest.raises(Killed):
        prepared("cut", listener=kill).run()
    cut, whole = prepared("cut").run(resume=True), prepared("whole").run()
    assert digest(cut.model) == digest(whole.model)


def test_pooled_layers_are_embeddings(tmp_path):
    store = build(tmp_path / "s", Layers(("blocks.0",), pooled=True, dtype="float32"))
    outputs = store.read(batch([6, 1]))
    assert outputs.features["blocks.0"].shape == (2, 8)


def test_images_have_one_answer_each(tmp_path):
    pictures, _ = images(8)
    options = {"task": "classification", "say": quiet, "temperature": 2.0}
    store = TeacherStore.build(tmp_path / "s", CNN(seed=1), pictures, TopKept(2, "float32"), **options)
    found = store.read(as_data(pictures).fetch(torch.tensor([5, 2]))).raw
    wanted = (CNN(seed=1)(pictures[[5, 2]]) / 2).log_softmax(-1).topk(2)
    assert torch.equal(found.ids, wanted.indices)
    assert torch.allclose(found.log_probabilities, wanted.values)
    with pytest.raises(ShapeError, match=r"kept at temperature 2.0, asked for 4"):
        transfer(KD(), source=store, target=CNN(), data=pictures, steps=1, batch_size=4)
    transfer(KD(temperature=2.0), source=store, target=CNN(), data=pictures, steps=1, batch_size=4)


def test_what_needs_more_than_was_kept_is_refused_by_name(tmp_path):
    store = build(tmp_path / "s")
    with pytest.raises(CapabilityError, match=r"TAID needs 'full' from its source, TeacherStore gives sampled.*RSKD"):
        transfer(TAID(), source=store, target=language_model(), data=Rows(), task="language-model", steps=1)
    with pytest.raises(InputError, match="7 bits"):
        Draws(128)
    with pytest.raises(InputError, match="not a loader"):
        TeacherStore.build(tmp_path / "x", language_model(), [torch.zeros(2, 3)], say=quiet)


def test_copies_and_pickles_are_the_folder(tmp_path):
    store = build(tmp_path / "s")
    assert copy.deepcopy(store) is store
    assert torch.equal(pickle.loads(pickle.dumps(store)).read(batch([1])).raw.ids, store.read(batch([1])).raw.ids)


def service(tokens: list[int], log_p: Tensor, answer: int) -> dict[str, Any]:
    """What a service says about the last tokens of a text: its three best at each."""
    content = []
    for i in range(len(tokens) - answer, len(tokens)):
        best = log_p[i - 1].topk(3)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = [{"token": "abcdefghijk"[j], "logprob": v} for j, v in pairs]
        spoken = {"token": "abcdefghijk"[tokens[i]], "logprob": log_p[i - 1, tokens[i]].item(), "top_logprobs": top}
        content.append(spoken)
    return {"choices": [{"logprobs": {"content": content}}]}


def test_a_service_s_top_log_probabilities_become_a_store(tmp_path):
    rows = [row[m.bool()].tolist() for row, m in zip(*TEXT.values(), strict=True)]
    log_p = call(language_model(1), TEXT).log_softmax(-1).detach()
    lines = [json.dumps(service(r, p, 1)) for r, p in zip(rows, log_p, strict=True)]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    store = import_openai(tmp_path / "s", tmp_path / "answers.jsonl", Rows(), Tokenizer(), VOCABULARY)
    found = store.read(batch([3])).raw
    at = len(rows[3]) - 2
    spoken = rows[3][-1]
    told = {*log_p[3, at].topk(3).indices.tolist(), spoken}  # what was chosen is told as well
    kept = found.log_probabilities[0, at].isfinite()
    assert set(found.ids[0, at][kept].tolist()) == told
    assert torch.allclose(found.log_probabilities[0, at][kept], log_p[3, at, found.ids[0, at][kept]], atol=1e-5)
    assert (found.log_probabilities[0, :at] == -torch.inf).all()
    transfer(KD(temperature=1.0), store, language_model(), Rows(), task="language-model", steps=2, batch_size=5)
    with pytest.raises(StoreError, match="response 2 has 1 tokens that are not those of sample 2"):
        import_openai(tmp_path / "x", map(json.loads, [*lines[:2], lines[4]]), Rows(), Tokenizer(), VOCABULARY)
    with pytest.raises(StoreError, match="9 answers for 10 samples"):
        import_openai(tmp_path / "x", map(json.loads, lines[:9]), Rows(), Tokenizer(), VOCABULARY)


def test_prompt_log_probabilities_of_vllm_become_a_store(tmp_path):
    rows = [row[m.bool()].tolist() for row, m in zip(*TEXT.values(), strict=True)]
    log_p = call(language_model(1), TEXT).log_softmax(-1).detach()
    outputs = []
    for tokens, p in zip(rows, log_p, strict=True):
        entries: list[Any] = [None]
        for i in range(1, len(tokens)):
            ids = {*p[i - 1].topk(2).indices.tolist(), tokens[i]}
            entries.append({str(j): {"logprob": p[i - 1, j].item(), "rank": 1, "decoded_token": "?"} for j in ids})
        outputs.append({"prompt_token_ids": tokens, "prompt_logprobs": entries})
    store = import_vllm(tmp_path / "s", outputs, Rows(), Tokenizer(), VOCABULARY)
    found = store.read(batch([6])).raw
    assert found.log_probabilities[0, 0].max() == pytest.approx(log_p[6, 0].max().item(), abs=1e-5)
    outputs[1]["prompt_logprobs"][1] = {"0": {"logprob": -1.0}} if rows[1][1] else {"1": {"logprob": -1.0}}
    with pytest.raises(StoreError, match="nothing about token 1 of sample 1"):
        import_vllm(tmp_path / "x", outputs, Rows(), Tokenizer(), VOCABULARY)
