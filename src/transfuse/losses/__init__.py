"""The mathematics that methods share: pure functions, tensors in, tensors out, torch only.

- :mod:`~transfuse.losses.divergence`: student against teacher logits, one value per sample, token or pixel
- :mod:`~transfuse.losses.match`: which divergence, as a value; of logits, of what was kept of them, or of logits that
  have not been computed
- :mod:`~transfuse.losses.scores`: what may stand in the place of logits
- :mod:`~transfuse.losses.sparse`: student logits against top-k or sampled targets
- :mod:`~transfuse.losses.preference`: one answer rather than another
- :mod:`~transfuse.losses.supervised`: logits against labels, one value per label
- :mod:`~transfuse.losses.feature`: student against teacher features, one value per sample
- :mod:`~transfuse.losses.adversarial`: domains against a discriminator, one value per sample
- :mod:`~transfuse.losses.relation`: relations within a batch, one scalar
- :mod:`~transfuse.losses.information`: how sure and how balanced predictions are
- :mod:`~transfuse.losses.anchor`: how far parameters have moved, one scalar
- :mod:`~transfuse.losses.prototypes`: class means, how far those of two domains lie apart, nearness to anchors
- :mod:`~transfuse.losses.data_free`: a frozen teacher's answers to made images, one scalar
- :mod:`~transfuse.losses.contrastive`: which samples belong together
- :mod:`~transfuse.losses.decoupled`: groups of classes apart from each other
- :mod:`~transfuse.losses.routing`: how a router spreads tokens over experts
- :mod:`~transfuse.losses.transform`: what a teacher's logits become before they are compared
- :mod:`~transfuse.losses.transport`: plans of optimal transport between two sets
- :mod:`~transfuse.losses.kernels`: convolution kernels moved, turned and made of each other
- :mod:`~transfuse.losses.reduction`: how those values become a :class:`Term`, which the trainer divides

What runs models, keeps state or follows a schedule is a method and lives in its family's folder.
"""

from transfuse.losses.adversarial import domain_cross_entropy, reverse_gradient
from transfuse.losses.anchor import anchor_penalty
from transfuse.losses.contrastive import info_nce, nce
from transfuse.losses.data_free import (
    agreeing_divergence,
    batch_norm_distance,
    category_contrast,
    clamped_jensen_shannon,
    variance_within_classes,
)
from transfuse.losses.decoupled import top_k_decoupled
from transfuse.losses.divergence import (
    Direction,
    balanced_kl,
    jensen_shannon,
    kl_divergence,
    skew_kl,
    soft_cross_entropy,
    total_variation,
)
from transfuse.losses.feature import attention_map, attention_transfer, mean_absolute_error, mean_squared_error
from transfuse.losses.information import entropy, marginal_entropy, mutual_information
from transfuse.losses.match import Divergence, label_entropy, match
from transfuse.losses.preference import preference, token_margin
from transfuse.losses.prototypes import anchor_entropy, class_means, mean_alignment, soft_labels
from transfuse.losses.reduction import IGNORE, Term, classes_last, mask_from_lengths, next_token
from transfuse.losses.relation import (
    distance_correlation,
    mmd,
    rkd_angle,
    rkd_distance,
    u_centred,
    u_correlation,
    u_product,
    u_removed,
)
from transfuse.losses.routing import balance_loss, router_z_loss
from transfuse.losses.scores import Projection, Sampled, Scores, Target, TopK
from transfuse.losses.sparse import sampled_kl, top_k_kl, top_k_target
from transfuse.losses.supervised import cross_entropy, ctc, pseudo_labels
from transfuse.losses.transform import top_k_linspace, top_k_scaling
from transfuse.losses.transport import cosine_cost, cut_cost, ipot, sinkhorn

__all__ = [
    "IGNORE",
    "Direction",
    "Divergence",
    "Projection",
    "Sampled",
    "Scores",
    "Target",
    "Term",
    "TopK",
    "agreeing_divergence",
    "anchor_entropy",
    "anchor_penalty",
    "attention_map",
    "attention_transfer",
    "balance_loss",
    "balanced_kl",
    "batch_norm_distance",
    "category_contrast",
    "clamped_jensen_shannon",
    "class_means",
    "classes_last",
    "cosine_cost",
    "cross_entropy",
    "ctc",
    "cut_cost",
    "distance_correlation",
    "domain_cross_entropy",
    "entropy",
    "info_nce",
    "ipot",
    "jensen_shannon",
    "kl_divergence",
    "label_entropy",
    "marginal_entropy",
    "mask_from_lengths",
    "match",
    "mean_absolute_error",
    "mean_alignment",
    "mean_squared_error",
    "mmd",
    "mutual_information",
    "nce",
    "next_token",
    "preference",
    "pseudo_labels",
    "reverse_gradient",
    "rkd_angle",
    "rkd_distance",
    "router_z_loss",
    "sampled_kl",
    "sinkhorn",
    "skew_kl",
    "soft_cross_entropy",
    "soft_labels",
    "token_margin",
    "top_k_decoupled",
    "top_k_kl",
    "top_k_linspace",
    "top_k_scaling",
    "top_k_target",
    "total_variation",
    "u_centred",
    "u_correlation",
    "u_product",
    "u_removed",
    "variance_within_classes",
]
