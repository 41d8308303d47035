"""Domain adaptation: what labels of one domain teach about another one that has none.

Read :mod:`transfuse.adapt.base` first, then any one method: each file is one system.
"""

from transfuse.adapt.base import Adaptation, SourceOnly
from transfuse.adapt.dan import DAN
from transfuse.adapt.dann import DANN
from transfuse.adapt.ktf import KTF
from transfuse.adapt.lftl import LFTL
from transfuse.adapt.mcd import MCD
from transfuse.adapt.paretoda import ParetoDA
from transfuse.adapt.source_study import SourceStudy, source_study

__all__ = ["DAN", "DANN", "KTF", "LFTL", "MCD", "Adaptation", "ParetoDA", "SourceOnly", "SourceStudy", "source_study"]
