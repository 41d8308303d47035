"""GraftLLM: what the sheet says must hold exactly, and packs on live models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import VOCABULARY, digest, language_model, ragged_tokens
from torch import Tensor, nn

from transfuse import transfer
from transfuse.core.errors import InputError, StoreError
from transfuse.distill import Labels
from transfuse.weights import GraftLLM
from transfuse.weights.factors import Factors
from transfuse.weights.skillpack import Grafts, Routed, Router, SkillPack, compressed, fingerprint, planned

TEXT = ragged_tokens()
EXACT = ((1.0, 32),)


def tuned(seed: int = 1, size: float = 0.1) -> nn.Module:
    """The base after training, in a manner of speaking."""
    model, draw = language_model(depth=2), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=draw)
    return model


def grafted(method: GraftLLM, source: nn.Module | None = None, data: Any = TEXT) -> nn.Module:
    return transfer(method, tuned() if source is None else source, language_model(depth=2), data, test=TEXT).model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**TEXT)


def test_at_full_rank_and_precision_it_is_the_tuned_model_and_taken_off_it_is_the_base():
    source, base = tuned(), language_model(depth=2)
    model = grafted(GraftLLM(1.0, 1.0, EXACT, other="keep"), source)
    for name, p in model.named_parameters():
        rough = 1e-5 if (".attn." in name and "weight" in name) or (".mlp." in name and "weight" in name) else 1e-3
        assert torch.allclose(p, source.get_parameter(name), atol=rough), name
    before = digest(base)
    live = Grafts(base)
    live.attach("skill", model.skill_pack)
    assert torch.equal(logits(base), logits(model))
    live.detach("skill")
    assert digest(base) == before


def test_layers_that_keep_their_weight_the_other_way_round_are_compressed_too():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    base, draw = GPT2LMHeadModel(config), torch.Generator().manual_seed(0)
    source = copy.deepcopy(base)
    with torch.no_grad():
        for p in source.parameters():
            p += 0.1 * torch.randn(p.shape, generator=draw)
    options = {"attention": ["*attn*"], "mlp": ["*mlp*"]}
    model = transfer(GraftLLM(1.0, 1.0, EXACT, other="keep", **options), source, base, TEXT, test=TEXT).model
    for block in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):  # one of them is square
        name = f"transformer.h.1.{block}.weight"
        assert torch.allclose(model.get_parameter(name), source.get_parameter(name), atol=1e-5), name
        assert name.replace(".", "/") + "|turned" in model.skill_pack.tensors


def test_packs_come_off_in_any_order_and_add_up_while_they_are_on():
    packs = {str(s): grafted(GraftLLM(1.0, 1.0, EXACT, other="drop"), tuned(s)).skill_pack for s in (1, 2)}
    base = language_model(depth=2)
    before = digest(base)
    for order in ("12", "21"):
        live = Grafts(base)
        for name, pack in packs.items():
            live.attach(name, pack)
        weight = "blocks.1.attn.qkv.weight"
        both = sum(tuned(s).get_parameter(weight) for s in (1, 2)) - language_model(depth=2).get_parameter(weight)
        assert torch.allclose(base.get_parameter(weight), both, atol=1e-5)
        for name in order:
            live.detach(name)
        assert digest(base) == before
    live.attach("1", packs["1"])
    live.only("2", packs["2"])
    assert list(live.attached) == ["2"]


def test_a_pack_of_another_base_is_refused():
    pack = grafted(GraftLLM(0.5, 0.5)).skill_pack
    other = tuned(7)
    with pytest.raises(InputError, match="skill pack of another base"):
        Grafts(other).attach("a", pack)
    with pytest.raises(InputError, match="belongs to another base"):
        Routed(other, {"a": pack})
    live = Grafts(language_model(depth=2))
    live.attach("a", pack)
    with pytest.raises(InputError, match="attached already"):
        live.attach("a", pack)
    with pytest.raises(InputError, match="no skill pack 'b' is attached"):
        live.detach("b")
    assert fingerprint(other) != fingerprint(language_model(depth=2))


def test_the_bits_that_are_reported_are_those_of_the_stored_arrays(tmp_path):
    method = GraftLLM(0.5, 0.5)
    result = transfer(method, tuned(), language_model(depth=2), TEXT, test=TEXT)
    pack = result.model.skill_pack
    assert pack.bits == sum(8 * t.numel() * t.element_size() for t in pack.tensors.values())
    whole = sum(p.numel() for p in tuned().parameters())
    assert f"{pack.bits / whole:.2f} bits per parameter" in result.report.panels[0].note
    pack.save(tmp_path / "pack.safetensors")
    again = SkillPack.load(tmp_path / "pack.safetensors")
    assert again.base == pack.base and again.blocks == pack.blocks and again.config == pack.config
    for block in pack.blocks:
        like = tuned().get_parameter(block)
        assert torch.equal(again.change(block, like), pack.change(block, like)), block
    torch.save({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(StoreError):
        SkillPack.load(tmp_path / "other.safetensors")


def test_what_is_dropped_is_the_norm_of_the_singular_values_left_out():
    source = tuned()
    model = grafted(GraftLLM(0.5, 0.25, EXACT), source)
    base = language_model(depth=2)
    for name, share in (("blocks.0.attn.proj.weight", 0.5), ("blocks.1.mlp.fc1.weight", 0.25)):
        change = source.get_parameter(name) - base.get_parameter(name)
        s = Factors.of(change).s
        expected = s[round(share * len(s)) :].square().sum().sqrt()
        error = (model.get_parameter(name) - source.get_parameter(name)).norm()
        assert error.item() == pytest.approx(expected.item(), rel=1e-3), name


def test_other_parameters_are_pruned_kept_or_dropped():
    source, base, name = tuned(), language_model(depth=2), "embed_tokens.weight"
    change = source.get_parameter(name) - base.get_parameter(name)
    found = {
        other: grafted(GraftLLM(0.5, 0.5, other=other, alpha=0.25), source).get_parameter(name)
        - base.get_parameter(name)
        for other in ("prune", "keep", "drop")
    }
    assert found["drop"].abs().max() == 0
    assert torch.allclose(found["keep"], change, atol=1e-3)
    kept = found["prune"] != 0
    assert kept.sum() == round(0.25 * change.numel())
    assert change.abs()[kept].min() >= change.abs()[~kept].max()
    assert torch.allclose(found["prune"][kept], change[kept], atol=1e-3)


def test_the_groups_of_a_plan_cover_all_terms_once():
    assert planned(1000, ((0.02, 8), (0.18, 4), (0.8, 2))) == [(0, 20, 8), (20, 200, 4), (200, 1000, 2)]
    assert planned(3, ((0.02, 8), (0.18, 4), (0.8, 2))) == [(0, 1, 8), (1, 2, 4), (2, 3, 2)]
    assert planned(1, ((0.5, 8), (0.5, 4))) == [(0, 1, 8)]


def output_error(plan: Any, seed: int) -> float:
    draw = torch.Generator().manual_seed(seed)
    change = (
        torch.randn(24, 16, generator=draw)
        @ torch.diag(0.7 ** torch.arange(16.0))
        @ torch.randn(16, 16, generator=draw)
    )
    inputs = torch.randn(100, 16, generator=draw) @ torch.randn(16, 16, generator=draw)
    tensors = compressed(Factors.of(change), inputs.mT @ inputs, plan)
    pack = SkillPack({f"w|{name}": t for name, t in tensors.items()}, "")
    return float(((pack.change("w", change) - change) @ inputs.mT).norm())


def test_more_bits_for_any_group_do_no_harm_and_the_largest_values_need_them_most():
    def mean(*bits: int) -> float:
        return sum(output_error(list(zip((0.2, 0.3, 0.5), bits, strict=True)), s) for s in range(8)) / 8

    plan = mean(4, 3, 2)
    assert mean(8, 3, 2) <= plan and mean(4, 4, 2) <= plan and mean(4, 3, 3) <= plan
    assert mean(2, 4, 8) > mean(8, 4, 2)


def test_layers_are_calibrated_on_the_inputs_they_get_from_compressed_ones():
    class Method(GraftLLM):
        def _gram(self, path: str, batches: Any, composed: Any, run: Any) -> Tensor:
            seen.append((path, [b for b in composed if b.endswith("weight") and ("attn" in b or "mlp" in b)]))
            return super()._gram(path, batches, composed, run)

    seen: list[Any] = []
    grafted(Method(0.5, 0.5))
    paths = [path for path, _ in seen]
    assert paths == [f"blocks.{i}.{p}" for i in (0, 1) for p in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    for number, (_, before) in enumerate(seen):
        assert before == [f"{p}.weight" for p in paths[:number]]


def test_padding_is_no_calibration():
    longer = {k: torch.cat([v, torch.zeros(len(v), 4, dtype=v.dtype)], 1) for k, v in TEXT.items()}
    one, other = (grafted(GraftLLM(0.5, 0.5), data=data) for data in (TEXT, longer))
    assert torch.allclose(logits(one), logits(other), atol=1e-3)


def test_a_router_sends_every_text_to_its_pack():
    packs = {str(s): grafted(GraftLLM(1.0, 1.0, EXACT), tuned(s)).skill_pack for s in (1, 2)}
    models = []
    for pack in packs.values():
        model = language_model(depth=2)
        Grafts(model).attach("a", pack)
        models.append(model)

    class ByFirst(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return nn.functional.one_hot((input_ids[:, 0] > 5).long(), 2).float()

    routed = Routed(language_model(depth=2), packs, ByFirst())
    second = (TEXT["input_ids"][:, 0] > 5)[:, None, None]
    real = TEXT["attention_mask"].bool()
    expected = torch.where(second, logits(models[1]), logits(models[0]))
    assert second.any() and not second.all()
    assert torch.allclose(logits(routed)[real], expected[real], atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(routed(**TEXT, task=1)[real], logits(models[1])[real], atol=1e-5)
    with pytest.raises(InputError, match="which pack"):
        Routed(language_model(depth=2), packs)(**TEXT)
    with pytest.raises(InputError, match="no pack number 5"):
        routed(**TEXT, task=5)


def test_a_router_is_trained_like_any_classifier_and_does_not_read_padding():
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, (40, 8), generator=draw)
    labels = torch.arange(40) % 2
    tokens[labels == 1] += 5
    router = transfer(
        Labels(),
        target=Router(VOCABULARY, 2),
        data=(tokens, labels),
        test=(tokens, labels),
        steps=40,
        lr=0.05,
        batch_size=20,
    ).model
    assert (router(tokens).argmax(1) == labels).all()
    padded = torch.cat([tokens, torch.zeros(40, 3, dtype=torch.long)], 1)
    mask = (torch.arange(11) < 8).long().expand(40, 11)
    assert torch.allclose(router(padded, mask), router(tokens), atol=1e-6)


def test_arguments_and_models_that_cannot_be_used():
    for wrong in (
        {"attention_rank": 0.0},
        {"mlp_rank": 1.5},
        {"other": "zero"},
        {"alpha": 0.0},
        {"calibration": 0},
        {"groups": ((0.5, 8),)},
        {"groups": ((1.0, 5),)},
    ):
        with pytest.raises(InputError):
            GraftLLM(**wrong)
    with pytest.raises(InputError, match="no linear layer fits mlp"):
        grafted(GraftLLM(mlp=["*experts*"]))
    broken = copy.deepcopy(tuned())
    broken.embed_positions.weight.data[15] = torch.nan  # beyond any text
    with pytest.raises(InputError, match="'embed_positions.weight' holds numbers that are not finite"):
        grafted(GraftLLM(), broken)
    with pytest.raises(InputError, match="compresses one tuned model"):
        transfer(GraftLLM(), [tuned(1), tuned(2)], language_model(depth=2), TEXT, test=TEXT)
    with pytest.raises(InputError):
        grafted(GraftLLM(), data=None)
