"""The same methods on Flower: its messages in memory, and its simulation where that is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from federations import fit, network, shard, vector
from torch import nn

from transfuse.core import rng
from transfuse.core.errors import InputError, MissingExtraError
from transfuse.core.training import Training
from transfuse.core.watch import TransferWarning
from transfuse.federated import FedAvg, FedAvgLocal, Federated, Local, PGFed, PGFedMo
from transfuse.federated.flower import client_app, server_app

SETTINGS = {"epochs": 2, "batch_size": 8, "optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0}
TRAINING = Training(**SETTINGS)


def test_without_flower_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    with pytest.raises(MissingExtraError, match=r"transfuse\[flower\]"):
        client_app(FedAvg(), network, shard, TRAINING)
    with pytest.raises(MissingExtraError, match="flwr"):
        server_app(FedAvg(), network, 3, TRAINING, done=lambda model, method: None)


class Nodes:
    """Flower's grid without a network: messages go to the client app, each node with a state of its own."""

    def __init__(self, app: Any, clients: int, fails: Callable[[int, Any], bool] = lambda client, message: False):
        from flwr.app import Context, RecordDict

        self.app, self.fails = app, fails
        self.sent: list[Any] = []
        self.contexts = {
            1000 - 7 * client: Context(0, 1000 - 7 * client, {"partition-id": client}, RecordDict(), {})
            for client in range(clients)
        }

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Any) -> list[Any]:
        from flwr.app import Error, Message

        replies = []
        for message in messages:
            context = self.contexts[message.metadata.dst_node_id]
            self.sent.append(message)
            if self.fails(context.node_config["partition-id"], message):
                replies.append(Message(Error(1, "out of battery"), reply_to=message))
            else:
                replies.append(self.app(message, context))
        return replies[::-1]  # who is first depends on the network


def on_flower(method: Federated, clients: int = 3, **options: Any) -> tuple[nn.Module, Federated, Nodes]:
    pytest.importorskip("flwr")
    with suppress(ImportError):  # newer versions number messages by the task that their runtime has started
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    found: list[Any] = []
    nodes = Nodes(client_app(method, network, shard, TRAINING), 3, **options)
    server = server_app(method, network, clients, TRAINING, done=lambda *result: found.extend(result), wait=0.2)
    server(nodes, None)
    return found[0], found[1], nodes


def in_one_process(method: Federated) -> Any:
    with rng.scope(rng.derive(TRAINING.seed, "target")):
        model = network()
    return fit(method, model, **SETTINGS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedAvg(rounds=2),
        lambda: FedAvg(rounds=3, fraction=0.6, reset=False),
        lambda: PGFed(mu=1.0, rounds=3),
        lambda: PGFed(mu=1.0, rounds=3, fraction=0.6, exact=True),
        lambda: PGFedMo(mu=1.0, rounds=3, reset=False),
    ],
)
def test_on_flowers_messages_the_server_ends_as_in_one_process(make):
    model, method, _ = on_flower(make())
    alone = make()
    in_one_process(alone)
    assert torch.equal(vector(model), alone.model()["weights"])
    assert all(torch.equal(method.model()[name], alone.model()[name]) for name in alone.model())
    assert method.history == alone.history
    assert method.traffic == alone.traffic


@pytest.mark.parametrize("make", [lambda: FedAvgLocal(rounds=2), lambda: Local(rounds=2), lambda: PGFed(1.0, rounds=2)])
def test_what_a_client_remembers_stays_on_its_node(make):
    _, method, nodes = on_flower(make())
    personal = in_one_process(make())
    for context in nodes.contexts.values():
        own = context.state["memory"].to_torch_state_dict()["weights"]
        assert torch.equal(own, vector(personal.clients[context.node_config["partition-id"]]))
    assert not [name for name, _ in method.server.named_buffers() if name.startswith("client")]


def test_no_message_holds_what_a_client_trains_on():
    _, _, nodes = on_flower(PGFed(rounds=2))
    images = [shard(client)[0].numel() for client in range(3)]
    assert len(nodes.sent) == 3 + 2 * 3  # who are you, and two rounds
    sizes = {a.numpy().size for m in nodes.sent for r in m.content.array_records.values() for a in r.values()}
    assert not sizes & set(images)


def test_a_client_that_fails_is_left_out_of_its_round():
    def fails(client: int, message: Any) -> bool:
        return client == 1 and message.metadata.group_id == "1"

    with pytest.warns(TransferWarning, match="round 1: a client failed and is left out: out of battery"):
        model, method, _ = on_flower(PGFed(mu=1.0, rounds=2), fails=fails)
    assert method.server["participants"].tolist() == [0, 2]
    assert vector(model).isfinite().all()


def test_a_federation_without_all_its_clients_is_refused():
    with pytest.raises(InputError, match=r"expected the clients 0 to 3, found \[0, 1, 2\] on 3 nodes"):
        on_flower(FedAvg(), clients=4)


def test_in_flowers_simulation_the_server_ends_as_in_one_process(tmp_path):
    pytest.importorskip("ray")
    from flwr.simulation import run_simulation

    def done(model: nn.Module, method: Federated) -> None:
        torch.save(method.model(), tmp_path / "model.pt")

    method, alone = PGFed(mu=1.0, rounds=2), PGFed(mu=1.0, rounds=2)
    run_simulation(
        server_app=server_app(method, network, 3, TRAINING, done),
        client_app=client_app(method, network, shard, TRAINING),
        num_supernodes=3,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    in_one_process(alone)
    found = torch.load(tmp_path / "model.pt")
    assert all(torch.equal(found[name], alone.model()[name]) for name in alone.model())
