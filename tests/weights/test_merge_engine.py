"""Merges of files: what is written, what is refused, and what a kill leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import CNN, llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from transfuse.core.errors import InputError, ShapeError, StoreError
from transfuse.weights import Linear, Merge
from transfuse.weights.engine import merge
from transfuse.weights.folder import INDEX, open_checkpoint
from transfuse.weights.linear import Linear as Average


def family(count: int = 3, **shapes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """A base and models near it."""
    shapes = shapes or {"embed": (12, 8), "layers.0.w": (8, 8), "layers.1.w": (8, 8), "norm": (8,)}
    draw = torch.Generator().manual_seed(0)
    base = {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}
    return [base] + [
        {key: value + 0.1 * torch.randn(value.shape, generator=draw) for key, value in base.items()}
        for _ in range(count - 1)
    ]


def folders(path: Path, states: list[dict[str, Tensor]], **config: object) -> list[Path]:
    made = []
    for i, state in enumerate(states):
        folder = path / f"model{i}"
        folder.mkdir(parents=True)
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "toy", "dtype": "float32", **config}))
        (folder / "tokenizer.json").write_text("{}")
        made.append(folder)
    return made


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


class Whole(Average):
    """The same average, of whole tensors."""

    elementwise = False


def test_files_modules_and_state_dicts_merge_to_the_same(tmp_path):
    states = family()
    expected = {key: sum(s[key] for s in states) / 3 for key in states[0]}
    mixed = [folders(tmp_path, states[:1])[0], states[1], states[2]]
    for method in (Linear(), Whole()):
        merged = merge(method, mixed).state
        assert merged.keys() == expected.keys()
        assert all(torch.allclose(merged[key], expected[key], atol=1e-6) for key in expected)


def test_what_is_written_is_what_is_merged_in_memory(tmp_path):
    states = family()
    merged = merge(Linear([2.0, 1.0, 1.0]), folders(tmp_path, states), out=tmp_path / "out")
    assert merged.folder == tmp_path / "out"
    written, wanted = load_file(tmp_path / "out" / "model.safetensors"), merge(Linear([2.0, 1.0, 1.0]), states).state
    assert list(written) == list(wanted)
    assert all(torch.equal(written[key], wanted[key]) for key in wanted)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_large_tensors_are_merged_in_pieces_that_join(tmp_path, monkeypatch):
    monkeypatch.setattr("transfuse.weights.engine.PIECE", 7)
    states = family()
    assert all(
        torch.allclose(value, sum(s[key] for s in states) / 3, atol=1e-6)
        for key, value in merge(Linear(), states).state.items()
    )


def test_shards_are_no_larger_than_asked_and_read_as_one(tmp_path):
    states = family()
    merge(Linear(), folders(tmp_path, states), out=tmp_path / "out", shard_size=500)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == len(set(index["weight_map"].values())) == 3
    assert index["metadata"]["total_size"] == sum(v.numel() * 4 for v in states[0].values())
    again = open_checkpoint(tmp_path / "out")
    assert set(again.tensors) == set(states[0])
    assert torch.allclose(again.read("norm"), sum(s["norm"] for s in states) / 3, atol=1e-6)


def test_types_are_mixed_in_float32_and_written_as_asked(tmp_path):
    states = family()
    half = {key: value.bfloat16() for key, value in states[1].items()}
    merged = merge(Linear(), [states[0], half])
    assert merged.ledger.dtypes == {"model 0": ["float32"], "model 1": ["bfloat16"]}
    assert torch.allclose(merged.state["norm"], (states[0]["norm"] + half["norm"].float()) / 2)
    parents = folders(tmp_path, states)
    merge(Linear(), parents, out=tmp_path / "out", dtype="bfloat16")
    assert load_file(tmp_path / "out" / "model.safetensors")["norm"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(InputError, match="unknown dtype 'bf16'"):
        merge(Linear(), states, dtype="bf16")


def test_statistics_are_averaged_and_counters_kept():
    models = [CNN(norm=True, seed=s) for s in (0, 1)]
    for seed, model in enumerate(models):
        model.norm.running_mean.fill_(seed)
        model.norm.running_var.fill_(1.0 + 2 * seed)
        model.norm.num_batches_tracked.fill_(7 + seed)

    class Far(Merge):
        def merge(self, key, base, tensors):
            return -10 * tensors[0]

    merged = merge(Far(), models, force=True)
    assert merged.model.norm.running_mean.tolist() == [0.5] * 4
    assert merged.model.norm.running_var.tolist() == [2.0] * 4
    assert merged.model.norm.num_batches_tracked == 7
    assert merged.ledger.averaged == ["norm.running_mean", "norm.running_var"]
    assert merged.ledger.kept == ["norm.num_batches_tracked"]
    assert torch.equal(merged.model.fc.weight, -10 * models[0].fc.weight)


# Hugging Face


@pytest.mark.parametrize("tie", [True, False])
def test_a_merge_of_hugging_face_folders_is_loaded_as_it_is(tmp_path, tie):
    from transformers import AutoModelForCausalLM

    base = llama(tie_word_embeddings=tie)
    paths, states = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in base.parameters():
                p.add_(0.05 * torch.randn_like(p))
        base.save_pretrained(tmp_path / str(seed))
        paths.append(tmp_path / str(seed))
        states.append({key: value.clone() for key, value in base.state_dict().items()})
    merge(Linear(), paths, out=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for key, value in model.state_dict().items():
        assert torch.allclose(value, (states[0][key] + states[1][key]) / 2, atol=1e-6)
    tied = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert tied == tie
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(str(path) in card for path in paths) and "unknown" in card
    in_memory = merge(Linear(), [llama(tie_word_embeddings=tie), llama(tie_word_embeddings=tie)]).model
    assert in_memory.get_output_embeddings().weight is not None


def test_a_head_beside_the_table_it_is_tied_to_must_be_the_same(tmp_path):
    states = family(2, **{"embed_tokens.weight": (6, 4), "lm_head.weight": (6, 4)})
    for state in states:
        state["lm_head.weight"] = state["embed_tokens.weight"].clone()
    paths = folders(tmp_path, states, tie_word_embeddings=True)
    merge(Linear(), paths, out=tmp_path / "out")
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["embed_tokens.weight"]
    states[1]["lm_head.weight"] += 1
    save_file(states[1], paths[1] / "model.safetensors")
    with pytest.raises(InputError, match=r"'lm_head.weight' and 'embed_tokens.weight' are tied, and they differ"):
        merge(Linear(), paths)


def test_licences_of_the_parents_are_in_the_card(tmp_path):
    paths = folders(tmp_path, family())
    for path, licence in zip(paths, ("apache-2.0", "mit"), strict=False):
        (path / "README.md").write_text(f"---\nlicense: {licence}\n---\nA model.")
    merge(Linear(), paths, out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"| {paths[0]} | apache-2.0 |" in card
        and f"| {paths[1]} | mit |" in card
        and f"| {paths[2]} | unknown |" in card
    )
    assert card.startswith("---\nlicense: other\n")


# What is refused


def test_other_architectures_are_refused_at_once_with_five_differences():
    ours = llama()
    wider, deeper = llama(intermediate_size=32), llama(num_hidden_layers=3)
    began = time.monotonic()
    with pytest.raises(ShapeError, match=r"model.layers.0.mlp.gate_proj.weight is \(24, 16\) in model 0.*6 in all"):
        merge(Linear(), [ours, wider])
    with pytest.raises(InputError, match=r"stands only in model 1.*9 in all"):
        merge(Linear(), [ours, deeper])
    assert time.monotonic() - began < 1


def test_models_without_a_common_ancestor_are_refused():
    with pytest.raises(
        InputError, match=r"model 0 and model 1 share no ancestor: the cosine of their weights is -?0\.0"
    ):
        merge(Linear(), [llama(0), llama(1)])
    assert merge(Linear(), [llama(0), llama(1)], force=True).state


def test_nan_in_a_parent_is_named(tmp_path):
    states = family()
    states[1]["layers.1.w"][0, 0] = torch.nan
    paths = folders(tmp_path, states)
    with pytest.raises(InputError, match=r"'layers.1.w' in .*model1 holds NaN"):
        merge(Linear(), paths, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_and_missing_files_are_named(tmp_path):
    paths = folders(tmp_path, family())
    content = (paths[1] / "model.safetensors").read_bytes()
    for broken in (content[:-5], b"\xff" + content[1:], content[:8] + b"?" + content[9:], b""):
        (paths[1] / "model.safetensors").write_bytes(broken)
        with pytest.raises(StoreError, match=r"cannot read .*model1/model.safetensors"):
            merge(Linear(), paths, out=tmp_path / "out")
    (paths[1] / "model.safetensors").unlink()
    with pytest.raises(StoreError, match="holds no safetensors files"):
        merge(Linear(), paths)
    with pytest.raises(StoreError, match="there is nothing at"):
        merge(Linear(), [paths[0], tmp_path / "nowhere"])
    (paths[1] / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(StoreError, match=r"lacks model-1.safetensors of 2 shards"):
        merge(Linear(), paths)


def test_pickles_are_read_without_running_code(tmp_path):
    states = family(2)
    torch.save(states[0], tmp_path / "a.pt")
    assert torch.allclose(
        merge(Linear(), [tmp_path / "a.pt", states[1]]).state["norm"], (states[0]["norm"] + states[1]["norm"]) / 2
    )
    torch.save(nn.Linear(2, 2), tmp_path / "b.pt")
    with pytest.raises(StoreError, match="runs code when it is loaded"):
        merge(Linear(), [tmp_path / "b.pt", states[1]])


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    with pytest.raises(InputError, match="exists and is not empty"):
        merge(Linear(), family(), out=tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "data"


def test_too_little_room_is_found_out_first(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(StoreError, match="make room"):
        merge(Linear(), family(), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_wrong_numbers_of_models_and_weights_are_refused():
    with pytest.raises(InputError, match="at least one model"):
        merge(Linear(), [])
    with pytest.raises(InputError, match="weight has 2 numbers, there are 3 models"):
        merge(Linear([1.0, 2.0]), family())
    with pytest.raises(InputError, match="found a int"):
        merge(Linear(), [3, 4])


def test_patterns_that_match_nothing_are_found_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="no value for 'embed'"):
        merge(Linear({"layers.*": 1.0}), family(), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Killed and resumed

SLOW = """
import sys, time
from pathlib import Path
import transfuse.weights.engine as engine
from transfuse.weights import Linear
original = engine.Plan.pieces
def slowly(self, key):
    time.sleep(0.15)
    yield from original(self, key)
