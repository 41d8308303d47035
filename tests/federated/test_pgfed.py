"""PGFed against its equations, and against a loop that is written from them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from federations import PLAIN, fit, network, opened, shards, trainer, vector
from helpers import CNN, digest
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from transfuse.core.errors import InputError, ShapeError
from transfuse.core.streams import as_data
from transfuse.core.training import Training
from transfuse.core.watch import TransferWarning
from transfuse.federated import FedAvgLocal, PGFed, PGFedMo, Reply
from transfuse.federated.state import size

SIZE = 6


def served(
    method: PGFed, gradients: Tensor, scalars: Tensor, participants: list[int] | None = None, clients: int | None = None
) -> PGFed:
    """A method whose server has the gradients and scalars of the round before."""
    participants = list(range(len(gradients))) if participants is None else participants
    opened(method, clients or len(gradients), nn.Linear(gradients.shape[1] - 1, 1))
    method.server["participants"] = torch.tensor(participants)
    method.server["gradients"], method.server["scalars"] = gradients, scalars
    return method


def reply(**upload: Tensor) -> Reply:
    whole = {"weights": torch.zeros(SIZE), "gradient": torch.randn(SIZE), "scalar": torch.randn(1)} | upload
    return Reply(whole, {}, 1, {}, 0)


def work(method: PGFed, client: int, model: nn.Module, data: Any, **training: Any) -> Reply:
    settings = Training(**({**PLAIN, "epochs": 1} | training))
    payload = method.payload(client)
    return method.work(client, model, as_data(data), payload, {}, number=0, training=settings, task="classification")


# The estimate of the others' risks


@pytest.mark.parametrize("exact", [True])
def test_the_estimate_of_a_linear_risk_is_exact_everywhere(exact):
    slopes, offsets, mu = torch.randn(3, SIZE), torch.randn(3), 0.7
    where = torch.randn(3, SIZE)  # w_j
    risks = (slopes * where).sum(1) + offsets
    payload = served(PGFed(mu=mu, exact=exact), slopes, risks - (slopes * where).sum(1)).payload(0)
    for w in torch.randn(5, SIZE):
        estimate = payload["scalars"] + payload["gradients"] @ w
        assert torch.allclose(estimate, mu * (slopes @ w + offsets), atol=1e-5)


def test_the_estimate_of_a_quadratic_risk_misses_half_the_curvature_times_the_squared_distance():
    curvature, w_j, w = 3.0, torch.randn(SIZE), torch.randn(SIZE)
    risk, gradient = 0.5 * curvature * w_j @ w_j, curvature * w_j
    payload = served(PGFed(mu=1.0, exact=True), gradient[None], (risk - gradient @ w_j)[None]).payload(0)
    estimate = payload["scalars"] + payload["gradients"] @ w
    truth = 0.5 * curvature * w @ w
    assert truth - estimate.item() == pytest.approx(0.5 * curvature * float((w - w_j) @ (w - w_j)), rel=1e-4)


# What is sent


def test_the_auxiliary_gradient_is_the_naive_sum():
    method = served(PGFed(mu=0.3), torch.randn(4, SIZE), torch.randn(4), participants=[0, 2, 3, 5], clients=6)
    method.server["A"] = torch.rand(6, 6)
    for client in range(6):
        naive = [0.0] * SIZE
        for j, gradient in zip([0, 2, 3, 5], method.server["gradients"].tolist(), strict=True):
            for k in range(SIZE):
                naive[k] += 0.3 * method.server["A"][client, j].item() * gradient[k]
        assert method.auxiliary(client).tolist() == pytest.approx(naive, abs=1e-6)


def test_with_one_client_the_auxiliary_gradient_is_its_own():
    gradient = torch.randn(1, SIZE)
    method = served(PGFed(mu=0.4), gradient, torch.randn(1))
    assert torch.allclose(method.auxiliary(0), 0.4 * 1.0 * gradient[0])


def test_the_mean_gradient_and_the_scalars_have_mu_once():
    gradients, scalars = torch.randn(3, SIZE), torch.randn(3)
    payload = served(PGFed(mu=0.5), gradients, scalars).payload(1)
    assert torch.allclose(payload["gradients"], 0.5 * gradients.mean(0))
    assert torch.allclose(payload["scalars"], 0.5 * scalars)


def test_a_payload_holds_one_number_per_participant_and_nothing_of_clients_times_parameters():
    method = served(PGFed(), torch.randn(3, SIZE), torch.randn(3), participants=[1, 4, 5], clients=8)
    shapes = {name: tuple(value.shape) for name, value in method.payload(0).items()}
    assert shapes == {"weights": (SIZE,), "auxiliary": (SIZE,), "gradients": (SIZE,), "scalars": (3,), "row": (3,)}
    exact = served(PGFed(exact=True), torch.randn(3, SIZE), torch.randn(3), participants=[1, 4, 5], clients=8)
    assert exact.payload(0)["gradients"].shape == (3, SIZE)


def test_the_first_round_has_no_auxiliary_terms():
    assert set(opened(PGFed(), 3).payload(0)) == {"weights", "floats", "integers"}


def test_accounts_count_every_vector():
    method, model = PGFed(rounds=2), CNN(seed=7)
    fit(method, model)
    whole = 4 * sum(p.numel() for p in model.parameters())
    assert method.traffic["sent"] == [whole + (3 * whole + 2 * 4 * 3)] * 3
    assert method.traffic["received"] == [(2 * whole + 4) + (2 * whole + 4 + 4 * 3)] * 3


# The weights of the others


def test_weights_begin_at_one_over_the_clients_of_a_round():
    assert torch.equal(opened(PGFed(fraction=0.25), 8).server["A"], torch.full((8, 8), 0.5))


def test_only_rows_of_participants_change_and_in_them_only_who_was_there_before():
    method = PGFed(mu=1.0, eta2=0.1, rounds=2, fraction=0.5)
    fit(method, data=shards((6, 7, 8, 9)), seed=1)  # two of four in each round
    before = torch.full((4, 4), 0.5)
    second = method.server["chosen"].tolist()
    first = opened(PGFed(fraction=0.5), 4, chosen=False).begin(0, seed=1)
    changed = {(i, j) for i, j in (method.server["A"] != before).nonzero().tolist()}
    assert changed == {(i, j) for i in second for j in first}
    assert first != second


def test_weights_never_fall_below_zero():
    method = PGFed(mu=1.0, eta2=10.0, rounds=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TransferWarning)
        fit(method, data=shards())
    assert (method.server["A"] >= 0).all()
    assert (method.server["A"] == 0).any()


def test_the_exact_step_follows_the_derivative_of_the_objective():
    mu, eta2, data = 0.6, 1e-3, shards((9,))[0]
    model = CNN(seed=7)
    d = len(vector(model))
    gradients, scalars = torch.randn(3, d), torch.randn(3)
    method = served(PGFed(mu, eta2, exact=True), gradients, scalars)
    method.open(model, 3)
    method.server["participants"] = torch.arange(3)
    method.server["gradients"], method.server["scalars"] = gradients, scalars
    method.begin(0, 0)
    row = torch.full((3,), 1 / 3, requires_grad=True)
    w = vector(model)
    objective = F.cross_entropy(model(data[0]), data[1]) + mu * (row * (scalars + gradients @ w)).sum()
    expected = row - eta2 * torch.autograd.grad(objective, row)[0]
    found = work(method, 0, model, data).upload["row"]
    assert torch.allclose(found, expected.clamp(min=0), atol=1e-6)
    assert not torch.allclose(found, row, atol=1e-5)


def test_a_row_that_is_sent_is_a_copy():
    method = served(PGFed(), torch.randn(2, SIZE), torch.randn(2))
    method.payload(0)["row"].zero_()
    assert torch.equal(method.server["A"], torch.full((2, 2), 0.5))


def test_a_row_of_another_length_is_refused():
    method = served(PGFed(), torch.randn(3, SIZE), torch.randn(3))
    with pytest.raises(ShapeError, match="client 1 sends 2 weights for 3"):
        method.collect(1, reply(row=torch.zeros(2)))


# What a client measures


def test_risk_and_gradient_are_those_of_all_its_data_in_eval_mode_however_they_are_cut():
    data = shards((11,))[0]
    found = []
    for batch_size in (11, 4):
        model = network()
        method = opened(PGFed(), 1, model)
        answer = work(method, 0, model, data, batch_size=batch_size, steps=1, epochs=None, shuffle=True)
        model.eval()
        risk = F.cross_entropy(model(data[0]), data[1])
        gradient = parameters_to_vector(torch.autograd.grad(risk, list(model.parameters())))
        assert torch.allclose(answer.upload["gradient"], gradient, atol=1e-6)
        assert answer.metrics["risk"] == pytest.approx(risk.item(), rel=1e-5)
        assert answer.upload["scalar"].item() == pytest.approx((risk - gradient @ vector(model)).item(), rel=1e-4)
        found.append(answer)
    assert not torch.equal(found[0].upload["gradient"], found[1].upload["gradient"])


def test_frozen_weights_take_no_part_in_gradients():
    model = CNN(seed=7)
    model.layer1.requires_grad_(False)
    method = PGFed(mu=1.0, rounds=2)
    personal = fit(method, model)
    assert method.server["gradients"].shape[1] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert torch.equal(personal.clients[0].layer1.weight, CNN(seed=7).layer1.weight)


# Whole rounds


def naive(models: list[nn.Module], data: Any, rounds: int, mu: float, eta2: float, lr: float, epochs: int) -> Any:
    """PGFed with full batches, all clients and plain gradient descent, from the equations, in double precision."""
    clients, sizes = len(data), [len(y) for _, y in data]
    weights = parameters_to_vector(models[0].parameters()).detach()
    a = torch.full((clients, clients), 1 / clients, dtype=torch.float64)
    known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def risk(i: int, w: Tensor) -> tuple[Tensor, Tensor]:
        vector_to_parameters(w.clone(), models[i].parameters())
        value = F.cross_entropy(models[i](data[i][0].double()), data[i][1])
        return value.detach(), parameters_to_vector(torch.autograd.grad(value, list(models[i].parameters())))

    for _ in range(rounds):
        before = dict(known)
        ends = []
        for i in range(clients):
            w = weights.clone()
            h = sum((mu * a[i, j] * before[j][1] for j in before), torch.zeros_like(w))
            for _ in range(epochs):
                step = risk(i, w)[1] + h
                if before:
                    mean = mu * sum(before[j][1] for j in before) / len(before)
                    for j, (f, g, w_j) in before.items():
                        a[i, j] = max(0.0, float(a[i, j] - eta2 * (mu * (f - g @ w_j) + w @ mean)))
                w = w - lr * step
            known[i] = (*risk(i, w), w)
            ends.append(w)
        weights = sum(n * w for n, w in zip(sizes, ends, strict=True)) / sum(sizes)
    return ends, weights, a


def test_three_rounds_agree_with_a_loop_written_from_the_equations():
    data, settings = shards(), {"mu": 0.8, "eta2": 0.05}
    ends, weights, a = naive([CNN(seed=7).double() for _ in data], data, 3, lr=0.1, epochs=2, **settings)
    method = PGFed(rounds=3, **settings)
    personal = fit(method, CNN(seed=7), data, **{**PLAIN, "epochs": 2})
    assert torch.allclose(method.server["A"].double(), a, atol=1e-5)
    assert (method.server["A"] - 1 / 3).abs().max() > 0.05
    assert torch.allclose(vector(personal.clients[1]).double(), ends[1], atol=1e-5)
    assert torch.allclose(method.model()["weights"].double(), weights, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_mu_it_is_fedavg_with_local_epochs_to_the_bit(momentum):
    plain, method = FedAvgLocal(rounds=3, fraction=0.7), PGFed(mu=0.0, rounds=3, fraction=0.7)
    expected, found = fit(plain, momentum=momentum), fit(method, momentum=momentum)
    assert digest(found) == digest(expected)
    assert all(torch.equal(method.model()[name], plain.model()[name]) for name in plain.model())


def test_with_mu_it_is_not():
    assert digest(fit(PGFed(mu=1.0, rounds=2))) != digest(fit(FedAvgLocal(rounds=2)))
    assert digest(fit(PGFed(mu=1.0, rounds=1))) == digest(fit(FedAvgLocal(rounds=1)))


def test_exact_and_mean_gradient_agree_on_h_and_differ_in_the_weights():
    mean, exact = (PGFed(mu=1.0, rounds=2, exact=exact) for exact in (False, True))
    one, other = fit(mean), fit(exact)
    assert digest(one) == digest(other)  # in the second round, weights have not yet been used
    assert not torch.allclose(mean.server["A"], exact.server["A"])


def test_keeping_the_optimiser_is_a_choice():
    found = [digest(fit(PGFed(mu=1.0, rounds=2, reset=reset), momentum=0.9)) for reset in (True, False)]
    assert found[0] != found[1]


# Momentum


def test_pgfedmo_without_beta_is_pgfed():
    assert digest(fit(PGFedMo(mu=1.0, beta=0.0, rounds=3))) == digest(fit(PGFed(mu=1.0, rounds=3)))


def test_pgfedmo_smooths_the_auxiliary_gradient_from_the_second_time_on():
    first, second = torch.randn(2, SIZE), torch.randn(2, SIZE)
    method = served(PGFedMo(mu=0.5, beta=0.25), first, torch.randn(2))
    sent = method.payload(0)["auxiliary"]
    assert torch.allclose(sent, 0.5 * (0.5 * first).sum(0))
    method.collect(0, reply(row=torch.tensor([0.2, 0.4])))
    method.server["gradients"] = second
    fresh = 0.5 * (torch.tensor([0.2, 0.4]) @ second)
    assert torch.allclose(method.payload(0)["auxiliary"], 0.75 * fresh + 0.25 * sent)
    smoothed = method.payload(0)["auxiliary"]
    method.server["waiting"] = torch.tensor([0, 1])
    method.collect(0, reply(row=torch.tensor([0.0, 1.0])))
    assert torch.allclose(method.payload(0)["auxiliary"], 0.75 * 0.5 * second[1] + 0.25 * smoothed, atol=1e-6)
    assert torch.allclose(method.payload(0)["gradients"], 0.5 * second.mean(0))  # not smoothed
    assert torch.allclose(method.payload(1)["auxiliary"], 0.5 * (0.5 * second).sum(0))  # its first time


def test_asking_for_a_payload_twice_changes_nothing():
    method = served(PGFedMo(mu=0.5), torch.randn(2, SIZE), torch.randn(2))
    before = digest(method)
    one, other = method.payload(0), method.payload(0)
    assert digest(method) == before
    assert all(torch.equal(one[name], other[name]) for name in one)


# What the user is told


def test_diagnostics_are_kept_for_every_round():
    method = PGFed(mu=1.0, rounds=3)
    fit(method)
    assert {name: len(values) for name, values in method.history.items()} == {
        "loss": 3,
        "risk": 3,
        "auxiliary_ratio": 2,  # the first round has none
        "weight_own": 3,
        "weight_others": 3,
    }
    a = method.server["A"]
    assert method.history["weight_own"][-1] == pytest.approx(a.diagonal().mean().item())
    assert method.history["weight_others"][-1] == pytest.approx((a.sum() - a.diagonal().sum()).item() / 6, rel=1e-5)


def test_a_degenerate_run_is_reported_and_another_one_is_not():
    run = trainer(PGFed(mu=1.0, eta2=100.0, rounds=4))
    with pytest.warns(TransferWarning, match="has become FedAvg with local epochs"):
        run.fit()
    assert "degenerate" in run.run.watch.messages
    calm = trainer(PGFed(mu=1.0, eta2=1e-4, rounds=4))
    calm.fit()
    assert "degenerate" not in calm.run.watch.messages


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGFed(mu=-0.1), "mu is -0.1"),
        (lambda: PGFed(eta2=-1.0), "eta2 is -1.0"),
        (lambda: PGFedMo(beta=1.0), "beta is 1.0"),
        (lambda: PGFedMo(mu=-0.1), "PGFedMo: mu is -0.1"),
    ],
)
def test_arguments_out_of_range_of_pgfed_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_payload_from_a_client_absent_in_the_round_is_refused():
    method = opened(PGFed(fraction=0.25), 8, nn.Linear(SIZE - 1, 1))
    absent = next(c for c in range(8) if c not in method.server["chosen"].tolist())
    with pytest.raises(InputError, match="is not one of them"):
        method.collect(absent, reply())
    assert f"gradient_{absent}" not in method.server


def test_payload_sizes_do_not_grow_with_the_number_of_clients():
    sizes = []
    for clients in (8, 80):
        method = served(PGFed(), torch.randn(4, SIZE), torch.randn(4), participants=[0, 1, 2, 3], clients=clients)
        sizes.append(size(method.payload(0)))
    assert sizes[0] == sizes[1]
