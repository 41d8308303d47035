"""Methods that make their own data: data-free distillation."""

from transfuse.synthesize.base import DataFree
from transfuse.synthesize.cae_dfkd import CAEDFKD
from transfuse.synthesize.retain_acquire import RetainAcquire

__all__ = ["CAEDFKD", "DataFree", "RetainAcquire"]
