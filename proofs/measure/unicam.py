"""UniCAM: does what only the distilled student knows lie on the object, and is it more relevant to the class?"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from proofs.study import Study
from transfuse import transfer
from transfuse.datasets import fashion_mnist
from transfuse.distill import KD, Hints, Labels
from transfuse.measure import Measurement, UniCAM
from transfuse.models import SmallCNN

SIDE, OBJECT, SEEN = 28, 14, 0.1
ARMS = ("student given base", "base given student", "base given other base", "other base given base")


def scenes(images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Clothes, halved in size, pasted anywhere on crops of two photographs; and where: `(samples, 28, 28)` bool."""
    from sklearn.datasets import load_sample_images

    photos = [torch.tensor(p).float().mean(dim=2) / 255 for p in load_sample_images().images]
    photos = [F.avg_pool2d(p[None], 2)[0] for p in photos]
    draw = torch.Generator().manual_seed(seed)
    clothes = F.avg_pool2d(images, 2)[:, 0]
    pictures = torch.empty(len(images), SIDE, SIDE)
    masks = torch.zeros(len(images), SIDE, SIDE, dtype=torch.bool)
    for i, item in enumerate(clothes):
        photo = photos[int(torch.randint(2, (), generator=draw))]
        height, width = photo.shape
        y, x = (int(torch.randint(size - SIDE, (), generator=draw)) for size in (height, width))
        pictures[i] = photo[y : y + SIDE, x : x + SIDE]
        y, x = torch.randint(SIDE - OBJECT, (2,), generator=draw).tolist()
        masks[i, y : y + OBJECT, x : x + OBJECT] = item > SEEN
        pictures[i][masks[i]] = item[item > SEEN]
    return pictures[:, None], masks


@cache
def prepared(smoke: bool) -> tuple[TensorDataset, TensorDataset, TensorDataset, Tensor, nn.Module]:
    """What the teacher learns, what students learn, what all are tested on, with its masks; and the teacher."""
    many, few, tested = (400, 200, 128) if smoke else (10_000, 3_000, 512)
    splits = fashion_mnist(size=many)
    images, labels = splits.train.tensors
    all_scenes = TensorDataset(scenes(images, seed=1)[0], labels)
    few_scenes = TensorDataset(*(t[:few] for t in all_scenes.tensors))
    pictures, masks = scenes(splits.test.tensors[0][:tested], seed=2)
    training = {"epochs": 1 if smoke else 4, "batch_size": 64, "lr": 2e-3}
    teacher = transfer(Labels(), target=lambda: SmallCNN(width=32), data=all_scenes, **training).model
    return all_scenes, few_scenes, TensorDataset(pictures, splits.test.tensors[1][:tested]), masks, teacher


def trial(seed: int, smoke: bool) -> dict[str, dict[str, float]]:
    """Share of a map's energy that lies on the object, for what one network knows and another does not."""
    data, few, test, masks, teacher = prepared(smoke)
    training = {"epochs": 1 if smoke else 8, "batch_size": 64, "lr": 2e-3, "seeds": [seed]}
    start, other_start = (initial(s) for s in (seed, seed + 1000))
    base = transfer(Labels(), target=start, data=few, **training).model
    other = transfer(Labels(), target=other_start, data=few, **training).model
    method = Labels() + KD(temperature=4) + Hints("layer3", "layer3")
    student = transfer(method, source=teacher, target=start, data=few, **training).model
    measure = UniCAM("layer3", embeddings=prototypes(data), maps=256, batch_size=64)
    distilled = measure.measure(source={"teacher": teacher, "base": base}, target=student, data=test, seed=seed)
    control = measure.measure(source={"teacher": teacher, "base": other}, target=base, data=test, seed=seed)
    found = {}
    for arm, measured, name in zip(
        ARMS,
        (distilled, distilled, control, control),
        ("student|base", "base|student", "student|base", "base|student"),
        strict=True,
    ):
        found[arm] = row(measured, name, masks[:256])
    for name, model in (("student", student), ("base", base), ("teacher", teacher)):
        found[ARMS[0]][f"accuracy of {name}"] = accuracy(model, test)
    return found


def row(measured: Measurement, name: str, masks: Tensor) -> dict[str, float]:
    """The energy on the object, with what else was measured of the network that is named first."""
    maps, own = measured.images[name], name.partition("|")[0]
    inside = (maps * masks).sum(dim=(1, 2)) / maps.sum(dim=(1, 2)).clamp(min=1e-12)
    return {
        "energy on the object": float(inside[maps.sum(dim=(1, 2)) > 0].mean()),
        "area of the object": float(masks.float().mean()),
        "partial rs": measured[f"rs {name}"],
        "rs": measured[f"rs {own}"],
        "fss": measured[f"fss {own}"],
    }


def initial(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallCNN(width=10)


def prototypes(data: TensorDataset) -> list[list[float]]:
    """The mean picture of each class, each picture scaled to length 1."""
    images, labels = data.tensors
    rows = F.normalize(images.flatten(1))
    return [rows[labels == c].mean(dim=0).tolist() for c in range(10)]


@torch.no_grad()
def accuracy(model: nn.Module, data: Any) -> float:
    images, labels = data.tensors
    return float((model.eval()(images).argmax(dim=1) == labels).double().mean())


PROOF = Study(
    name="unicam",
    proves=("UniCAM",),
    data="Fashion-MNIST at 14x14 pixels, pasted on 28x28 crops of scikit-learn's two photographs; the teacher had "
    "10,000 labels, students 3,000; 512 test scenes, 256 of them with maps",
    trial=trial,
    arms=ARMS,
    baseline="base given student",
    metric="energy on the object",
    expected="Of a map's energy more lies on the object for the student given the base than the reverse, by more than "
    "two bases of different seeds differ; fss student > fss base with every seed, rs student >= rs base and partial rs "
    "student|base > base|student on average",
    notes="In part. With every seed the map of the student given the base has more of its energy on the object than "
    "the reverse (by .006, .015 and .010; two bases differ by .004, .000 and -.004), but three seeds are too few for "
    "an interval above zero. The student's fss is above the base's with every seed. Not as expected: rs of the student "
    "is above the base's with one seed of three and below on average (.333 and .339), and so is the partial rs (.077 "
    "and .096). Maps have about .27 of their energy on the object, which covers .126. Students reach an accuracy of "
    ".46 only (3,000 cluttered scenes, 8 epochs); whether a longer training separates them further was not tested.",
)
