"""Knowledge that is moved while a frozen model answers: nothing is trained, outputs are put together.

Read :mod:`transfuse.infer.base` first. What a transfer gives back is in :mod:`transfuse.infer.fused`.
"""

from transfuse.infer.base import Fused, Fusion
from transfuse.infer.dynamic_fusion import DynamicFusion
from transfuse.infer.fused import Decoded, FusedModel
from transfuse.infer.static_fusion import StaticFusion

__all__ = ["Decoded", "DynamicFusion", "Fused", "FusedModel", "Fusion", "StaticFusion"]
