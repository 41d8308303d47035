"""The family of inference: knowledge that moves while frozen models answer. Nothing is trained.

A method of this family is one function, `fuse(large, base, experts)`: from the next-token logits of every model to
those that are drawn from. What is deployed is a model that runs all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.decoding import Reader, generate
from transfuse.core.errors import InputError
from transfuse.core.method import Method
from transfuse.core.outputs import call, find_logits, full_precision
from transfuse.core.phases import Observe, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Generated
from transfuse.core.vocabulary import common_classes


class Fusion(Method):
    """Base of the family. `"target"` is a large model; the sources are a small base and what was tuned from it.

    Sources are given by name, `{"base": small, "expert": tuned, ...}`, or as a list with the base first. All read the
    same tokens; output layers that differ in padding are cut to what they share.
    """

    family = "infer"
    needs_data = False

    def fuse(self, large: Tensor, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """Logits `(rows, vocabulary)` from those of all models, in float32 and of the same vocabulary."""
        raise NotImplementedError

    def setup(self, run: Run, sample: Batch | None) -> None:
        roles = run.sources
        if len(roles) < 2:
            raise InputError(
                f"{type(self).__name__} needs a small base model and at least one that was tuned from it: pass "
                'source={"base": small, "expert": tuned}'
            )
        first = "source.base" if "source.base" in roles else roles[0]
        ordered = [run[first], *(run[role] for role in roles if role != first)]
        self._helpers = ordered  # a list, so that the models stay what they are: roles, not parts of this method

    def stage(self, i: int, run: Run) -> Stage:
        return Stage({"nothing": Generated(1)}, [Observe("nothing", lambda batches, run: None)], steps=1, train=())

    def deploy(self, target: nn.Module) -> nn.Module:
        base, *experts = copy.deepcopy(self._helpers)  # those of the caller stay as they are, also their mode
        return FusedModel(target, base, experts, self.fuse)


class FusedModel(nn.Module):
    """A large model, a small one and its experts, that answer as one.

    Args:
        large, base, experts: frozen; read the same tokens.
        fuse: from their logits to one, see :meth:`Fusion.fuse`.
    """

    def __init__(
        self,
        large: nn.Module,
        base: nn.Module,
        experts: Sequence[nn.Module],
        fuse: Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor],
    ):
        super().__init__()
        self.large, self.base, self.experts, self.fuse = large, base, nn.ModuleList(experts), fuse

    @property
    def models(self) -> list[nn.Module]:
        """All of them, the large one first."""
        return [self.large, self.base, *self.experts]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Fused logits at every position, `(batch, tokens, vocabulary)`."""
        inputs = input_ids if attention_mask is None else {"input_ids": input_ids, "attention_mask": attention_mask}
        logits = [full_precision(find_logits(call(model, inputs))) for model in self.models]
        return self._fused([one.flatten(0, 1) for one in logits]).view(*input_ids.shape, -1)

    @torch.no_grad()
    def generate(self, tokens: Tensor, **options: Any) -> Tensor:
        """Continue prompts with all models at once; options are those of :func:`transfuse.core.decoding.generate`."""
        return generate(self.models, tokens, fuse=self._fused, **options)

    def logits_processor(self) -> Callable[[Tensor, Tensor], Tensor]:
        """What Hugging Face's `large.generate(logits_processor=[...])` takes, for prompts of one length."""
        readers = [Reader(model.eval(), False) for model in self.models[1:]]

        @torch.no_grad()
        def process(input_ids: Tensor, scores: Tensor) -> Tensor:
            others = [reader(input_ids, torch.ones_like(input_ids)) for reader in readers]
            return self._fused([full_precision(scores), *others])

        return process

    def _fused(self, logits: list[Tensor]) -> Tensor:
        large, base, *experts = logits
        shared = large.shape[-1]
        for model, one in zip(self.models[1:], logits[1:], strict=True):
            shared = min(shared, common_classes(self.large, model, large.shape[-1], one.shape[-1]))
        large, base, *experts = (one[:, :shared] for one in logits)
        excluded = torch.stack([one == -torch.inf for one in (large, base, *experts)]).any(0)
        # Finite meanwhile, for a difference of infinities is no number; so unlikely is as good as excluded.
        large, base, *experts = (
            one.masked_fill(excluded, torch.finfo(one.dtype).min / 4) for one in (large, base, *experts)
        )
        return self.fuse(large, base, experts).masked_fill(excluded, -torch.inf)
