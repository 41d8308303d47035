"""BD-KD: balancing the divergences for online knowledge distillation."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.labels import labels_term
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.distill.online import Online
from transfuse.losses import Term, balanced_kl, kl_divergence


class BDKD(Online):
    """Train a large and a small network together; the small one weighs both KL divergences by which side is surer.

        p = softmax(logits / T),  h = H(p_teacher) - H(p_student), a constant
        w_f, w_r = (nu, 1) where h > 0 (the student is over-confident), (1, nu) where h < 0, (1, 1) where h = 0
        student = CE + T**2 * (w_f * KL(p_teacher || p_student) + w_r * KL(p_student || p_teacher))
        teacher = CE + gamma * T**2 * KL(p_student || p_teacher)

    Means over samples; in each loss the other network's probabilities are constants. With `smooth` s the weights are
    w_f = 1 + (nu - 1) * sigmoid(h / s) and w_r = 1 + (nu - 1) * sigmoid(-h / s) instead.
    With more than two networks, give the sources from the largest to the smallest: each network is the student of
    those before it and the teacher of those behind it, and either sum is divided by how many they are.
    Calibration, measured at temperature 1, is what it promises to improve; the target is used alone.

    That h turns the balance is the paper's; the step from 1 to `nu`, its size and T are ours, not checked against it.

    Args:
        temperature: T > 0.
        nu: 1 or more; 1 is the fixed sum of both divergences (Jeffreys).
        gamma: weight of what the teacher learns from the student.
        smooth: width of the smooth weights; None for the step.

    Raises:
        VocabularyError: the networks count different classes.
        InputError: two networks share parameters, one cannot learn, or an argument is out of range.

    Source: Amara, Sepahvand, Meyer, Gross & Clark, 2022, arXiv:2212.12965.
    """

    card = Card(
        paper="Amara, Sepahvand, Meyer, Gross & Clark, 2022",
        arxiv="2212.12965",
        sheet=65,
        carries="outputs",
        teacher="full",
        data="labelled",
        tasks=("classification", "language-model", "token-classification", "segmentation"),
    )

    def __init__(self, temperature: float = 3.0, nu: float = 2.0, gamma: float = 1.0, smooth: float | None = None):
        super().__init__()
        if temperature <= 0:
            raise InputError(f"BDKD: temperature is {temperature}, it must be positive")
        if nu < 1:
            raise InputError(f"BDKD: nu is {nu}, it must be 1 (no balance) or more")
        if gamma < 0:
            raise InputError(f"BDKD: gamma is {gamma}, it must be 0 (the teacher learns from labels alone) or more")
        if smooth is not None and smooth <= 0:
            raise InputError(f"BDKD: smooth is {smooth}, it must be positive, or None for a step")
        self.temperature, self.nu, self.gamma, self.smooth = temperature, nu, gamma, smooth

    def loss(self, role: str, networks: Mapping[str, Outputs], batch: Batch, clock: Clock) -> Losses:
        own, order, t = networks[role].logits, list(networks), self.temperature
        place = order.index(role)
        larger = [networks[name].logits for name in order[:place]]
        smaller = [networks[name].logits for name in order[place + 1 :]]
        terms = {"labels": labels_term(own, batch)}
        if larger:
            taught = [balanced_kl(own, peer, nu=self.nu, smooth=self.smooth, temperature=t) for peer in larger]
            terms["balanced"] = Term.of(torch.stack(taught).mean(0), batch.mask)
        if smaller and self.gamma:
            mutual = [kl_divergence(own, peer, temperature=t) for peer in smaller]
            terms["mutual"] = self.gamma * Term.of(torch.stack(mutual).mean(0), batch.mask)
        return terms
