"""Class discovery: what labelled classes teach about other classes that nobody labelled.

Read :mod:`transfuse.discover.base` first, then any one method: each file is one system. Heads made of prototypes and
the model that is deployed with them are in :mod:`transfuse.discover.heads`, views in :mod:`transfuse.discover.views`.
"""

from transfuse.discover.base import Discovery
from transfuse.discover.crkd import CrKD

__all__ = ["CrKD", "Discovery"]
