"""Continual learning: a stream of tasks, each learned without forgetting the earlier ones.

Read :mod:`transfuse.continual.base` first, then any one method: each file is one system.
"""

from transfuse.continual.base import Learner
from transfuse.continual.cuber import CUBER
from transfuse.continual.ewc import EWC
from transfuse.continual.finetune import FineTune
from transfuse.continual.gpm import GPM
from transfuse.continual.heads import PrototypeModel, TaskModel
from transfuse.continual.lwf import LwF
from transfuse.continual.replay import Replay
from transfuse.continual.simplecil import ADAM, SimpleCIL
from transfuse.continual.trgp import TRGP

__all__ = [
    "ADAM",
    "CUBER",
    "EWC",
    "GPM",
    "TRGP",
    "FineTune",
    "Learner",
    "LwF",
    "PrototypeModel",
    "Replay",
    "SimpleCIL",
    "TaskModel",
]
