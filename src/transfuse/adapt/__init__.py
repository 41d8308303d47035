"""Domain adaptation: what labels of one domain teach about another one that has none.

Read :mod:`transfuse.adapt.base` first, then any one method: each file is one system.
"""

from transfuse.adapt.base import Adaptation, SourceOnly
from transfuse.adapt.dann import DANN

__all__ = ["DANN", "Adaptation", "SourceOnly"]
