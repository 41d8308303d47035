"""Several frozen models that answer as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transfuse.core.decoding import Reader, generate
from transfuse.core.errors import MissingExtraError, VocabularyError
from transfuse.core.outputs import modes_kept
from transfuse.core.vocabulary import compare
from transfuse.infer.base import Fused, Fusion


class Decoded(NamedTuple):
    """Texts with what was decided on the way.

    Attributes:
        tokens: `(batch, n + steps)`, the prompts first.
        alpha: `(batch, steps, experts)`.
        residuals: `(batch, steps, experts, 2)`, see :class:`~transfuse.infer.base.Fused`.
    """

    tokens: Tensor
    alpha: Tensor
    residuals: Tensor


class FusedModel(nn.Module):
    """A large model, the base of small experts, and the experts, fused at every token by a method.

    It holds the models themselves and no copies. They run in eval mode without gradients, and are left in the mode
    they were in.

    Args:
        large: the model that is moved.
        base: what the experts were tuned from.
        experts: in a list, or by name; their order is that of `alpha`.
        method: how they are fused.

    Raises:
        VocabularyError: (at the first text) the models mean different tokens by the same ids, or it cannot be known.
            Outputs beyond the common vocabulary, by which some models pad theirs, are cut off.
    """

    def __init__(
        self,
        large: nn.Module,
        base: nn.Module,
        experts: Iterable[nn.Module] | Mapping[str, nn.Module],
        method: Fusion,
    ):
        super().__init__()
        named = experts if isinstance(experts, Mapping) else {str(i): model for i, model in enumerate(experts)}
        self.large, self.base, self.method = large, base, method
        self.experts, self.names = nn.ModuleList(named.values()), tuple(named)
        self.tokenizer = getattr(large, "tokenizer", None)
        self._vocabulary: tuple[list[int], int] | None = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Fused logits `(batch, tokens, vocabulary)`; position t predicts token t + 1."""
        return self.read(input_ids, attention_mask).logits

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Fused:
        """The same with what was decided at every position: all are `(batch, tokens, ...)`."""
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with torch.no_grad(), modes_kept(*self._models):
            said = [Reader(model.eval()).logits(input_ids, seen.bool()) for model in self._models]
            fused = self._fuse([logits.flatten(0, 1) for logits in said])
        return Fused(*(found.unflatten(0, input_ids.shape) for found in fused))

    def generate(self, tokens: Tensor, *, new_tokens: int, **options: Any) -> Tensor:
        """Continue texts, each model with a cache of its own; arguments as for :meth:`decode`."""
        return self.decode(tokens, new_tokens=new_tokens, **options).tokens

    def decode(self, tokens: Tensor, *, new_tokens: int, instruction: Tensor | None = None, **options: Any) -> Decoded:
        """Continue texts, and tell what was decided at every step.

        Args:
            instruction: tokens `(m,)` that the large model alone reads before the prompts, for instance examples.
            tokens, new_tokens, options: as for :func:`transfuse.core.decoding.generate`.

        Raises:
            InputError: as :func:`transfuse.core.decoding.generate`.
        """
        steps: list[Fused] = []

        def fuse(said: list[Tensor]) -> Tensor:
            steps.append(self._fuse(said))
            return steps[-1].logits

        prefixes = {} if instruction is None else {0: instruction}
        whole = generate(self._models, tokens, new_tokens=new_tokens, fuse=fuse, prefixes=prefixes, **options)
        alpha, residuals = (torch.stack([getattr(s, name) for s in steps], 1) for name in ("alpha", "residuals"))
        return Decoded(whole, alpha, residuals)

    def logits_processor(self, mask: Tensor | None = None) -> Any:
        """The same inside `large.generate(..., logits_processor=[...])` of transformers, with all that it can do.

        Base and experts read what is generated with caches of their own. A processor is for one call; where a beam
        search turns rows around, everything is read again.

        Args:
            mask: the attention mask of the prompts, where they are padded (on the left).

        Raises:
            MissingExtraError: transformers is not installed.
        """
        try:
            from transformers import LogitsProcessor
        except ImportError as error:
            raise MissingExtraError("transformers", "hf", "a logits processor") from error
        fused, helpers = self, self._models[1:]

        class FusionProcessor(LogitsProcessor):
            def __init__(self) -> None:
                self.text: Tensor | None = None
                self.readers: list[Reader] = []

            @torch.no_grad()
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                goes_on = self.text is not None and torch.equal(input_ids[:, :-1], self.text)
                if not goes_on:
                    self.readers = [Reader(model) for model in helpers]
                new, self.text = input_ids[:, -1:] if goes_on else input_ids, input_ids
                seen = torch.ones_like(input_ids, dtype=torch.bool)
                if mask is not None:  # beams of a prompt stand one after the other
                    seen[:, : mask.shape[1]] = mask.bool().repeat_interleave(len(input_ids) // len(mask), 0)
                with modes_kept(*helpers):
                    for model in helpers:
                        model.eval()
                    said = [reader.read(new, seen[:, -new.shape[1] :]) for reader in self.readers]
                logits = fused._fuse([scores, *said]).logits.log_softmax(-1)  # beams are compared by their sums
                return nn.functional.pad(logits, (0, scores.shape[1] - logits.shape[1]), value=-torch.inf)

        return FusionProcessor()

    def train(self, mode: bool = True) -> FusedModel:
        self.training = mode  # the models are others', and stay in the mode they are in
        return self

    @property
    def _models(self) -> list[nn.Module]:
        return [self.large, self.base, *self.experts]

    def _fuse(self, said: list[Tensor]) -> Fused:
        widths = [logits.shape[-1] for logits in said]
        if self._vocabulary is None or self._vocabulary[0] != widths:
            named = {"the large model": self.large, "the base": self.base}
            named |= {f"the expert {name!r}": model for name, model in zip(self.names, self.experts, strict=True)}
            self._vocabulary = widths, common_vocabulary(named, widths)
        large, base, *experts = (logits[:, : self._vocabulary[1]] for logits in said)
        return self.method.fuse(large, base, experts)


def common_vocabulary(models: Mapping[str, nn.Module], widths: list[int]) -> int:
    """How many tokens, from id 0 on, mean the same to all models.

    Args:
        models: by what to call them in messages, the one that all are compared with first; the `tokenizer` of each is
            read where it has one.
        widths: the number of outputs of each.

    Raises:
        VocabularyError: they mean different tokens, or it cannot be known and their numbers differ.
    """
    (first, large), *others = models.items()
    ours, common = getattr(large, "tokenizer", None), widths[0]
    for (name, model), width in zip(others, widths[1:], strict=True):
        theirs = getattr(model, "tokenizer", None)
        if ours is None or theirs is None:
            if width == widths[0]:
                continue
            raise VocabularyError(
                f"{first} has {widths[0]} outputs, {name} {width}, and what their ids mean is not known: logits are "
                "fused token by token, so set `model.tokenizer` on all models to have the bytes of tokens compared"
            )
        relation = compare(ours, theirs, widths[0], width)
        if relation.kind == "different":
            token, mine, other = relation.differing[0]
            raise VocabularyError(
                f"{first} and {name} mean different tokens by the same ids ({token}: {mine!r} and {other!r}), so their "
                "logits cannot be fused: take small models with the tokenizer of the large one"
            )
        common = min(common, relation.common)
    return common
