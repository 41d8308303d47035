"""A teacher of bytes and students of other tokens: what the proofs of ByteSpanKD and SortedLogitsKD share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch.utils.data import Dataset, TensorDataset

from proofs.runner import SMOKE_SAMPLES, SMOKE_STEPS, trained
from proofs.small_text import CONTEXT, TEACHER, TRAINING, small_text
from proofs.study import Numbers
from transfuse import transfer
from transfuse.core.method import Method
from transfuse.core.vocabulary import BYTES
from transfuse.datasets import paired_tokens
from transfuse.models import DecoderLM

VOCABULARY, WINDOWS = 512, 9600
DATA = (
    "source code of CPython's library in windows of 64 bytes, of which 9,600 to train on and about 1,450 to test; the "
    "student reads a byte-pair encoding of 512 tokens, trained on the same windows, the teacher bytes"
)


def texts(windows: Dataset[Any], count: int) -> list[str]:
    """The first windows that are whole characters."""
    assert isinstance(windows, TensorDataset)
    found = (bytes(row.tolist()) for row in windows.tensors[0])
    return [window.decode() for window in found if window.isascii()][:count]


@cache
def tokenizer() -> Any:
    """Byte-pair encoding of the training windows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    encoder.train_from_iterator(texts(small_text().train, WINDOWS), trainer)
    return encoder


def student() -> DecoderLM:
    """One block of width 48: 56,016 parameters."""
    return DecoderLM(VOCABULARY, dim=48, depth=1, context=CONTEXT)


def compared(seed: int, smoke: bool, method: Method, *others: str | Method) -> Mapping[str, Numbers]:
    """Every arm with the same student and the same order of the data; nll in nats per token of the student."""
    splits, few = small_text(), SMOKE_SAMPLES if smoke else WINDOWS
    data, test = (paired_tokens(texts(part, few), tokenizer(), BYTES, CONTEXT) for part in (splits.train, splits.test))
    training: dict[str, Any] = {**TRAINING, "steps": SMOKE_STEPS if smoke else 300}
    result = transfer(
        method, trained(TEACHER, smoke), student, data, test=test, compare=others, seeds=[seed],
        task="language-model", **training,
    )  # fmt: skip
    return {arm.name: arm.evaluations[0].metrics for arm in result.arms}


def names(method: Method, others: Sequence[str | Method]) -> tuple[str, ...]:
    """The arms as they are called in a result."""
    return tuple(entry if isinstance(entry, str) else repr(entry) for entry in (method, *others))
