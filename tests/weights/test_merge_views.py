"""Checkpoints seen otherwise: other ids, other layers, an adapter folded in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from transfuse.core.errors import CapabilityError, InputError, StoreError, VocabularyError
from transfuse.weights import Linear, TaskArithmetic, merge
from transfuse.weights.checkpoint import InMemory
from transfuse.weights.lora import Adapter, WithAdapter, extract_lora, low_rank, merge_adapters
from transfuse.weights.stack import Stacked
from transfuse.weights.tokenizer_files import cut, renumbered
from transfuse.weights.vocabulary import align

TOKENS = [b"<s>", b"a", b"b", b"c", b"ab", "ä".encode(), b"\xff", b"cab", b"ba", b"bb", b"cc"]


def permuted(model: nn.Module, order: Tensor) -> nn.Module:
    """The same model with token order[i] as its token i."""
    changed = llama()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer in {changed.get_input_embeddings(), changed.get_output_embeddings()}:
            layer.weight.copy_(layer.weight[order])
    return changed


def tokenizer(tokens: list[str], folder: Path) -> None:
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, tokens[0])).save(str(folder / "tokenizer.json"))


# Vocabulary


def test_a_model_merged_with_itself_under_permuted_ids_gives_the_same_logits():
    model, order = llama(), torch.randperm(11, generator=torch.Generator().manual_seed(0))
    other, theirs = permuted(model, order), [TOKENS[i] for i in order]
    _, aligned, vocabulary = align(None, [InMemory(model), InMemory(other)], "base", [TOKENS, theirs])
    assert list(vocabulary.tokens) == TOKENS
    merged = merge(Linear(), aligned).state
    again = llama(1)
    again.load_state_dict(merged)
    tokens = torch.tensor([[1, 2, 5, 9, 10]])
    assert torch.allclose(again(tokens).logits, model(tokens).logits, atol=1e-5)
    plain = merge(Linear(), [model, other]).model(tokens).logits
    assert not torch.allclose(plain, model(tokens).logits, atol=1e-2)


def test_a_token_that_one_model_alone_knows_keeps_its_row():
    base, a, b = ({"embed": torch.randn(n, 4), "w": torch.randn(4, 4)} for n in (3, 4, 4))
    base["embed"][:3] = a["embed"][:3]
    tokens = [TOKENS[:3], TOKENS[:4], [TOKENS[4], *TOKENS[:3]]]
    opened = [InMemory(state, name) for state, name in ((base, "base"), (a, "a"), (b, "b"))]
    ancestor, models, vocabulary = align(opened[0], opened[1:], "union", tokens)
    assert list(vocabulary.tokens) == [*TOKENS[:3], TOKENS[3], TOKENS[4]] and vocabulary.added == 3
    merged = merge(TaskArithmetic(), models, ancestor, force=True).state["embed"]
    assert merged.shape == (5, 4) and bool(merged.isfinite().all())
    assert torch.allclose(merged[3], a["embed"][3]) and torch.allclose(merged[4], b["embed"][0])
    expected = base["embed"] + (a["embed"][:3] - base["embed"]) + (b["embed"][1:] - base["embed"])
    assert torch.allclose(merged[:3], expected, atol=1e-6)
    _, averaged, _ = align(None, opened[1:], "union", tokens[1:])
    merged = merge(Linear(), averaged, force=True).state["embed"]
    assert torch.allclose(merged[3], a["embed"][3]) and torch.allclose(merged[4], b["embed"][0])
    assert torch.allclose(merged[0], (a["embed"][0] + b["embed"][1]) / 2)


def test_the_intersection_has_what_all_know():
    a, b = ({"embed": torch.randn(3, 4)} for _ in range(2))
    _, models, vocabulary = align(None, [InMemory(a, "a"), InMemory(b, "b")], "intersection", [TOKENS[:3], TOKENS[1:4]])
    assert list(vocabulary.tokens) == TOKENS[1:3]
    merged = merge(Linear(), models, force=True).state["embed"]
    assert torch.allclose(merged, (a["embed"][1:] + b["embed"][:2]) / 2)
    with pytest.raises(VocabularyError, match="no token in common"):
        align(None, [InMemory(a, "a"), InMemory(b, "b")], "intersection", [[b"x"], [b"y"]])


def test_rows_of_padding_stay_the_references():
    a, b = {"embed": torch.randn(6, 4)}, {"embed": torch.randn(3, 4)}
    _, models, vocabulary = align(None, [InMemory(a, "a"), InMemory(b, "b")], "base", [TOKENS[:3], TOKENS[:3]])
    merged = merge(Linear(), models, force=True).state["embed"]
    assert merged.shape == (6, 4) and len(vocabulary.tokens) == 6
    assert torch.allclose(merged[3:], a["embed"][3:])
    with pytest.raises(InputError, match="its tokenizer knows 4, its tables have"):
        align(None, [InMemory(b, "b"), InMemory(a, "a")], "base", [TOKENS[:4], TOKENS[:3]])


def test_folders_whose_tokenizers_differ_are_refused_until_it_is_said_what_to_do(tmp_path):
    model, order = llama(), torch.randperm(11, generator=torch.Generator().manual_seed(0))
    names = [f"t{i}" for i in range(11)]
    for name, one, tokens in (("a", model, names), ("b", permuted(model, order), [names[i] for i in order])):
        one.save_pretrained(tmp_path / name)
        tokenizer(tokens, tmp_path / name)
    paths = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(VocabularyError, match="say whose tokens the merge shall have"):
        merge(Linear(), paths)
    merge(Linear(), paths, out=tmp_path / "out", vocabulary="base")
    again = type(model).from_pretrained(tmp_path / "out")
    tokens = torch.tensor([[1, 2, 5]])
    assert torch.allclose(again(tokens).logits, model(tokens).logits, atol=1e-5)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (tmp_path / "a" / "tokenizer.json").read_text()
    (tmp_path / "b" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"b has no tokenizer.json"):
        merge(Linear(), paths, vocabulary="base")


def test_a_union_is_written_with_a_tokenizer_that_knows_the_new_tokens(tmp_path):
    from tokenizers import Tokenizer

    small, large = llama(vocab_size=5), llama(vocab_size=6)
    for name, one, tokens in (("a", small, list("xabcd")), ("b", large, list("xdcba") + ["<new>"])):
        one.save_pretrained(tmp_path / name)
        tokenizer(tokens, tmp_path / name)
    merge(Linear(), [tmp_path / "a", tmp_path / "b"], out=tmp_path / "out", vocabulary="union", force=True)
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert written.token_to_id("<new>") == 5
    model = type(small).from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 6
    assert torch.allclose(model.get_input_embeddings().weight[5], large.get_input_embeddings().weight[5])


def byte_pairs(words: list[str], folder: Path) -> Any:
    """A byte-level tokenizer that begins texts with <s>, with a merge for every way to put a word together."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *words]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [(w[:-1], w[-1]) for w in words]))
    made.add_special_tokens([AddedToken("<s>", special=True)])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    made.save(str(folder / "tokenizer.json"))
    return made


