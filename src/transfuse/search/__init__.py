"""Architecture search: what cheap results teach about expensive ones decides which network to train.

Read :mod:`transfuse.search.base` first. The space of networks and its codes are in :mod:`transfuse.search.space`, the
network that holds them all in :mod:`transfuse.search.elastic`, the evolution in :mod:`transfuse.search.evolution`.
"""

from transfuse.search.apq import APQ, Predictor
from transfuse.search.base import Search
from transfuse.search.elastic import ElasticNet
from transfuse.search.evolution import evolve
from transfuse.search.space import Space, Spec

__all__ = ["APQ", "ElasticNet", "Predictor", "Search", "Space", "Spec", "evolve"]
