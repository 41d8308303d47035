"""What personalised methods deploy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from transfuse.core.outputs import call
from transfuse.federated.state import Payload, write


class Personal(nn.Module):
    """The model of every client in one: `forward(inputs, task)` runs that of client number `task`."""

    def __init__(self, model: nn.Module, states: Sequence[Payload]):
        super().__init__()
        self.clients = nn.ModuleList()
        for state in states:
            own = copy.deepcopy(model)
            write(own, state)
            self.clients.append(own)

    def forward(self, *inputs: Any, task: int, **named: Any) -> Any:
        return call(self.clients[task], inputs[0] if inputs else named)
