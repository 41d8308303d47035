"""Stored views come back bit by bit, and what was kept of them teaches what the teacher said."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import CLASSES, CNN, images
from torch import Tensor, nn
from torch.utils.data import DataLoader

from transfuse import transfer
from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, StoreError
from transfuse.core.outputs import Outputs
from transfuse.core.store import ViewStore
from transfuse.datasets import crop_flip_erase
from transfuse.distill import TinyViT
from transfuse.distill.tinyvit import stored_cross_entropy
from transfuse.losses import soft_cross_entropy, top_k_target

PICTURES = images(20)[0]


def build(folder: Path, **options: object) -> ViewStore:
    return ViewStore.build(folder, CNN(seed=1), PICTURES, crop_flip_erase, **{"k": 2, "epochs": 2, **options})


def test_a_view_comes_back_bit_by_bit_and_the_global_generators_stay(tmp_path):
    store = build(tmp_path)
    before = torch.get_rng_state()
    data = store.dataset(PICTURES)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    first = {i: data[i]["inputs"] for i in range(40)}
    assert all(torch.equal(data[i]["inputs"], first[i]) for i in order)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first[0], first[20])  # another view in another epoch
    loaded = torch.cat([b["inputs"] for b in DataLoader(data, batch_size=8, num_workers=2)])
    assert torch.equal(loaded, torch.stack([first[i] for i in range(40)]))


def test_what_is_stored_is_what_the_teacher_says_about_the_view(tmp_path):
    store = build(tmp_path)
    found = store.check(CNN(seed=1), PICTURES)
    assert found["difference"] < 1e-3
    assert found["mismatches"] == 0
    assert store.check(CNN(seed=2), PICTURES)["difference"] > 0.01
    loose = copy.copy(store)
    loose.augment = lambda image, generator: image + torch.randn_like(image)
    assert loose.check(CNN(seed=1), PICTURES)["difference"] > 1e-3


def test_a_record_has_four_bytes_and_four_for_each_class(tmp_path):
    build(tmp_path, k=2)
    assert (tmp_path / "epoch-1.bin").stat().st_size == 20 * (4 + 4 * 2)


def test_the_target_is_the_kept_and_an_even_rest():
    torch.manual_seed(0)
    logits, teacher = torch.randn(6, 5), torch.randn(6, 5)
    kept = teacher.softmax(-1).topk(2)
    found = stored_cross_entropy(logits, kept.indices, kept.values)
    assert torch.allclose(found, soft_cross_entropy(logits, top_k_target(teacher, 2, "uniform").log()), atol=1e-5)
    values = torch.tensor([[0.6, 0.2]])
    even = stored_cross_entropy(torch.zeros(1, 5), torch.tensor([[0, 1]]), values)
    assert even.item() == pytest.approx(torch.log(torch.tensor(5.0)).item())
    over = stored_cross_entropy(torch.randn(1, 5), torch.tensor([[0, 1]]), torch.tensor([[0.9, 0.1001]]))
    assert over.isfinite()


def test_all_but_one_class_is_the_whole_answer_and_fewer_are_further_off():
    torch.manual_seed(0)
    teacher = 2 * torch.randn(50, 8)
    p = teacher.softmax(-1)
    errors = []
    for k in range(1, 8):
        kept = p.topk(k)
        logits = torch.zeros(50, 8, requires_grad=True)
        loss = stored_cross_entropy(logits, kept.indices, kept.values.half().float()).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        errors.append((gradient - (logits.softmax(-1) - p)).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 5e-3


def test_killed_it_goes_on_and_other_stores_are_refused(tmp_path):
    whole = build(tmp_path)
    content = (tmp_path / "epoch-1.bin").read_bytes()
    (tmp_path / "epoch-1.bin").unlink()
    with pytest.raises(StoreError, match="epoch-1.bin has been removed"):
        ViewStore(tmp_path, crop_flip_erase)
    build(tmp_path)
    assert (tmp_path / "epoch-1.bin").read_bytes() == content
    with pytest.raises(StoreError, match="another k"):
        build(tmp_path, k=1)
    with pytest.raises(StoreError, match="were made by crop_flip_erase"):
        ViewStore(tmp_path, partial(crop_flip_erase, pad=1))
    with pytest.raises(StoreError, match="of 20 images, found 3"):
        whole.dataset(PICTURES[:3])
    (tmp_path / "epoch-0.bin").write_bytes(content[:-1])
    with pytest.raises(StoreError, match="239 bytes, 240 were"):
        ViewStore(tmp_path, crop_flip_erase)
    with pytest.raises(StoreError, match="no store of views"):
        ViewStore(tmp_path / "nowhere", crop_flip_erase)


def test_other_images_and_damaged_records_are_named(tmp_path):
    store = build(tmp_path)
    edited = PICTURES.clone()
    edited[7, 0, 0, 0] += 1
    data = store.dataset(edited)
    data[6]
    for number in (7, 27):
        with pytest.raises(StoreError, match="image 7 is not what the teacher"):
            data[number]
    with pytest.raises(StoreError, match="image 0 is not .*another order"):
        store.dataset(PICTURES.flip(0))[0]
    with pytest.raises(StoreError, match="another images"):
        ViewStore.build(tmp_path, CNN(seed=1), edited, crop_flip_erase, k=2, epochs=2)
    records = tmp_path / "epoch-1.bin"
    content = bytearray(records.read_bytes())
    content[12 * 5 + 3] ^= 1
    records.write_bytes(content)
    data = build(tmp_path).dataset(PICTURES)
    data[5]
    with pytest.raises(StoreError, match=r"image 5 in .*epoch-1.bin is damaged"):
        data[25]
    (tmp_path / "images.crc").write_bytes(b"nothing")
    with pytest.raises(StoreError, match=r"images.crc has 7 bytes, 80 were written"):
        ViewStore(tmp_path, crop_flip_erase)


def test_a_copy_in_a_worker_maps_the_files_itself(tmp_path):
    store = build(tmp_path)
    content = pickle.dumps(store)
    assert len(content) < 1000
    assert pickle.loads(content).read(1, 3)[0] == store.read(1, 3)[0]


class Wide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 40_000)


def test_wrong_sizes_and_data_are_refused(tmp_path):
    with pytest.raises(InputError, match="below the teacher's 3 classes"):
        build(tmp_path, k=CLASSES)
    with pytest.raises(InputError, match="16 bits"):
        ViewStore.build(tmp_path, Wide(), PICTURES, crop_flip_erase, k=3)
    with pytest.raises(InputError, match="pass store.dataset"):
        transfer(TinyViT(), target=CNN(), data=PICTURES, steps=1, batch_size=4)


def test_a_student_learns_from_it_without_a_teacher(tmp_path):
    store = build(tmp_path, epochs=6)
    result = transfer(TinyViT(), target=CNN(), data=store.dataset(PICTURES), epochs=4, batch_size=10, lr=0.01)
    curve = result.report.arms[0].runs[0].curve
    assert curve[-1].loss < curve[0].loss


def test_mixed_views_are_replayed_and_their_targets_are_mixed_alike(tmp_path):
    store = build(tmp_path)
    data, plain = store.dataset(PICTURES, mixup=0.8), store.dataset(PICTURES)
    first, again = data[3], store.dataset(PICTURES, mixup=0.8)[3]
    assert all(torch.equal(first[key], again[key]) for key in first)
    others = [i for i in range(20) if torch.equal(plain[i]["values"], first["other_values"])]
    views = [first["share"] * plain[3]["inputs"] + (1 - first["share"]) * plain[i]["inputs"] for i in others]
    assert any(torch.allclose(view, first["inputs"], atol=1e-6) for view in views)
    shares = torch.stack([data[i]["share"] for i in range(20)])
    assert len(set(shares.tolist())) == 20
    assert bool(((shares > 0) & (shares < 1)).all())

    method, batch = TinyViT(), Batch.of(torch.utils.data.default_collate([data[i] for i in range(4)]))
    logits = torch.randn(4, CLASSES)
    term = method.loss(Outputs(logits), Outputs(None), batch, Clock())["stored"]
    total = sum(
        share * stored_cross_entropy(logits[i : i + 1], batch[ids][i : i + 1], batch[values][i : i + 1]).item()
        for i in range(4)
        for ids, values, share in (
            ("ids", "values", float(batch["share"][i])),
            ("other_ids", "other_values", 1 - float(batch["share"][i])),
        )
    )
    assert float(term.sum) == pytest.approx(total, rel=1e-5)
    with pytest.raises(InputError, match="mixup is -1"):
        store.dataset(PICTURES, mixup=-1)


def test_mixed_views_are_learned_from(tmp_path):
    data = build(tmp_path).dataset(PICTURES, mixup=0.8)
    result = transfer(TinyViT(), target=CNN(), data=data, test=images(8), steps=3, batch_size=5)
    assert result.model is not None
