"""Knowledge in weights: merging checkpoints, task vectors, adapters, growth and pruning.

Read :mod:`transfuse.weights.base` first.
"""

from transfuse.weights.base import Merge
from transfuse.weights.composed import Composed
from transfuse.weights.cross_d_conv import CrossDConv
from transfuse.weights.linear import Linear
from transfuse.weights.tokalign import TokAlign

__all__ = ["Composed", "CrossDConv", "Linear", "Merge", "TokAlign"]
