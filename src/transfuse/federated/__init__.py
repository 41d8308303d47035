"""Federated learning: knowledge carried between clients whose data never leaves them.

Read :mod:`transfuse.federated.base` first, then any one method: each file is one system.
:mod:`transfuse.federated.flower` runs the same methods on a network.
"""

from transfuse.federated.base import Federated
from transfuse.federated.client import Client, Reply
from transfuse.federated.fedavg import FedAvg, FedAvgLocal
from transfuse.federated.fedprox import FedProx
from transfuse.federated.local import Local
from transfuse.federated.personal import Personal
from transfuse.federated.pgfed import PGFed, PGFedMo

__all__ = ["Client", "FedAvg", "FedAvgLocal", "FedProx", "Federated", "Local", "PGFed", "PGFedMo", "Personal", "Reply"]
