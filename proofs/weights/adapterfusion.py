"""AdapterFusion: six tasks' adapters for a target task with 200 labels."""

from __future__ import annotations

from proofs.small_adapters import ADAPTER, ALONE, accuracy, bank, parts
from proofs.study import Numbers, Study
from transfuse.distill import Labels
from transfuse.weights import AdapterFusion, ScaLearn

LABELS = 200
OWN = "BottleneckAdapter of the target alone"
FULL = "fine-tuning of all weights"
MEAN = "uniform average of the adapters"
SHUFFLED = "fusion with sources of shuffled labels"


def trial(seed: int, smoke: bool, validate: bool = False) -> dict[str, Numbers]:
    train, test = parts(LABELS, seed, validate)
    found: dict[str, Numbers] = {}
    own, model, _ = accuracy(ADAPTER, None, train, test, seed, smoke, **ALONE)
    found[OWN] = {"accuracy": own}
    found[FULL] = {"accuracy": accuracy(Labels(), None, train, test, seed, smoke, lr=1e-3)[0]}
    average = ScaLearn(lr_scale=0, total=1.0, dropout=0.0)
    found[MEAN] = {"accuracy": accuracy(average, {**bank(smoke), "own": model}, train, test, seed, smoke)[0]}
    for name, shuffled in ((repr(AdapterFusion()), False), (SHUFFLED, True)):
        given = {**bank(smoke, shuffled), "own": model}
        score, _, panels = accuracy(AdapterFusion(), given, train, test, seed, smoke)
        taken = [row[-1] for panel in panels for row in panel["values"]]
        found[name] = {"accuracy": score, "attention to its own adapter": sum(taken) / len(taken)}
    return found


PROOF = Study(
    name="adapterfusion",
    proves=("AdapterFusion",),
    data=(
        "Python's standard library as windows of 16 words (vocabulary of 2,000). Encoder of 3 blocks, width 64, "
        "pre-trained on masked words of 29 modules; adapters of bottleneck 8 of 6 source tasks on those modules (which "
        "of 9 or 10 modules, three times; how the next line begins; prose or code; indentation; 3,000 windows each) "
        "and for the target: which of 8 packages a window is from, with 200 labels and 600 other test "
        "windows, and no file in common with the sources."
    ),
    trial=trial,
    arms=(repr(AdapterFusion()), OWN, FULL, MEAN, SHUFFLED),
    baseline=OWN,
    metric="accuracy",
    expected=(
        "AdapterFusion is at least as good as the target's own adapter and better than the uniform average. With "
        "sources of shuffled labels it stays within 1 point of the own adapter, and attends more to it."
    ),
    notes=(
        "A first run with an encoder, adapters and fusions trained for a tenth as long said nothing, for all arms were "
        "near chance (12.5 %). The budgets are longer since, and learning rates were chosen on validation windows with "
        "another seed. Now the target's own adapter learns something (23 %), all weights more (30 %), and the other "
        "tasks' adapters add nothing to it: fusion is within noise of the own adapter, to which it gives 82 to 93 % of "
        "its attention, and with sources of shuffled labels it is as good. Which package a window is from follows from "
        "words that the source tasks had no reason to tell apart."
    ),
)
