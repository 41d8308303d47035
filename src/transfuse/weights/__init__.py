"""Knowledge in weights: merging checkpoints, task vectors, adapters, growth and pruning.

Read :mod:`transfuse.weights.base` first.
"""

from transfuse.weights.base import Merge
from transfuse.weights.composed import Composed
from transfuse.weights.emoe import EMoE
from transfuse.weights.linear import Linear
from transfuse.weights.low_rank_clone import LowRankClone
from transfuse.weights.scale_out import ScaleOut
from transfuse.weights.scale_up import ScaleUp
from transfuse.weights.weight_squeezing import WeightSqueezing

__all__ = ["Composed", "EMoE", "Linear", "LowRankClone", "Merge", "ScaleOut", "ScaleUp", "WeightSqueezing"]
