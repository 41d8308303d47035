"""Whether one model is fooled by what fools another, as a sign that knowledge would transfer between them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.core.card import Card
from transfuse.core.errors import InputError, ShapeError, nearest
from transfuse.core.outputs import call, find_logits
from transfuse.losses import IGNORE
from transfuse.measure.base import Measure, Measurement, Table, batches, device_of, named_models, single_model
from transfuse.measure.interval import Interval, bootstrap

DIRECTIONS = ("source_to_target", "target_to_source")
TINY = 1e-8
COLUMNS = ("alpha", "gamma", "combined", "success")


class AdversarialTransferability(Measure):
    """Measure how alike two models answer to adversarial perturbations, on data of the target's domain.

    An attacker a and a victim v see an input x and what each attack makes of it:
      D_aa = f_a(x) - f_a(A_a(x)),  D_av = f_v(x) - f_v(A_a(x)),  D_vv = f_v(x) - f_v(A_v(x))
      alpha    = mean_x |D_av| / |D_vv|                      how far the victim is moved, against its own attack
      gamma    = |mean_x u v^T|_F^2                          whether always in the same direction of its outputs
      combined = |mean_x alpha(x) u v^T|_F^2                 with u = D_aa / |D_aa|, v = D_av / |D_av|
      success  = share of inputs for which the victim's class changes
    The attack A_f: x0 = x + U(-r, r), then `steps` times x <- x + s sign(grad CE(f(x), argmax f(x_clean))), each time
    cut to the ball |x - x_clean| <= r and to the range of pixels; s = 5 r / steps (one step: s = r). It uses no label.

    `measure(source=model or pool of models, target=reference model, data=target data)`: inputs that the reference
    answers wrongly are left out (without labels, none), and so are those with an answer that does not move.

    Numbers: of a single source; Tables: `sources`, one row for each, with the columns alpha, gamma, combined and
    success, `null` (alike, the victim's answers dealt out to other inputs: what is no alignment), and `matching` with
    `ridge`. :func:`~transfuse.measure.correlation.agreement_with_results` compares them with transfers that were made.

    Args:
        direction: `"source_to_target"`: the source attacks the reference; `"target_to_source"`: the reverse.
        epsilon: radius r as a share of the range of pixels, 0.06 to 0.1 as published.
        steps: of the attack; 1 is the fast gradient sign method with a random start.
        low, high: the range of pixels of the data.
        ridge: also report the gradient-matching distance `min_B E|J_target - B J_source|_F^2 / E|J_target|_F^2`, J
            being the gradients of the logits by the inputs, with this ridge (a share of the mean of E J_S J_S^T).
        batch_size: inputs at once.

    Raises:
        InputError: an argument is out of range; (in `measure`) inputs outside `low` to `high`, or none left.

    Source: Liang et al., ICML 2021, arXiv:2006.14512.
    """

    card = Card(
        paper="Liang et al., ICML 2021",
        arxiv="2006.14512",
        sheet=7,
        carries="gradients",
        teacher="full",
        data="unlabelled",
        tasks=("classification",),
    )

    def __init__(
        self,
        direction: str = "source_to_target",
        epsilon: float = 0.06,
        steps: int = 50,
        low: float = 0.0,
        high: float = 1.0,
        ridge: float | None = None,
        batch_size: int = 128,
    ):
        if direction not in DIRECTIONS:
            raise InputError(f"unknown direction {direction!r}: {nearest(direction, DIRECTIONS)}")
        if epsilon < 0 or steps < 1 or low >= high or (ridge is not None and ridge < 0):
            raise InputError(
                "epsilon and ridge are 0 or more, steps 1 or more, and low is below high, found "
                f"epsilon={epsilon}, ridge={ridge}, steps={steps}, low={low}, high={high}"
            )
        self.direction, self.epsilon, self.steps = direction, epsilon, steps
        self.low, self.high, self.ridge, self.batch_size = low, high, ridge, batch_size

    def look(self, source: Any, target: Any, data: Any) -> Measurement:
        sources, reference = named_models(source, "source"), single_model(target, "target")
        inputs, wrong = self._inputs(reference, data)
        starts = torch.rand(inputs.shape).mul(2).sub(1)  # one for each input, whoever attacks: a = v is alpha = 1
        found = {name: self._compare(model, reference, inputs, starts) for name, model in sources.items()}
        table = Table(tuple(found), COLUMNS, torch.stack([numbers for numbers, _, _, _ in found.values()]))
        tables = {"sources": table}
        tables["null"] = Table(tuple(found), COLUMNS[1:3], torch.stack([null for _, null, _, _ in found.values()]))
        if self.ridge is not None:
            distances = [self._gradients_apart(model, reference, inputs) for model in sources.values()]
            tables["matching"] = Table(tuple(found), ("distance",), torch.tensor(distances)[:, None])
        notes = [f"{wrong} inputs that the target answers wrongly were left out; {len(inputs)} are looked at"]
        notes += [f"{name}: {skipped} inputs do not move" for name, (_, _, skipped, _) in found.items() if skipped]
        single = next(iter(found)) if len(found) == 1 else None
        return Measurement(
            measure=repr(self),
            numbers={} if single is None else {c: table[single, c] for c in COLUMNS},
            intervals={"alpha" if single else f"{name} alpha": found[name][3] for name in found},
            tables=tables,
            notes=tuple(notes),
        )

    def _inputs(self, reference: nn.Module, data: Any) -> tuple[Tensor, int]:
        """What the reference answers rightly, and how many others there are."""
        kept, wrong = [], 0
        for batch in batches(data, self.batch_size, device_of(reference)):
            if not isinstance(batch.inputs, Tensor) or not batch.inputs.is_floating_point():
                raise InputError("an attack moves along gradients, so inputs must be one tensor of real numbers")
            if batch.inputs.min() < self.low or batch.inputs.max() > self.high:
                raise InputError(
                    f"inputs lie in [{batch.inputs.min():.3g}, {batch.inputs.max():.3g}] and not in [{self.low:g}, "
                    f"{self.high:g}]: give the range of pixels as low= and high="
                )
            right = torch.ones(len(batch.inputs), dtype=torch.bool, device=batch.inputs.device)
            if batch.labels is not None:
                with torch.no_grad():
                    logits = _logits(reference, batch.inputs)
                if batch.labels.max() >= logits.shape[1]:
                    raise InputError(
                        f"the target tells {logits.shape[1]} classes apart, and the data has the label "
                        f"{int(batch.labels.max())}: target= is the reference model of this data, source= the others"
                    )
                right = (logits.argmax(dim=1) == batch.labels) | (batch.labels == IGNORE)
            kept.append(batch.inputs[right].cpu())
            wrong += int((~right).sum())
        inputs = torch.cat(kept)
        if len(inputs) < 2:
            raise InputError(f"{len(inputs)} inputs are left that the target answers rightly: bring more, or train it")
        return inputs, wrong

    def _compare(
        self, source: nn.Module, reference: nn.Module, inputs: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor, int, Interval]:
        """The columns, those of the null, how many inputs do not move, and the interval of alpha."""
        attacker, victim = (source, reference) if self.direction == DIRECTIONS[0] else (reference, source)
        moved, fooled = [], []
        for x, start in zip(inputs.split(self.batch_size), starts.split(self.batch_size), strict=True):
            with torch.no_grad():
                answers = {model: _logits(model, x) for model in (attacker, victim)}
            hit, own = self._attack(attacker, x, start), self._attack(victim, x, start)
            with torch.no_grad():
                after = _logits(victim, hit)
                fooled.append(after.argmax(dim=1) != answers[victim].argmax(dim=1))
                moved.append(
                    (
                        answers[attacker] - _logits(attacker, hit),
                        answers[victim] - after,
                        answers[victim] - _logits(victim, own),
                    )
                )
        aa, av, vv = (torch.cat(parts).double() for parts in zip(*moved, strict=True))
        moves = torch.stack([d.norm(dim=1) for d in (aa, av, vv)]).amin(dim=0) >= TINY
        success = torch.cat(fooled).double().mean()
        if not moves.any():
            nothing = torch.full((4,), torch.nan, dtype=torch.float64)
            return nothing, nothing[:2], len(inputs), Interval(torch.nan, torch.nan, torch.nan)
        aa, av, vv = aa[moves], av[moves], vv[moves]
        u, v, alpha = F.normalize(aa), F.normalize(av), av.norm(dim=1) / vv.norm(dim=1)
        order = torch.randperm(len(u)) if len(u) > 1 else torch.arange(1)
        columns = torch.stack([alpha.mean(), _aligned(u, v), _aligned(u, v, alpha), success])
        null = torch.stack([_aligned(u, v[order]), _aligned(u, v[order], alpha[order])])
        return columns, null, int((~moves).sum()), bootstrap(alpha[None])

    def _attack(self, model: nn.Module, clean: Tensor, start: Tensor) -> Tensor:
        return attack(model, clean, start, self.epsilon * (self.high - self.low), self.steps, self.low, self.high)

    def _gradients_apart(self, source: nn.Module, reference: nn.Module, inputs: Tensor) -> float:
        assert self.ridge is not None
        pairs = [(jacobian(source, x), jacobian(reference, x)) for x in inputs.split(self.batch_size)]
        ours, theirs = (torch.cat(side) for side in zip(*pairs, strict=True))
        return matching_distance(ours, theirs, self.ridge)


def attack(
    model: nn.Module, clean: Tensor, start: Tensor, radius: float, steps: int, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Inputs near `clean` that move a model away from its own answers (projected gradient descent, no labels).

    Args:
        model: in eval mode; its parameters get no gradient.
        clean: `(samples, ...)` in [low, high].
        start: numbers in [-1, 1] of the same shape: where in the ball to begin.
        radius: of the ball in the maximum norm.
        steps: how many; one step is as long as the radius, many are five times that in all.

    Returns:
        As `clean`, within the ball and the range.
    """
    below, above = (clean - radius).clamp(min=low), (clean + radius).clamp(max=high)
    step = radius if steps == 1 else 5 * radius / steps
    with torch.no_grad():
        said = _logits(model, clean).argmax(dim=1)
    moved = (clean + radius * start).clamp(low, high)
    for _ in range(steps):
        moved.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(_logits(model, moved), said, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
        moved = (moved.detach() + step * gradient.sign()).clamp(below, above)
    return moved.detach()


def jacobian(model: nn.Module, inputs: Tensor) -> Tensor:
    """Gradient of each logit by each input, `(samples, classes, inputs)`, for a model that treats samples apart."""
    inputs = inputs.detach().requires_grad_()
    with torch.enable_grad():
        logits = _logits(model, inputs).sum(dim=0)
        rows = [torch.autograd.grad(c, inputs, retain_graph=True)[0].flatten(1) for c in logits]
    return torch.stack(rows, dim=1)


def matching_distance(source: Tensor, target: Tensor, ridge: float = 1e-3) -> float:
    """How much of a target's gradients no linear map of a source's explains: `min_B E|J_T - B J_S|^2 / E|J_T|^2`.

    B = E[J_T J_S^T] (E[J_S J_S^T] + lambda I)^-1

    Args:
        source, target: `(samples, classes, inputs)`; classes may differ.
        ridge: lambda, as a share of the mean of the diagonal of E[J_S J_S^T].

    Returns:
        0 (all) to 1 (nothing); slightly off with a ridge.

    Raises:
        ShapeError: other samples or inputs on the two sides.
    """
    if source.dim() != 3 or source.shape[::2] != target.shape[::2]:
        raise ShapeError(f"gradients must be of the same inputs, found {tuple(source.shape)} and {tuple(target.shape)}")
    source, target = source.double(), target.double()
    across = torch.einsum("sci,sdi->cd", target, source) / len(source)
    within = torch.einsum("sci,sdi->cd", source, source) / len(source)
    within = within + ridge * within.diagonal().mean() * torch.eye(len(within), dtype=within.dtype)
    b = across @ torch.linalg.pinv(within, hermitian=True)
    return float((target - b @ source).square().sum() / target.square().sum())


def _aligned(u: Tensor, v: Tensor, weight: Tensor | None = None) -> Tensor:
    """`|mean u v^T|_F^2`, each sample weighted."""
    weighted = u if weight is None else u * weight[:, None]
    return (weighted.T @ v / len(u)).square().sum()


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    return find_logits(call(model, inputs.to(device_of(model)))).float().to(inputs.device)
