"""transfuse: move what a source knows into a target, and show whether it arrived.

    from transfuse import transfer
    from transfuse.distill import KD

    result = transfer(KD(temperature=4), source=teacher, target=student, data=train, validate=val, epochs=10)

Families are folders: `transfuse.distill`, ... Names below are imported when they are first used, so that
`import transfuse` and the command line cost nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transfuse.core.lazy import lazily

if TYPE_CHECKING:
    from transfuse.core.clock import Constant, Cosine, Linear, Warmup
    from transfuse.core.composition import Then
    from transfuse.core.teacher import LogitsTeacher
    from transfuse.experiment import Result, Transfer, transfer
    from transfuse.report.schema import Report
    from transfuse.weights.engine import merge

__version__ = "0.1.0"
_HOMES = {
    "transfer": "transfuse.experiment",
    "Transfer": "transfuse.experiment",
    "Result": "transfuse.experiment",
    "Report": "transfuse.report.schema",
    "merge": "transfuse.weights.engine",
    "Then": "transfuse.core.composition",
    "LogitsTeacher": "transfuse.core.teacher",
    "Linear": "transfuse.core.clock",
    "Cosine": "transfuse.core.clock",
    "Constant": "transfuse.core.clock",
    "Warmup": "transfuse.core.clock",
}
__all__ = [
    "Constant",
    "Cosine",
    "Linear",
    "LogitsTeacher",
    "Report",
    "Result",
    "Then",
    "Transfer",
    "Warmup",
    "merge",
    "transfer",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
