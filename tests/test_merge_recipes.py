"""Recipes of merges, in our words and in mergekit's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import llama
from typer.testing import CliRunner

from transfuse.cli import app
from transfuse.core.errors import InputError
from transfuse.recipe.mergekit import translated
from transfuse.recipe.merging import MergeRecipe
from transfuse.weights import TIES, Linear


@pytest.fixture
def models(tmp_path):
    """A base and two models near it, of four layers."""
    base = llama(num_hidden_layers=4)
    for name, seed in (("base", None), ("a", 1), ("b", 2)):
        if seed is not None:
            torch.manual_seed(seed)
            with torch.no_grad():
                for p in base.parameters():
                    p.add_(0.05 * torch.randn_like(p))
        base.save_pretrained(tmp_path / name)
    return tmp_path


def state(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def merged(folder: Path, text: str) -> dict[str, torch.Tensor]:
    (folder / "recipe.yaml").write_text(text)
    out = folder / f"out{len(list(folder.glob('out*')))}"
    MergeRecipe.read(folder / "recipe.yaml").run(out)
    return state(out)


OURS = """
method: {name: TIES, density: 0.5, weight: [1.0, {depth: [0, 1]}]}
base: base
models: [a, {model: b}]
"""


def test_a_recipe_of_ours_is_the_call(models):
    found = merged(models, OURS)
    from transfuse.weights import merge

    method = TIES(0.5, [1.0, {"depth": [0, 1]}])
    expected = merge(method, [models / "a", models / "b"], models / "base").state
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# mergekit's words, from its documentation's kinds of examples

LINEAR = """
models:
  - model: a
    parameters: {weight: 1.0}
  - model: b
    parameters: {weight: 0.3}
merge_method: linear
dtype: float32
"""
SLERP = """
slices:
  - sources:
      - model: a
        layer_range: [0, 4]
      - model: b
        layer_range: [0, 4]
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
"""
TIES_ = """
models:
  - model: a
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: base
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
"""
STACKED = """
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
merge_method: passthrough
dtype: float32
"""
PARTS = """
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
    parameters: {t: [0, 1]}
  - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
    parameters: {t: 0.25}
