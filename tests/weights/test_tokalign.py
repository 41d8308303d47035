"""TokAlign: vectors of tokens, which token stands for which, and the model that has the new vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from weights.examples_vocabulary import LETTERS, OTHERS, SMALL, example, model, texts

from transfuse import transfer
from transfuse.core.errors import InputError, LayerError, StoreError
from transfuse.cotrain.vocabulary import change_rows
from transfuse.datasets import byte_text, paired_tokens
from transfuse.weights import TokAlign
from transfuse.weights.glove import Vectors, cooccurrence, glove, weight
from transfuse.weights.token_mapping import (
    ALIGNED,
    NONE,
    RANDOM,
    ROLE,
    SURFACE,
    Spaces,
    TokenMapping,
    alignment_quality,
    bleu1,
    comparable,
    gold_pairs,
    mapped,
    nearest,
    relative,
    roles,
    surfaces,
)

OPTIONS = {"batch_size": 4, "lr": 1e-2, "task": "language-model"}


def run_of(method: TokAlign, source: nn.Module, target: nn.Module, steps: int = 2, **options):
    data = paired_tokens(texts(), target.tokenizer, source.tokenizer, 12)
    return transfer(method, source, target, data, test=data, steps=steps, **{**OPTIONS, **options})


# Counting and GloVe ------------------------------------------------------------------------------------------------


def test_meetings_are_counted_by_distance_both_ways_and_not_across_texts():
    found = cooccurrence([torch.tensor([[0, 1, 2], [1, 1, -1]])], 4, window=2)
    table = torch.zeros(4, 4).index_put_((found.rows, found.columns), found.counts)
    wanted = torch.tensor([[0, 1, 0.5, 0], [1, 2, 1, 0], [0.5, 1, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(table, wanted)
    assert found.frequency.tolist() == [1, 3, 1, 0]
    one_by_one = cooccurrence([torch.tensor([[0, 1, 2]]), torch.tensor([[1, 1]])], 4, window=2)
    assert torch.equal(one_by_one.counts, found.counts)
    with pytest.raises(InputError, match="the id 9"):
        cooccurrence([torch.tensor([[9]])], 4)
    with pytest.raises(InputError, match="window"):
        cooccurrence([], 4, window=0)


def test_a_cell_counts_in_full_from_x_max_on():
    assert weight(torch.tensor([10.0, 20.0]), 10.0).tolist() == [1.0, 1.0]
    assert float(weight(torch.tensor(5.0), 10.0)) == pytest.approx(0.5**0.75)


def test_glove_learns_a_table_of_two_tokens():
    found = cooccurrence([torch.tensor([[0, 0, 1]] * 8 + [[1, 0, 1]] * 4)], 2, window=2)
    learned = glove(found, dimension=4, iterations=300, min_count=1, lr=0.1)
    assert learned.losses[-1] < 1e-3 < learned.losses[0]
    assert glove(found, 4, 3, seed=1).vectors.equal(glove(found, 4, 3, seed=1).vectors)


def test_rare_tokens_have_no_vector_and_a_text_of_rare_ones_is_refused():
    found = cooccurrence([torch.tensor([[0, 1] * 5, [0, 2] + [0, 1] * 4])], 3)
    learned = glove(found, dimension=2, iterations=1, min_count=5)
    assert learned.known.tolist() == [True, True, False]
    assert (learned.vectors[2] == 0).all()
    with pytest.raises(InputError, match="smaller min_count"):
        glove(found, min_count=100)


# Alignment ---------------------------------------------------------------------------------------------------------


def test_relative_representations_do_not_see_a_rotation_and_raw_vectors_do():
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(20, 6, generator=draw, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64)).Q
    pivots = torch.arange(5)
    assert torch.allclose(relative(vectors, pivots), relative(vectors @ turn, pivots))
    assert relative(vectors, pivots)[3, 3] == pytest.approx(1.0)
    known, gold = torch.ones(20, dtype=torch.bool), {i: i for i in range(10)}
    one, other = Vectors(vectors, known, ()), Vectors(vectors @ turn, known, ())

    def found(similarity: str) -> list[int]:
        spaces = comparable(one, other, gold, 10, similarity)
        return nearest(spaces.target, spaces.source)[1][:, 0].tolist()

    assert found("cosine") == list(range(20))
    assert found("vanilla") != list(range(20))
    assert not torch.allclose(vectors, vectors @ turn)


def test_half_of_the_tokens_hidden_are_found_again_by_what_stands_beside_them():
    text = byte_text(context=256).train.tensors[0][:600]
    counts = cooccurrence(text.split(100), 256, window=10)
    one, other = (glove(counts, 48, 40, seed=seed) for seed in (1, 2))  # two spaces, as two tokenizers have
    often = (counts.frequency >= 50).nonzero().flatten()
    order = often[torch.randperm(len(often), generator=torch.Generator().manual_seed(0))]
    gold, hidden = order[: len(often) // 2].tolist(), order[len(often) // 2 :]
    surface = [i if i in gold else None for i in range(256)]

    def share(similarity: str) -> float:
        pairs = gold_pairs(surface, surface)
        spaces = comparable(one, other, pairs, len(gold), similarity)
        found = nearest(spaces.target[hidden], spaces.source)[1][:, 0]
        return float((found == hidden).float().mean())

    assert share("cosine") >= 0.9
    assert share("vanilla") < 0.2


def test_every_target_token_is_mapped_and_the_report_says_why():
    target, source = [b"a", b"b", b"new", b"rare", None, b"<s>"], [b"b", b"a", b"old", b"</s>"]
    known = torch.tensor([True, True, True, False, False, True]), torch.ones(4, dtype=torch.bool)
    ours, theirs = torch.eye(6), torch.eye(6)[[1, 0, 2, 2]]
    theirs[3] *= 2  # nearest to "new", were it not special
    gold = gold_pairs(target, source)
    found = mapped(target, source, Spaces(ours, theirs, *known), gold, {5: 3}, excluded=[3])
    assert found.source[[0, 1, 2, 5]].tolist() == [1, 0, 2, 3]
    assert found.kinds.tolist() == [SURFACE, SURFACE, ALIGNED, RANDOM, NONE, ROLE]
    assert ((found.source >= 0) & (found.source < 4)).all()
    assert found.counts["at random"] == 1
    assert "6 target tokens (2 same surface, 1 same role, 1 aligned, 1 at random, 1 no token)" in found.report()
    assert found.invert()[0][0] == 1
    assert found(torch.tensor([[0, 1]])).tolist() == [[1, 0]]


class Tokenizer:
    def __init__(self, tokens: dict[str, int], **ids: int):
        self.tokens = tokens
        for role, i in ids.items():
            setattr(self, f"{role}_token_id", i)

    def get_vocab(self) -> dict[str, int]:
        return self.tokens


def test_the_same_bytes_written_otherwise_are_the_same_and_the_same_strings_need_not_be():
    pieces, levels = Tokenizer({"▁the": 0, "a": 1}, bos=1), Tokenizer({"Ġthe": 1, "a": 0, **byte_level()}, bos=0)
    assert gold_pairs(surfaces(pieces), surfaces(levels)) == {0: 1, 1: 0}
    assert gold_pairs(surfaces(pieces, "strings"), surfaces(levels, "strings")) == {1: 0}
    assert roles(pieces) == {"bos": 1}


def byte_level() -> dict[str, int]:
    from transfuse.core.vocabulary import _byte_level

    return {c: 2 + i for i, c in enumerate(_byte_level()) if c != "a"}


def test_too_few_pairs_for_the_pivots_are_counted():
    known = torch.tensor([True, True, False])
    vectors = Vectors(torch.randn(3, 2), known, ())
    with pytest.raises(InputError, match="2 tokens are the same .* set pivots=2"):
        comparable(vectors, vectors, {0: 0, 1: 1, 2: 2}, 3)


def test_bleu_of_single_tokens_is_clipped_and_short_texts_pay():
    assert bleu1([[1, 2, 3]], [[3, 2, 1]]) == 1.0
    assert bleu1([[1, 1, 1, 2]], [[1, 2, 3, 4]]) == 0.5
    assert bleu1([[1, 2]], [[1, 2, 3]]) == pytest.approx(math.exp(1 - 3 / 2))
    with pytest.raises(InputError, match="one for each"):
        bleu1([[1]], [])
    with pytest.raises(InputError, match="no token"):
        bleu1([[]], [[1]])
    ids = torch.tensor([[0, 2, -1]])
    identity = TokenMapping(torch.arange(3), torch.zeros(3, dtype=torch.uint8), 3)
    assert alignment_quality(identity, ids, ids) == 1.0


def test_a_mapping_is_kept_as_a_file_and_other_files_are_none(tmp_path):
    mapping = TokenMapping(torch.tensor([1, 0, 1]), torch.tensor([0, 1, 2], dtype=torch.uint8), 2)
    mapping.save(tmp_path / "m.json")
    again = TokenMapping.load(tmp_path / "m.json")
    assert again.source.tolist() == [1, 0, 1]
    assert again.kinds.tolist() == [0, 1, 2]
    assert again.source_size == 2
    (tmp_path / "m.json").write_text('{"source": [5], "kinds": [0], "source_size": 2}')
    for name in ("m.json", "none.json"):
        with pytest.raises(StoreError, match="no mapping"):
            TokenMapping.load(tmp_path / name)


# The model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True])
def test_a_permuted_vocabulary_gives_permuted_logits_and_tied_rows_stay_tied(tie):
    order = [3, 1, 0, 7, 6, 5, 4, 2]
    source, target = model(LETTERS, 1, tie), model([LETTERS[i] for i in order], 2, tie)
    found = run_of(TokAlign(**SMALL), source, target, lr=1e-12).model
    ids = torch.tensor([[0, 3, 5, 2]])
    assert torch.allclose(found(ids), source(torch.tensor(order)[ids])[..., order], atol=1e-5)
    assert (found.head.weight is found.embed_tokens.weight) == tie


def test_the_first_stage_moves_rows_alone_and_the_second_everything():
    source, target = model(LETTERS, 1), model(OTHERS)
    moved: list[set[str]] = []

    def listener(arm, seed, trainer, record):
        own = trainer.run["target"].named_parameters()
        start = dict(source.named_parameters())
        moved.append({n for n, p in own if p.shape != start[n].shape or not torch.equal(p, start[n])})

    run_of(TokAlign(first=0.5, **SMALL), source, target, steps=4, listener=listener)
    assert moved[0] == moved[1] == {"embed_tokens.weight", "head.weight"}
    assert moved[-1] == {n for n, _ in target.named_parameters()}


def test_a_mapping_of_the_user_s_is_followed(tmp_path):
    kinds = torch.zeros(11, dtype=torch.uint8)
    TokenMapping(torch.full((11,), 3), kinds, 8).save(tmp_path / "all-to-three.json")
    source = model(LETTERS, 1)
    found = run_of(TokAlign(str(tmp_path / "all-to-three.json")), source, model(OTHERS), lr=1e-12).model
    assert torch.allclose(found.head.weight, source.head.weight[3].expand(11, -1), atol=1e-6)
    TokenMapping(torch.full((9,), 3), kinds[:9], 8).save(tmp_path / "other.json")
    with pytest.raises(InputError, match="from 9 to 8 tokens"):
        run_of(TokAlign(str(tmp_path / "other.json")), source, model(OTHERS))


def test_rows_of_a_bias_and_of_a_config_are_changed_as_well():
    changed = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    changed.config = type("Config", (), {"vocab_size": 4})()
    before = changed[1].bias.detach().clone()
    change_rows(changed, lambda rows: rows[[0, 0, 3]])
    assert torch.equal(changed[1].bias, before[[0, 0, 3]])
    assert changed[0].num_embeddings == changed[1].out_features == changed.config.vocab_size == 3
    assert changed(torch.tensor([[2]])).shape == (1, 1, 3)


@pytest.mark.parametrize("tie", [False, True])
def test_a_model_of_hugging_face_s_keeps_its_ties_and_knows_its_new_size(tie):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=7, num_key_value_heads=2, tie_word_embeddings=tie, **sizes)
    llama = transformers.LlamaForCausalLM(config).eval()
    order = torch.tensor([6, 0, 3, 3])
    before = llama(torch.tensor([[6, 3]])).logits[..., order]
    change_rows(llama, lambda rows: rows[order])
    assert torch.allclose(llama(torch.tensor([[0, 2]])).logits, before, atol=1e-6)
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == tie
    assert llama.config.vocab_size == 4


def test_what_was_mapped_how_is_reported():
    method = TokAlign(**SMALL)
    assert method.panels() == []
    assert example(method).method is method
    result = run_of(TokAlign(**SMALL), model(LETTERS, 1), model(OTHERS))
    (panel,) = [p for p in result.report.panels if p.title == "Tokens"]
    assert dict(zip(panel.groups, panel.values[0], strict=True)) == {
        "same surface": 8, "same role": 0, "aligned": 0, "at random": 2, "no token": 1,
    }  # fmt: skip


def test_wrong_arguments_models_and_data_are_refused():
    for wrong in ({"pivots": 0}, {"similarity": "x"}, {"match": "x"}, {"first": 1.0}, {"lr_ratio": 0.0}, {"x_max": 0}):
        with pytest.raises(InputError, match="TokAlign"):
            TokAlign(**wrong)
    nameless = model(OTHERS)
    del nameless.tokenizer
    data = paired_tokens(texts(), OTHERS, LETTERS, 12)
    with pytest.raises(InputError, match="ids of target mean"):
        transfer(TokAlign(**SMALL), model(LETTERS), nameless, data, steps=1, **OPTIONS)
    with pytest.raises(InputError, match="paired_tokens"):
        transfer(TokAlign(**SMALL), model(OTHERS, 1), model(OTHERS), torch.zeros(4, 5).long(), steps=1, **OPTIONS)
    with pytest.raises(LayerError, match="differ in blocks.0"):
        run_of(TokAlign(**SMALL), model(LETTERS, dim=4), model(OTHERS))
    with pytest.raises(LayerError, match="whether they are tied"):
        run_of(TokAlign(**SMALL), model(LETTERS, tie=True), model(OTHERS))
    with pytest.raises(InputError, match="set pivots=8"):
        run_of(TokAlign(**{**SMALL, "pivots": 9}), model(LETTERS), model(OTHERS))
