"""The methods of this family on Flower: the same objects, each client on a node of its own.

    method, training = PGFed(mu=1.0, eta2=1e-4), Training(epochs=2, batch_size=32, optimizer="sgd", lr=0.05)
    client = client_app(method, target=build, data=my_data, training=training)
    server = server_app(method, target=build, clients=10, training=training, done=save)
    flwr.simulation.run_simulation(server, client, num_supernodes=10)

With the same seed and number of threads, the server's model is that of :func:`transfuse.transfer`, to the bit.
What a client remembers (its own model, moments of its optimiser) stays in Flower's state of its node.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from transfuse.core import rng
from transfuse.core.errors import InputError, MissingExtraError
from transfuse.core.streams import as_data
from transfuse.core.training import Training
from transfuse.core.watch import TransferWarning
from transfuse.federated.base import Federated
from transfuse.federated.client import Reply
from transfuse.federated.state import Payload, write

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp


def client_app(
    method: Federated,
    target: Callable[[], nn.Module],
    data: Callable[[int], Any],
    training: Training,
    task: str = "classification",
) -> ClientApp:
    """What runs on every node.

    Args:
        target: builds the model; data: gives a client's data set from its number, Flower's `partition-id`.
        training: of one client in one round.

    Raises:
        MissingExtraError: Flower is not installed.
    """
    flwr = _flower()
    app: ClientApp = flwr.clientapp.ClientApp()

    @app.query()
    def query(message: Message, context: Any) -> Message:
        about = flwr.app.ConfigRecord({"client": int(context.node_config["partition-id"])})
        return flwr.app.Message(flwr.app.RecordDict({"about": about}), reply_to=message)

    @app.train()
    def train(message: Message, context: Any) -> Message:
        client, number = int(context.node_config["partition-id"]), int(message.content["about"]["round"])
        memory = _tensors(context.state["memory"]) if "memory" in context.state else {}
        payload = _tensors(message.content["payload"])
        reply = method.work(
            client, target(), as_data(data(client)), payload, memory, number=number, training=training, task=task
        )
        context.state["memory"] = _record(reply.memory)
        about = {"client": client, "samples": reply.samples, "received": reply.received}
        content = {
            "upload": _record(reply.upload),
            "metrics": flwr.app.MetricRecord(reply.metrics),
            "about": flwr.app.ConfigRecord(about),
        }
        return flwr.app.Message(flwr.app.RecordDict(content), reply_to=message)

    return app


def server_app(
    method: Federated,
    target: Callable[[], nn.Module],
    clients: int,
    training: Training,
    done: Callable[[nn.Module, Federated], None],
    wait: float = 600.0,
) -> ServerApp:
    """What runs on the server, once all nodes are there.

    A client that fails in a round is left out of it, with a warning.

    Args:
        target: builds the model; clients: how many nodes there are.
        training: the same as for the clients; its seed chooses who takes part, and the initial weights.
        done: called at the end with the server's model and the method, which has `history` and `traffic`.
        wait: seconds to wait for the nodes.

    Raises:
        MissingExtraError: Flower is not installed.
    """
    flwr = _flower()
    app: ServerApp = flwr.serverapp.ServerApp()

    @app.main()
    def main(grid: Grid, context: Any) -> None:
        nodes = _nodes(grid, clients, wait)
        with rng.scope(rng.derive(training.seed, "target")):
            model = target()
        method.open(model, clients)
        for number in range(method.rounds):
            messages = []
            for client in method.begin(number, training.seed):
                about = flwr.app.ConfigRecord({"round": number})
                content = flwr.app.RecordDict({"payload": _record(method.payload(client)), "about": about})
                messages.append(flwr.app.Message(content, nodes[client], "train", group_id=str(number)))
            replies = {}
            for answer in grid.send_and_receive(messages):
                if answer.has_error():
                    why = f"round {number}: a client failed and is left out: {answer.error.reason}"
                    warnings.warn(why, TransferWarning, stacklevel=2)
                else:
                    replies[int(answer.content["about"]["client"])] = _reply(answer)
            for client in sorted(replies):  # they come as they are ready; sums must not depend on that
                method.collect(client, replies[client])
            for message in method.findings(method.close()).values():
                warnings.warn(message, TransferWarning, stacklevel=2)
        write(model, method.model())
        done(model, method)

    return app


def _nodes(grid: Grid, clients: int, wait: float) -> dict[int, int]:
    """The node of each client, by the client's number, as soon as there are as many nodes as clients."""
    flwr, until = _flower(), time.monotonic() + wait
    while len(known := list(grid.get_node_ids())) < clients and time.monotonic() < until:
        time.sleep(0.1)
    questions = [flwr.app.Message(flwr.app.RecordDict(), node, "query") for node in known]
    answers = [m for m in grid.send_and_receive(questions) if not m.has_error()]
    nodes = {int(m.content["about"]["client"]): m.metadata.src_node_id for m in answers}
    if sorted(nodes) != list(range(clients)):
        raise InputError(f"expected the clients 0 to {clients - 1}, found {sorted(nodes)} on {len(known)} nodes")
    return nodes


def _reply(message: Message) -> Reply:
    content: Any = message.content
    about, metrics = content["about"], {name: float(value) for name, value in content["metrics"].items()}
    return Reply(_tensors(content["upload"]), {}, int(about["samples"]), metrics, int(about["received"]))


def _record(payload: Payload) -> Any:
    flwr = _flower()
    return flwr.app.ArrayRecord({name: flwr.app.Array(value.numpy()) for name, value in payload.items()})


def _tensors(record: Any) -> Payload:
    return dict(record.to_torch_state_dict())


def _flower() -> Any:
    try:
        import flwr.app
        import flwr.clientapp
        import flwr.serverapp
    except ImportError:
        raise MissingExtraError("flwr", "flower", "running federated methods on Flower") from None
    return flwr
