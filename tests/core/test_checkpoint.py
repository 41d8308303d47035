from __future__ import annotations

import collections
import json
import pickle
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CNN, digest, images, language_model, trainer
from processes import in_process
from safetensors.torch import save_file
from torch import nn

from transfuse.core import rng
from transfuse.core.checkpoint import Checkpoints, load_state, load_weights, save_state, save_weights
from transfuse.core.errors import InputError, StoreError
from transfuse.core.sync import Sync
from transfuse.distill import KD, Labels


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_states_come_back_as_they_were(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "tensors": [
            shared,
            shared,
            shared[:2],
            torch.zeros(0),
            torch.tensor(True),
            torch.ones(2, dtype=torch.bfloat16),
        ],
        3: (1, 2.5, -0.1 + 0.2, None, "ü\n", True),
        "nested": {"tuple": (), "dict": {}, "list": [[1], (2,)]},
        "generators": rng.state(),
    }
    save_state(tmp_path / "state", state)
    assert equal(load_state(tmp_path / "state"), state)


def test_named_tuples_and_ordered_dicts_become_plain_ones(tmp_path):
    betas = collections.namedtuple("Betas", "a b")(0.9, 0.99)
    save_state(tmp_path / "state", {"betas": betas, "dict": collections.OrderedDict(x=torch.Size([2, 3]))})
    assert load_state(tmp_path / "state") == {"betas": (0.9, 0.99), "dict": {"x": (2, 3)}}


@pytest.mark.parametrize("value", [object(), {1, 2}, np.float32(0.5), np.array([0.5])])
def test_what_cannot_be_saved_is_named_and_the_old_file_stays(tmp_path, value):
    save_state(tmp_path / "state", {"old": 1})
    with pytest.raises(StoreError, match=f"a {type(value).__name__} cannot be saved"):
        save_state(tmp_path / "state", {"new": value})
    assert load_state(tmp_path / "state") == {"old": 1}


