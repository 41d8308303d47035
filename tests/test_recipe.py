from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from transfuse.core.clock import Clock, Cosine, Linear
from transfuse.core.composition import Sum, Then
from transfuse.core.errors import InputError, MethodError, StoreError
from transfuse.core.training import Training
from transfuse.distill import KD, RKD, Hints, Labels
from transfuse.recipe import Recipe
from transfuse.recipe.schema import TrainingSpec

MINIMAL = """
method: KD
source: mlp
target: {model: mlp, args: {hidden: [4]}}
data: digits
training: {steps: 2}
"""

OWN = """
import torch
from torch.utils.data import TensorDataset


def part(count=8):
    return TensorDataset(torch.rand(count, 64), torch.arange(count) % 10)


def pair():
    return part(), part()


def triple():
    return part(), None, part()


def mapping(key="validate"):
    return {"train": part(), key: part(), "classes": tuple("abcdefghij")}


def located(path: "str | Path"):
    return {"train": part(), "classes": [path]}


def flexible(hidden, **rest):
    from transfuse.models import MLP
    return MLP(hidden=hidden, **rest)


number = 3
"""


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "own", raising=False)  # another test's module of the same name

    def read(text: str = MINIMAL, **options: Any) -> Recipe:
        (tmp_path / "tiny.yaml").write_text(text)
        return Recipe.read(tmp_path / "tiny.yaml", **options)

    return read


def with_lines(**lines: str) -> str:
    """The minimal recipe with other or further top-level lines."""
    kept = [line for line in MINIMAL.strip().split("\n") if line.partition(":")[0] not in lines]
    return "\n".join([*kept, *(f"{key}: {value}" for key, value in lines.items())])


def refused(read: Callable[..., Recipe], text: str) -> str:
    with pytest.raises(InputError) as caught:
        read(text)
    return str(caught.value)


# The shape of the file


def test_training_has_the_fields_and_defaults_of_the_trainer() -> None:
    theirs = {f.name: f.default for f in dataclasses.fields(Training) if f.name != "seed"}
    assert {name: field.default for name, field in TrainingSpec.model_fields.items()} == theirs


