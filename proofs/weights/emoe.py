"""EMoE: do a trained network's own units form experts, and is it tuned no worse as such?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from proofs.proof import Trained
from proofs.runner import SMOKE_SAMPLES, SMOKE_STEPS, trained
from proofs.study import Numbers, Study
from transfuse import transfer
from transfuse.core.method import Method
from transfuse.core.streams import as_data
from transfuse.datasets import Splits, fashion_mnist
from transfuse.distill import Labels
from transfuse.evaluation import evaluate
from transfuse.models import ViTTiny
from transfuse.weights import EMoE
from transfuse.weights.emoe import Router, effective_weight, route
from transfuse.weights.experts import balanced_clusters
from transfuse.weights.layout import layers_of

PICTURES, LABELS, TESTED = 10_000, 1000, 4000
EXPERTS, TOP_K, LAYER = 64, 16, -2


def net(classes: int) -> ViTTiny:
    """Four blocks of width 64, perceptrons of 256 units."""
    return ViTTiny(28, 7, dim=64, depth=4, heads=4, classes=classes)


@cache
def turned() -> Splits:
    """Pictures of clothes and by how many quarters they were turned: needs no labels."""
    train = fashion_mnist(size=PICTURES).train
    assert isinstance(train, TensorDataset)
    quarters = torch.arange(PICTURES) % 4
    images = torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(train.tensors[0], quarters, strict=True)])
    return Splits(TensorDataset(images, quarters), None, None, name="turned clothes")


PRETRAINED = Trained(
    build=lambda: net(4), splits=turned, training={"epochs": 4, "batch_size": 64, "lr": 1e-3, "clip": 1.0}
)
TRAINING = {"steps": 200, "batch_size": 32, "lr": 1e-3, "warmup": 10, "clip": 1.0}


def arms() -> dict[str, Method]:
    """Every arm by name."""
    settings: dict[str, Any] = {"experts": EXPERTS, "top_k": TOP_K, "layers": [LAYER]}
    return {
        "EMoE": EMoE(**settings),
        "dense": Labels(),
        "random experts": EMoE(**settings, clusters="random"),
        "EMoE-learn": EMoE(**settings, gate="learned"),
        "EMoE2Dense": EMoE(**settings, dense=True),
    }


def beginning(pretrained: nn.Module) -> ViTTiny:
    """The pre-trained network with a new head for ten classes."""
    found, state = net(10), pretrained.state_dict()
    found.load_state_dict({k: v for k, v in state.items() if not k.startswith("head")}, strict=False)
    return found


def shifted(images: Tensor, kind: str) -> Tensor:
    """The same clothes elsewhere in the picture, or in noise that is the same for all arms."""
    if kind == "moved":
        return images.roll((3, -3), (2, 3))
    return (images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


@torch.no_grad()
def mass(model: nn.Module, images: Tensor, seed: int | None) -> float:
    """The share of a perceptron's activation that is in the chosen experts: similar units, or random with a seed."""
    layer = layers_of(model)[LAYER]
    rows = effective_weight(model.get_submodule(layer.rise[0]))
    router = Router(rows, EXPERTS, TOP_K, 0.0, False)
    if seed is None:
        clusters = balanced_clusters(rows, EXPERTS)
    else:
        clusters = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)) % EXPERTS
    router.assign(clusters, rows)
    model = beginning(model)
    shares: list[float] = []

    def look(module: nn.Module, args: Any) -> None:
        assert router._weights is not None
        shares.append(float((args[0].abs() * router._weights).sum() / args[0].abs().sum()))

    model.get_submodule(layer.down).register_forward_pre_hook(look)
    route(model, layer, router.eval())
    model.eval()(images)
    return shares[0]


def trial(seed: int, smoke: bool, held_out: str = "test") -> Mapping[str, Numbers]:
    """Every arm is tuned on the same 1,000 labels from the same network."""
    splits, pretrained = fashion_mnist(size=PICTURES), trained(PRETRAINED, smoke)
    test = getattr(splits, held_out)
    assert isinstance(splits.train, TensorDataset)
    few = TensorDataset(*(t[:LABELS] for t in splits.train.tensors))
    images, labels = (t[: SMOKE_SAMPLES if smoke else TESTED] for t in test.tensors)
    settings: dict[str, Any] = {**TRAINING, "steps": SMOKE_STEPS} if smoke else TRAINING
    found = {}
    for name, method in arms().items():
        target = lambda: beginning(pretrained)  # noqa: E731
        result = transfer(method, None, target, few, test=TensorDataset(images, labels), seeds=[seed], **settings)
        evaluation = result.arms[0].runs[0].evaluation
        assert evaluation is not None
        found[name] = {"accuracy": evaluation.metrics["accuracy"]}
        for kind in ("moved", "noisy"):
            data = as_data(TensorDataset(shifted(images, kind), labels))
            score = evaluate(result.model, data, task="classification", batch_size=256).metrics["accuracy"]
            found[name][f"accuracy, {kind}"] = score
    found["EMoE"]["activation in the chosen"] = mass(pretrained, images[:500], None)
    found["random experts"]["activation in the chosen"] = mass(pretrained, images[:500], seed)
    return found


PROOF = Study(
    name="emoe",
    proves=("EMoE",),
    data=(
        "a ViT of four blocks, pre-trained to tell how 10,000 pictures of clothes (Fashion-MNIST) were turned, is "
        "tuned on 1,000 labels; 4,000 pictures to test, and out of domain the same moved by three pixels, or in noise"
    ),
    trial=trial,
    arms=("EMoE", "dense", "random experts", "EMoE-learn", "EMoE2Dense"),
    baseline="dense",
    metric="accuracy",
    expected=(
        "a clearly greater share of the activation is in the chosen experts of similar units than of random ones: this "
        "must hold. EMoE not worse than dense by half a point; a gain in and out of domain may not exceed noise. "
        "EMoE2Dense about as good as EMoE, EMoE-learn not better"
    ),
    seeds=(0, 1, 2),
)
