"""Merging checkpoints on disk: beside mergekit where it is installed, beside copying the result, and its memory.

The models have the shapes of SmolLM2-135M in float32: a base, and three that are near it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common import Result, alternate
from transfuse.weights import Linear, merge

MODELS = 3
MB = 2**20
RECIPES = {
    "linear": ({"merge_method": "linear", "parameters": {"weight": 1.0}}, 3, 1 / 2.5),
    "slerp": ({"merge_method": "slerp", "parameters": {"t": 0.4}}, 2, 1 / 2.5),
    "TIES": ({"merge_method": "ties", "parameters": {"density": 0.3, "weight": 1.0}}, 3, 1 / 8),
}
"""By name: a recipe of mergekit's, how many models it merges, and the limit of our seconds over mergekit's."""


def measure(repeats: int | None = None, smoke: bool = False) -> Result:
    """Run every comparison."""
    repeats = repeats or (1 if smoke else 3)
    result = Result("merge")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabulary, layers = (512, 2) if smoke else (49152, 30)
        largest = models(folder, vocabulary, layers)
        for label, (content, count, limit) in RECIPES.items():
            file = recipe(folder, label, content, count)
            if importlib.util.find_spec("mergekit"):
                pairs = alternate(whole(ours, file), whole(theirs, file), repeats)
                result.add(f"{label}, whole process / mergekit's", limit, pairs)
            taken = float(subprocess.check_output([sys.executable, "-c", PROBE, str(file)], text=True))
            allowed = (count + 2) * largest / MB + 300
            result.add(f"{label}, memory / {count + 2} largest tensors and 300 MB", 1.0, [(taken, allowed)])
        paths = [folder / f"model{i}" for i in range(1, MODELS + 1)]
        result.add("linear / copying the result", 2.0, alternate(merged(paths, folder), copied(folder), repeats))
        if not smoke:
            shutil.rmtree(folder / "out", ignore_errors=True)
            largest = models(folder, vocabulary=128_000, layers=24, width=1024, inner=4096)
            for label in ("linear", "TIES"):
                content, count, _ = RECIPES[label]
                file = recipe(folder, label, content, count)
                taken = float(subprocess.check_output([sys.executable, "-c", PROBE, str(file)], text=True))
                size = (folder / "base" / "model.safetensors").stat().st_size / 2**30
                label = f"{label} of {size:.1f} GB each, memory / {count + 2} largest tensors and 300 MB"
                result.add(label, 1.0, [(taken, (count + 2) * largest / MB + 300)])
    return result


def models(folder: Path, vocabulary: int, layers: int, width: int = 576, inner: int = 1536) -> int:
    """Write a base and three models near it; returns the bytes of the largest tensor in float32."""
    heads = width // 64
    keys = max(1, heads // 3)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    for i in range(layers):
        layer = {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (64 * keys, width),
            "self_attn.v_proj": (64 * keys, width), "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner), "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": 64,
        "vocab_size": vocabulary, "tie_word_embeddings": True, "torch_dtype": "float32",
    }  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    base = {key: 0.02 * torch.randn(shape, generator=draw) for key, shape in shapes.items()}
    for i in range(MODELS + 1):
        near: dict[str, Tensor] = (
            {k: v + 0.002 * torch.randn(v.shape, generator=draw) for k, v in base.items()} if i else base
        )
        path = folder / (f"model{i}" if i else "base")
        path.mkdir(exist_ok=True)
        save_file(near, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))
    return max(torch.Size(shape).numel() for shape in shapes.values()) * 4


def recipe(folder: Path, label: str, content: Mapping[str, object], count: int) -> Path:
    """Write a recipe that both read."""
    paths = [str(folder / f"model{i}") for i in range(1, count + 1)]
    base = {"ties": str(folder / "base"), "slerp": paths[0]}.get(str(content["merge_method"]))
    given = {**content, "models": [{"model": path} for path in paths], "dtype": "float32"}
    file = folder / f"{label}.yaml"
    file.write_text(yaml.safe_dump(given | ({"base_model": base} if base else {})))
    return file


def ours(file: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "transfuse", "merge", str(file), "--out", str(out), "--quiet"]


def theirs(file: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "mergekit.scripts.run_yaml", str(file), str(out), "--quiet"]


def whole(command: Callable[[Path, Path], list[str]], file: Path) -> Callable[[], float]:
    """Seconds of a process, from its start to its end."""

    def seconds() -> float:
        out = file.parent / "out"
        shutil.rmtree(out, ignore_errors=True)
        os.sync()  # what was written before is nobody's to wait for
        began = time.perf_counter()
        subprocess.run(command(file, out), check=True, capture_output=True)
        return time.perf_counter() - began

    return seconds


def merged(paths: list[Path], folder: Path) -> Callable[[], float]:
    """Seconds of a merge inside a process."""

    def seconds() -> float:
        shutil.rmtree(folder / "out", ignore_errors=True)
        os.sync()
        began = time.perf_counter()
        merge(Linear(), paths, out=folder / "out")
        return time.perf_counter() - began

    return seconds


def copied(folder: Path) -> Callable[[], float]:
    """Seconds of copying what was merged, to the disk as well."""

    def seconds() -> float:
        os.sync()
        began = time.perf_counter()
        shutil.copyfile(folder / "out" / "model.safetensors", folder / "copy")
        file = os.open(folder / "copy", os.O_RDWR)
        os.fsync(file)
        os.close(file)
        taken = time.perf_counter() - began
        (folder / "copy").unlink()
        return taken

    return seconds


PROBE = """
import re, shutil, sys, threading, time
from pathlib import Path
from transfuse.recipe.merging import MergeRecipe
file, peak, going = Path(sys.argv[1]), 0, True
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
def watch():
    global peak
    while going:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
shutil.rmtree(file.parent / "probe", ignore_errors=True)
try:
    MergeRecipe.read(file).run(file.parent / "probe")
finally:
    going = False
    thread.join()
shutil.rmtree(file.parent / "probe")
print(peak)
"""
