"""Knowledge in weights: merging checkpoints, task vectors, adapters, growth and pruning.

Read :mod:`transfuse.weights.base` first.
"""

from transfuse.weights.base import Merge
from transfuse.weights.composed import Composed
from transfuse.weights.linear import Linear
from transfuse.weights.lorashear import LoRAShear
from transfuse.weights.neural_nuggets import NeuralNuggets

__all__ = ["Composed", "Linear", "LoRAShear", "Merge", "NeuralNuggets"]