def test_reading_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(MINIMAL)
    code = f"""
import sys
from transfuse.recipe import Recipe
Recipe.read({str(tmp_path / "tiny.yaml")!r})
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ({"trainin": "{}"}, "tiny.yaml: trainin: unknown key; did you mean 'training' or"),
        ({"training": "{batchsize: 3}"}, "tiny.yaml: training.batchsize: unknown key; did you mean 'batch_size' or"),
        ({"target": "{modle: mlp}"}, "tiny.yaml: target.modle: unknown key; did you mean 'model'?"),
        (
            {"source": "{model: mlp, train: {epoch: 3}}"},
            "tiny.yaml: source.train.epoch: unknown key; did you mean 'epochs'?",
        ),
        ({"data": "{name: digits, argss: {}}"}, "tiny.yaml: data.argss: unknown key; did you mean 'args'?"),
        ({"method": "{then: [KD], share: [1]}"}, "tiny.yaml: method.share: unknown key; did you mean 'shares'?"),
        (
            {"method": "{name: KD, weight: {liner: [0, 1]}}"},
            "method.weight.liner: unknown key; did you mean 'linear' or",
        ),
        ({"method": "{name: KD, weight: [1, 2]}"}, "the weight of KD is [1.0, 2.0]: expected a number"),
        ({"compare": "[{then: [KD], shars: [1]}]"}, "compare[0].shars: unknown key; did you mean 'shares'?"),
        ({"lr": "0.1"}, "tiny.yaml: lr: unknown key; it belongs under 'training'."),
        ({"weights": "a.pt"}, "weights: unknown key; it belongs under 'source' or 'target'."),
        ({"training": "{steps: 1, seeds: [0]}"}, "training.seeds: unknown key; it belongs at the top of the recipe."),
        ({"training": "{steps: 1, 3: 4}"}, "training.3: unknown key"),
    ],
)
def test_an_unknown_key_is_answered_with_its_place_and_the_nearest(
    read: Callable[..., Recipe], lines: dict[str, str], said: str
) -> None:
    assert said in refused(read, with_lines(**lines))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ({"training": "{steps: many}"}, "training.steps: expected a whole number, found 'many'"),
        ({"training": "{steps: 1.5}"}, "training.steps: expected a whole number, found 1.5"),
        ({"training": "{lr: fast}"}, "training.lr: expected a number, found 'fast'"),
        ({"training": "{lr: .inf}"}, "training.lr: expected a finite number, found inf"),
        ({"training": "{shuffle: 7}"}, "training.shuffle: expected true or false, found 7"),
        ({"training": "[1]"}, "training: expected `key: value` pairs, found [1]"),
        ({"seeds": "3"}, "seeds: expected a list, for instance [1, 2], found 3"),
        ({"seeds": "[]"}, "seeds: "),
        ({"name": "[a]"}, "name: expected text, found ['a']"),
        ({"target": "{model: mlp, args: 3}"}, "target.args: expected `key: value` pairs, found 3"),
        (
            {"method": "{name: KD, weight: {linear: 3}}"},
            "method.weight.linear: expected a list of two numbers, found 3",
        ),
        ({"method": "{name: KD, weight: {}}"}, "method.weight: expected 'linear' or 'cosine', one of them"),
        ({"method": "{temperature: 4}"}, "method.name: is missing"),
        ({"target": "{}"}, "target: expected 'model' or 'huggingface', one of them"),
        ({"target": "{model: mlp, auto: AutoModel}"}, "target: 'auto' is the class that reads a 'huggingface' folder"),
        ({"data": "{name: digits, args: {labels: .nan}}"}, "data.args.labels"),
    ],
)
def test_a_wrong_value_is_explained_in_plain_words(
    read: Callable[..., Recipe], lines: dict[str, str], said: str
) -> None:
    assert said in refused(read, with_lines(**lines))


def test_every_problem_is_listed(read: Callable[..., Recipe]) -> None:
    said = refused(read, with_lines(training="{lr: fast}", seeds="no"))
    assert "training.lr" in said
    assert "seeds" in said


def test_a_missing_part_is_named(read: Callable[..., Recipe]) -> None:
    assert "tiny.yaml: training: is missing" in refused(read, MINIMAL.replace("training: {steps: 2}", ""))


def test_an_unknown_method_is_answered_with_the_nearest(read: Callable[..., Recipe]) -> None:
    assert "method.name: no method is called 'Hintz': did you mean 'Hints'?" in refused(
        read, with_lines(method="Hintz")
    )


def test_an_unknown_arm_is_answered_with_arms_and_methods(read: Callable[..., Recipe]) -> None:
    assert "did you mean 'scratch'?" in refused(read, with_lines(compare="[scrach]"))
    assert "did you mean 'Hints' or" in refused(read, with_lines(compare="[hint]"))


def test_arms_may_be_written_in_several_ways(read: Callable[..., Recipe]) -> None:
    assert read(with_lines(compare="[Scratch, shuffled_teacher, shuffled-teacher, kd]")).trainings == 5


# YAML


def test_a_key_that_stands_twice_is_an_error(read: Callable[..., Recipe]) -> None:
    said = refused(read, MINIMAL + "data: digits\n")
    assert "line 7" in said
    assert "'data' stands twice" in said


def test_bad_yaml_is_answered_with_the_line(read: Callable[..., Recipe]) -> None:
    assert "tiny.yaml, line 2" in refused(read, "a: [1,\nb: }")


@pytest.mark.parametrize("text", ["", "- a", "text", "\0"])
def test_a_file_that_is_no_recipe_is_refused(read: Callable[..., Recipe], text: str) -> None:
    assert "tiny.yaml" in refused(read, text)


def test_a_missing_file_is_answered_with_the_nearest(read: Callable[..., Recipe], tmp_path: Path) -> None:
    read()
    with pytest.raises(InputError, match=r"there is no recipe .*tinny.yaml.* did you mean 'tiny.yaml'"):
        Recipe.read(tmp_path / "tinny.yaml")


def test_numbers_with_an_exponent_are_numbers_and_dates_are_text(read: Callable[..., Recipe]) -> None:
    recipe = read(with_lines(method="{name: KD, temperature: 4e0}", data="{name: digits, args: {labels: 2026-01-01}}"))
    assert recipe.content["method"]["temperature"] == 4.0
    assert recipe.content["data"]["args"]["labels"] == "2026-01-01"


def test_name_and_folder_come_from_the_file(read: Callable[..., Recipe]) -> None:
    recipe = read()
    assert (recipe.spec.name, recipe.out) == ("tiny", Path("runs/tiny"))
    assert read(with_lines(name="b")).out == Path("runs/b")
    assert read(with_lines(out="c")).out == Path("c")
    assert read(out="d").out == Path("d")


def test_seeds_of_the_caller_take_the_place_of_the_recipes(read: Callable[..., Recipe]) -> None:
    recipe = read(with_lines(seeds="[0, 1]"), seeds=[7])
    assert recipe.spec.seeds == recipe.content["seeds"] == [7]


# Building


def built(recipe: Recipe) -> Any:
    return recipe.build().method


def test_methods_by_name_with_arguments_in_sums_and_in_sequence(read: Callable[..., Recipe]) -> None:
    assert repr(built(read())) == "KD()"
    assert repr(built(read(with_lines(method="{name: kd, temperature: 2}")))) == "KD(temperature=2)"
    total = built(read(with_lines(method="[KD, {name: Hints, student: fc, teacher: fc, weight: 0.5}]")))
    assert repr(total) == "KD() + 0.5 * Hints('fc', 'fc')"
    assert isinstance(total, Sum)
    chain = built(
        read(with_lines(method="{then: [{name: Hints, student: fc, teacher: fc}, [KD, RKD]], shares: [0.3, 0.7]}"))
    )
    assert isinstance(chain, Then)
    assert chain.shares == (0.3, 0.7)
    assert [type(m) for m in (chain.methods[0], *chain.methods[1].methods)] == [Hints, KD, RKD]


def test_the_weights_of_a_merge_are_those_of_its_models(read: Callable[..., Recipe]) -> None:
    assert repr(built(read(with_lines(method="{name: TaskArithmetic, weight: [1, 3]}")))) == (
        "TaskArithmetic(weight=[1.0, 3.0])"
    )
    assert repr(built(read(with_lines(method="{name: TaskArithmetic, weight: 0.5}")))) == "TaskArithmetic(weight=0.5)"


def test_a_weight_may_follow_the_training(read: Callable[..., Recipe]) -> None:
    total = built(
        read(
            with_lines(method="[KD, {name: RKD, weight: {linear: [0, 1]}}, {name: Labels, weight: {cosine: [1, 0.5]}}]")
        )
    )
    assert total.weights == (1.0, Linear(0, 1), Cosine(1, 0.5))
    assert total.weights[1](Clock(step=1, steps=4)) == 0.25
    assert isinstance(total.methods[2], Labels)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            "{name: KD, temprature: 4}",
            "method: method 'KD' has no argument 'temprature'; it takes: temperature=4.0, alpha",
        ),
        (
            "{name: Hints, student: fc}",
            "method: method 'Hints' needs the argument 'teacher'; it takes: student, teacher",
        ),
        ("{name: Labels, temperature: 4}", "method: method 'Labels' has no argument 'temperature'; it takes: no arg"),
        ("{name: KD, temperature: -1}", "method: KD: temperature is -1, it must be positive"),
        ("{name: KD, temperature: hot}", "method: TypeError"),
    ],
)
def test_wrong_arguments_of_a_method_name_the_place_and_the_accepted_ones(
    read: Callable[..., Recipe], method: str, said: str
) -> None:
    with pytest.raises(InputError) as caught:
        read(with_lines(method=method)).build()
    assert said in str(caught.value)
    assert "tiny.yaml" in str(caught.value)


def test_shares_that_do_not_fit_are_refused_with_the_place(read: Callable[..., Recipe]) -> None:
    with pytest.raises(MethodError, match=r"tiny\.yaml: method: Then needs one share per method"):
        read(with_lines(method="{then: [KD, RKD], shares: [1]}")).build()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ({"training": "{}"}, "training: say how long to train: epochs=... or steps=..."),
        ({"training": "{steps: 1, optimizer: adm}"}, "training: unknown optimizer 'adm': did you mean 'adam'"),
        ({"target": "mpl"}, "target: there is no model 'mpl'; did you mean 'mlp'?"),
        (
            {"source": "{model: mlp, args: {hiden: [3]}}"},
            "source: model 'mlp' has no argument 'hiden'; it takes: inputs",
        ),
        ({"data": "digts"}, "data: there is no data set 'digts'; did you mean 'digits'?"),
        (
            {"data": "{name: digits, args: {label: 5}}"},
            "data: data set 'digits' has no argument 'label'; it takes: labels",
        ),
        ({"data": "own.py:trple"}, "data: own.py has no function 'trple'; did you mean 'triple'?"),
        ({"data": "own.py:number"}, "data: own.py has no function 'number'"),
        ({"data": "nowhere.py:load"}, "nowhere.py"),
        ({"data": "no_such_package.module:load"}, "data: cannot import 'no_such_package.module'"),
        ({"data": "own.py:pair"}, "data: own.py:pair returned a tuple: expected transfuse.datasets.Splits, a tuple"),
        (
            {"data": "{name: 'own.py:mapping', args: {key: valid}}"},
            "returned 'valid', which is unknown; did you mean 'val",
        ),
        ({"source": "{huggingface: nowhere}"}, "is no folder with a Hugging Face model"),
        ({"task": "classificaton"}, "unknown task 'classificaton': did you mean 'classification'"),
    ],
)
def test_what_cannot_be_built_is_answered_with_the_place_and_the_nearest(
    read: Callable[..., Recipe], lines: dict[str, str], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        read(with_lines(**lines)).check()
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["own.py:triple", "own.py:mapping", "own:mapping"])
def test_data_may_be_a_function_of_ones_own(read: Callable[..., Recipe], name: str) -> None:
    transfer = read(with_lines(data=name)).build()
    assert transfer.data["data"].size == transfer.test.size == 8
    assert transfer.classes == (tuple("abcdefghij") if "mapping" in name else None)


def test_paths_among_arguments_are_relative_to_the_recipe(read: Callable[..., Recipe], tmp_path: Path) -> None:
    transfer = read(with_lines(data="{name: 'own.py:located', args: {path: a.csv}}")).build()
    assert transfer.classes == [str(tmp_path / "a.csv")]


def test_functions_with_further_keyword_arguments_are_called(read: Callable[..., Recipe]) -> None:
    transfer = read(with_lines(target="{model: 'own.py:flexible', args: {hidden: [3], classes: 10}}")).build()
    assert transfer.build_target(0).linear1.out_features == 3


def test_every_seed_has_a_target_of_its_own_and_the_source_stays(read: Callable[..., Recipe]) -> None:
    transfer = read().build()
    one, other = transfer.build_target(0), transfer.build_target(1)
    assert not torch.equal(one.fc.weight, other.fc.weight)
    assert torch.equal(one.fc.weight, read().build().build_target(0).fc.weight)
    assert torch.equal(transfer.source.fc.weight, read().build().source.fc.weight)


def test_weights_are_read_relative_to_the_recipe(read: Callable[..., Recipe], tmp_path: Path) -> None:
    from transfuse.core.checkpoint import save_weights
    from transfuse.models import MLP

    teacher = MLP()
    save_weights(tmp_path / "teacher.safetensors", teacher)
    transfer = read(with_lines(source="{model: mlp, weights: teacher.safetensors}")).build()
    assert torch.equal(transfer.source.fc.weight, teacher.fc.weight)


def test_scratch_redraws_a_target_with_weights_and_finetune_keeps_them(
    read: Callable[..., Recipe], tmp_path: Path
) -> None:
    from transfuse.core.checkpoint import save_weights
    from transfuse.models import MLP

    model = MLP(hidden=[4])
    save_weights(tmp_path / "w.safetensors", model)
    transfer = read(with_lines(target="{model: mlp, args: {hidden: [4]}, weights: w.safetensors}")).build()
    assert torch.equal(transfer.build_target(0).fc.weight, model.fc.weight)
    assert not torch.equal(transfer.build_target(0, fresh=True).fc.weight, model.fc.weight)


@pytest.mark.parametrize("auto", ["", ", auto: AutoModelForSequenceClassification"])
def test_a_local_hugging_face_folder_is_a_model(read: Callable[..., Recipe], tmp_path: Path, auto: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    saved = transformers.BertForSequenceClassification(config)
    saved.save_pretrained(tmp_path / "bert")
    source = read(with_lines(source=f"{{huggingface: bert{auto}}}")).build().source
    assert type(source) is type(saved)
    assert torch.equal(source.classifier.weight, saved.classifier.weight)


def test_an_unknown_auto_class_is_answered_with_the_nearest(read: Callable[..., Recipe], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="did you mean 'AutoModelForCausalLM'"):
        read(with_lines(source="{huggingface: m, auto: AutoModelForCasualLM}")).build()


# A source that is trained first


TAUGHT = with_lines(source="{model: mlp, train: {steps: 3, data: {name: digits}}}")


def test_a_source_is_trained_once_and_then_read(read: Callable[..., Recipe], tmp_path: Path) -> None:
    first = read(TAUGHT, out=tmp_path / "run").build()
    weights = tmp_path / "run" / "source" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    again = read(TAUGHT, out=tmp_path / "run").build()
    untrained = read(with_lines(source="{model: mlp}")).build()
    assert torch.equal(first.source.fc.weight, again.source.fc.weight)
    assert not torch.equal(first.source.fc.weight, untrained.source.fc.weight)
    assert weights.stat().st_mtime_ns == written


def test_a_dry_run_trains_no_source_and_writes_nothing(read: Callable[..., Recipe], tmp_path: Path) -> None:
    found = read(TAUGHT, out=tmp_path / "run").check()
    assert found["lessons"]["source"]["arms"][0]["updates"] == 3
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_found_before_anything_is_trained_or_written(read: Callable[..., Recipe], tmp_path: Path) -> None:
    text = TAUGHT.replace("method: KD", "method: {name: Hints, student: layr1, teacher: fc}")
    with pytest.raises(InputError, match="layr1"):
        read(text, out=tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_a_source_that_is_only_a_function_cannot_be_trained(read: Callable[..., Recipe]) -> None:
    with pytest.raises(InputError, match=r"source\.train: a TensorDataset cannot be trained"):
        read(with_lines(source="{model: 'own.py:part', train: {steps: 1}}")).build()


# The folder of a run


def test_a_folder_that_holds_a_run_is_refused(read: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = read(out=tmp_path / "run")
    recipe.run()
    with pytest.raises(InputError, match="holds a run already"):
        recipe.run()
    assert any("holds a run already" in note for note in recipe.check()["notes"])


def test_a_folder_with_another_recipe_is_not_resumed(read: Callable[..., Recipe], tmp_path: Path) -> None:
    read(out=tmp_path / "run").run()
    with pytest.raises(InputError, match="holds a run of another recipe"):
        read(MINIMAL.replace("steps: 2", "steps: 3"), out=tmp_path / "run").run(resume=True)


def test_a_run_says_how_it_was_started(read: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = read(MINIMAL + "# a comment\n", out=tmp_path / "run", seeds=[5])
    recipe.run()
    again = Recipe.of_run(tmp_path / "run")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == recipe.text
    assert (again.content, again.out, again.folder.resolve()) == (recipe.content, recipe.out, tmp_path.resolve())
    assert (again.spec, again.finished, again.trainings) == (recipe.spec, 1, 1)


def test_a_folder_without_a_recipe_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is not the folder of a run"):
        Recipe.of_run(tmp_path)
    (tmp_path / "transfer.json").write_text("{}")
    with pytest.raises(InputError, match="it was started from Python"):
        Recipe.of_run(tmp_path)


def test_a_damaged_note_is_a_store_error(read: Callable[..., Recipe], tmp_path: Path) -> None:
    read(out=tmp_path / "run").run()
    (tmp_path / "run" / "started.json").write_text("{")
    with pytest.raises(StoreError, match=r"started\.json"):
        Recipe.of_run(tmp_path / "run")


def test_an_iterator_that_can_be_read_once_is_not_read_by_the_dry_run(tmp_path: Path) -> None:
    (tmp_path / "stream.py").write_text(
        "import torch\n"
        "def load():\n"
        "    return {'train': iter([(torch.rand(4, 64), torch.arange(4)) for _ in range(2)])}\n"
    )
    (tmp_path / "tiny.yaml").write_text(with_lines(data="stream.py:load"))
    result = Recipe.read(tmp_path / "tiny.yaml", out=tmp_path / "run").run()
    assert result.report.arms[0].runs[0].steps == 2


def test_a_run_gives_back_a_model_and_its_report(read: Callable[..., Recipe], tmp_path: Path) -> None:
    seen = []
    recipe = read(with_lines(compare="[scratch, RKD]", seeds="[0, 1]"), out=tmp_path / "run")
    result = recipe.run(listener=lambda arm, seed, trainer, record: seen.append((arm, seed)))
    assert isinstance(result.model, nn.Module)
    assert [arm.name for arm in result.report.arms] == ["KD()", "scratch", "RKD()"]
    assert result.report.recipe == recipe.content
    assert len(dict.fromkeys(seen)) == recipe.trainings == recipe.finished == 6
