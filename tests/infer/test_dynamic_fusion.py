import math
from collections import Counter

import pytest
import torch
from helpers import VOCABULARY, digest, language_model, llama, ragged_tokens
from torch import nn

from transfuse import transfer
from transfuse.core.decoding import generate, left_padded
from transfuse.core.errors import CapabilityError, InputError, VocabularyError
from transfuse.core.teacher import Recorded
from transfuse.infer import DynamicFusion, FusedModel, StaticFusion
from transfuse.infer.base import Moves, centred, divergences
from transfuse.infer.dynamic_fusion import line_search
from transfuse.recipe import Recipe

V = 40


def draws(*rows_and_width, seed=0, scale=1.5, dtype=torch.float64):
    return torch.randn(*rows_and_width, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def kl(p, q):
    """KL(softmax p || softmax q) of one row, over what both allow, as a loop in plain Python."""
    allowed = [i for i in range(len(p)) if p[i] > -math.inf and q[i] > -math.inf]
    zp, zq = (math.fsum(math.exp(float(x[i])) for i in allowed) for x in (p, q))
    return math.fsum(
        math.exp(float(p[i])) / zp * (float(p[i]) - math.log(zp) - float(q[i]) + math.log(zq)) for i in allowed
    )


def objective(large, base, experts, alpha):
    """The sheet's, of one row."""
    fused = large + sum(a * (e - base) for a, e in zip(alpha, experts, strict=True))
    return sum((kl(fused, large) - kl(e, base)) ** 2 + (kl(large, fused) - kl(base, e)) ** 2 for e in experts)


def moves_of(large, base, experts):
    log_p, log_q = large.log_softmax(-1), base.log_softmax(-1)
    targets = torch.stack([divergences(log_q, centred(log_q, e - base)) for e in experts], 1)
    return Moves(log_p, torch.stack([centred(log_p, e - base) for e in experts], 1), targets)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 2.0])
