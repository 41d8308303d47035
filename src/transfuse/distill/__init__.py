"""Distillation: knowledge carried by what a teacher says, or how it sees, the same samples.

Read :mod:`transfuse.distill.base` first, then any one method: each file is one system.
"""

from transfuse.distill.attention_transfer import AttentionTransfer
from transfuse.distill.base import Distillation
from transfuse.distill.bdkd import BDKD
from transfuse.distill.byte_span import ByteSpanKD
from transfuse.distill.catkd import CATKD
from transfuse.distill.distillm import DistiLLM
from transfuse.distill.dml import DML
from transfuse.distill.dpkd import DPKD
from transfuse.distill.gkd import GKD
from transfuse.distill.hints import Hints
from transfuse.distill.kd import KD
from transfuse.distill.labels import Labels
from transfuse.distill.llm_neo import LLMNeo
from transfuse.distill.minillm import MiniLLM
from transfuse.distill.online import Online
from transfuse.distill.orc import ORC
from transfuse.distill.rkd import RKD
from transfuse.distill.rskd import RSKD
from transfuse.distill.self_evolution import SelfEvolution
from transfuse.distill.seqkd import SeqKD
from transfuse.distill.sla import SLA
from transfuse.distill.sorted_logits import SortedLogitsKD
from transfuse.distill.subquadratic import Subquadratic
from transfuse.distill.swing import Swing
from transfuse.distill.taid import TAID
from transfuse.distill.tinyvit import TinyViT
from transfuse.distill.topkd import TopKD, TopKScaled
from transfuse.distill.transformed import Transformed
from transfuse.distill.wcord import WCoRD

__all__ = [
    "BDKD",
    "CATKD",
    "DML",
    "DPKD",
    "GKD",
    "KD",
    "ORC",
    "RKD",
    "RSKD",
    "SLA",
    "TAID",
    "AttentionTransfer",
    "ByteSpanKD",
    "DistiLLM",
    "Distillation",
    "Hints",
    "LLMNeo",
    "Labels",
    "MiniLLM",
    "Online",
    "SelfEvolution",
    "SeqKD",
    "SortedLogitsKD",
    "Subquadratic",
    "Swing",
    "TinyViT",
    "TopKD",
    "TopKScaled",
    "Transformed",
    "WCoRD",
]
