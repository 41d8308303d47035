"""KTF: what a source of other features, or of noise, teaches a target with few labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse.adapt.base import Adaptation, source_labels
from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError, ShapeError
from transfuse.core.outputs import Outputs, full_precision
from transfuse.core.phases import Batches, Losses
from transfuse.core.run import Run
from transfuse.core.streams import Data, Indexed, Stream
from transfuse.core.taps import PENULTIMATE
from transfuse.losses import IGNORE, Term, cross_entropy, mean_alignment, soft_labels


class KTF(Adaptation):
    """Align class means of a target with few labels to those of any labelled source: other features, or noise.

        loss = CE(y_l, f(g(x_l))) + beta CE(y_s, f(p)) + mu A + tau/2 (||W1||^2 + ||W2||^2)
        A    = ( ||mean p - mean g(x)||^2 + sum_k ||m_s,k - m_t,k||^2 ) / (C + 1)
        m_s,k = mean of p with y_s = k
        m_t,k = sum_i q_i[k] g(x_i) / sum_i q_i[k]
        q_i   = onehot(y_i) where x_i has a label, else softmax(f(g(x_i)))

    g is the target model up to its linear head f, and gives features `(samples, d)` of length 1; the head serves both
    domains. p are the source's samples, `(samples, d)`, brought to length 1: no network runs on them, so they lie in
    the head's space already (noise is drawn there, real features are projected there first). W are the weight matrices
    of the model; biases do not decay. Every update sees both domains whole: means of small batches would add noise that
    hides the effect.

    The paper's model is :class:`transfuse.models.SphereClassifier`; it trains 600 updates of
    `optimizer="adam", lr=1e-3, schedule="constant", weight_decay=0`, with mu = 1 for 10 classes and 0.1 for 6.
    `KTF(beta=0, mu=0)` is the target-only baseline. `source=` is labelled data, `data=` the target's, with label -100
    where there is none. :func:`transfuse.adapt.source_study` asks what about a source matters.

    Args:
        beta: weight of the source's labels.
        mu: weight of the alignment.
        tau: weight of the decay; keep it the same for all sources that are compared.
        stop_grad: take no gradient through the soft labels. (The authors' code does take it.)

    Raises:
        InputError: a weight is negative; a domain lacks labels, or labels of a class; values that are not finite.
        ShapeError: the source's features are not as wide as the head, or the model's are not of length 1.

    Source: Yao et al., 2025, arXiv:2502.13573.
    """

    card = Card(
        paper="Yao et al., 2025",
        arxiv="2502.13573",
        sheet=1,
        carries="features",
        teacher="data",
        data="few-labelled",
        tasks=("classification",),
    )
    one_process = "KTF aligns means over whole data sets, which processes would cut into parts"

    def __init__(self, beta: float = 0.1, mu: float = 1.0, tau: float = 0.05, stop_grad: bool = False):
        super().__init__()
        if min(beta, mu, tau) < 0:
            raise InputError(f"KTF: beta is {beta}, mu {mu} and tau {tau}, none may be negative")
        self.beta, self.mu, self.tau, self.stop_grad = beta, mu, tau, stop_grad

    def wants(self) -> dict[str, list[str]]:
        return {"target": [PENULTIMATE]}

    def losses(self, batches: Batches, run: Run) -> Losses:
        target, source = batches["target"], batches["source"]
        if target.size < _whole(run, "data").size:
            raise InputError("KTF needs every update to see its domains whole: leave out micro_batch")
        p = F.normalize(source.inputs.flatten(1))
        # One pass for both domains: the source joins in front of the head.
        both = run("target", target, swap={PENULTIMATE: lambda g: torch.cat([g, p.to(g.dtype)])})
        g, (logits, source_logits) = _features(both)[: target.size], both.logits.tensor_split([target.size])
        q = soft_labels(logits.detach() if self.stop_grad else logits, target.labels)
        squares = [w.square().sum() for w in run["target"].parameters() if w.dim() > 1]
        return {
            "labels": Term.of(cross_entropy(logits, target.labels), target.labels != IGNORE, "labelled"),
            "source": self.beta * source_labels(source_logits, source),
            "alignment": self.mu * Term(mean_alignment(p, F.one_hot(source.labels, logits.shape[1]), g, q)),
            "decay": self.tau / 2 * Term(torch.stack(squares).sum()),
        }

    def setup(self, run: Run, sample: Batch | None) -> None:
        target, source = (_whole(run, name).sample(_whole(run, name).size) for name in ("data", "source"))
        outputs = run("target", target.to(run.device), grad=False)
        width, classes = _features(outputs).shape[1], outputs.logits.shape[1]
        _require("data", target, classes)
        _require("source", source, classes)
        if (missing := int((source.labels == IGNORE).sum())) > 0:
            raise InputError(f"KTF learns from every sample of its source, and {missing} of them have no label")
        if source.inputs.flatten(1).shape[1] != width:
            raise ShapeError(
                f"the head of the target reads {width} features, a sample of the source has "
                f"{source.inputs.flatten(1).shape[1]}: project the source to {width} dimensions, or build a target of "
                "the source's width"
            )
        if (_features(outputs).norm(dim=1) - 1).abs().max() > 1e-3:
            raise ShapeError(
                "KTF aligns features of length 1, and those before the target's head are not: normalise them in the "
                "model, as transfuse.models.SphereClassifier does"
            )

    def streams(self, run: Run) -> dict[str, Stream | Data]:
        target, source = _whole(run, "data"), _whole(run, "source")
        return {
            "target": Stream(target, batch_size=target.size, shuffle=False),
            "source": Stream(source, batch_size=source.size, shuffle=False),
        }


def _features(outputs: Outputs) -> Tensor:
    features: Tensor = outputs.features[PENULTIMATE]
    return full_precision(features)


def _whole(run: Run, name: str) -> Indexed:
    """A domain's data, of which every update sees all."""
    data = run.data.get(name)
    if not isinstance(data, Indexed):
        found = "nothing" if data is None else "batches that somebody else makes"
        raise InputError(
            f"KTF reads all of {name!r} in every update, found {found}: pass source=(features, labels) and "
            "data=(target features, labels), with label -100 where there is none"
        )
    return data


def _require(name: str, batch: Batch, classes: int) -> None:
    """Refuse values that are not finite, and labels that do not cover the head's classes exactly."""
    if bad := (~batch.inputs.flatten(1).isfinite()).any(1).nonzero().flatten().tolist():
        raise InputError(f"{len(bad)} samples of {name!r} hold values that are not finite, the first is {bad[0]}")
    labels = torch.empty(0, dtype=torch.long) if batch.labels is None else batch.labels
    found = set(labels[labels != IGNORE].tolist())
    if found != set(range(classes)):
        raise InputError(
            f"KTF aligns the {classes} classes of the target's head, so {name!r} needs labels of each of them and of "
            f"no other; missing: {sorted(set(range(classes)) - found)}, unknown: {sorted(found - set(range(classes)))}"
        )
