"""AdapterFusion: six tasks' adapters for a target task with 200 labels."""

from __future__ import annotations

from proofs.small_adapters import ADAPTER, accuracy, bank, parts
from proofs.study import Numbers, Study
from transfuse.distill import Labels
from transfuse.weights import AdapterFusion, ScaLearn

LABELS = 200
OWN = "BottleneckAdapter of the target alone"
FULL = "fine-tuning of all weights"
MEAN = "uniform average of the adapters"
SHUFFLED = "fusion with sources of shuffled labels"
FUSION = {"lr": 1e-3}


def trial(seed: int, smoke: bool, validate: bool = False) -> dict[str, Numbers]:
    train, test = parts(LABELS, seed, validate)
    found: dict[str, Numbers] = {}
    own, model, _ = accuracy(ADAPTER, None, train, test, seed, smoke)
    found[OWN] = {"accuracy": own}
    found[FULL] = {"accuracy": accuracy(Labels(), None, train, test, seed, smoke, lr=1e-3)[0]}
    average = ScaLearn(lr_scale=0, total=1.0, dropout=0.0)
    found[MEAN] = {"accuracy": accuracy(average, {**bank(smoke), "own": model}, train, test, seed, smoke)[0]}
    for name, shuffled in ((repr(AdapterFusion()), False), (SHUFFLED, True)):
        given = {**bank(smoke, shuffled), "own": model}
        score, _, panels = accuracy(AdapterFusion(), given, train, test, seed, smoke, **FUSION)
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
        "Nothing can be read from this: with an encoder and adapters trained for so few updates every adapter"
        " arm is near chance (12.5 %), full fine-tuning at 25 %. The target task was made easier once, after "
        "validation with another seed had left all arms at chance; learning rates were not chosen anew. "
        "Attention does move to the target's own adapter when the sources are shuffled."
    ),
)