def test_an_intersection_is_written_with_a_tokenizer_of_what_is_left(tmp_path):
    from tokenizers import Tokenizer

    rows = {}
    for name, words in (("a", ["th", "the", "in", "ing"]), ("b", ["in", "th", "tha"])):
        model = llama(vocab_size=256 + len(words) + 1, bos_token_id=256 + len(words), eos_token_id=5, pad_token_id=None)
        model.save_pretrained(tmp_path / name)
        made = byte_pairs(words, tmp_path / name)
        (tmp_path / name / "vocab.json").write_text("{}")
        rows[name] = {t: model.get_input_embeddings().weight[i] for t, i in made.get_vocab().items()}
    paths, out = [tmp_path / "a", tmp_path / "b"], tmp_path / "out"
    merge(Linear(), paths, out=out, vocabulary="intersection", force=True)
    written, own = (
        Tokenizer.from_file(str(out / "tokenizer.json")),
        Tokenizer.from_file(str(paths[0] / "tokenizer.json")),
    )
    assert own.encode("nothing").tokens == ["<s>", "n", "o", "th", "ing"]
    found = written.encode("nothing the ü")
    assert found.tokens[:6] == ["<s>", "n", "o", "th", "in", "g"] and written.decode(found.ids) == "nothing the ü"
    assert written.get_vocab_size() == 256 + 3 and sorted(written.get_vocab().values()) == list(range(259))
    model = type(model).from_pretrained(out)
    assert model.config.vocab_size == 259 and model.config.bos_token_id == written.token_to_id("<s>") == found.ids[0]
    assert model.generation_config.bos_token_id == 258
    for token, i in written.get_vocab().items():
        mean = (rows["a"][token] + rows["b"][token]) / 2
        assert torch.allclose(model.get_input_embeddings().weight[i], mean, atol=1e-6)
    assert not (out / "vocab.json").exists()


