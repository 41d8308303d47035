"""The mathematics that methods share: pure functions, tensors in, tensors out, torch only.

- :mod:`~transfuse.losses.divergence`: student against teacher logits, one value per sample, token or pixel
- :mod:`~transfuse.losses.supervised`: logits against labels, one value per label
- :mod:`~transfuse.losses.feature`: student against teacher features, one value per sample
- :mod:`~transfuse.losses.adversarial`: domains against a discriminator, one value per sample
- :mod:`~transfuse.losses.relation`: relations within a batch, one scalar
- :mod:`~transfuse.losses.information`: how sure and how balanced predictions are
- :mod:`~transfuse.losses.reduction`: how those values become a :class:`Term`, which the trainer divides

What runs models, keeps state or follows a schedule is a method and lives in its family's folder.
"""

from transfuse.losses.adversarial import domain_cross_entropy, reverse_gradient
from transfuse.losses.divergence import (
    Direction,
    balanced_kl,
    jensen_shannon,
    kl_divergence,
    skew_kl,
    soft_cross_entropy,
)
from transfuse.losses.feature import attention_map, attention_transfer, mean_squared_error
from transfuse.losses.information import entropy, marginal_entropy, mutual_information
from transfuse.losses.reduction import IGNORE, Term, classes_last, mask_from_lengths, next_token
from transfuse.losses.relation import mmd, rkd_angle, rkd_distance
from transfuse.losses.supervised import cross_entropy

__all__ = [
    "IGNORE",
    "Direction",
    "Term",
    "attention_map",
    "attention_transfer",
    "balanced_kl",
    "classes_last",
    "cross_entropy",
    "domain_cross_entropy",
    "entropy",
    "jensen_shannon",
    "kl_divergence",
    "marginal_entropy",
    "mask_from_lengths",
    "mean_squared_error",
    "mmd",
    "mutual_information",
    "next_token",
    "reverse_gradient",
    "rkd_angle",
    "rkd_distance",
    "skew_kl",
    "soft_cross_entropy",
]
