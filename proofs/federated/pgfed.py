"""PGFed: are clients with skewed classes better served when each minimises the others' risks, too?"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from proofs.study import Numbers, Study
from transfuse import transfer
from transfuse.comparison import ArmRun
from transfuse.datasets import fashion_clients
from transfuse.federated import FedAvg, FedAvgLocal, Federated, FedProx, Local, PGFed, PGFedMo
from transfuse.models import MLP

ROUNDS = 30
TRAINING = {
    "epochs": 2,
    "batch_size": 32,
    "optimizer": "sgd",
    "lr": 0.05,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "schedule": "constant",
}


def arms(rounds: int) -> dict[str, Federated]:
    """Every arm by name, the judged one first; mu and eta2 are the sheet's."""
    return {
        "PGFed (mu 1, eta2 1e-4)": PGFed(mu=1.0, eta2=1e-4, rounds=rounds),
        "PGFedMo (mu 1, eta2 1e-4)": PGFedMo(mu=1.0, eta2=1e-4, rounds=rounds),
        "PGFed (mu 0.1, eta2 1e-2)": PGFed(rounds=rounds),
        "FedAvg + local epochs": FedAvgLocal(rounds=rounds),
        "FedAvg": FedAvg(rounds=rounds),
        "FedProx": FedProx(rounds=rounds),
        "Local": Local(rounds=rounds),
    }


def trial(seed: int, smoke: bool) -> Mapping[str, Numbers]:
    """Deal the pictures out and train every arm, all from the same initial weights."""
    size, rounds = (600, 2) if smoke else (6000, ROUNDS)
    clients, methods = fashion_clients(clients=10, alpha=0.3, size=size, seed=seed), arms(rounds)
    first, *others = methods.values()
    result = transfer(
        first,
        target=lambda: MLP(784, hidden=(64,)),
        data=clients.train,
        test=clients.test,
        compare=others,
        seeds=[seed],
        classes=clients.classes,
        **TRAINING,
    )
    return {name: numbers(arm.runs[0]) for name, arm in zip(methods, result.arms, strict=True)}


def numbers(run: ArmRun) -> dict[str, float]:
    """Accuracies: the mean over clients, after the last round and after the best one, and over all test pictures."""
    assert run.evaluation is not None
    rounds = [fmean(scores.values()) for scores in run.stages]
    return {
        "mean accuracy of clients": fmean(run.evaluation.by_set("accuracy").values()),
        "best round": max(rounds),
        "accuracy": run.evaluation.metrics["accuracy"],
    }


PROOF = Study(
    name="pgfed",
    proves=("PGFed", "PGFedMo", "FedAvg", "FedAvgLocal", "FedProx"),
    data="Fashion-MNIST, 6,000 pictures dealt out to 10 clients by a Dirichlet distribution of 0.3, anew for each "
    "seed; 60 % of each client's to train, 40 % to test",
    trial=trial,
    arms=tuple(arms(ROUNDS)),
    baseline="FedAvg + local epochs",
    metric="mean accuracy of clients",
    seeds=(1, 2, 3),
    expected="PGFed with mu 1 and eta2 1e-4 is above FedAvg with local epochs by 0.015 or more, above Local by 0.01 "
    "and above the one model of FedAvg by 0.06; with the authors' mu 0.1 and eta2 0.01 all weights fall to about 0 "
    "within 30 rounds, and it is as good as FedAvg with local epochs",
    notes="mu, eta2, learning rate, batches and rounds are the sheet's, which names no momentum for them. "
    "Momentum was chosen by looking at the test accuracy of seed 0, which is therefore not among the "
    "seeds: with the authors' 0.9, PGFed with mu 1 and eta2 1e-4 broke down there (0.125 after the last "
    "round, FedAvg with local epochs 0.881); with 0, as here, the two had 0.882 and 0.877, and Local "
    "0.864. The result: PGFed is ahead of FedAvg with local epochs with every seed, but by 0.005 and not "
    "by 0.015, and the interval holds zero; of Local by 0.008, surely, and of the one model of FedAvg by "
    "0.10. With the authors' mu and eta2 the weights vanish, as the run itself warns. Without momentum "
    "local training is a stronger baseline than in the sheet's pilot, which may be why; untested.",
)
