"""Measures read; they neither write to their inputs nor draw from the global random state (S23)."""

import random

import numpy as np
import pytest
import torch

from transfuse import measure

LOGITS = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
TEACHER = torch.randn(20, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
LABELS = torch.arange(20) % 3
HEAD = torch.nn.Linear(3, 3)
DATA = torch.utils.data.TensorDataset(TEACHER.detach(), LABELS)
MATRIX = torch.rand(3, 3, generator=torch.Generator().manual_seed(2))

CALLS = {
    "bootstrap": lambda: measure.bootstrap(LOGITS.T),
    "paired": lambda: measure.paired(LOGITS.T, TEACHER.T),
    "correct": lambda: measure.correct(LOGITS, LABELS),
    "negative_log_likelihood": lambda: measure.negative_log_likelihood(LOGITS, LABELS),
    "per_class_accuracy": lambda: measure.per_class_accuracy(LOGITS.detach()[:, 0], LABELS, 3),
    "per_class_gain": lambda: measure.per_class_gain(LOGITS.T, TEACHER.T, LABELS, 3),
    "agreement": lambda: measure.agreement(LOGITS, TEACHER),
    "held_out_kl": lambda: measure.held_out_kl(LOGITS, TEACHER),
    "disagreement": lambda: measure.disagreement(LOGITS, TEACHER, 3),
    "reliability": lambda: measure.reliability(LOGITS, LABELS),
    "expected_calibration_error": lambda: measure.expected_calibration_error(LOGITS, LABELS),
    "brier_score": lambda: measure.brier_score(LOGITS, LABELS),
    "pearson": lambda: measure.pearson(LOGITS.detach()[:, 0], TEACHER.detach()[:, 0]),
    "spearman": lambda: measure.spearman(LOGITS.detach()[:, 0], TEACHER.detach()[:, 0]),
    "agreement_with_results": lambda: measure.agreement_with_results(
        measure.Table(("a", "b"), ("score",), torch.tensor([[1.0], [2.0]])), {"a": 1.0, "b": 3.0}
    ),
    "linear_transfer": lambda: measure.linear_transfer(torch.nn.Sequential(HEAD), DATA, DATA, epochs=1),
    "result_matrix": lambda: measure.result_matrix([{"a": 0.5}]),
    "final_accuracy": lambda: measure.final_accuracy(MATRIX),
    "average_accuracy": lambda: measure.average_accuracy(MATRIX),
    "backward_transfer": lambda: measure.backward_transfer(MATRIX),
    "forward_transfer": lambda: measure.forward_transfer(MATRIX, MATRIX[0]),
    "forgetting": lambda: measure.forgetting(MATRIX),
    "canary_exposure": lambda: measure.canary_exposure(LOGITS.detach()[:, 0], 3),
    "sampled_exposure": lambda: measure.sampled_exposure(LOGITS.detach()[:, 0], 0.5),
    "laplace_epsilon": lambda: measure.laplace_epsilon(0.5),
    "cost": lambda: measure.cost(torch.nn.Dropout(), LOGITS),
}


def test_every_measure_is_watched_here():
    functions = {n for n in measure.__all__ if n.islower() and n not in ("verdict", "read_facts")}
    assert set(CALLS) == functions


@pytest.mark.parametrize("name", CALLS)
def test_changes_nothing(name):
    tensors = [LOGITS, TEACHER, LABELS, MATRIX]
    before = [t.detach().clone() for t in tensors]
    states = [torch.get_rng_state(), random.getstate(), str(np.random.get_state())]
    result = CALLS[name]()
    assert all(t.equal(b) for t, b in zip(tensors, before, strict=True))
    assert torch.get_rng_state().equal(states[0])
    assert [random.getstate(), str(np.random.get_state())] == states[1:]
    assert LOGITS.grad is None
    assert not (isinstance(result, torch.Tensor) and result.requires_grad)