def test_tokens_that_a_tokenizer_cannot_do_without_must_not_be_lost(tmp_path):
    for name, tokens in (("a", ["<unk>", "a", "b"]), ("b", ["a", "b", "c"])):
        llama(vocab_size=3, bos_token_id=None, eos_token_id=None, pad_token_id=None).save_pretrained(tmp_path / name)
        tokenizer(tokens, tmp_path / name)
    paths = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(VocabularyError, match="'<unk>' of the reference's tokenizer is not in every model"):
        merge(Linear(), paths, out=tmp_path / "x", vocabulary="intersection", force=True)
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()
    with pytest.raises(VocabularyError, match="eos_token_id 7 in config.json"):
        renumbered({"eos_token_id": [1, 7]}, [0, 1], "config.json")
    assert renumbered({"pad_token_id": 2, "x": 1}, [0, 2], "c") == {"pad_token_id": 1, "x": 1}
    decoder = {"added_tokens_decoder": {"2": {"content": "</s>"}, "1": {"content": "gone"}}}
    assert renumbered(decoder, [0, 2], "c") == {"added_tokens_decoder": {"1": {"content": "</s>"}}}


def test_pieces_with_scores_are_cut_by_their_places():
    model = {"type": "Unigram", "unk_id": 1, "vocab": [["x", -1.0], ["<unk>", 0.0], ["y", -2.0]]}
    found = cut({"model": model, "added_tokens": [{"id": 3, "content": "<e>"}]}, [1, 2, 3])
    assert found["model"] == {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["y", -2.0]]}
    assert found["added_tokens"] == [{"id": 2, "content": "<e>"}]
    with pytest.raises(VocabularyError, match="unknown token"):
        cut({"model": model}, [0, 2])


# Layers


def test_layers_are_stacked_and_renumbered(tmp_path):
    a, b = llama(0, num_hidden_layers=3), llama(1, num_hidden_layers=3)
    stacked = Stacked([(InMemory(a, "a"), 0, 2), (InMemory(b, "b"), 1, 3)])
    assert stacked.config["num_hidden_layers"] == 4
    model = llama(2, num_hidden_layers=4)
    state = {key: stacked.read(key) for key in stacked.tensors}
    model.load_state_dict(state)
    for new, (one, old) in enumerate(((a, 0), (a, 1), (b, 1), (b, 2))):
        theirs = one.model.layers[old].state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in model.model.layers[new].state_dict().items())
    assert torch.equal(model.model.embed_tokens.weight, a.model.embed_tokens.weight)
    assert torch.equal(model.lm_head.weight, b.lm_head.weight)
    whole = Stacked([(InMemory(a, "a"), 0, 3)])
    assert set(whole.tensors) == set(InMemory(a).tensors)


