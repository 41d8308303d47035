import pytest
import torch

from transfuse.weights.factors import Factors


def random_matrix(rows: int = 7, columns: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_all_terms_are_the_matrix_and_half_precision_is_computed_in_float32():
    m = random_matrix()
    assert torch.allclose(Factors.of(m).dense(), m, atol=1e-5)
    assert Factors.of(m.half()).u.dtype == torch.float32


def test_the_error_of_truncation_is_the_norm_of_what_is_dropped():
    m = random_matrix()
    whole = Factors.of(m)
    error = (whole.top(2).dense() - m).norm()
    assert error.item() == pytest.approx(whole.s[2:].square().sum().sqrt().item(), abs=1e-5)


def test_a_pool_through_qr_is_the_decomposition_of_the_dense_sum():
    one, other = Factors.of(random_matrix(seed=1)).top(3), Factors.of(random_matrix(seed=2)).top(2)
    pooled = one.pooled(other)
    found = pooled.orthogonal()
    dense = one.dense() + other.dense()
    assert torch.allclose(pooled.dense(), dense, atol=1e-5)
    assert torch.allclose(found.dense(), dense, atol=1e-5)
    assert torch.allclose(found.s, torch.linalg.svdvals(dense), atol=1e-4)
    for basis in (found.u, found.v):
        assert torch.allclose(basis.mT @ basis, torch.eye(5), atol=1e-5)


def test_a_completed_basis_is_orthogonal_and_changes_nothing():
    few = Factors.of(random_matrix()).top(2)
    whole = few.completed(5)
    assert whole.terms == 5 and whole.s[2:].eq(0).all()
    assert torch.allclose(whole.dense(), few.dense(), atol=1e-6)
    for basis in (whole.u, whole.v):
        assert torch.allclose(basis.mT @ basis, torch.eye(5), atol=1e-5)
    assert few.completed(1) is few
