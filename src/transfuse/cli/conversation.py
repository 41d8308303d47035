"""`transfuse chat`: prompts in, text out while it is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.decoding import generate
from transfuse.core.errors import InputError, MissingExtraError
from transfuse.datasets.documents import load_tokenizer
from transfuse.recipe import Recipe


class Conversation:
    """A model, what it reads, and what was said.

    Args:
        folder: of a run, or of a Hugging Face model.
        tokenizer: `"bytes"`, `"smollm2"`, a Hugging Face folder; None for the model's own.
        plain: continue the text, without a chat template.
        most, temperature, seed: of an answer.

    Raises:
        InputError: there is no model, or nothing says what it reads.
    """

    def __init__(self, folder: Path, tokenizer: str | None, plain: bool, most: int, temperature: float, seed: int):
        self.model = load(folder)
        if tokenizer is not None:
            self.tokenizer: Any = None if tokenizer == "bytes" else load_tokenizer(tokenizer)
        elif (own := getattr(self.model, "tokenizer", None)) is not None:
            self.tokenizer = own
        else:
            raise InputError(f"nothing says what the model in {folder} reads: give --tokenizer (bytes, or a folder)")
        self.most, self.temperature = most, temperature
        self.draw = torch.Generator().manual_seed(seed)
        self.templated = not plain and bool(getattr(self.tokenizer, "chat_template", None))
        self.said: list[dict[str, str]] = []

    def answer(self, prompt: str) -> None:
        """Write the answer to a prompt to stdout, token by token."""
        if not prompt:
            raise InputError("the prompt is empty: there is nothing to answer")
        self.said.append({"role": "user", "content": prompt})
        text = self._templated() if self.templated else prompt
        ids, shown = self._ids(text), ""
        written: list[int] = []
        end = getattr(self.tokenizer, "eos_token_id", None)

        def show(column: Tensor) -> None:
            nonlocal shown
            written.append(int(column[0]))
            if written[-1] == end:
                return
            found = self._text(written)
            if not found.endswith("\ufffd"):  # the rest of a character is still to come
                sys.stdout.write(found[len(shown) :])
                sys.stdout.flush()
                shown = found

        given: Any = {"temperature": self.temperature, "end": end, "generator": self.draw, "each": show}
        generate(self.model, ids, new_tokens=self.most, **given)
        sys.stdout.write("\n")
        self.said.append({"role": "assistant", "content": shown})

    def converse(self) -> None:
        """Ask for prompts until there is none."""
        if not sys.stdin.isatty():
            raise InputError("there is no terminal to ask: give --prompt TEXT")
        while prompt := self._asked():
            self.answer(prompt)

    def _asked(self) -> str:
        try:
            return input("> ").strip()
        except EOFError:
            return ""

    def _templated(self) -> str:
        text: str = self.tokenizer.apply_chat_template(self.said, tokenize=False, add_generation_prompt=True)
        return text

    def _ids(self, text: str) -> Tensor:
        if self.tokenizer is None:
            return torch.tensor([list(text.encode())])
        return torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]])

    def _text(self, ids: list[int]) -> str:
        if self.tokenizer is None:
            return bytes(ids).decode(errors="replace")
        text: str = self.tokenizer.decode(ids)
        return text


def load(folder: Path) -> nn.Module:
    """The student of a run, or a Hugging Face model with its tokenizer.

    Raises:
        InputError: the folder holds neither.
        MissingExtraError: transformers is not installed.
    """
    if (folder / "recipe.yaml").exists():
        return Recipe.of_run(folder).student()
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} is neither the folder of a run that was started from a recipe nor a model's")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("transformers", "llm", "a Hugging Face model") from error
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    if (folder / "tokenizer_config.json").exists():
        model.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval()