def test_closed_forms_are_the_divergences_in_this_order(alpha):
    large, d = draws(5, V), draws(5, V, seed=1)
    found = divergences(large.log_softmax(-1), centred(large.log_softmax(-1), alpha * d))
    for row in range(5):
        there, back = kl(large[row] + alpha * d[row], large[row]), kl(large[row], large[row] + alpha * d[row])
        assert found[row].tolist() == pytest.approx([there, back], abs=1e-10)
    if alpha:
        assert not torch.allclose(found[:, 0], found[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_model_that_is_the_base_becomes_the_expert(dtype):
    base, expert = draws(6, V, dtype=dtype), draws(6, V, seed=1, dtype=dtype)
    fused = DynamicFusion().fuse(base, base, [expert])
    assert torch.equal(fused.alpha, torch.ones(6, 1, dtype=dtype))
    assert torch.allclose(fused.logits, expert, atol=1e-5)
    assert fused.residuals.abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_an_expert_that_has_not_moved_moves_nothing(constant):
    large, base = draws(6, V, dtype=torch.float32), draws(6, V, seed=1, dtype=torch.float32)
    fused = DynamicFusion().fuse(large, base, [base + constant])
    assert torch.equal(fused.alpha, torch.zeros(6, 1)) and torch.equal(fused.logits, large)


@pytest.mark.parametrize("search", ["one", "joint"])
def test_constants_on_the_logits_of_a_model_change_nothing(search):
    large, base, *experts = (draws(4, V, seed=i) for i in range(4))
    one = DynamicFusion(search).fuse(large, base, experts)
    other = DynamicFusion(search).fuse(large + 5, base - 3, [e + 7 * i for i, e in enumerate(experts)])
    assert torch.allclose(one.alpha, other.alpha, atol=1e-6)
    assert torch.allclose(one.logits.log_softmax(-1), other.logits.log_softmax(-1), atol=1e-6)


def test_two_tokens_against_the_formula_in_their_gap_and_a_dense_grid():
    gaps = draws(60, 3, seed=4)
    large, base, expert = (torch.stack([g, torch.zeros_like(g)], 1) for g in gaps.T)
    found = DynamicFusion().fuse(large, base, [expert]).alpha[:, 0]

    def between(a, b):  # of Bernoulli variables with logits a and b
        p = torch.sigmoid(a)
        return p * (a - b) - nn.functional.softplus(a) + nn.functional.softplus(b)

    grid = torch.linspace(0, 2, 200001, dtype=torch.float64)
    for alpha, (gap, small, tuned) in zip(found, gaps, strict=True):
        moved = gap + grid * (tuned - small)
        values = (between(moved, gap) - between(tuned, small)).square()
        values += (between(gap, moved) - between(small, tuned)).square()
        assert float(alpha) == pytest.approx(float(grid[values.argmin()]), abs=1e-4)


def test_both_divergences_grow_with_alpha():
    log_p = draws(500, V).log_softmax(-1)
    shift = centred(log_p, draws(500, V, seed=1) - draws(500, V, seed=2))
    steps = torch.stack([divergences(log_p, a * shift) for a in torch.arange(21, dtype=torch.float64) / 10])
    assert bool((steps[1:] > steps[:-1]).all())


@pytest.mark.parametrize(("search", "count"), [("one", 3), ("joint", 2)])
def test_experts_in_another_order_have_their_weights_in_that_order(search, count):
    large, base, *experts = (draws(40, V, seed=i) for i in range(2 + count))
    one = DynamicFusion(search).fuse(large, base, experts).alpha
    other = DynamicFusion(search).fuse(large, base, experts[::-1]).alpha
    assert torch.allclose(one, other.flip(1), atol=1e-3)


def test_the_order_of_many_experts_does_not_matter_to_how_good_the_box_is():
    large, base, *experts = (draws(40, V, seed=i) for i in range(5))
    one, other = (DynamicFusion("joint").fuse(large, base, e).alpha for e in (experts, experts[::-1]))
    moves = moves_of(large, base, experts)
    values = [moves.objective(moves.total(alpha)) for alpha in (one, other.flip(1))]
    assert torch.allclose(*values, atol=1e-9)


def test_one_expert_per_step_is_the_best_single_one_and_the_box_is_at_least_as_good():
    large, base, *experts = (draws(20, V, seed=i) for i in range(4))
    single, box = (DynamicFusion(search).fuse(large, base, experts).alpha for search in ("one", "joint"))
    assert bool(((single > 0).sum(1) <= 1).all()) and bool(((box > 0).sum(1) == 2).any())
    pairs = torch.cartesian_prod(*[torch.arange(41, dtype=torch.float64) / 20] * 2)
    moves = moves_of(large, base, experts)
    values = torch.stack([moves.objective(moves.total(pair.expand(20, -1))) for pair in pairs])
    at_best, alone = (moves.objective(moves.total(alpha)) for alpha in (box, single))
    assert bool((at_best <= alone + 1e-9).all()) and bool((at_best <= values.amin(0) + 1e-3).all())
    assert bool((alone <= values[(pairs == 0).any(1)].amin(0) + 1e-9).all())
    for row in range(3):
        values = [
            objective(large[row], base[row], [e[row] for e in experts], alpha)
            for alpha in (box[row].tolist(), single[row].tolist())
        ]
        assert values == pytest.approx([float(moves.objective(moves.total(x))[row]) for x in (box, single)], abs=1e-9)


@pytest.mark.parametrize("search", ["one", "joint"])
def test_weights_stay_in_their_box_however_far_experts_have_moved(search):
    large, base = draws(10, V), draws(10, V, seed=1)
    alpha = DynamicFusion(search).fuse(large / 9, base, [10 * base, base + draws(10, V, seed=2, scale=20)]).alpha
    assert float(alpha.min()) >= 0 and float(alpha.max()) <= 2
    assert float(alpha.max()) > 1.5 or float(alpha.min()) == 0


def test_every_row_has_a_weight_of_its_own_and_rows_do_not_matter_to_each_other():
    large, base, expert = (draws(30, V, seed=i) for i in range(3))
    together = DynamicFusion().fuse(large, base, [expert])
    assert len(together.alpha.unique()) > 20
    for row in (0, 7):
        alone = DynamicFusion().fuse(*(x[row : row + 1] for x in (large, base)), [expert[row : row + 1]])
        assert torch.equal(alone.alpha, together.alpha[row : row + 1])


def test_many_rows_are_worked_on_in_pieces(monkeypatch):
    large, base, expert = (draws(9, V, seed=i) for i in range(3))
    whole = DynamicFusion().fuse(large, base, [expert])
    monkeypatch.setattr("transfuse.infer.base.AT_ONCE", 4 * 3 * V)
    pieces = DynamicFusion().fuse(large, base, [expert])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(whole, pieces, strict=True))


@pytest.mark.parametrize("who", ["large", "base", "expert"])
def test_a_token_that_one_model_rules_out_counts_for_none(who):
    models = {name: draws(4, V, seed=i) for i, name in enumerate(("large", "base", "expert"))}
    models[who][:, 3] = -torch.inf
    fused = DynamicFusion().fuse(models["large"], models["base"], [models["expert"]])
    kept = [i for i in range(V) if i != 3]
    without = DynamicFusion().fuse(models["large"][:, kept], models["base"][:, kept], [models["expert"][:, kept]])
    assert bool((fused.logits[:, 3] == -torch.inf).all()) and bool(fused.logits[:, kept].isfinite().all())
    assert torch.allclose(fused.alpha, without.alpha, atol=1e-6)
    assert torch.allclose(fused.residuals, without.residuals, atol=1e-9)


def test_residuals_are_how_much_further_the_large_model_was_moved():
    large, base, expert = (draws(3, V, seed=i) for i in range(3))
    fused = StaticFusion(0.7).fuse(large, base, [expert])
    for row in range(3):
        there = kl(fused.logits[row], large[row]) - kl(expert[row], base[row])
        back = kl(large[row], fused.logits[row]) - kl(base[row], expert[row])
        assert fused.residuals[row, 0].tolist() == pytest.approx([there, back], abs=1e-10)


def test_half_precision_is_fused_in_full():
    large, base, expert = (draws(4, V, seed=i, dtype=torch.float32).bfloat16() for i in range(3))
    fused = DynamicFusion().fuse(large, base, [expert])
    assert fused.logits.dtype == torch.float32
    assert torch.equal(fused.alpha, DynamicFusion().fuse(large.float(), base.float(), [expert.float()]).alpha)


def test_a_line_search_takes_the_smallest_of_equal_weights():
    log_p, base = draws(2, V).log_softmax(-1), torch.zeros(2, 1, V, dtype=torch.float64)
    assert torch.equal(
        line_search(Moves(log_p, base, torch.zeros(2, 1, 2)), torch.ones(2, 1).double(), 0), torch.zeros(2, 1).double()
    )


# Static fusion ---------------------------------------------------------------------------------------------------


def test_proxy_tuning_is_a_product_of_experts():
    large, base, expert = (draws(4, V, seed=i) for i in range(3))
    for alpha in (0.0, 0.5, 1.0, -1.0):
        product = large.softmax(-1) * (expert.softmax(-1) / base.softmax(-1)) ** alpha
        found = StaticFusion(alpha).fuse(large, base, [expert]).logits.softmax(-1)
        assert torch.allclose(found, product / product.sum(-1, keepdim=True), atol=1e-10)


def test_static_weights_are_one_for_all_or_one_for_each():
    large, base, *experts = (draws(4, V, seed=i) for i in range(4))
    assert StaticFusion([0.2, 0.4]).fuse(large, base, experts).alpha.tolist() == [[0.2, 0.4]] * 4
    assert StaticFusion(0.5).fuse(large, base, experts).alpha.tolist() == [[0.5, 0.5]] * 4
    with pytest.raises(InputError, match="has 3 numbers, there are 2 experts"):
        StaticFusion([1, 2, 3]).fuse(large, base, experts)
    with pytest.raises(InputError, match="finite"):
        StaticFusion(math.nan)
    with pytest.raises(InputError, match="must be 'one'"):
        DynamicFusion("all")


# Models ----------------------------------------------------------------------------------------------------------


def fused_of(method=None, experts=1, seed=0):
    tuned = {f"tuned{i}": language_model(seed + 2 + i) for i in range(experts)}
    return FusedModel(language_model(seed, dim=16, depth=2), language_model(seed + 1), tuned, method or DynamicFusion())


def test_decoding_is_reading_token_by_token():
    model, tokens = fused_of(experts=2), ragged_tokens(4)["input_ids"][:, :2] + 1
    decoded = model.decode(tokens % VOCABULARY, new_tokens=5)
    whole = model.read(decoded.tokens[:, :-1])
    assert torch.equal(decoded.tokens[:, 2:], whole.logits[:, 1:].argmax(-1))
    assert torch.allclose(decoded.alpha, whole.alpha[:, 1:], atol=1e-4)
    # The search finds alpha to 1e-4, and another sum in another order ends elsewhere within that.
    assert torch.allclose(decoded.residuals, whole.residuals[:, 1:], atol=1e-4)
    assert decoded.alpha.shape == (4, 5, 2) and decoded.residuals.shape == (4, 5, 2, 2)
    assert torch.equal(generate(model, tokens % VOCABULARY, new_tokens=5), decoded.tokens)


def test_left_padding_changes_nothing_for_any_model():
    model, (tokens, mask) = fused_of(), left_padded(*ragged_tokens(6).values())
    found = model.generate(tokens, mask=mask, new_tokens=4)
    for row in range(6):
        alone = model.generate(tokens[row : row + 1, mask[row].bool()], new_tokens=4)
        assert torch.equal(found[row, -4:], alone[0, -4:])


def test_only_the_large_model_reads_the_instruction():
    model, tokens = fused_of(StaticFusion(0.0)), torch.tensor([[3, 5]])
    instruction = torch.tensor([1, 7, 7])
    whole = generate(model.large, torch.cat([instruction[None], tokens], 1), new_tokens=4)
    assert torch.equal(model.generate(tokens, new_tokens=4, instruction=instruction)[0], whole[0, 3:])


def test_models_are_used_and_left_alone():
    model = fused_of()
    before, modes = digest(model), [m.training for m in model.large.modules()]
    logits = model.eval()(**ragged_tokens())
    assert not logits.requires_grad and all(p.grad is None for p in model.parameters())
    assert digest(model) == before and [m.training for m in model.large.modules()] == modes


def test_models_with_different_vocabularies_are_refused_and_padded_ones_cut():
    class Wide(nn.Module):
        def __init__(self, model, extra):
            super().__init__()
            self.model, self.extra = model, extra

        def forward(self, input_ids):
            logits = self.model(input_ids)
            return torch.cat([logits, 50 + logits[..., : self.extra]], -1)

    tokens, plain = ragged_tokens(3)["input_ids"], fused_of()
    padded = FusedModel(Wide(plain.large, 3), Wide(plain.base, 1), [Wide(plain.experts[0], 1)], plain.method)
    with pytest.raises(VocabularyError, match="the large model has 14 outputs, the base 12"):
        padded(tokens)
    for part in (padded.large, padded.base, *padded.experts):
        part.tokenizer = [f"t{i}" for i in range(VOCABULARY)]
    cut = padded.read(tokens)
    assert cut.logits.shape[-1] == 12  # ids beyond the tokenizers' are nobody's, but the models agree on one
    padded.base.tokenizer = [f"t{i}" for i in range(VOCABULARY - 1)] + ["other"]
    other = FusedModel(padded.large, padded.base, padded.experts, plain.method)
    with pytest.raises(VocabularyError, match="the large model and the base mean different tokens by the same ids"):
        other(tokens)


def test_inside_transformers_generate_it_says_the_same():
    transformers = pytest.importorskip("transformers")

    model = FusedModel(llama(0, hidden_size=32), llama(1), [llama(2)], DynamicFusion())
    tokens, mask = torch.tensor([[0, 0, 4, 5], [6, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ours = model.decode(tokens, mask=mask, new_tokens=6)
    lengths = Counter()
    model.base.register_forward_pre_hook(
        lambda m, args, kwargs: lengths.update([kwargs["input_ids"].shape[1]]), with_kwargs=True
    )
    theirs = model.large.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        logits_processor=transformers.LogitsProcessorList([model.logits_processor(mask)]),
    )
    assert torch.equal(ours.tokens, theirs)
    assert lengths == {4: 1, 1: 5}  # the prompt once, then a token at a time
    assert not torch.equal(theirs, generate(model.large, tokens, mask=mask, new_tokens=6))


def test_beams_that_change_places_are_read_again():
    transformers = pytest.importorskip("transformers")
    model = FusedModel(llama(0, hidden_size=32), llama(1), [llama(2)], DynamicFusion())
    tokens = torch.tensor([[4, 5, 9, 2], [6, 7, 8, 9]])
    given = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "num_beams": 3, "do_sample": False}

    def whole(input_ids, scores):
        return model(input_ids)[:, -1].log_softmax(-1)

    found, expected = (
        model.large.generate(tokens, logits_processor=transformers.LogitsProcessorList([each]), **given)
        for each in (model.logits_processor(torch.ones_like(tokens)), whole)
    )
    assert torch.equal(found, expected)


# Transfers -------------------------------------------------------------------------------------------------------


def test_a_transfer_gives_the_fused_model_and_says_what_it_is_worth():
    large, base, tuned = language_model(0, dim=16, depth=2), language_model(1), language_model(2)
    result = transfer(
        DynamicFusion(),
        source={"base": base, "expert": tuned},
        target=large,
        test=ragged_tokens(),
        compare=[StaticFusion(0.0), StaticFusion()],
    )
    assert isinstance(result.model, FusedModel) and result.model.names == ("expert",)
    values = {arm.name: arm.value.mean for arm in result.report.arms}
    assert list(values) == ["DynamicFusion()", "StaticFusion(alpha=0.0)", "StaticFusion()"]
    alone = transfer(StaticFusion(0.0), source=[base, tuned], target=large, test=ragged_tokens())
    assert alone.report.arms[0].value.mean == values["StaticFusion(alpha=0.0)"]
    assert result.report.arms[0].runs[0].steps == 0
    same = transfer(
        DynamicFusion(), source={"base": base, "expert": tuned}, target=language_model(1), test=ragged_tokens()
    )
    assert torch.allclose(same.model(**ragged_tokens()), tuned(**ragged_tokens()), atol=1e-4)


class Store(Recorded):
    gives = frozenset({"full"})


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ({"base": language_model(1)}, {}, InputError, "at least one expert"),
        ({"one": language_model(1), "two": language_model(2)}, {}, InputError, 'source={"base": small'),
        (None, {}, InputError, "needs a source"),
        (
            {"base": language_model(1), "x": language_model(2)},
            {"compare": ["shuffled teacher"]},
            InputError,
            "shuffled",
        ),
        ({"base": language_model(1), "x": Store()}, {}, CapabilityError, "store of answers"),
    ],
)
def test_sources_that_cannot_be_fused_are_refused(source, options, error, message):
    with pytest.raises(error, match=message):
        transfer(DynamicFusion(), source=source, target=language_model(), test=ragged_tokens(), **options)