merge_method: slerp
base_model: b
dtype: float32
"""
ALL = {"linear": LINEAR, "slerp": SLERP, "ties": TIES_, "passthrough": STACKED, "slices": PARTS} | {
    name: yaml.safe_dump({
        "merge_method": name, "base_model": "base", "dtype": "float32", "models": [{"model": "a"}, {"model": "b"}],
        "parameters": parameters,
    })
    for name, parameters in {
        "task_arithmetic": {"weight": 0.4, "lambda": 0.5}, "sce": {"select_topk": 0.5}, "model_stock": {},
        "breadcrumbs": {"density": 0.7, "gamma": 0.02, "weight": 0.5},
        "breadcrumbs_ties": {"density": 0.7, "weight": 0.5}, "nuslerp": {"weight": 0.5}, "multislerp": {"weight": 0.5},
    }.items()
} | {
    "karcher": "merge_method: karcher\nmodels: [{model: a}, {model: b}]\ndtype: float32\n",
    "nearswap": "merge_method: nearswap\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.01}\ndtype: float32\n",
}  # fmt: skip


def test_gradients_filters_and_weights_mean_what_they_say(models):
    assert translated(yaml.safe_load(LINEAR))[0] == {
        "method": {"name": "Linear", "weight": [1.0, 0.3]},
        "models": [{"model": "a"}, {"model": "b"}],
        "dtype": "float32",
    }
    content, notes = translated(yaml.safe_load(TIES_))
    assert content["method"] == {
        "name": "TIES",
        "normalize": True,
        "density": [{"depth": [1.0, 0.7, 0.1]}, 0.5],
        "weight": [1.0, {"depth": [0.0, 0.3, 0.7, 1.0]}],
    }
    assert content["base"] == {"model": "base"} and len(content["models"]) == 2
    assert notes == ["int8_mask: masks take no memory here"]
    content, _ = translated(yaml.safe_load(SLERP))
    assert list(content["method"]["t"]) == ["*self_attn*", "*mlp*", "*"]
    assert content["method"]["t"]["*self_attn*"]["depth"] == pytest.approx([0, 0.4333333, 0.5666667, 1.0])
    content, _ = translated(yaml.safe_load(PARTS))
    assert content["method"]["t"]["*.[0-9].*"] == {"depth": [0.0, 1.0, 0.25, 0.25]}
    assert (content["method"]["t"]["*embed*"], content["method"]["t"]["*"]) == (0.0, 0.25)
    assert [range_["model"] for range_ in content["slices"][0]] == ["b", "a"]  # the base is where t is 0


def test_a_filter_of_mergekits_may_fit_nothing_and_a_pattern_of_ours_must_fit(models, tmp_path):
    plain = merged(models, SLERP)
    more = SLERP.replace("    - value: 0.5", "    - filter: block_sparse_moe\n      value: 0.9\n    - value: 0.5")
    assert all(torch.equal(t, plain[k]) for k, t in merged(models, more).items())
    file = models / "ours.yaml"
    file.write_text("method: {name: SLERP, t: {'*block_sparse_moe*': 0.9, '*': 0.5}}\nmodels: [a, b]\n")
    with pytest.raises(InputError, match="fits no tensor"):
        MergeRecipe.read(file).run(tmp_path / "out")


def test_slices_of_layers_are_stacked(models):
    found = merged(models, STACKED)
    a, b = state(models / "a"), state(models / "b")
    for new, (one, old) in enumerate(((a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3))):
        for rest in ("self_attn.q_proj.weight", "mlp.up_proj.weight"):
            assert torch.equal(found[f"model.layers.{new}.{rest}"], one[f"model.layers.{old}.{rest}"])
    found = merged(models, PARTS)
    assert torch.allclose(found["model.layers.0.mlp.up_proj.weight"], b["model.layers.0.mlp.up_proj.weight"])
    assert torch.allclose(found["model.layers.1.mlp.up_proj.weight"], a["model.layers.1.mlp.up_proj.weight"])


def test_an_adapter_after_a_plus_is_folded_in(models):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(llama(num_hidden_layers=4), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p)
    adapted.save_pretrained(models / "lora")
    found = merged(models, "merge_method: linear\nmodels: [{model: base+lora}]\n")
    expected = adapted.merge_and_unload().state_dict()
    assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in expected)


@pytest.mark.parametrize("name", ALL)
def test_recipes_of_mergekit_give_what_mergekit_gives(models, name):
    pytest.importorskip("mergekit", reason="compared where mergekit is installed")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    found = merged(models, ALL[name])
    content = yaml.safe_load(ALL[name])
    for entry in content.get("models", []) + [s for part in content.get("slices", []) for s in part["sources"]]:
        entry["model"] = str(models / entry["model"])
    if "base_model" in content:
        content["base_model"] = str(models / content["base_model"])
    options = MergeOptions(cuda=False, copy_tokenizer=False, random_seed=0)
    run_merge(MergeConfiguration.model_validate(content), str(models / "theirs"), options)
    theirs = state(models / "theirs")
    assert found.keys() == theirs.keys()
    worst = max(float((found[key] - theirs[key]).abs().max()) for key in theirs)
    assert worst < 1e-5, f"{name}: {worst}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "arcee_fusion"}, "'arcee_fusion' has no counterpart"),
        ({"modules": {}}, "'modules' of a mergekit recipe is not understood"),
        ({"parameters": {"wait": 1.0}}, "no parameter 'wait' that is understood: did you mean 'weight'"),
        ({"chat_template": "chatml"}, "chat_template is 'chatml'"),
        ({"tokenizer": {"source": "union", "tokens": {}}}, "'tokenizer' takes 'source' here, not 'tokens'"),
        ({"slices": []}, None),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change, message):
    content = yaml.safe_load(LINEAR) | change
    if message is None:
        assert translated(content)
        return
    with pytest.raises(InputError, match=message):
        translated(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OURS + "densty: 3\n", r"densty: unknown key"),
        (OURS.replace("TIES", "KD"), "KD merges no weights"),
        (OURS.replace("density", "densty"), "has no argument 'densty'"),
        ("method: Linear\n", "expected 'models' or 'slices'"),
        (OURS.replace("base: base\n", ""), "pass base="),
        (OURS.replace("[a,", "[nowhere,"), "there is nothing at"),
    ],
)
def test_wrong_recipes_are_refused_in_plain_words(models, text, message):
    with pytest.raises(Exception, match=message):
        merged(models, text)


# The command


def run(*arguments: object):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def test_the_command_checks_merges_and_says_where(models):
    (models / "recipe.yaml").write_text(OURS)
    dry = run(models / "recipe.yaml", "--dry-run")
    assert dry.exit_code == 0 and "This merge fits" in dry.output and not (models / "out").exists()
    done = run(models / "recipe.yaml", "--out", models / "out")
    assert done.exit_code == 0, done.output
    assert "Model:" in done.output and "cosine" in done.output
    assert (models / "out" / "model.safetensors").exists()
    again = run(models / "recipe.yaml", "--out", models / "out")
    assert again.exit_code == 2 and "exists and is not empty" in again.output
    found = json.loads(run(models / "recipe.yaml", "--dry-run", "--json").output)
    assert found["ok"] and len(found["merged"]) == 39
    assert run(models / "recipe.yaml").exit_code == 2


def test_the_python_entrance_is_at_the_top():
    import transfuse

    assert transfuse.merge(Linear(), [{"w": torch.ones(2)}, {"w": torch.zeros(2)}]).state["w"].tolist() == [0.5, 0.5]


def test_adapters_are_merged_into_an_adapter(models, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    for seed, name in enumerate(("one", "two")):
        adapted = get_peft_model(llama(num_hidden_layers=4), LoraConfig(r=2, target_modules=["q_proj"]))
        for key, p in adapted.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(seed))
        adapted.save_pretrained(models / name)
    both = "models: [{model: base, adapter: one}, {model: base, adapter: two}]\nbase: base\n"
    file = models / "adapters.yaml"
    file.write_text(f"method: TaskArithmetic\n{both}lora: 4\n")
    assert "an adapter of rank 4 to write" in CliRunner().invoke(app, ["merge", str(file), "--dry-run"]).output
    done = CliRunner().invoke(app, ["merge", str(file), "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["lost"][""] < 1e-5
    loaded = PeftModel.from_pretrained(llama(num_hidden_layers=4), tmp_path / "out").merge_and_unload().state_dict()
    expected = merged(models, f"method: TaskArithmetic\n{both}")
    assert all(torch.allclose(loaded[key], t, atol=1e-5) for key, t in expected.items())
    file.write_text(f"method: TaskArithmetic\n{both}lora: 1\n")
    done = CliRunner().invoke(app, ["merge", str(file), "--out", str(tmp_path / "narrow")])
    assert "of the change is not in it. Load it with PEFT." in " ".join(done.stdout.split()), done.output
