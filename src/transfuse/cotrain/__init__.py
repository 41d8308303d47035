"""Co-training: one model learns from several pools of data at once, mixed in shares.

Read :mod:`transfuse.cotrain.base` first. The mixing itself is :mod:`transfuse.core.mixture`; what a new language
needs of the model is in :mod:`transfuse.cotrain.vocabulary`.
"""

from transfuse.cotrain.base import Cotraining, StaticMixture
from transfuse.cotrain.dynamic_sampler import DynamicSampler
from transfuse.cotrain.vocabulary import extend_vocabulary

__all__ = ["Cotraining", "DynamicSampler", "StaticMixture", "extend_vocabulary"]
