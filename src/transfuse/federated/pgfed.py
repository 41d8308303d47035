"""PGFed and PGFedMo: every client minimises everybody's risk, the others' to first order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.card import Card
from transfuse.core.errors import InputError, ShapeError
from transfuse.core.phases import Batches, Gradients, Observe, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Stream
from transfuse.core.update import gradients
from transfuse.federated.base import SHOWN, Federated
from transfuse.federated.client import Client, Reply
from transfuse.federated.state import Payload, flat, pieces, trainable

DEGENERATE = 1e-3


class PGFed(Federated):
    """Personalise each client's global objective: its own risk, and the others' by their first-order estimates.

        F_i(w, a) = f_i(w) + mu * sum_j a_ij * ( f_j(w_j) + <g_j, w - w_j> ),     g_j = grad f_j(w_j),  a_ij >= 0

    summed over J, the clients of the round before (i itself may be one). In the first round J is empty.

        server sends   the averaged weights,
                       h_i  = mu * sum_{j in J} a_ij g_j
                       gbar = mu * mean_{j in J} g_j
                       m_j  = mu * ( f_j(w_j) - <g_j, w_j> )  and  a_ij           for j in J
        client steps   w   along  grad f_i(batch) + h_i
                       a_ij = max(0, a_ij - eta2 * ( m_j + <w, gbar> ))           after each backward pass
        client sends   w, f_i(w), g_i (one pass in eval mode), as the scalar f_i - <g_i, w>, and its a_ij

    dF_i/da_ij has <w, mu g_j> where the update has <w, gbar>: one vector is sent instead of one per client, so a round
    costs O(clients). Each client is served by its own model, right after its training.
    Gradients and risks say something about the data they come from: nothing here is a promise of privacy.

    Args:
        mu: weight of the others, at least 0; 0 is :class:`~transfuse.federated.FedAvgLocal`, to the bit.
        eta2: step size of a. With the defaults, many rounds drive every a_ij, and with it the transfer, to about 0:
            tune it down. A warning is given when h_i is less than a thousandth of the clients' gradients.
        exact: send every g_j and follow the exact derivative of a; O(clients**2), for few clients.
        rounds, fraction, reset, buffer_rule: as for :class:`~transfuse.federated.FedAvg`. (The authors' code keeps the
            optimiser of each client over the rounds: `reset=False`.)

    Raises:
        InputError: mu or eta2 is negative; a payload from a client that is not in the round, or without samples.

    Source: Luo et al., ICCV 2023, arXiv:2212.01448.
    """

    card = Card(
        paper="Luo et al., ICCV 2023",
        arxiv="2212.01448",
        sheet=116,
        carries="gradients",
        teacher="clients",
        data="private",
        tasks=("classification", "language-model", "token-classification", "segmentation"),
    )
    personal = True

    def __init__(
        self,
        mu: float = 0.1,
        eta2: float = 0.01,
        exact: bool = False,
        rounds: int = 30,
        fraction: float = 1.0,
        reset: bool = True,
        buffer_rule: str = "mean",
    ):
        super().__init__(rounds, fraction, reset, buffer_rule)
        for name, value in (("mu", mu), ("eta2", eta2)):
            if value < 0:
                raise InputError(f"{type(self).__name__}: {name} is {value}, it must be at least 0")
        self.mu, self.eta2, self.exact = mu, eta2, exact

    def open(self, model: nn.Module, clients: int) -> None:
        super().open(model, clients)
        self.server["A"] = torch.full((clients, clients), 1 / self.per_round(clients))

    def auxiliary(self, client: int) -> Tensor:
        """h_i: what the others add to every gradient of a client."""
        row = self.server["A"][client, self.server["participants"]]
        return self.mu * row @ self.server["gradients"]

    def payload(self, client: int) -> Payload:
        payload = super().payload(client)
        if "participants" not in self.server:
            return payload
        found = self.mu * self.server["gradients"]
        return payload | {
            "auxiliary": self.auxiliary(client),
            "gradients": found if self.exact else found.mean(0),
            "scalars": self.mu * self.server["scalars"],
            "row": self.server["A"][client, self.server["participants"]],  # indexed by a list, so a copy
        }

    def client(self, payload: Payload, memory: Payload) -> Client:
        return _Personalised(payload, memory, self.reset, self.eta2)

    def collect(self, client: int, reply: Reply) -> None:
        super().collect(client, reply)
        if "row" in reply.upload:
            participants = self.server["participants"]
            if reply.upload["row"].shape != participants.shape:
                raise ShapeError(f"client {client} sends {len(reply.upload['row'])} weights for {len(participants)}")
            self.server["A"][client, participants] = reply.upload["row"]
        for name in ("gradient", "scalar"):
            self.server[f"{name}_{client}"] = reply.upload[name]

    def close(self) -> dict[str, float]:
        answered = [c for c in self.server["chosen"].tolist() if f"gradient_{c}" in self.server]
        metrics = super().close()
        self.server["participants"] = torch.tensor(answered)
        self.server["gradients"] = torch.stack([self.server.pop(f"gradient_{c}") for c in answered])
        self.server["scalars"] = torch.cat([self.server.pop(f"scalar_{c}") for c in answered])
        return metrics

    def diagnostics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Mean weights of clients for themselves and for the others."""
        a, own = self.server["A"], torch.eye(self.clients, dtype=torch.bool)
        others = a[~own].mean() if self.clients > 1 else 0.0
        return {"weight_own": float(a[own].mean()), "weight_others": float(others)}

    def panels(self) -> list[dict[str, Any]]:
        if "A" not in self.server:
            return []
        names = [str(client) for client in range(self.clients)][:SHOWN]
        weights = {
            "kind": "matrix",
            "title": "Whom each client listens to",
            "note": "The weights a_ij of all risks after the last round. Where they are near 0, nothing is shared.",
            "x": "j",
            "y": "client i",
            "rows": names,
            "columns": names,
            "values": self.server["A"][:SHOWN, :SHOWN].tolist(),
        }
        return [*super().panels(), weights]

    def findings(self, metrics: dict[str, float]) -> dict[str, str]:
        if not self.mu or metrics.get("auxiliary_ratio", 1.0) >= DEGENERATE:
            return {}
        message = (
            f"{type(self).__name__} has become FedAvg with local epochs: what clients learn from each other is under "
            f"{DEGENERATE} of their own gradients. Raise mu or lower eta2"
        )
        return {"degenerate": message}