def test_a_dry_run_finds_nothing_to_train():
    from transfuse import Transfer

    source = {"base": language_model(1), "expert": language_model(2)}
    found = Transfer(DynamicFusion(), source, language_model(), test=ragged_tokens()).check()
    assert found["arms"][0]["updates"] == 0 and found["estimate"]["seconds"] == 0
    tuned = Transfer(DynamicFusion(), source, language_model(), test=ragged_tokens(), epochs=3)
    assert tuned.training.epochs == 3


OWN = """
from helpers import language_model, ragged_tokens
from transfuse.datasets import Splits

def model(seed):
    return language_model(seed)

def texts():
    return Splits(ragged_tokens(), None, ragged_tokens(6, seed=1), name="texts", task="language-model")
"""
RECIPE = """
method: {name: DynamicFusion}
source: [{model: 'fusing.py:model', args: {seed: 1}}, {model: 'fusing.py:model', args: {seed: 2}}]
target: {model: 'fusing.py:model', args: {seed: 1}}
data: fusing.py:texts
compare: [{name: StaticFusion, alpha: 0.0}]
"""


def test_a_recipe_names_the_base_first_and_says_nothing_of_training(tmp_path):
    (tmp_path / "fusing.py").write_text(OWN)
    (tmp_path / "fuse.yaml").write_text(RECIPE)
    result = Recipe.read(tmp_path / "fuse.yaml", out=tmp_path / "run").run()
    expert, text = language_model(2), ragged_tokens(6, seed=1)
    assert torch.allclose(result.model(**text), expert(**text), atol=1e-4)
    assert [arm.runs[0].steps for arm in result.report.arms] == [0, 0]
