"""Knowledge in weights: merging checkpoints, task vectors, adapters, growth and pruning.

Read :mod:`transfuse.weights.base` first. Merges of files: :mod:`transfuse.weights.engine`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transfuse.core.lazy import lazily

if TYPE_CHECKING:
    from transfuse.weights.adamerging import AdaMerging
    from transfuse.weights.adapterfusion import AdapterFusion
    from transfuse.weights.adapters import BottleneckAdapter
    from transfuse.weights.atlas import ATLAS
    from transfuse.weights.axis import AXIS
    from transfuse.weights.base import Merge
    from transfuse.weights.breadcrumbs import Breadcrumbs
    from transfuse.weights.composed import Composed
    from transfuse.weights.cross_d_conv import CrossDConv
    from transfuse.weights.dare import DARE
    from transfuse.weights.della import DELLA
    from transfuse.weights.emoe import EMoE
    from transfuse.weights.emr import EMR
    from transfuse.weights.engine import Merged, merge
    from transfuse.weights.fisher import Fisher
    from transfuse.weights.graftllm import GraftLLM
    from transfuse.weights.karcher import Karcher
    from transfuse.weights.linear import Linear
    from transfuse.weights.lorashear import LoRAShear
    from transfuse.weights.low_rank_clone import LowRankClone
    from transfuse.weights.master_asr import MasterASR
    from transfuse.weights.model_stock import ModelStock
    from transfuse.weights.multislerp import MultiSLERP
    from transfuse.weights.nearswap import NearSwap
    from transfuse.weights.neural_nuggets import NeuralNuggets
    from transfuse.weights.neuron_specialization import NeuronSpecialization
    from transfuse.weights.nuslerp import NuSLERP
    from transfuse.weights.passthrough import Passthrough
    from transfuse.weights.regmean import RegMean
    from transfuse.weights.scale_out import ScaleOut
    from transfuse.weights.scale_up import ScaleUp
    from transfuse.weights.scalearn import ScaLearn
    from transfuse.weights.sce import SCE
    from transfuse.weights.slerp import SLERP
    from transfuse.weights.soup import GreedySoup
    from transfuse.weights.subspaces import TSVM, IsoC
    from transfuse.weights.task_arithmetic import TaskArithmetic
    from transfuse.weights.ties import TIES
    from transfuse.weights.tokalign import TokAlign
    from transfuse.weights.weight_squeezing import WeightSqueezing

_HOMES = {
    "ATLAS": "atlas",
    "AXIS": "axis",
    "AdaMerging": "adamerging",
    "AdapterFusion": "adapterfusion",
    "BottleneckAdapter": "adapters",
    "Breadcrumbs": "breadcrumbs",
    "Composed": "composed",
    "CrossDConv": "cross_d_conv",
    "DARE": "dare",
    "DELLA": "della",
    "EMR": "emr",
    "EMoE": "emoe",
    "Fisher": "fisher",
    "GraftLLM": "graftllm",
    "GreedySoup": "soup",
    "IsoC": "subspaces",
    "Karcher": "karcher",
    "Linear": "linear",
    "LoRAShear": "lorashear",
    "LowRankClone": "low_rank_clone",
    "MasterASR": "master_asr",
    "Merge": "base",
    "Merged": "engine",
    "ModelStock": "model_stock",
    "MultiSLERP": "multislerp",
    "NearSwap": "nearswap",
    "NeuralNuggets": "neural_nuggets",
    "NeuronSpecialization": "neuron_specialization",
    "NuSLERP": "nuslerp",
    "Passthrough": "passthrough",
    "RegMean": "regmean",
    "SCE": "sce",
    "SLERP": "slerp",
    "ScaLearn": "scalearn",
    "ScaleOut": "scale_out",
    "ScaleUp": "scale_up",
    "TIES": "ties",
    "TSVM": "subspaces",
    "TaskArithmetic": "task_arithmetic",
    "TokAlign": "tokalign",
    "WeightSqueezing": "weight_squeezing",
    "merge": "engine",
}
"""Names are imported when they are first used: a merge of files wants no trainer."""
__all__ = [
    "ATLAS",
    "AXIS",
    "DARE",
    "DELLA",
    "EMR",
    "SCE",
    "SLERP",
    "TIES",
    "TSVM",
    "AdaMerging",
    "AdapterFusion",
    "BottleneckAdapter",
    "Breadcrumbs",
    "Composed",
    "CrossDConv",
    "EMoE",
    "Fisher",
    "GraftLLM",
    "GreedySoup",
    "IsoC",
    "Karcher",
    "Linear",
    "LoRAShear",
    "LowRankClone",
    "MasterASR",
    "Merge",
    "Merged",
    "ModelStock",
    "MultiSLERP",
    "NearSwap",
    "NeuralNuggets",
    "NeuronSpecialization",
    "NuSLERP",
    "Passthrough",
    "RegMean",
    "ScaLearn",
    "ScaleOut",
    "ScaleUp",
    "TaskArithmetic",
    "TokAlign",
    "WeightSqueezing",
    "merge",
]

__getattr__, __dir__ = lazily(__name__, {name: f"{__name__}.{home}" for name, home in _HOMES.items()})