def test_stacks_that_do_not_fit_are_refused():
    a, wide = InMemory(llama(0), "a"), InMemory(llama(0, intermediate_size=32), "wide")
    with pytest.raises(InputError, match=r"a has layers 0 to 1, there is no range \[1, 3\]"):
        Stacked([(a, 1, 3)])
    with pytest.raises(InputError, match="different widths"):
        Stacked([(a, 0, 1), (wide, 1, 2)])
    with pytest.raises(InputError, match="no numbered layers"):
        Stacked([(InMemory({"w": torch.zeros(2)}, "flat"), 0, 1)])


# Adapters


def adapter(folder: Path, model: nn.Module, **settings: object) -> nn.Module:
    """A trained-looking adapter of PEFT, saved; returns the model with it merged by PEFT."""
    from peft import LoraConfig, get_peft_model

    given = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        adapted = get_peft_model(llama(), LoraConfig(**given))
        adapted.base_model.model.load_state_dict(model.state_dict(), strict=False)
        for name, p in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                nn.init.normal_(p, std=0.3)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 4}, "alpha_pattern": {"down_proj": 2}},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_an_adapter_is_folded_in_as_peft_does(tmp_path, settings):
    expected = adapter(tmp_path / "lora", llama(), **settings).state_dict()
    seen = WithAdapter(InMemory(llama(), "base"), tmp_path / "lora")
    found = {key: seen.read(key) for key in seen.tensors}
    assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in found)
    assert not all(torch.equal(found[key], llama().state_dict()[key]) for key in found)
    assert "lora" in seen.name