# Unreadable files


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "state"
    save_state(path, {"step": 12, "x": torch.arange(4.0), "note": {"a": [1, 2]}})
    return path


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(StoreError, match="missing"):
        load_state(tmp_path / "nothing")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_says_so(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(StoreError, match="truncated"):
        load_state(saved)


def test_no_flipped_bit_of_the_header_goes_unnoticed(saved):
    content = saved.read_bytes()
    state = load_state(saved)
    size = 8 + int.from_bytes(content[:8], "little")
    for position in range(size):
        for bit in (0, 3):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            saved.write_bytes(changed)
            try:
                found = load_state(saved)
            except StoreError:
                continue
            assert equal(found, state), f"byte {position}, bit {bit}: {found}"


def test_a_file_of_something_else_is_not_taken_for_ours(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(StoreError, match="not one of a transfuse run"):
        load_state(tmp_path / "other")


# Checkpoint folders


def folder(path: Path, *updates: int) -> Checkpoints:
    checkpoints = Checkpoints(path)
    for update in updates:
        checkpoints.save(update, {"update": update}, {"own": update}, Sync())
    return checkpoints


def test_only_the_newest_is_kept(tmp_path):
    checkpoints = folder(tmp_path, 5, 40, 100)
    assert [p.name for p in tmp_path.iterdir()] == ["update-100"]
    assert checkpoints.load(Sync()) == ({"update": 100}, {"own": 100})


def test_there_is_never_a_moment_without_a_complete_one(tmp_path, monkeypatch):
    checkpoints = folder(tmp_path, 7)
    replace, rmtree = __import__("os").replace, __import__("shutil").rmtree
    moments = 0

    def look(step: Any) -> Any:
        def watched(*args: Any, **options: Any) -> Any:
            nonlocal moments
            for act in (lambda: None, lambda: step(*args, **options)):
                act()
                moments += 1
                loaded = Checkpoints(tmp_path).load(Sync())
                assert loaded is not None
                assert loaded[0]["update"] == 7

        return watched

    monkeypatch.setattr("os.replace", look(replace))
    monkeypatch.setattr("shutil.rmtree", look(rmtree))
    for _ in range(3):  # the same update again, as at the end of a stage and after a resume
        checkpoints.save(7, {"update": 7}, {}, Sync())
    assert moments > 20


def test_a_checkpoint_that_was_being_written_is_ignored_and_cleared(tmp_path):
    checkpoints = folder(tmp_path, 3)
    (tmp_path / "update-9.tmp").mkdir()
    (tmp_path / "update-12 (copy)").mkdir()
    assert checkpoints.newest.name == "update-3"
    folder(tmp_path, 4)
    assert checkpoints.newest.name == "update-4"
    assert not (tmp_path / "update-9.tmp").exists()


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path).newest is None
    assert Checkpoints(tmp_path / "missing").load(Sync()) is None


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("transfuse.core.checkpoint.FORMAT", 99)
    folder(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(StoreError, match="has checkpoint format 99, this version reads 1"):
        Checkpoints(tmp_path).load(Sync())


def test_another_number_of_processes_is_refused(tmp_path):
    two = Sync()
    folder(tmp_path, 1)
    two.world = 2
    with pytest.raises(StoreError, match=r"written by 1 process\(es\) and cannot go on with 2: launch 1"):
        Checkpoints(tmp_path).load(two)


def start(path: Path, method: Any = None, **changed: Any) -> Any:
    settings = {"steps": 3, "seed": 5} | changed
    return trainer(method or KD(), changed.pop("target", CNN()), CNN(width=6), images(), folder=path, **settings)


def test_a_run_goes_on_only_with_the_same_method_and_training(tmp_path):
    start(tmp_path).fit()
    for changed, message in [
        ({"method": KD(temperature=2)}, r"method was KD\(\), is now KD\(temperature=2\)"),
        ({"method": 0.5 * KD()}, r"method was KD\(\), is now 0.5 \* KD\(\)"),
        ({"lr": 0.2}, "lr was 0.1, is now 0.2"),
        ({"optimizer": "adam"}, "optimizer was sgd, is now adam"),
        ({"steps": 4}, "steps was 3, is now 4"),
        ({"schedule": "linear"}, "schedule was cosine, is now linear"),
    ]:
        with pytest.raises(InputError, match=message):
            start(tmp_path, **changed).fit(resume=True)
    start(tmp_path, workers=2, checkpoint_every=9.0).fit(resume=True)  # these change no result


def test_another_architecture_is_refused(tmp_path):
    start(tmp_path).fit()
    with pytest.raises(StoreError, match=r"does not fit these models: (.|\n)*layer1"):
        trainer(KD(), CNN(width=5), CNN(width=6), images(), folder=tmp_path, steps=3, seed=5).fit(resume=True)


def test_a_damaged_checkpoint_is_an_error_and_not_a_new_run(tmp_path):
    start(tmp_path).fit()
    shared = Checkpoints(tmp_path).newest / "shared.safetensors"
    shared.write_bytes(shared.read_bytes()[:100])
    with pytest.raises(StoreError, match="truncated"):
        start(tmp_path).fit(resume=True)


def save_on_a_full_disk(path: Path) -> str:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        Checkpoints(path).save(2, {"x": torch.zeros(10_000)}, {}, Sync())
    except StoreError as error:
        return str(error)
    return "saved"


def save_weights_on_a_full_disk(path: Path) -> str:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        save_weights(path, nn.Linear(100, 100))
    except StoreError as error:
        return str(error)
    return "saved"


def test_a_full_disk_leaves_the_old_checkpoint_readable(tmp_path):
    folder(tmp_path, 1)
    message = in_process(save_on_a_full_disk, tmp_path)
    assert "could not write" in message
    assert "an older file is intact" in message
    assert Checkpoints(tmp_path).load(Sync()) == ({"update": 1}, {"own": 1})
    folder(tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["update-3"]


def test_a_full_disk_leaves_old_weights_readable(tmp_path):
    path, model = tmp_path / "model.safetensors", nn.Linear(2, 2)
    save_weights(path, model)
    assert "could not write" in in_process(save_weights_on_a_full_disk, path)
    load_weights(path, nn.Linear(2, 2))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


# Weights


@pytest.mark.parametrize("form", ["safetensors", "state dict", "wrapped state dict"])
def test_weights_come_back_bit_by_bit(tmp_path, form):
    model, other = CNN(norm=True), CNN(norm=True, seed=1)
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pt")
    if form == "safetensors":
        save_weights(path, model)
    else:
        torch.save(model.state_dict() if form == "state dict" else {"state_dict": model.state_dict(), "x": 1}, path)
    load_weights(path, other)
    assert digest(other) == digest(model)


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        if tie:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights_are_written_once_and_fill_both_places(tmp_path, tie):
    model, other = Tied(), Tied(tie)
    save_weights(tmp_path / "m", model)
    assert (tmp_path / "m").stat().st_size < 2 * model.embed.weight.nbytes + 200
    load_weights(tmp_path / "m", other)
    assert torch.equal(other.embed.weight, model.embed.weight)
    assert torch.equal(other.head.weight, model.embed.weight)
    assert (other.head.weight is other.embed.weight) == tie


def test_files_of_others_that_hold_tied_weights_once_fit_too(tmp_path):
    model = Tied()
    save_file({"embed.weight": torch.ones(5, 3)}, tmp_path / "m")
    load_weights(tmp_path / "m", model)
    assert torch.equal(model.head.weight, torch.ones(5, 3))


def test_weights_that_do_not_fit_change_nothing_and_show_the_first_differences(tmp_path):
    save_file({"layer1.weight": torch.zeros(1), "extra": torch.zeros(1)}, tmp_path / "m")
    model = CNN()
    before = digest(model)
    with pytest.raises(InputError) as error:
        load_weights(tmp_path / "m", model)
    message = str(error.value)
    assert "do not fit CNN: missing layer1.bias; missing layer2.weight" in message
    assert "... (7 in all)" in message
    assert digest(model) == before
    state = CNN().state_dict() | {"fc.bias": torch.zeros(7)}
    save_file(state, tmp_path / "m")
    with pytest.raises(InputError, match=r"fc.bias is \(7,\), the model has \(3,\)"):
        load_weights(tmp_path / "m", model)


class Payload:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("/tmp/transfuse-was-here"),)


def test_a_strangers_pickle_is_refused_without_running_it(tmp_path):
    trace = Path("/tmp/transfuse-was-here")
    for number, content in enumerate([CNN(), {"weight": Payload()}]):
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        with pytest.raises(StoreError, match=r"a pickle that runs code.*convert it once: safetensors"):
            load_weights(path, CNN())
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(StoreError):
        load_weights(tmp_path / "raw.pt", CNN())
    assert not trace.exists()


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_unreadable_weights_say_so(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(StoreError, match=f"no file {path}|missing"):
        load_weights(path, CNN())
    torch.save(CNN().state_dict(), path) if name == "m.pt" else save_weights(path, CNN())
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(StoreError, match="truncated"):
        load_weights(path, CNN())


def test_a_file_without_a_state_dict_says_so(tmp_path):
    torch.save([1, 2], tmp_path / "m.pt")
    with pytest.raises(StoreError, match="holds no state dict"):
        load_weights(tmp_path / "m.pt", CNN())


# What a run writes


def test_no_teacher_is_in_a_checkpoint(tmp_path):
    start(tmp_path).fit()
    shared = load_state(Checkpoints(tmp_path).newest / "shared.safetensors")["state"]
    assert list(shared["moving"]) == ["target"]
    assert not [key for key in shared["method"] if "source" in key or "teacher" in key]
    text = json.dumps(shared, default=lambda t: list(t.shape) if isinstance(t, torch.Tensor) else str(type(t)))
    assert "[6, 1, 3, 3]" not in text  # the shape of the teacher's first layer
    assert "[4, 1, 3, 3]" in text


def test_masks_of_infinities_are_no_divergence(tmp_path):
    model = CNN()
    model.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    trainer(Labels(), model, None, images(), folder=tmp_path).fit()
    assert Checkpoints(tmp_path).newest is not None


def test_a_language_model_with_tied_weights_resumes(tmp_path):
    model = language_model()
    model.head.weight = model.embed_tokens.weight
    tokens = torch.randint(11, (12, 5))
    trainer(Labels(), model, None, tokens, folder=tmp_path, task="language-model").fit()
    again = language_model(seed=1)
    again.head.weight = again.embed_tokens.weight
    trainer(Labels(), again, None, tokens, folder=tmp_path, task="language-model").fit(resume=True)
    assert digest(again) == digest(model)
