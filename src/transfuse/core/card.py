"""What the catalogue knows about a method."""

from __future__ import annotations

from dataclasses import dataclass

CARRIES = ("outputs", "features", "relations", "attention", "weights", "data", "gradients", "nothing")
TEACHERS = ("full", "features", "topk", "sampled", "text", "weights", "data", "tasks", "clients", "none")
DATA = ("labelled", "few-labelled", "unlabelled", "private", "none")
TASKS = ("classification", "language-model", "token-classification", "segmentation", "regression")


@dataclass(frozen=True, slots=True)
class Card:
    """A method's entry in the catalogue. Written as literals, so that it can be read without importing torch.

    Attributes:
        paper: authors, venue, year.
        arxiv: arXiv id, where there is one.
        sheet: number of the system's sheet; None for what is not one of the 176.
        carries: what carries the knowledge, one of `CARRIES`.
        teacher: what the source must give, one of `TEACHERS`: full logits, features (and logits), top-k
            log-probabilities, sampled tokens, text, weights, or nothing.
        also: other forms of source that serve as well, from `TEACHERS`: of full logits, top-k or sampled ones are kept.
        data: the least that the method needs, one of `DATA`.
        tasks: the tasks it is defined for, from `TASKS`.
        control: whether it is a control arm rather than a method.
    """

    paper: str
    arxiv: str | None = None
    sheet: int | None = None
    carries: str = "outputs"
    teacher: str = "full"
    also: tuple[str, ...] = ()
    data: str = "unlabelled"
    tasks: tuple[str, ...] = ("classification",)
    control: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        """Every form of source that the method can learn from."""
        return (self.teacher, *self.also)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("carries", self.carries, CARRIES),
            ("teacher", self.teacher, TEACHERS),
            *(("also", teacher, TEACHERS) for teacher in self.also),
            ("data", self.data, DATA),
            *(("tasks", task, TASKS) for task in self.tasks),
        ):
            if value not in known:
                raise ValueError(f"card: {name} is {value!r}, known are {', '.join(known)}")
