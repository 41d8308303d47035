"""Knowledge in weights: merging checkpoints, task vectors, adapters, growth and pruning.

Read :mod:`transfuse.weights.base` first.
"""

from transfuse.weights.adamerging import AdaMerging
from transfuse.weights.atlas import ATLAS
from transfuse.weights.axis import AXIS
from transfuse.weights.base import Merge
from transfuse.weights.composed import Composed
from transfuse.weights.graftllm import GraftLLM
from transfuse.weights.linear import Linear

__all__ = ["ATLAS", "AXIS", "AdaMerging", "Composed", "GraftLLM", "Linear", "Merge"]