class PGFedMo(PGFed):
    """PGFed whose h_i has momentum: it remembers the auxiliary gradients of earlier rounds.

        h_i = (1 - beta) * mu * sum_{j in J} a_ij g_j + beta * h_i of the client's last round

    kept per client, and without the second part the first time. gbar is not smoothed. beta = 0 is PGFed.

    Args:
        mu, eta2, exact, rounds, fraction, reset, buffer_rule: as for :class:`PGFed`.
        beta: how much is remembered, in [0, 1).

    Source: Luo et al., ICCV 2023, arXiv:2212.01448.
    """

    card = Card(
        paper="Luo et al., ICCV 2023",
        arxiv="2212.01448",
        sheet=116,
        carries="gradients",
        teacher="clients",
        data="private",
        tasks=("classification", "language-model", "token-classification", "segmentation"),
    )

    def __init__(
        self,
        mu: float = 0.1,
        eta2: float = 0.01,
        beta: float = 0.5,
        exact: bool = False,
        rounds: int = 30,
        fraction: float = 1.0,
        reset: bool = True,
        buffer_rule: str = "mean",
    ):
        super().__init__(mu, eta2, exact, rounds, fraction, reset, buffer_rule)
        if not 0 <= beta < 1:
            raise InputError(f"PGFedMo: beta is {beta}, it must be at least 0 and below 1")
        self.beta = beta

    def auxiliary(self, client: int) -> Tensor:
        new, key = super().auxiliary(client), f"auxiliary_{client}"
        return torch.lerp(new, self.server[key], self.beta) if key in self.server else new

    def collect(self, client: int, reply: Reply) -> None:
        if "row" in reply.upload:
            sent = self.auxiliary(client)  # before the client's row changes
        super().collect(client, reply)
        if "row" in reply.upload:
            self.server[f"auxiliary_{client}"] = sent


class _Personalised(Client):
    """A client of PGFed: a stage of training, then one pass for its risk and gradient."""

    def __init__(self, payload: Payload, memory: Payload, reset: bool, eta2: float):
        super().__init__(payload, memory, reset)
        self.eta2 = eta2
        self._sent: Payload = {}  # the payload on the run's device
        self._norms: list[Tensor] = []
        self._risk, self._count = 0.0, 0.0
        self._gradient: Tensor
        self._weights: Tensor

    def begin_stage(self, i: int, run: Run) -> bool:
        names = {"auxiliary", "gradients", "scalars", "row"} & self.payload.keys()
        self._sent = self._sent or {name: self.payload[name].to(run.device) for name in names}
        return i < 2

    def stage(self, i: int, run: Run) -> Stage:
        if i == 0:
            return super().stage(i, run)
        every = Stream(run.data["data"], shuffle=False)
        return Stage({"data": every}, [Observe("risk", self._measure)], epochs=1, train=())

    def edit(self, grads: Gradients, run: Run) -> Gradients | None:
        if not self._sent:
            return None
        params, sent = trainable(run["target"]), self._sent
        self._norms.append(flat(grads.values()).norm())
        slope = sent["scalars"] + sent["gradients"] @ flat(params)  # one product per j where exact, else one for all
        sent["row"] = (sent["row"] - self.eta2 * slope).clamp(min=0)
        parts = zip(params, pieces(sent["auxiliary"], params), strict=True)
        return {p: grads[p] + h if p in grads else h for p, h in parts}

    def end_stage(self, i: int, run: Run) -> None:
        if i == 1:
            self._gradient, self._weights = self._gradient / self._count, flat(trainable(run["target"]))

    def sends(self) -> Payload:
        gradient, weights = self._gradient.cpu(), self._weights.cpu()
        scalar = self._risk / self._count - float(gradient.double() @ weights.double())
        upload = {"gradient": gradient, "scalar": torch.tensor([scalar])}
        return {**upload, "row": self._sent["row"].cpu()} if self._sent else upload

    def metrics(self) -> dict[str, float]:
        found = {**super().metrics(), "risk": self._risk / self._count}
        if not self._sent:
            return found
        return {**found, "auxiliary_ratio": float(self._sent["auxiliary"].norm() / torch.stack(self._norms).mean())}

    def _measure(self, batches: Batches, run: Run) -> None:
        """Add the undivided loss and gradient of a batch, in eval mode: normalisation must not depend on the batch."""
        with torch.enable_grad():
            term = self.losses(batches, run)["labels"]
            found = flat(gradients(term.sum, trainable(run["target"])))
        self._gradient = self._gradient + found if self._count else found
        self._risk, self._count = self._risk + float(term.sum.detach()), self._count + float(term.count)
