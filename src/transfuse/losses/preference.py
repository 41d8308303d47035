"""Losses that prefer one answer to another, one value per pair; of tokens or of whole sequences."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Shape = Literal["sigmoid", "squared"]


def preference(margin: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0, shape: Shape = "sigmoid") -> Tensor:
    """The loss of a margin between the chosen and the rejected answer, in the shape of `margin`.

        sigmoid: -(1 - e) log sigmoid(beta * h) - e log sigmoid(-beta * h)    (DPO: Rafailov et al., arXiv:2305.18290)
        squared: (h - 1 / (2 beta))**2                                         (IPO: Azar et al., arXiv:2310.12036)

    Args:
        margin: h, log-probability of the chosen answer less that of the rejected one, less the same of a reference.
        beta: how sharp the preference is, positive.
        label_smoothing: e, the share of preferences that are taken to be the wrong way round, in [0, 0.5).

    Raises:
        ValueError: an argument is out of its range.
    """
    if not beta > 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"beta must be positive and label_smoothing in [0, 0.5), found {beta} and {label_smoothing}")
    if shape == "squared":
        return (margin - 1 / (2 * beta)) ** 2
    if shape != "sigmoid":
        raise ValueError(f'shape must be "sigmoid" or "squared", found {shape!r}')
    return -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)


def token_margin(student: Tensor, teacher: Tensor, *, reference: bool = True, positive: float = 0.0) -> Tensor:
    """How much less a student prefers the teacher's token to its own than the teacher does, `(rows,)`, at most 0.

    With a the teacher's most likely token and c the student's:
    `h = (log s[a] - log s[c]) - (log t[a] - log t[c])`, 0 where they are the same.

    Args:
        student, teacher: logits `(rows, classes)`; gradients reach the student alone, and no choice of a token.
        reference: subtract the teacher's own preference; False leaves the second bracket out.
        positive: weight of `max(0, log t[a] - log s[a])`, which is subtracted so that the chosen token itself does not
            become less likely (DPOP: Pal et al., arXiv:2402.13228).
    """
    log_s, log_t = student.float().log_softmax(-1), teacher.detach().float().log_softmax(-1)
    chosen, rejected = log_t.argmax(-1, keepdim=True), log_s.argmax(-1, keepdim=True)
    margin = (log_s.gather(-1, chosen) - log_s.gather(-1, rejected))[:, 0]
    if reference:
        margin = margin - (log_t.gather(-1, chosen) - log_t.gather(-1, rejected))[:, 0]
    if positive:
        margin = margin - positive * (log_t.gather(-1, chosen) - log_s.gather(-1, chosen))[:, 0].clamp(min=0)
    return margin
