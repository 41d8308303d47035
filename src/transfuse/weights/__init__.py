"""Knowledge in weights: merging checkpoints, task vectors, adapters, growth and pruning.

Read :mod:`transfuse.weights.base` first.
"""

from transfuse.weights.adapterfusion import AdapterFusion
from transfuse.weights.adapters import BottleneckAdapter
from transfuse.weights.base import Merge
from transfuse.weights.composed import Composed
from transfuse.weights.linear import Linear
from transfuse.weights.master_asr import MasterASR
from transfuse.weights.neuron_specialization import NeuronSpecialization
from transfuse.weights.scalearn import ScaLearn

__all__ = [
    "AdapterFusion",
    "BottleneckAdapter",
    "Composed",
    "Linear",
    "MasterASR",
    "Merge",
    "NeuronSpecialization",
    "ScaLearn",
]
