"""The family of federated learning: clients train on data that never leaves them, a server averages what they send.

A method says what the server sends (`payload`), how a client learns (`client`), and what the server makes of the
answers (`collect`, `close`). `Federated` runs the rounds in one process with one live model: a round is a stage, a
step is a client, and each client is an ordinary method in a trainer of its own. The same five functions are all that
:mod:`transfuse.federated.flower` calls, so the same method runs on a network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from transfuse.core import rng
from transfuse.core.batch import Batch
from transfuse.core.errors import InputError, TransferError, nearest
from transfuse.core.method import Method
from transfuse.core.outputs import modes_kept
from transfuse.core.phases import Batches, Observe, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Data, Generated, Stream
from transfuse.core.sync import Sync
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training
from transfuse.federated.client import AcrossRounds, Client, Reply, samples_of
from transfuse.federated.personal import Personal
from transfuse.federated.processes import in_processes, require_processes
from transfuse.federated.state import Payload, Server, read, size, write

BUFFERS = ("mean", "fixed")
SHOWN = 50
"""Clients in a picture of the report."""


class Federated(Method):
    """Base of the family. `"target"` is the server's model between steps, and each stream of the data is a client.

    In every round the server draws `fraction` of the clients, sends each a payload, and averages what comes back:

        weights and floating buffers = sum_i n_i * theirs_i / sum_i n_i;  integer buffers = the largest of theirs

    with n_i the samples of client i. The training that the caller asks for (epochs or steps, batch size, optimiser) is
    that of one client in one round; the learning rate's schedule runs over all rounds. What happens depends on the seed
    alone, not on `workers`: each pair of round and client has random numbers of its own, and answers are taken in the
    order of the clients. A copy of the model exists once, however many clients there are.

    Args:
        rounds: how often the server sends and collects.
        fraction: of the clients that take part in a round, in (0, 1]; at least one does.
        reset: each client's optimiser starts anew in every round, as its model does; False keeps its moments.
        buffer_rule: `"mean"` as above, or `"fixed"`: the server's stay as they were.

    Raises:
        InputError: an argument out of range; data that is no list of private data sets; a client that cannot train.
    """

    family = "federated"
    uses_source = False
    keeps = ("target",)
    scored_by_stage = True
    personal: ClassVar[bool] = False
    """Whether each client is served by the model it ends its own training with, not by the server's."""

    def __init__(self, rounds: int = 30, fraction: float = 1.0, reset: bool = True, buffer_rule: str = "mean"):
        super().__init__()
        if rounds < 1:
            raise InputError(f"{type(self).__name__}: rounds is {rounds}, it must be at least 1")
        if not 0 < fraction <= 1:
            raise InputError(f"{type(self).__name__}: fraction is {fraction}, it must be above 0 and at most 1")
        if buffer_rule not in BUFFERS:
            hint = nearest(buffer_rule, BUFFERS)
            raise InputError(f"{type(self).__name__}: unknown buffer_rule={buffer_rule!r}: {hint}")
        self.rounds, self.fraction, self.reset, self.buffer_rule = rounds, fraction, reset, buffer_rule
        self.server = Server()
        self._ready: dict[int, Reply] = {}  # trained ahead side by side; after a resume they are trained again, alike

    # The server ------------------------------------------------------------------------------------------------

    def open(self, model: nn.Module, clients: int) -> None:
        """Start: the server's model, and accounts of what each client is sent and sends."""
        self.server = Server()
        for name, value in read(model).items():
            self.server[name] = value
        for account in ("sent", "received"):
            self.server[account] = torch.zeros(clients, dtype=torch.int64)

    @property
    def clients(self) -> int:
        """How many clients there are."""
        return len(self.server["sent"])

    def per_round(self, clients: int) -> int:
        """How many of the clients take part in a round."""
        return max(1, round(self.fraction * clients))

    def begin(self, number: int, seed: int) -> list[int]:
        """Begin a round and return its clients, in order; the draw depends on seed and round alone."""
        draw = torch.Generator().manual_seed(rng.derive(seed, "clients", number))
        chosen = torch.randperm(self.clients, generator=draw)[: self.per_round(self.clients)].sort().values
        self.server["round"], self.server["chosen"] = torch.tensor(number), chosen
        self.server["waiting"] = chosen.clone()
        return chosen.tolist()

    def payload(self, client: int) -> Payload:
        """What a client is sent in this round. Changes nothing, and does not depend on other answers of the round."""
        return self.model()

    def collect(self, client: int, reply: Reply) -> None:
        """Take a client's answer. Called in the order of the clients, so that sums do not depend on who is fast.

        Raises:
            InputError: the client is not among those of the round, has answered already, or has no samples.
        """
        waiting, chosen = self.server["waiting"], self.server["chosen"].tolist()
        if client not in waiting:
            why = "has answered already" if client in chosen else f"is not one of them: {chosen}"
            raise InputError(f"a payload came from client {client}, which in round {int(self.server['round'])} {why}")
        if reply.samples < 1:
            raise InputError(f"client {client} has no samples, so what it sends has no weight: leave it out")
        self.server["waiting"] = waiting[waiting != client]
        self.server["sent"][client] += reply.received
        self.server["received"][client] += size(reply.upload)
        for name, value in reply.metrics.items():
            self._add(f"metric_{name}", torch.tensor([value, 1.0]), reply.samples)
        self._add("sum_samples", torch.ones(1), reply.samples)
        if "weights" in reply.upload:
            self._add("sum_weights", reply.upload["weights"], reply.samples)
        if "floats" in reply.upload and self.buffer_rule == "mean":
            self._add("sum_floats", reply.upload["floats"], reply.samples)
        if "integers" in reply.upload and self.buffer_rule == "mean":
            counters, key = reply.upload["integers"], "most_integers"
            self.server[key] = torch.maximum(self.server[key], counters) if key in self.server else counters

    def close(self) -> dict[str, float]:
        """End the round: the server's model becomes the average. Returns the round's metrics, averaged by samples.

        Raises:
            InputError: no client has answered.
        """
        if "sum_samples" not in self.server:
            raise InputError(f"no client has answered in round {int(self.server['round'])}")
        samples = self.server.pop("sum_samples")
        for name in ("weights", "floats"):
            if (key := f"sum_{name}") in self.server:
                self.server[name] = (self.server.pop(key) / samples).to(self.server[name].dtype)
        if "most_integers" in self.server:
            self.server["integers"] = self.server.pop("most_integers")
        metrics = {}
        for key in [name for name, _ in self.server.named_buffers() if name.startswith("metric_")]:
            total, count = self.server.pop(key).tolist()
            metrics[key.removeprefix("metric_")] = total / count
        metrics |= self.diagnostics(metrics)
        for name, value in metrics.items():
            past, key = self.history.get(name, []), f"history_{name}"
            self.server[key] = torch.tensor([*past, value], dtype=torch.float64)
        return metrics

    def diagnostics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Numbers about the server's own state at the end of a round, next to the clients' `metrics`."""
        return {}

    def findings(self, metrics: dict[str, float]) -> dict[str, str]:
        """What the user should hear about a round: messages, each under a name by which it is said once."""
        return {}

    def model(self, client: int | None = None) -> Payload:
        """The server's model, or a client's own where it has one."""
        names = [name for name in ("weights", "floats", "integers") if name in self.server]
        own = {name: self.server[f"client{client}_{name}"] for name in names if f"client{client}_{name}" in self.server}
        return {name: self.server[name] for name in names} | own

    @property
    def history(self) -> dict[str, list[float]]:
        """Every metric over the rounds, averaged over clients by their samples."""
        stored = {n: b for n, b in self.server.named_buffers() if n.startswith("history_")}
        return {name.removeprefix("history_"): values.tolist() for name, values in stored.items()}

    @property
    def traffic(self) -> dict[str, list[int]]:
        """Bytes that each client was sent and has sent back, over all rounds."""
        return {"sent": self.server["sent"].tolist(), "received": self.server["received"].tolist()}

    def panels(self) -> list[dict[str, Any]]:
        if "sent" not in self.server:
            return []
        sent, received = self.traffic.values()
        total = f"{sum(sent) / 1e6:.3g} MB to the clients and {sum(received) / 1e6:.3g} MB back, over all rounds."
        traffic = {
            "kind": "bars",
            "title": "Traffic",
            "note": total + (f" The first {SHOWN} of {self.clients} clients." if self.clients > SHOWN else ""),
            "x": "client",
            "y": "bytes",
            "rows": ["sent to it", "received from it"],
            "groups": [str(client) for client in range(self.clients)][:SHOWN],
            "values": [sent[:SHOWN], received[:SHOWN]],
        }
        return [traffic]

    def _add(self, name: str, values: Tensor, samples: int) -> None:
        part = samples * values.double()
        self.server[name] = self.server[name] + part if name in self.server else part

    # The clients -----------------------------------------------------------------------------------------------

    def client(self, payload: Payload, memory: Payload) -> Client:
        """How a client learns in one round."""
        return Client(payload, memory, self.reset)

    def upload(self, state: Payload, client: Client) -> Payload:
        """What a client sends back."""
        return {**state, **client.sends()}

    def work(
        self,
        client: int,
        model: nn.Module,
        data: Data,
        payload: Payload,
        memory: Payload,
        *,
        number: int,
        training: Training,
        task: str,
        device: torch.device | str | None = None,
    ) -> Reply:
        """A client's part in a round. Of all that belongs to the method, this alone sees the client's data.

        Args:
            model: any model of the right class; its weights are overwritten.
            payload: from the server; memory: from the client's last round, empty in its first.
            number: of the round.
            training: what the caller asked for.
        """
        samples = samples_of(data, f"client {client}")
        write(model, {**memory, **payload})
        local = replace(
            training,
            batch_size=min(training.batch_size, samples),
            schedule=AcrossRounds(training.make_schedule(), number, self.rounds),
            warmup=0,  # it is in the schedule already
            workers=0,
            seed=rng.derive(training.seed, "client", number, client),
        )
        method = self.client(payload, memory)
        with modes_kept(model):
            try:
                Trainer(method, {"target": model}, {"data": data}, local, sync=Sync(device), task=task).fit()
            except TransferError as error:
                raise type(error)(f"client {client}, round {number}: {error}") from error
        state = read(model)
        kept = {**method.remembers(), **(state if self.personal else {})}
        return Reply(self.upload(state, method), kept, samples, method.metrics(), size(payload))

    # The rounds, in this process -------------------------------------------------------------------------------

    def setup(self, run: Run, sample: Batch | None) -> None:
        if list(run.data) == ["data"] or not run.data:
            raise InputError(f"{type(self).__name__} reads one data set per client: pass data=[first, second, ...]")
        assert run.training is not None
        if run.training.ema is not None:
            raise InputError(f"{type(self).__name__}: a moving average over clients means nothing: leave out ema")
        if run.training.workers:
            require_processes(run.device)
        for name, data in run.data.items():
            samples = samples_of(data, f"client {name}")
            smallest = samples // -(-samples // min(run.training.batch_size, samples))
            if smallest < 2 and any(isinstance(m, _BatchNorm) for m in run["target"].modules()):
                raise InputError(
                    f"client {name} has {samples} sample(s), so some batches hold one, from which batch normalisation "
                    "has no statistics: give it more, leave it out, or use a model with GroupNorm or LayerNorm"
                )
        self.open(run["target"], len(run.data))

    def begin_stage(self, i: int, run: Run) -> bool:
        if i >= self.rounds:
            return False
        self.begin(i, run.seed)
        self._ready = {}
        return True

    def stage(self, i: int, run: Run) -> Stage:
        clients = Stream(Generated(len(self.server["chosen"])), batch_size=run.world)
        return Stage({"clients": clients}, [Observe("round", self._step)], epochs=1, train=())

    def deploy(self, target: nn.Module) -> nn.Module:
        if not self.personal or "sent" not in self.server:
            return target
        return Personal(target, [self.model(client) for client in range(self.clients)])

    def _step(self, batches: Batches, run: Run) -> None:
        """One client: train it, or take what was trained ahead, and put the server's model back into the target."""
        chosen = self.server["chosen"].tolist()
        client = chosen[run.clock.step]
        if client not in self._ready:
            self._ready = self._train(chosen[run.clock.step :], run)
        reply = self._ready.pop(client)
        self.collect(client, reply)
        for name, value in reply.memory.items():
            self.server[f"client{client}_{name}"] = value
        if run.clock.step + 1 == len(chosen):
            metrics = self.close()
            for name, number in metrics.items():
                run.note(name, number, weight=float(name == "loss"))
            for finding, message in self.findings(metrics).items():
                run.watch.say(finding, message)
        write(run["target"], self.model())

    def _train(self, clients: list[int], run: Run) -> dict[int, Reply]:
        """The next clients side by side: as many as there are processes, and workers in each."""
        assert run.training is not None
        workers = run.training.workers
        group = clients[: max(1, workers) * run.world]
        mine = group[run.rank :: run.world]
        if workers:
            own = in_processes(lambda client: vars(self._reply(client, run)), mine)
        else:
            own = {client: vars(self._reply(client, run)) for client in mine}
        return {c: Reply(**reply) for part in run.sync.gather_objects(own) for c, reply in part.items()}

    def _reply(self, client: int, run: Run) -> Reply:
        assert run.training is not None
        prefix, data = f"client{client}_", list(run.data.values())[client]
        memory = {n.removeprefix(prefix): b for n, b in self.server.named_buffers() if n.startswith(prefix)}
        return self.work(
            client,
            run["target"],
            data,
            self.payload(client),
            memory,
            number=int(self.server["round"]),
            training=run.training,
            task=run.task,
            device=run.device,
        )
