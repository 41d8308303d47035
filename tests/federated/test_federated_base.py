"""Rounds, averages, accounts and what must hold whatever the method."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import weakref
from typing import Any, ClassVar

import pytest
import torch
from federations import PLAIN, answer, fit, network, opened, shards, streams, trainer, vector
from helpers import CNN, digest
from processes import on_ranks
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from transfuse import transfer
from transfuse.core.clock import Clock, Linear
from transfuse.core.errors import InputError, MethodError, ShapeError
from transfuse.core.interruption import Interrupted
from transfuse.core.streams import Iterated, as_data
from transfuse.core.training import Training
from transfuse.federated import Client, FedAvg, FedAvgLocal, Federated, FedProx, Local, PGFed, PGFedMo, Reply
from transfuse.federated.client import AcrossRounds
from transfuse.federated.state import pieces, read, size, write
from transfuse.report.panels import Panel

EVERY = [FedAvg, FedAvgLocal, FedProx, Local, PGFed, PGFedMo]

# The state of a model


def test_a_model_reads_and_writes_as_it_was():
    one, other = network(1), network(2)
    state = read(one)
    assert set(state) == {"weights", "floats", "integers"}
    write(other, state)
    assert digest(one) == digest(other)


def test_training_after_writing_does_not_reach_the_state():
    model = network()
    state = read(model)
    before = {name: value.clone() for name, value in state.items()}
    write(model, state)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_shared_weights_travel_once_and_unsaved_buffers_not_at_all():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3, bias=False)
            self.other = nn.Linear(3, 3, bias=False)
            self.other.weight = self.one.weight
            self.register_buffer("mask", torch.full((2,), float("-inf")), persistent=False)

    assert {name: len(value) for name, value in read(Tied()).items()} == {"weights": 9}


def test_a_payload_of_another_model_is_refused():
    with pytest.raises(ShapeError, match="same model"):
        pieces(torch.zeros(3), [torch.zeros(2, 2)])


# Averages


def test_the_server_averages_weights_and_statistics_by_samples_and_counters_stay_whole():
    method, one, other = opened(FedAvg(), 2), network(1), network(2)
    for model, mean, variance, batches in ((one, 1.0, 4.0, 7), (other, 5.0, 8.0, 3)):
        model.norm.running_mean.fill_(mean)
        model.norm.running_var.fill_(variance)
        model.norm.num_batches_tracked.fill_(batches)
    method.collect(0, Reply(read(one), {}, 30, {}, 0))
    method.collect(1, Reply(read(other), {}, 10, {}, 0))
    method.close()
    averaged = network(3)
    write(averaged, method.model())
    assert torch.allclose(averaged.norm.running_mean, torch.tensor(2.0))
    assert torch.allclose(averaged.norm.running_var, torch.tensor(5.0))
    assert averaged.norm.num_batches_tracked.dtype == torch.int64
    assert averaged.norm.num_batches_tracked.item() == 7
    assert torch.allclose(vector(averaged), 0.75 * vector(one) + 0.25 * vector(other))


def test_fixed_buffers_stay_the_servers():
    model = network()
    before = read(model)
    method = FedAvg(rounds=1, buffer_rule="fixed")
    fit(method, model)
    after = method.model()
    assert torch.equal(after["floats"], before["floats"])
    assert torch.equal(after["integers"], before["integers"])
    assert not torch.equal(after["weights"], before["weights"])


def test_variances_stay_positive_and_statistics_move_with_the_clients():
    method = FedAvg(rounds=3)
    model = fit(method, lr=1.0)
    assert (model.norm.running_var > 0).all()
    assert (model.norm.running_mean != 0).any()
    assert model.norm.num_batches_tracked > 0


def test_the_average_of_equal_models_is_that_model():
    weights = torch.randn(50)
    method = opened(FedAvg(), 3, nn.Linear(49, 1))
    for client, samples in enumerate((7, 11, 13)):
        method.collect(client, answer(weights, samples))
    method.close()
    assert torch.equal(method.model()["weights"], weights)


def test_the_average_does_not_depend_on_the_order_of_the_clients():
    found = []
    uploads = torch.randn(4, 50)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        method = opened(FedAvg(), 4, nn.Linear(49, 1))
        for client in order:
            method.collect(client, answer(uploads[client], client + 1))
        method.close()
        found.append(method.model()["weights"])
    assert torch.allclose(*found, rtol=1e-7, atol=0)


def test_one_full_batch_step_of_all_clients_is_a_step_on_the_pooled_data():
    data = shards()
    pooled = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    separate = fit(FedAvg(rounds=1), CNN(seed=7), data, **PLAIN)
    together = fit(FedAvg(rounds=1), CNN(seed=7), pooled, **PLAIN)
    assert torch.allclose(vector(separate), vector(together), atol=1e-6)
    assert not torch.allclose(vector(separate), vector(CNN(seed=7)), atol=1e-3)


# Metrics and accounts


def test_metrics_are_averaged_by_samples_and_reach_the_learning_curve():
    method = opened(FedAvg(), 2, nn.Linear(1, 1))
    method.collect(0, answer(torch.zeros(2), 30, loss=1.0, score=4.0))
    method.collect(1, answer(torch.zeros(2), 10, loss=5.0))
    assert method.close() == {"loss": 2.0, "score": 4.0}  # by the samples of those who report it
    run = trainer(FedAvg(rounds=2))
    run.fit()
    last = run.history[-1]
    assert last["terms"]["loss"]["raw"] == pytest.approx(run.method.history["loss"][-1])
    assert last["loss"] == last["terms"]["loss"]["raw"] > 0
    assert len(run.method.history["loss"]) == 2


def test_every_client_has_an_account_of_what_it_was_sent_and_has_sent():
    model, method = network(), FedAvg(rounds=2)
    fit(method, model)
    whole = size(read(model))
    assert whole == 4 * (sum(p.numel() for p in model.parameters()) + 8) + 8
    assert method.traffic == {"sent": [2 * whole] * 3, "received": [2 * whole] * 3}
    alone = Local(rounds=3)
    fit(alone, model)
    assert alone.traffic == {"sent": [whole] * 3, "received": [0] * 3}


def test_clients_without_a_part_in_a_round_have_no_traffic():
    method = FedAvg(rounds=1, fraction=0.3)
    fit(method)
    chosen = method.server["chosen"].tolist()
    assert len(chosen) == 1
    assert [client for client, bytes in enumerate(method.traffic["sent"]) if bytes] == chosen


# Who takes part


def test_the_draw_of_clients_depends_on_seed_and_round_alone():
    def draws(seed: int) -> list[list[int]]:
        method = opened(FedAvg(fraction=0.5), 20, nn.Linear(1, 1), chosen=False)
        return [method.begin(number, seed) for number in range(4)]

    torch.manual_seed(1)
    first = draws(0)
    torch.manual_seed(2)
    assert draws(0) == first
    assert draws(1) != first
    assert all(len(chosen) == 10 and chosen == sorted(set(chosen)) for chosen in first)
    assert len({tuple(chosen) for chosen in first}) == 4


def test_a_payload_from_a_client_that_is_not_in_the_round_is_refused():
    method = opened(FedAvg(fraction=0.5), 4, nn.Linear(1, 1))
    absent = next(c for c in range(4) if c not in method.server["chosen"].tolist())
    with pytest.raises(InputError, match=f"client {absent}, which in round 0 is not one of them"):
        method.collect(absent, answer(torch.zeros(2)))


def test_a_second_payload_of_a_client_is_refused():
    method = opened(FedAvg(), 2, nn.Linear(1, 1))
    method.collect(1, answer(torch.zeros(2)))
    with pytest.raises(InputError, match="has answered already"):
        method.collect(1, answer(torch.zeros(2)))


def test_a_client_without_samples_is_refused():
    with pytest.raises(InputError, match="client 0 has no samples"):
        opened(FedAvg(), 2, nn.Linear(1, 1)).collect(0, answer(torch.zeros(2), samples=0))
    with pytest.raises(InputError, match="empty"):
        streams([(torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64))])


def test_a_round_without_answers_is_an_error():
    with pytest.raises(InputError, match="no client has answered in round 0"):
        opened(FedAvg(), 2).close()


# Repeatable, bounded, resumable


@pytest.mark.parametrize("cls", [FedAvg, PGFedMo])
def test_the_same_seed_gives_the_same_hash_with_any_number_of_workers(cls):
    found = {workers: digest(fit(cls(rounds=2), workers=workers)) for workers in (0, 1, 4)}
    assert len(set(found.values())) == 1
    assert digest(fit(cls(rounds=2), seed=1)) != found[0]


class Killed(BaseException):
    pass


def kill_at(update: int) -> Any:
    def listener(run: Any, record: Any) -> None:
        if run.updates == update:
            raise Killed

    return listener


@pytest.mark.parametrize(
    ("cls", "update", "workers"),
    [*((PGFedMo, update, 0) for update in (1, 3, 5, 8)), *((cls, 4, 0) for cls in EVERY), (PGFedMo, 4, 2)],
)
def test_killed_after_any_client_and_resumed_it_ends_bit_identical(cls, update, workers, tmp_path):
    def run(**options: Any) -> Any:
        return trainer(cls(rounds=3, reset=False), **options)

    whole = run()
    expected = digest(whole.fit())
    with pytest.raises(Killed):
        run(folder=tmp_path, listener=kill_at(update), workers=workers).fit()
    torch.manual_seed(99)
    resumed = run(folder=tmp_path, workers=workers)
    assert digest(resumed.fit(resume=True)) == expected
    assert digest(resumed.method) == digest(whole.method)
    assert resumed.history == whole.history


class Counted(CNN):
    """Knows how many of its kind there are, copies too."""

    alive: ClassVar[weakref.WeakSet[CNN]] = weakref.WeakSet()

    def __new__(cls, *args: Any, **options: Any) -> Any:
        made = super().__new__(cls)
        cls.alive.add(made)
        return made

    __hash__ = object.__hash__


def test_a_thousand_clients_need_the_models_and_the_state_of_two():
    def measured(clients: int) -> tuple[int, int]:
        seen = []
        method = FedAvg(rounds=1, fraction=min(1.0, 200 / clients))
        model = Counted(seed=7)
        fit(
            method,
            model,
            shards((2,) * clients),
            listener=lambda *_: seen.append(len(Counted.alive)),
            steps=1,
            epochs=None,
        )
        assert len(seen) == min(clients, 200)
        state = {n: b for n, b in method.server.named_buffers() if n not in ("sent", "received", "chosen", "waiting")}
        return max(seen), size(state)

    assert measured(1000) == measured(2)
    assert copy.deepcopy(Counted()) in Counted.alive


def test_the_live_model_is_the_servers_between_clients():
    seen = []

    def listener(run: Any, record: Any) -> None:
        seen.append((run.clock.step, torch.equal(vector(run.run["target"]), run.method.model()["weights"])))

    fit(FedAvg(rounds=1), listener=listener)
    assert seen == [(1, True), (2, True), (3, True)]


def two_processes(folder: Any, rank: int) -> None:
    import pickle

    from transfuse.core.sync import sync_for

    torch.set_num_threads(1)
    method = PGFed(mu=1.0, rounds=2)
    found = digest(fit(method, sync=sync_for("cpu")))
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps((found, method.traffic)))


def test_two_processes_share_the_clients_and_end_like_one(tmp_path):
    method = PGFed(mu=1.0, rounds=2)
    alone = digest(fit(method)), method.traffic
    assert on_ranks(two_processes, tmp_path) == [alone, alone]


# Workers


def test_what_goes_wrong_in_a_worker_is_told_as_without_workers():
    images, labels = shards((9,))[0]
    data = [(images, labels), (images, labels + 5)]
    texts = []
    for workers in (0, 2):
        with pytest.raises(InputError, match="client 1, round 0") as error:
            fit(FedAvg(), data=data, workers=workers)
        texts.append(str(error.value))
    assert texts[0] == texts[1]


class Fatal(Dataset):
    def __init__(self, data: tuple[Tensor, Tensor], number: int):
        self.data, self.number, self.main = data, number, os.getpid()

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, i: int) -> Any:
        if self.number == signal.SIGINT or os.getpid() != self.main:
            os.kill(os.getpid(), self.number)
        return self.data[0][i], self.data[1][i]


def test_a_worker_that_dies_is_noticed():
    data = [shards((4,))[0], Fatal(shards((4,))[0], signal.SIGKILL)]
    with pytest.raises(RuntimeError, match="the process of client 1 died"):
        fit(FedAvg(rounds=1), CNN(), data, workers=2, batch_size=4)


def test_control_c_while_a_client_trains_saves_the_rounds(tmp_path):
    class Once(Fatal):
        def __getitem__(self, i: int) -> Any:
            if not (tmp_path / "asked").exists() and list(tmp_path.glob("run/update-*")):
                (tmp_path / "asked").touch()
                os.kill(os.getpid(), signal.SIGINT)
            return self.data[0][i], self.data[1][i]

    def run(folder: Any, listener: Any = None) -> Any:
        data = [*shards((6,)), Once(shards((5,))[0], signal.SIGINT)]
        return trainer(FedAvg(rounds=2), data=data, folder=folder, checkpoint_every=1e9)

    expected = digest(run(None).fit())
    with pytest.raises(Interrupted, match="the checkpoint is .*update-"):
        run(tmp_path / "run").fit()
    assert digest(run(tmp_path / "run").fit(resume=True)) == expected


# Clients


def test_every_pair_of_round_and_client_has_random_numbers_of_its_own():
    method, model, data = FedAvg(rounds=2), network(), as_data(shards()[0])
    opened(method, 2, model)
    training = Training(epochs=1, batch_size=4, schedule="constant")

    def weights(client: int, number: int) -> Tensor:
        sent = method.payload(client)
        reply = method.work(client, model, data, sent, {}, number=number, training=training, task="classification")
        return reply.upload["weights"]

    found = [weights(client, number) for client in (0, 1) for number in (0, 1)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(found, 2))
    assert torch.equal(weights(0, 0), found[0])


def test_a_clients_result_depends_on_no_other_client():
    data = shards()
    alone, among = fit(Local(rounds=2), data=data[:1]), fit(Local(rounds=2), data=data)
    assert digest(alone.clients[0]) == digest(among.clients[0])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rounds_that_keep_the_optimiser_are_one_long_training(optimizer, schedule):
    settings = {**PLAIN, "momentum": 0.9, "optimizer": optimizer, "schedule": schedule, "lr": 0.05}
    long = vector(fit(Local(rounds=1), CNN(seed=7), **{**settings, "epochs": 4}).clients[0])
    kept = vector(fit(Local(rounds=2, reset=False), CNN(seed=7), **{**settings, "epochs": 2}).clients[0])
    anew = vector(fit(Local(rounds=2), CNN(seed=7), **{**settings, "epochs": 2}).clients[0])
    assert torch.equal(kept, long)
    assert not torch.allclose(anew, long)


def test_a_schedule_goes_on_from_round_to_round():
    factors = [
        AcrossRounds(Linear(1, 0), number, 2)(Clock(step=step, steps=4)) for number in (0, 1) for step in range(4)
    ]
    assert factors == [1 - i / 8 for i in range(8)]


def test_warm_up_happens_once():
    settings = {**PLAIN, "warmup": 2, "epochs": 1}
    rates = Local(rounds=3), CNN(seed=7)
    vectors = [vector(CNN(seed=7))]
    run = trainer(*rates, shards((9,)), **settings)
    run.listener = lambda run, record: vectors.append(run.method.model(0)["weights"])
    run.fit()
    steps = [float((b - a).norm()) for a, b in itertools.pairwise(vectors)]
    assert steps[0] == pytest.approx(steps[1] / 2, rel=0.2)
    assert steps[2] == pytest.approx(steps[1], rel=0.2)


def test_a_client_with_one_sample_works_without_batch_normalisation():
    model = fit(FedAvg(rounds=1), CNN(seed=7), shards((1, 9)))
    assert vector(model).isfinite().all()


def test_a_client_with_one_sample_is_refused_with_batch_normalisation():
    with pytest.raises(InputError, match=r"client 0 has 1 sample.*batch normalisation.*GroupNorm"):
        fit(FedAvg(rounds=1), data=shards((1, 9)))


def test_batches_of_clients_are_cut_evenly_so_none_has_one_sample():
    fit(FedAvg(rounds=1), data=shards((9, 17)))  # 4 + 5 and 5 + 6 + 6, not 8 + 1


# Local, FedAvg with local epochs, FedProx


def test_fedavg_with_local_epochs_trains_as_fedavg_and_serves_each_client_its_own_model():
    average, local = FedAvg(rounds=2), FedAvgLocal(rounds=2)
    model, personal = fit(average), fit(local)
    assert all(torch.equal(average.model()[name], local.model()[name]) for name in average.model())
    assert digest(model) != digest(personal.clients[0]) != digest(personal.clients[1])
    mean = sum(n * vector(client) for n, client in zip((9, 6, 12), personal.clients, strict=True)) / 27
    assert torch.allclose(mean, vector(model), atol=1e-6)


def test_a_client_that_never_took_part_is_served_by_the_servers_model():
    method = FedAvgLocal(rounds=1, fraction=0.6)
    personal = fit(method)
    chosen = method.server["chosen"].tolist()
    same = [torch.equal(vector(client), method.model()["weights"]) for client in personal.clients]
    assert same == [client not in chosen for client in range(3)]


def test_a_personal_model_runs_the_clients_own_and_deploying_changes_nothing():
    run = trainer(FedAvgLocal(rounds=1))
    personal, images = run.fit().eval(), shards()[0][0]
    before = digest(run.method), digest(run.run["target"])
    again = run.method.deploy(run.run["target"])
    assert digest(again) == digest(personal)
    assert (digest(run.method), digest(run.run["target"])) == before
    for client in range(3):
        expected = network()
        write(expected, run.method.model(client))
        assert torch.equal(personal(images, task=client), expected.eval()(images))
        assert torch.equal(personal(images=images, task=client), expected(images))
    with pytest.raises(TypeError, match="task"):
        personal(images)


def test_fedprox_without_mu_is_fedavg():
    assert digest(fit(FedProx(mu=0.0, rounds=2))) == digest(fit(FedAvg(rounds=2)))


def test_fedprox_follows_its_objective():
    images, labels = shards((9,))[0]
    model, mu = CNN(seed=7), 3.0
    sent = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        proximal = sum(((p - s) ** 2).sum() for p, s in zip(model.parameters(), sent, strict=True))
        loss = F.cross_entropy(model(images), labels) + mu / 2 * proximal
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= 0.1 * g
    found = fit(FedProx(mu, rounds=1), CNN(seed=7), [(images, labels)], **{**PLAIN, "epochs": 3})
    assert torch.allclose(vector(found), vector(model), atol=1e-6)


def test_the_larger_mu_the_nearer_the_clients_stay():
    start = vector(CNN(seed=7))
    far = [
        float((vector(fit(FedProx(mu, rounds=1), CNN(seed=7), lr=0.05, epochs=5)) - start).norm()) for mu in (0, 1, 10)
    ]
    assert far[0] > far[1] > far[2] > 0


# What cannot be used


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedAvg(rounds=0), "rounds is 0"),
        (lambda: FedAvg(fraction=0.0), "fraction is 0.0"),
        (lambda: FedAvg(fraction=1.5), "fraction is 1.5"),
        (lambda: FedAvg(buffer_rule="maen"), "did you mean 'mean'"),
        (lambda: FedProx(mu=-1.0), "mu is -1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_one_data_set_for_all_is_refused():
    run = trainer(FedAvg())
    run.run.data = {"data": as_data(shards()[0])}
    with pytest.raises(InputError, match="one data set per client"):
        run.fit()


def test_data_that_does_not_say_how_much_it_is_is_refused():
    run = trainer(FedAvg())
    run.run.data = {**run.run.data, "1": Iterated([shards()[0]])}
    with pytest.raises(InputError, match=r"client 1 gives its data in batches.*weight"):
        run.fit()


def test_unlabelled_clients_are_refused():
    with pytest.raises(InputError, match="client 0, round 0: .*labels"):
        fit(FedAvg(), data=[shards()[0][0], shards()[1]])


def test_a_moving_average_is_refused():
    with pytest.raises(InputError, match="ema"):
        fit(FedAvg(), ema=0.9)


def test_methods_of_the_family_do_not_add():
    with pytest.raises(MethodError, match="no loss to weigh or add"):
        FedAvg() + FedProx()
    with pytest.raises(MethodError, match="no loss to weigh or add"):
        0.5 * FedAvg()


# The one call


def test_a_transfer_reports_each_clients_own_test_set():
    result = transfer(
        FedAvgLocal(rounds=2),
        target=lambda: network(),
        data=[TensorDataset(*shard) for shard in shards()],
        test=[TensorDataset(*shard) for shard in shards((4, 5, 6), seed=1)],
        compare=[FedAvg(rounds=2), Local(rounds=2)],
        epochs=1,
        batch_size=8,
    )
    run = result.arms[0].runs[0]
    assert set(run.evaluation.by_set("accuracy")) == {"0", "1", "2"}
    assert len(run.stages) == 2
    assert run.stages[-1] == run.evaluation.by_set("accuracy")
    images, labels = shards((4, 5, 6), seed=1)[1]
    own = (result.model(images, task=1).argmax(-1) == labels).float().mean()
    assert run.evaluation.by_set("accuracy")["1"] == pytest.approx(float(own))


@pytest.mark.parametrize("cls", EVERY)
def test_the_report_shows_the_traffic_of_every_client(cls):
    method = cls(rounds=1)
    assert method.panels() == []
    fit(method)
    panels = [TypeAdapter(Panel).validate_python(panel) for panel in method.panels()]
    assert panels[0].title == "Traffic"
    assert panels[0].values == list(method.traffic.values())
    assert [panel.kind for panel in panels] == ["bars", "matrix"] if issubclass(cls, PGFed) else ["bars"]


@pytest.mark.parametrize("cls", EVERY)
def test_a_client_leaves_modes_and_global_random_numbers_alone(cls):
    model, method = network(), cls(rounds=1)
    opened(method, 1, model)
    model.eval()
    before = torch.get_rng_state()
    training = Training(epochs=1, batch_size=4)
    method.work(
        0, model, as_data(shards()[0]), method.payload(0), {}, number=0, training=training, task="classification"
    )
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_new_client_method_needs_only_its_loss():
    class Doubled(Client):
        def edit(self, grads: Any, run: Any) -> Any:
            return {p: 2 * g for p, g in grads.items()}

    class Faster(Federated):
        def client(self, payload: Any, memory: Any) -> Client:
            return Doubled(payload, memory, self.reset)

    start = vector(CNN(seed=7))
    slow, fast = (vector(fit(m, CNN(seed=7), **PLAIN)) - start for m in (FedAvg(rounds=1), Faster(rounds=1)))
    assert torch.allclose(fast, 2 * slow, atol=1e-6)
    assert copy.deepcopy(slow).norm() > 0
