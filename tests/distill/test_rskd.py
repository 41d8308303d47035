"""RS-KD against the numbers of its sheet."""

from __future__ import annotations

import pytest
import torch
from helpers import language_model, ragged_tokens, trainer
from torch import Tensor

from transfuse.core.errors import InputError
from transfuse.core.outputs import call
from transfuse.core.run import Run
from transfuse.core.store.forms import draw_tokens
from transfuse.distill import RSKD
from transfuse.losses import Sampled, TopK, kl_divergence, sampled_kl, top_k_kl, top_k_target

T = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])


def drawn(logits: Tensor, n: int, seed: int = 0) -> Tensor:
    """Shares of each class, from n draws of every row."""
    found = draw_tokens(logits.clone(), n, torch.Generator().manual_seed(seed))
    return torch.nn.functional.one_hot(found, logits.shape[-1]).double().mean(1)


def test_draws_and_their_gradient_are_unbiased():
    rows = T.log().expand(20_000, 5)
    shares = drawn(rows, 50)
    error = (T.double() * (1 - T.double()) / 50 / 20_000).sqrt()
    assert ((shares.mean(0) - T).abs() < 4 * error).all()
    assert shares.var(0).tolist() == pytest.approx((T * (1 - T) / 50).tolist(), rel=0.05)
    student = torch.tensor([0.3, -0.2, 0.5, 0.0, 0.1], requires_grad=True)
    (full,) = torch.autograd.grad(kl_divergence(student[None], T.log()[None]).sum(), student)
    gradients = student.detach().softmax(-1) - shares
    assert ((gradients.mean(0) - full).abs() < 4 * error).all()


def test_many_draws_are_full_distillation_and_one_is_a_hard_label():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6)
    shares = drawn(teacher, 200_000)
    ids = torch.arange(6).expand(3, 6)
    many = sampled_kl(student, Sampled(ids, (shares * 200_000).round().long(), 6))
    assert torch.allclose(many, kl_divergence(student, teacher), atol=0.01)
    one = sampled_kl(student, Sampled(torch.tensor([[2], [0], [5]]), torch.ones(3, 1, dtype=torch.long), 6))
    assert torch.allclose(one, -student.log_softmax(-1)[torch.arange(3), [2, 0, 5]])


def test_the_bias_of_what_is_usually_made_of_the_largest():
    renormalised = top_k_target(T.log(), 2)
    assert renormalised.tolist() == pytest.approx([0.5714, 0.4286, 0, 0, 0], abs=1e-4)
    assert (renormalised - T).tolist() == pytest.approx([0.1714, 0.1286, -0.15, -0.10, -0.05], abs=1e-4)
    uniform = top_k_target(T.log(), 2, "uniform")
    assert uniform.tolist() == pytest.approx([0.4, 0.3, 0.1, 0.1, 0.1])
    label = top_k_target(T.log(), 2, "label", torch.tensor(3))
    assert label.tolist() == pytest.approx([0.4, 0.3, 0, 0.3, 0])
    assert top_k_target(T.log(), 2, "label", torch.tensor(-100)).tolist() == pytest.approx(renormalised.tolist())
    for wrong in ({"k": 5}, {"k": 0}, {"k": 2, "rest": "label"}):
        with pytest.raises(ValueError, match=r"k must lie|there are none"):
            top_k_target(T.log(), **wrong)


@pytest.mark.parametrize(("exponent", "expected"), [(1.0, 42.4), (1.5, 18.6), (2.0, 9.3)])
def test_the_number_of_distinct_tokens_of_zipf_s_law(exponent, expected):
    t = torch.arange(1, 50_001, dtype=torch.float64) ** -exponent
    t /= t.sum()
    assert float((1 - (1 - t) ** 50).sum()) == pytest.approx(expected, abs=0.05)
    found = draw_tokens(t.log().float().expand(60, -1).clone(), 50, torch.Generator().manual_seed(0))
    assert sum(len(set(row.tolist())) for row in found) / 60 == pytest.approx(expected, rel=0.06)


def test_a_bucket_for_the_rest_is_zero_only_where_head_and_rest_agree():
    kept = TopK(torch.tensor([[0, 1]]), T[:2].log()[None], 5)
    same_head = torch.tensor([[0.4, 0.3, 0.02, 0.08, 0.2]]).log()
    assert top_k_kl(same_head, kept).item() == pytest.approx(0.0, abs=1e-6)
    other = torch.tensor([[0.3, 0.4, 0.1, 0.1, 0.1]]).log()
    assert top_k_kl(other, kept).item() > 0.01
    renormalised = kl_divergence(T.log()[None], top_k_target(T.log()[None], 2).log())
    assert renormalised.item() == pytest.approx(-torch.log(T[:2].sum()).item())  # the student is the teacher


def test_a_live_teacher_is_drawn_from_anew_in_every_step_and_only_where_it_counts():
    teacher, text = language_model(1), ragged_tokens()
    run = Run({"target": language_model(), "source": teacher}, {}, task="language-model")
    from transfuse.core.batch import Batch, align_tokens

    batch = align_tokens(Batch(inputs=text))
    outputs = run("source", batch, grad=False)
    method = RSKD(draws=30)
    first, second = method._draw(outputs, batch), method._draw(outputs, batch)
    assert not torch.equal(first.ids, second.ids)
    assert (first.counts.sum(-1) == 30 * batch.mask).all()
    expected = call(teacher, text).softmax(-1)
    shares = torch.zeros_like(expected).scatter_add_(-1, first.ids, first.shares)
    assert ((shares - expected)[batch.mask].abs() < 0.5).all()


def test_it_teaches_a_student_and_refuses_wrong_arguments():
    run = trainer(RSKD(), language_model(), language_model(1), ragged_tokens(), task="language-model", steps=2)
    run.fit()
    for wrong in ({"draws": 0}, {"draws": 128}, {"alpha": -0.1}):
        with pytest.raises(InputError, match=r"RSKD|Draws"):
            RSKD(**wrong)