def test_adapters_that_are_no_sum_or_speak_of_something_else_are_refused(tmp_path):
    adapter(tmp_path / "dora", llama(), use_dora=True)
    with pytest.raises(CapabilityError, match="use_dora"):
        Adapter(tmp_path / "dora")
    adapter(tmp_path / "lora", llama())
    with pytest.raises(InputError, match=r"speaks of 'model.layers.1"):
        WithAdapter(InMemory(llama(num_hidden_layers=1), "small"), tmp_path / "lora")
    with pytest.raises(InputError, match=r"changes 'model.layers.0.* as \(.*\), wide has \("):
        WithAdapter(InMemory(llama(intermediate_size=64), "wide"), tmp_path / "lora")
    codes = {k: t.to(torch.int8) if "proj" in k else t for k, t in llama().state_dict().items()}
    with pytest.raises(CapabilityError, match=r"is quantised \(int8\)"):
        WithAdapter(InMemory(codes, "int8"), tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    tensors.pop(next(k for k in tensors if "lora_B" in k))
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(StoreError, match="lora_B"):
        Adapter(tmp_path / "lora")
    with pytest.raises(StoreError, match="there is no adapter"):
        Adapter(tmp_path / "nowhere")


def test_what_a_model_has_learned_is_extracted_into_an_adapter_that_peft_loads(tmp_path):
    from peft import PeftModel

    base, tuned = llama(), llama()
    left, right = torch.randn(16, 3), torch.randn(3, 16)
    with torch.no_grad():
        for layer in tuned.model.layers:
            layer.self_attn.q_proj.weight.add_(0.1 * left @ right)
    lost = extract_lora(InMemory(base, "base"), InMemory(tuned, "tuned"), 3, tmp_path / "lora")
    assert lost[""] < 1e-5 and len(lost) == 3
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora").merge_and_unload()
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.allclose(loaded(tokens).logits, tuned(tokens).logits, atol=1e-5)
    values = torch.linalg.svdvals(0.1 * left @ right)
    lost = extract_lora(InMemory(base, "base"), InMemory(tuned, "tuned"), 1, tmp_path / "one")
    assert lost[""] == pytest.approx(float(values[1:].norm() / values.norm()), rel=1e-3)
    with pytest.raises(InputError, match="differ in no matrix"):
        extract_lora(InMemory(base, "base"), InMemory(llama(), "same"), 1, tmp_path / "none")


def test_a_merge_is_written_as_an_adapter_of_its_base(tmp_path):
    from peft import PeftModel

    base, tuned, tokens = llama(), [llama(), llama()], torch.tensor([[1, 2, 3]])
    for seed, model in enumerate(tuned):
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.up_proj.weight.add_(0.1 * torch.randn(layer.mlp.up_proj.weight.shape, generator=draw))
    whole = merge(TaskArithmetic(), tuned, base)
    found = merge(TaskArithmetic(), tuned, base, tmp_path / "lora", lora=16)
    assert found.folder == tmp_path / "lora" and found.lost[""] < 1e-5
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora").merge_and_unload()
    assert torch.allclose(loaded(tokens).logits, whole.model(tokens).logits, atol=1e-4)
    narrow = merge(TaskArithmetic(), tuned, base, tmp_path / "one", lora=1)
    assert 0.5 < narrow.lost[""] < 1
    with pytest.raises(InputError, match="is not empty"):
        merge(TaskArithmetic(), tuned, base, tmp_path / "one", lora=1)
    with pytest.raises(InputError, match="says what changes in a base"):
        merge(Linear(), tuned, out=tmp_path / "x", lora=1)
    with pytest.raises(InputError, match="leave out vocabulary and dtype"):
        merge(TaskArithmetic(), tuned, base, tmp_path / "x", lora=1, dtype="bfloat16")
    assert not (tmp_path / "x").exists()


def test_a_randomised_svd_is_nearly_the_exact_one(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    delta = torch.randn(60, 40, generator=draw) * torch.logspace(0, -3, 40)
    exact = delta - torch.matmul(*low_rank(delta, 5))
    monkeypatch.setattr("transfuse.weights.lora.EXACT", 10)
    near = delta - torch.matmul(*low_rank(delta, 5))
    assert near.norm() <= 1.01 * exact.norm()


def test_adapters_add_up_as_their_deltas_do(tmp_path):
    for number, rank in ((0, 2), (1, 3)):
        adapter(tmp_path / str(number), llama(), r=rank, lora_alpha=4 + number)
    a, b = Adapter(tmp_path / "0"), Adapter(tmp_path / "1")
    zeros = {key: torch.zeros(spec.shape) for key, spec in InMemory(llama()).tensors.items()}

    def delta(path: Path) -> dict[str, Tensor]:
        seen = WithAdapter(InMemory(zeros, "zeros"), path)
        return {key: seen.read(key) for key in a.deltas}

    parts = delta(tmp_path / "0"), delta(tmp_path / "1")
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, -2.0)):
        lost = merge_adapters([a, b], weights, tmp_path / "sum")
        assert max(lost.values()) < 1e-5
        found = delta(tmp_path / "sum")
        for key in found:
            assert torch.allclose(found[key], weights[0] * parts[0][key] + weights[1] * parts[1][key], atol=1e-5)
    merge_adapters([a, Adapter(tmp_path / "0")], (1.0, -1.0), tmp_path / "nothing")
    assert all(value.abs().max() < 1e-6 for value in delta(tmp_path / "nothing").values())
    with pytest.raises(InputError, match="1 weights for 2 adapters"):
        merge_adapters([a, b], [1.0], tmp_path / "x")


def test_other_networks_go_through_untouched():
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    bert = BertForMaskedLM(
        BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    for model in (bert, gpt, nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))):
        merged = merge(Linear(), [model, model.state_dict()]).model
        assert all(torch.allclose(v, model.state_dict()[k]) for k, v in merged.state_dict().items())
    tied = merge(Linear(), [gpt, gpt.state_dict()])
    assert tied.ledger.tied == {"lm_head.weight": "transformer.wte.weight"}