engine.Plan.pieces = slowly
folder = Path(sys.argv[1])
engine.merge(Linear(), [folder / f"model{i}" for i in range(3)], out=folder / "out", shard_size=3000, resume=True)
"""


def test_killed_and_resumed_it_ends_with_the_same_bytes(tmp_path):
    shapes = {f"layers.{i}.w": (16, 16) for i in range(12)}
    paths = folders(tmp_path, family(3, **shapes))
    merge(Linear(), paths, out=tmp_path / "whole", shard_size=3000)
    for wait in (0.3, 0.7):
        process = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)])
        journal = tmp_path / "out.partial" / "done.jsonl"
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    before = len(journal.read_text().splitlines())
    assert 0 < before < 12
    with pytest.raises(InputError, match="go on with resume"):
        merge(Linear(), paths, out=tmp_path / "out", shard_size=3000)
    with pytest.raises(InputError, match="unfinished merge of other things"):
        merge(Linear([1, 2, 3]), paths, out=tmp_path / "out", shard_size=3000, resume=True)
    first = next((tmp_path / "out.partial").glob("*.safetensors"))
    damaged = bytearray(first.read_bytes())
    damaged[-3] ^= 1
    first.write_bytes(damaged)  # whatever happened to what was written, it is checked
    merge(Linear(), paths, out=tmp_path / "out", shard_size=3000, resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    merge(Linear(), paths, out=tmp_path / "out", shard_size=3000, resume=True)  # finished, so nothing is done
    save_file(family(4, **shapes)[3], paths[2] / "model.safetensors")
    with pytest.raises(InputError, match="exists and is not empty"):
        merge(Linear(), paths, out=tmp_path / "out", shard_size=3000, resume=True)


def test_size_and_progress_are_said(tmp_path):
    said, seen = [], []
    merge(Linear(), family(), out=tmp_path / "out", say=said.append, progress=lambda *now: seen.append(now))
    assert "Linear() of 3 models" in said[0] and "1 file(s)" in said[0]
    assert seen[-1][0] == seen[-1][1] and [a for a, _ in seen] == sorted(a for a, _ in seen)
