"""Cr-KD: are novel clothes found better when their relation to the known ones is kept?"""

from __future__ import annotations

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from proofs.study import Study
from transfuse.core.head import head_of, headless
from transfuse.core.streams import as_data
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training
from transfuse.datasets import fashion_mnist
from transfuse.discover import CrKD
from transfuse.measure.discovery import matched

KNOWN, NOVEL = (0, 1, 2, 3, 5), (4, 6, 7, 8, 9)
PER_CLASS = 200


def network() -> nn.Module:
    """Two convolutions and 64 features."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 49, 64),
        nn.ReLU(),
        nn.Linear(64, len(KNOWN)),
    )


def trial(seed: int, smoke: bool) -> dict[str, dict[str, float]]:
    """Accuracy on the unlabelled pictures by the best matching, and on test pictures of the known classes."""
    splits = fashion_mnist()
    images, labels = splits.train.tensors
    draw = torch.Generator().manual_seed(seed)
    known, novel = (_few(images, labels, classes, draw) for classes in (KNOWN, NOVEL))
    test = splits.test.tensors
    found = {}
    for arm, alpha in (("CrKD", 0.1), ("without relation", 0.0), ("shuffled teacher", 0.1)):
        method = CrKD(novel=len(NOVEL), heads=1, hidden=64, width=64, alpha=alpha)
        torch.manual_seed(seed)
        target = network()
        settings = Training(
            steps=8 if smoke else 500, batch_size=128, optimizer="adam", lr=1e-3, schedule="constant", seed=seed
        )
        data = {"labelled": as_data(known), "unlabelled": as_data(novel[:1])}
        model = Trainer(method, {"target": target}, data, settings, shuffled=arm == "shuffled teacher").fit().eval()
        with torch.no_grad():
            clusters = model(novel[0])[:, len(KNOWN) :].argmax(1)
            right = [model(test[0][test[1] == c]).argmax(1) == i for i, c in enumerate(KNOWN)]
            relation = (model(novel[0])[:, : len(KNOWN)] / 4).softmax(1)
        found[arm] = {
            "novel accuracy": float(matched(clusters, novel[1], 0).float().mean()),
            "known test accuracy": float(torch.cat(right).float().mean()),
            "information of the relation": _information(relation, novel[1]),
        }
    body = headless(method.teacher, head_of(method.teacher, known[0][:8]))
    with torch.no_grad():
        features = body(novel[0]).numpy()
    groups = torch.from_numpy(KMeans(len(NOVEL), n_init=10, random_state=seed).fit_predict(features)).long()
    found["k-means"] = {"novel accuracy": float(matched(groups, novel[1], 0).float().mean())}
    return found


def _few(images: Tensor, labels: Tensor, classes: tuple[int, ...], draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some pictures of each class, with labels 0, 1, ... in the order of the classes."""
    rows = [(labels == c).nonzero().flatten() for c in classes]
    rows = [mine[torch.randperm(len(mine), generator=draw)[:PER_CLASS]] for mine in rows]
    return images[torch.cat(rows)], torch.arange(len(classes)).repeat_interleave(PER_CLASS)


def _information(relation: Tensor, labels: Tensor) -> float:
    """Mutual information, in nats, between the known-class distribution of a sample and its hidden novel class."""
    means = torch.stack([relation[labels == c].mean(0) for c in labels.unique()])
    mean = means.mean(0)
    return float((means * (means / mean).log()).sum(1).mean())


PROOF = Study(
    name="crkd",
    proves=("CrKD",),
    data="Fashion-MNIST, 200 labelled pictures of each of 5 classes, 200 unlabelled of each of 5 others; "
    "novel accuracy is on the latter",
    trial=trial,
    arms=("CrKD", "without relation", "shuffled teacher", "k-means"),
    baseline="without relation",
    metric="novel accuracy",
    seeds=(0, 1, 2, 3, 4),
    expected="CrKD at least .03 above clustering without the relation, above k-means by .01 and above the shuffled "
    "teacher; known accuracy falls by .025 at most",
    notes="Not as expected: the mean gain of .01 is far inside the spread, two seeds fall and three rise, and a "
    "shuffled "
    "teacher does about as well. What changes visibly is the spread of novel accuracy over seeds (.57 to .59 "
    "against .50 to .65), and known test accuracy, which rises in four of five seeds. Clustering alone is weaker "
    "here than in the pilot of the sheet (.57 against .61); other views and one draw of both kinds per update are "
    "differences that we have not tested.",
)
