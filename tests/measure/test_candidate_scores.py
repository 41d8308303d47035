"""Candidate scores against a loop that runs the model on one sequence at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from transfuse.core.errors import InputError
from transfuse.measure import CandidateScorer, Cloze
from transfuse.measure.candidates import vocabulary_overlap

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
CLOZES = [
    Cloze("x <mask> yy z", ("ab", "c", "def"), (0,)),
    Cloze("<mask> w", ("a", "bcd"), (1,)),
]


class Letters:
    """A tokenizer of letters: `[` and `]` around a sentence, `#` for a mask, `~` for a sentinel; spaces are nothing."""

    special = "[]#~"
    mask_token_id, bos_token_id, unk_token_id = 2, 0, -1

    def __init__(self, around: bool = True):
        self.around = around

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [4 + ord(c) - ord("a") for c in text if c.isalpha()]
        return {"input_ids": [0, *ids, 1] if add_special_tokens and self.around else ids}

    def convert_tokens_to_ids(self, token: str) -> int:
        return 3 if token == "<extra_id_0>" else -1


def ids(text: str) -> list[int]:
    return [Letters.special.index(c) if c in Letters.special else 4 + ord(c) - ord("a") for c in text if c != " "]


@torch.no_grad()
def nll(model: Any, text: str, place: int, token: str, **more: Any) -> float:
    logits = model(input_ids=torch.tensor([ids(text)]), **more).logits
    return -logits[0, place].double().log_softmax(0)[ids(token)[0]].item()


@pytest.fixture(scope="module")
def masked() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=20, initializer_range=0.5, **SIZES)
    return transformers.BertForMaskedLM(config).eval()


@pytest.fixture(scope="module")
def causal() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=20, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def seq2seq() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=1
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def near(found: list[Tensor], expected: list[list[float]]) -> bool:
    return all(f.tolist() == pytest.approx(e, abs=1e-4) for f, e in zip(found, expected, strict=True))


def test_masked_models_are_read_left_to_right(masked: Any) -> None:
    found = CandidateScorer(masked, Letters())(CLOZES)
    ab = (nll(masked, "[x##yyz]", 2, "a") + nll(masked, "[xa#yyz]", 3, "b")) / 2
    d = [nll(masked, f"[x{'def'[:k]}{'#' * (3 - k)}yyz]", 2 + k, "def"[k]) for k in range(3)]
    bcd = [nll(masked, f"[{'bcd'[:k]}{'#' * (3 - k)}w]", 1 + k, "bcd"[k]) for k in range(3)]
    assert near(found, [[ab, nll(masked, "[x#yyz]", 2, "c"), sum(d) / 3], [nll(masked, "[#w]", 1, "a"), sum(bcd) / 3]])


def test_causal_models_are_read_over_the_sentence_or_the_candidate(causal: Any) -> None:
    def mean(text: str, places: range) -> float:
        return sum(nll(causal, text, p - 1, text[p]) for p in places) / len(places)

    tokenizer = Letters(around=False)  # it puts nothing before a text, so the scorer does
    sentence = CandidateScorer(causal, tokenizer, "causal")(CLOZES)
    first = [mean(t, range(1, len(t))) for t in ("[xabyyz", "[xcyyz", "[xdefyyz")]
    assert near(sentence, [first, [mean("[aw", range(1, 3)), mean("[bcdw", range(1, 5))]])
    candidate = CandidateScorer(causal, tokenizer, "causal", span="candidate")(CLOZES)
    first = [mean("[xabyyz", range(2, 4)), mean("[xcyyz", range(2, 3)), mean("[xdefyyz", range(2, 5))]
    assert near(candidate, [first, [mean("[aw", range(1, 2)), mean("[bcdw", range(1, 4))]])


def test_encoder_decoders_are_read_after_the_sentinel(seq2seq: Any) -> None:
    def mean(text: str, candidate: str) -> float:
        decoder = torch.tensor([[1, 3, *ids(candidate)[:-1]]])
        return sum(nll(seq2seq, text, 1 + k, c, decoder_input_ids=decoder) for k, c in enumerate(candidate)) / len(
            candidate
        )

    found = CandidateScorer(seq2seq, Letters(), "seq2seq")(CLOZES)
    assert near(found, [[mean("[x~yyz]", c) for c in ("ab", "c", "def")], [mean("[~w]", c) for c in ("a", "bcd")]])


@pytest.mark.parametrize("kind", ["masked", "causal", "seq2seq"])
def test_batches_and_padding_change_nothing_and_so_does_the_mode(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    whole = CandidateScorer(model, Letters(), kind)(CLOZES)
    training = copy.deepcopy(model).train()
    single = CandidateScorer(training, Letters(), kind, batch_size=1)(CLOZES)
    assert near(whole, [s.tolist() for s in single])
    assert training.training


def test_the_mean_does_not_favour_short_candidates(masked: Any) -> None:
    uniform = copy.deepcopy(masked)
    for p in uniform.parameters():
        torch.nn.init.zeros_(p)
    (found, _) = CandidateScorer(uniform, Letters())(CLOZES)
    assert found.tolist() == pytest.approx([torch.tensor(30.0).log().item()] * 3, rel=1e-5)


def test_a_hugging_face_tokenizer_gives_the_same_as_whole_sentences(causal: Any) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {w: i for i, w in enumerate(["[UNK]", "[BOS]", "The", "cat", "dog", "sat", "."])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", bos_token="[BOS]")
    (found,) = CandidateScorer(causal, tokenizer, "causal")([Cloze("The <mask> sat .", ("cat", "dog"), (0,))])
    with torch.no_grad():
        for score, word in zip(found.tolist(), ("cat", "dog"), strict=True):
            whole = torch.tensor([[1, *tokenizer(f"The {word} sat .")["input_ids"]]])
            loss = torch.nn.functional.cross_entropy(causal(whole).logits[0, :-1], whole[0, 1:])
            assert score == pytest.approx(loss.item(), abs=1e-5)


def test_what_is_missing_is_named(masked: Any, seq2seq: Any) -> None:
    class Bare(Letters):
        mask_token_id = None  # type: ignore[assignment]

    with pytest.raises(InputError, match="no mask_token_id"):
        CandidateScorer(masked, Bare())
    with pytest.raises(InputError, match="unknown kind 'mask'"):
        CandidateScorer(masked, Letters(), "mask")
    with pytest.raises(InputError, match="unknown span"):
        CandidateScorer(masked, Letters(), span="word")
    with pytest.raises(InputError, match="config.decoder_start_token_id"):
        CandidateScorer(torch.nn.Linear(1, 1), Letters(), "seq2seq")
    with pytest.raises(InputError, match="'1' .* has no tokens"):
        CandidateScorer(masked, Letters())([Cloze("x <mask>", ("1",), (0,))])


def test_vocabulary_overlap_is_shared_tokens_over_all() -> None:
    assert vocabulary_overlap({"a": [1, 2, 2], "b": [2, 3]})[0].tolist() == [1, pytest.approx(1 / 3)]
