"""Inference: knowledge that moves while frozen models answer; nothing is trained, outputs are put together.

Read :mod:`transfuse.infer.base` first, then any one method: each file is one system.
"""

from transfuse.infer.base import FusedModel, Fusion
from transfuse.infer.dynamic_fusion import DynamicFusion
from transfuse.infer.static_fusion import StaticFusion

__all__ = ["DynamicFusion", "FusedModel", "Fusion", "StaticFusion"]
