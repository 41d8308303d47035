"""APQ: a predictor of accuracy is transferred to quantised networks, and searches architecture and bits jointly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from transfuse.core import rng
from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.labels import labels_term
from transfuse.core.method import Bag
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Stream, as_data
from transfuse.core.sync import Sync
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training
from transfuse.distill import Labels
from transfuse.losses import Term
from transfuse.search.base import Search
from transfuse.search.elastic import ElasticNet, recalibrate
from transfuse.search.evolution import evolve
from transfuse.search.space import Space, Spec


class Predictor(nn.Module):
    """Accuracy of a network from its code.

        h = ReLU(W1 architecture + b1) + (Wq bits + bq)
        accuracy = W4 ReLU(W3 ReLU(W2 h + b2) + b3) + b4

    The bits enter after the first ReLU; without them (full precision) that term is left out.

    Args:
        space: of the codes.
        hidden: width of the three hidden layers.
    """

    def __init__(self, space: Space, hidden: int = 400):
        super().__init__()
        self.split = space.half
        self.architecture = nn.Linear(space.half, hidden)
        self.bits = nn.Linear(space.length - space.half, hidden)
        self.rest = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, codes: Tensor, quantised: bool = True) -> Tensor:
        """Codes `(networks, length)` to accuracies `(networks,)`."""
        h = self.architecture(codes[:, : self.split]).relu()
        if quantised:
            h = h + self.bits(codes[:, self.split :])
        return self.rest(h).squeeze(1)

    def forget(self, everything: bool) -> None:
        """Draw the weights of the bits anew, or all: what is kept is what is transferred."""
        for layer in self.modules() if everything else [self.bits]:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()


class APQ(Search):
    """Search architecture, pruning and quantisation together, with a predictor that cheap results have taught.

    Stage 1: the supernet learns all its networks (sandwich: largest, smallest and two random ones per update).
    Stage 2: `full` networks in full precision are scored without training, and teach the predictor by
    (predicted - accuracy)^2. Stage 3: `quantised` networks are scored after `qat_steps` of quantisation-aware training
    each; the predictor goes on from what it knows, with fresh weights for the bits. Stage 4: evolution finds

        max over (architecture, widths, bits) of the predicted accuracy,   cost <= budget

    and the best network inherits the supernet's weights and is trained with its bits. It is what is deployed.

    The caller's budget of updates is shared: half for the supernet, a tenth for each predictor, the rest for the
    final training. Inner trainings are counted by `qat_steps`.

    Args:
        budget: largest cost, as a part of that of the largest network at 8 bits.
        full, quantised: how many networks are scored.
        qat_steps: updates of each quantised candidate before it is scored; 0 rounds its weights and scores it.
        transfer: False teaches the predictor of quantised networks from scratch: the paper's comparison.
        hidden: width of the predictor.
        population, iterations: of the evolution.
        calibration: see :class:`Search`.

    Raises:
        InputError: an argument is out of range; no network costs so little; the data is not `train` and `probe`.

    Source: Wang et al., CVPR 2020, arXiv:2006.08509.
    """

    card = Card(
        paper="Wang et al. (APQ), CVPR 2020",
        arxiv="2006.08509",
        sheet=172,
        carries="weights",
        teacher="none",
        data="labelled",
    )

    def __init__(
        self,
        budget: float = 0.25,
        full: int = 600,
        quantised: int = 160,
        qat_steps: int = 30,
        transfer: bool = True,
        hidden: int = 400,
        population: int = 100,
        iterations: int = 500,
        calibration: int = 4,
    ):
        super().__init__(calibration)
        if budget <= 0 or min(full, quantised) < 2 or qat_steps < 0 or population < 4 or iterations < 0:
            raise InputError(
                f"APQ: budget {budget} must be positive, full {full} and quantised {quantised} at least 2, qat_steps "
                f"{qat_steps} and iterations {iterations} not negative, population {population} at least 4"
            )
        self.budget, self.full, self.quantised, self.qat_steps = budget, full, quantised, qat_steps
        self.transfer, self.hidden, self.population, self.iterations = transfer, hidden, population, iterations
        self.scored = Bag()
        """`"full"`, `"quantised"`: codes of scored networks, `(networks, length)`; `"full/accuracy"`, ...; `"best"`."""

    def setup(self, run: Run, sample: Batch | None) -> None:
        super().setup(run, sample)
        self.predictor = Predictor(self.supernet(run).space, self.hidden)
        self.scored = Bag()

    def learns(self, i: int) -> Iterator[nn.Parameter]:
        if i in (1, 2):
            yield from self._taught(i)

    def begin_stage(self, i: int, run: Run) -> bool:
        if i == 1:
            self._score("full", self.full, run)
        elif i == 2:
            self._score("quantised", self.quantised, run)
            self.predictor.forget(everything=not self.transfer)
        elif i == 3:
            space = self.supernet(run).space
            self.scored["best"] = space.encode(self.search(self.supernet(run), run.shared_rng("evolution")))
        return i < 4

    def stage(self, i: int, run: Run) -> Stage:
        if i in (0, 3):
            # A full-precision training touches no clipping bound, and only blocks in use have a gradient.
            phase = Phase(
                "supernet" if i == 0 else "final", self._sandwich if i == 0 else self._final, self._weights(i, run)
            )
            return Stage({"train": run.data["train"]}, [phase], share=0.5 if i == 0 else 0.3)
        name = ("full", "quantised")[i - 1]
        scored = as_data({"inputs": self.scored[name], "accuracy": self.scored[f"{name}/accuracy"]})
        phase = Phase(f"predictor: {name}", self._prediction, self._taught(i))
        # Few networks are scored, perhaps fewer than one of the caller's batches of images.
        assert run.training is not None
        codes = Stream(scored, batch_size=min(run.training.batch_size, len(self.scored[name])))
        return Stage({"codes": codes}, [phase], steps=self._updates(run))

    def _best(self, run: Run) -> Spec:
        """The network that was found."""
        return self.supernet(run).space.decode(self.scored["best"])

    def search(self, net: ElasticNet, generator: torch.Generator) -> Spec:
        """The network with the highest predicted accuracy within the budget."""
        return evolve(
            net.space,
            lambda specs: self.predict(net.space, specs),
            net.cost,
            self.budget * net.cost(net.space.largest()),
            generator,
            self.population,
            self.iterations,
        )

    @torch.no_grad()
    def predict(self, space: Space, specs: Sequence[Spec]) -> Tensor:
        """Predicted accuracy of quantised networks, `(networks,)`."""
        device = next(self.predictor.parameters()).device
        return self.predictor(torch.stack([space.encode(spec) for spec in specs]).to(device)).cpu()

    def deploy(self, target: nn.Module) -> nn.Module:
        assert isinstance(target, ElasticNet)
        return target.extract(target.space.decode(self.scored["best"])) if "best" in self.scored else target

    # Stages ---------------------------------------------------------------------------------------------------------

    def _sandwich(self, batches: Batches, run: Run) -> Losses:
        """Cross-entropy of the largest, the smallest and two random networks, summed."""
        net, generator = self.supernet(run), run.shared_rng("sandwich")
        drawn = [net.space.draw(generator, quantised=False) for _ in range(2)]
        terms = {}
        for name, spec in zip(
            ("largest", "smallest", "one", "other"), (net.space.largest(), net.space.smallest(), *drawn), strict=True
        ):
            with net.using(spec):
                terms[name] = labels_term(run("target", batches["train"]).logits, batches["train"])
        return terms

    def _final(self, batches: Batches, run: Run) -> Losses:
        net = self.supernet(run)
        with net.using(self._best(run)):
            return {"labels": labels_term(run("target", batches["train"]).logits, batches["train"])}

    def _prediction(self, batches: Batches, run: Run) -> Losses:
        batch, quantised = batches["codes"], run.clock.stage == 2
        error = (self.predictor(batch.inputs, quantised) - batch.accuracy).square()
        return {"error": Term.of(error)}

    def _taught(self, i: int) -> Iterable[nn.Parameter]:
        """The predictor's parameters that a stage moves."""
        # Nothing for bits while everything is in full precision.
        return (p for name, p in self.predictor.named_parameters() if i == 2 or not name.startswith("bits."))

    def _weights(self, i: int, run: Run) -> list[nn.Parameter]:
        """What a stage moves of the supernet: in the final one only blocks in use, and the bounds of activations."""
        depth = self._best(run).depth if i == 3 else self.supernet(run).space.blocks
        skipped = tuple(f"blocks.{n}." for n in range(depth, self.supernet(run).space.blocks))
        named = run["target"].named_parameters()
        return [p for name, p in named if (i == 3 or ".clips." not in name) and not name.startswith(skipped)]

    def _updates(self, run: Run) -> int:
        """A tenth of the caller's budget, for each of the predictors."""
        training, train = run.training, run.data["train"]
        assert training is not None
        steps = training.steps or (training.epochs or 0) * (train.updates(training.batch_size) or 0)
        return max(1, round(0.1 * steps))

    # Scoring --------------------------------------------------------------------------------------------------------

    def _score(self, name: str, count: int, run: Run) -> None:
        """Draw different networks and score each once."""
        net, generator = self.supernet(run), run.shared_rng(name)
        specs: dict[object, Spec] = {}
        for _ in range(100 * count):
            spec = net.space.draw(generator, quantised=name == "quantised")
            specs.setdefault(spec.used(), spec)
            if len(specs) == count:
                break
        with run.probe():
            accuracies = [self._accuracy(net, spec, run, i) for i, spec in enumerate(specs.values())]
        self.scored[name] = torch.stack([net.space.encode(spec) for spec in specs.values()])
        self.scored[f"{name}/accuracy"] = torch.tensor(accuracies)

    def _accuracy(self, net: ElasticNet, spec: Spec, run: Run, number: int) -> float:
        if spec.bits is None or not self.qat_steps:
            return self.score(net, spec, run)
        assert run.training is not None
        candidate = net.extract(spec)
        # Its own random numbers, so that what one candidate gets does not depend on the others.
        training = Training(
            steps=self.qat_steps,
            batch_size=run.training.batch_size,
            lr=run.training.lr,
            seed=rng.derive(run.training.seed, "candidate", number) % 2**31,
        )
        with torch.enable_grad():
            Trainer(Labels(), {"target": candidate}, {"data": run.data["train"]}, training, sync=Sync(run.device)).fit()
        return self.score(candidate, candidate.spec, run)

    def end_stage(self, i: int, run: Run) -> None:
        if i in (0, 3):
            net = self.supernet(run)
            with net.using(self._best(run) if i == 3 else net.space.largest()):
                recalibrate(net, self._calibration_batches(run))
