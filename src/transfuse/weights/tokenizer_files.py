"""Tokenizer files of checkpoints: read, compared, and written for the tokens that a merge has."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transfuse.core.errors import InputError, MissingExtraError, VocabularyError
from transfuse.weights.checkpoint import Checkpoint

FILE = "tokenizer.json"


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """The tokenizer in a checkpoint's folder.

    Raises:
        InputError: there is none.
        MissingExtraError: tokenizers is not installed.
    """
    file = None if checkpoint.folder is None else checkpoint.folder / FILE
    if file is None or not file.exists():
        raise InputError(f"{checkpoint.name} has no {FILE}, so what its ids mean is not known")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingExtraError("tokenizers", "hf", f"reading a {FILE}") from None
    return Tokenizer.from_file(str(file))


def same_tokens(checkpoints: Sequence[Checkpoint]) -> bool | None:
    """Whether all tokenizers in the checkpoints' folders give the same ids; None where one has none."""
    files = [None if c.folder is None else c.folder / FILE for c in checkpoints]
    if any(file is None or not file.exists() for file in files):
        return None
    texts = [file.read_text(encoding="utf-8") for file in files if file is not None]
    if len(set(texts)) == 1:
        return True
    vocabularies = [_ids(json.loads(text)) for text in texts]
    return all(found == vocabularies[0] for found in vocabularies)


def grown(tokenizer: Any, tokens: Sequence[bytes | None], first: int) -> Any:
    """A tokenizer of `tokenizers` that knows the added tokens, too.

    Args:
        tokens: by id. first: the id from which on they are added.

    Raises:
        VocabularyError: an added token is no text, so no tokenizer could be told to look for it.
    """
    from tokenizers import AddedToken, Tokenizer

    copied = Tokenizer.from_str(tokenizer.to_str())
    for number, token in enumerate(tokens[first:], first):
        try:
            text = (token or b"").decode()
        except UnicodeDecodeError:
            text = ""
        if not text:
            raise VocabularyError(f"the token {token!r} of another model is no text, so it cannot be added: use 'base'")
        copied.add_tokens([AddedToken(text, normalized=False)])
        if copied.token_to_id(text) != number:
            raise VocabularyError(
                f"the token {text!r} would get the id {copied.token_to_id(text)}, and its row is {number}: the head of "
                "the reference is padded. Use 'base', or cut its padding first"
            )
    return copied


def cut(described: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """What a tokenizer.json says with some tokens alone, numbered in their order.

    Merges of byte-pair encodings that lead to a token that is gone, or from one, are left out; so a text is cut into
    the pieces that are left.

    Args:
        kept: ids of the tokens that stay.

    Raises:
        VocabularyError: what would be lost makes texts unreadable: a single character of a byte-pair encoding, the
            unknown token, or one that is put around texts.
    """
    found, new = copy.deepcopy(dict(described)), {old: i for i, old in enumerate(kept)}
    model = found["model"]
    ids = _ids(found)
    lost = {token for token, i in ids.items() if i not in new}
    needed = {model.get("unk_token")} | set(_around(found.get("post_processor")))
    if "merges" in model:
        needed |= {token for token in model["vocab"] if len(token) == 1}
    if gone := sorted(token for token in needed & lost if token is not None):
        raise VocabularyError(
            f"{', '.join(map(repr, gone[:5]))} of the reference's tokenizer is not in every model, and without it "
            "texts cannot be read: use vocabulary='base'"
        )
    if isinstance(model["vocab"], Mapping):
        model["vocab"] = {token: new[i] for token, i in model["vocab"].items() if i in new}
    else:  # pieces with their scores, by id
        model["vocab"] = [piece for i, piece in enumerate(model["vocab"]) if i in new]
        if model.get("unk_id") is not None:
            if model["unk_id"] not in new:
                raise VocabularyError("the reference's unknown token is not in every model: use vocabulary='base'")
            model["unk_id"] = new[model["unk_id"]]
    if "merges" in model:
        inside = model.get("continuing_subword_prefix") or ""
        model["merges"] = [pair for pair in model["merges"] if _stays(pair, inside, model["vocab"])]
    found["added_tokens"] = [t | {"id": new[t["id"]]} for t in found.get("added_tokens", []) if t["id"] in new]
    _renumber(found.get("post_processor"), {token: new[i] for token, i in ids.items() if i in new})
    return found


def _stays(pair: Any, inside: str, vocabulary: Mapping[str, int]) -> bool:
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left in vocabulary and right in vocabulary and left + right.removeprefix(inside) in vocabulary


def _around(processor: Any) -> list[str]:
    """The tokens that are put around texts."""
    if not processor:
        return []
    if processor["type"] == "Sequence":
        return [token for part in processor["processors"] for token in _around(part)]
    if processor["type"] == "TemplateProcessing":
        return [token for special in processor["special_tokens"].values() for token in special["tokens"]]
    return [processor[name][0] for name in ("sep", "cls") if name in processor]


def _renumber(processor: Any, ids: Mapping[str, int]) -> None:
    """Give the tokens that are put around texts their new ids, in place."""
    if not processor:
        return
    for part in processor.get("processors", ()):
        _renumber(part, ids)
    for special in processor.get("special_tokens", {}).values():
        special["ids"] = [ids[token] for token in special["tokens"]]
    for name in ("sep", "cls"):
        if name in processor:
            processor[name] = [processor[name][0], ids[processor[name][0]]]


def renumbered(config: Mapping[str, Any], kept: Sequence[int], name: str) -> dict[str, Any]:
    """A config with the new ids of what it names by id (`eos_token_id`, `added_tokens_decoder`, ...).

    Raises:
        VocabularyError: such a token is gone.
    """
    new, found = {old: i for i, old in enumerate(kept)} | {-1: -1}, dict(config)  # -1 says that there is none
    for key, value in config.items():
        if key.endswith("_token_id") and value is not None:
            several = value if isinstance(value, list) else [value]
            if gone := [i for i in several if i not in new]:
                raise VocabularyError(f"{key} {gone[0]} in {name} is a token that not every model has: use 'base'")
            found[key] = [new[i] for i in several] if isinstance(value, list) else new[value]
    if "added_tokens_decoder" in config:
        added = {int(i): token for i, token in config["added_tokens_decoder"].items()}
        found["added_tokens_decoder"] = {str(new[i]): token for i, token in added.items() if i in new}
    return found


def _ids(described: Mapping[str, Any]) -> dict[str, int]:
    """Which token has which id, from a tokenizer.json."""
    vocabulary = described.get("model", {}).get("vocab", {})
    plain = dict(vocabulary) if isinstance(vocabulary, dict) else {t[0]: i for i, t in enumerate(vocabulary)}
    return plain | {t["content"]: t["id"] for t in described.get("added_tokens", [])}
