"""APQ: does a predictor that knows networks in full precision rank quantised ones better, from few of them?"""

from __future__ import annotations

import torch
from scipy.stats import kendalltau
from sklearn.linear_model import Ridge
from torch import Tensor

from proofs.small_fashion import small_fashion
from proofs.study import Study
from transfuse.core.streams import as_data
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training
from transfuse.search import APQ, ElasticNet, Predictor, Space

SIZES = (20, 40, 80)
HELD_OUT = 80
PROBE = 300


def trial(seed: int, smoke: bool) -> dict[str, dict[str, float]]:
    """Kendall's tau on held-out quantised networks, of predictors that saw few of them."""
    full, quantised, steps = (4, 6, 4) if smoke else (120, SIZES[-1] + HELD_OUT, 400)
    splits = small_fashion()
    images, labels = splits.train.tensors
    data = {"train": as_data((images[:-PROBE], labels[:-PROBE])), "probe": as_data((images[-PROBE:], labels[-PROBE:]))}
    method = APQ(full=full, quantised=quantised, qat_steps=0, population=4, iterations=0, calibration=1, budget=1.0)
    torch.manual_seed(seed)
    net = ElasticNet(stem=12, widths=(8, 16, 24, 32))
    Trainer(method, {"target": net}, data, Training(steps=steps, batch_size=64, lr=3e-3, seed=seed)).fit()
    codes, accuracy = method.scored["quantised"], method.scored["quantised/accuracy"]
    seen, rest = len(codes) // 2, len(codes) - len(codes) // 2
    train, test = (codes[:seen], accuracy[:seen]), (codes[-rest:], accuracy[-rest:])
    found: dict[str, dict[str, float]] = {arm: {} for arm in ARMS}
    torch.manual_seed(seed)
    known, true = method.scored["full"], method.scored["full/accuracy"]
    taught = _fitted(Predictor(net.space), known, true, quantised=False)
    misled = _fitted(Predictor(net.space), known, true[torch.randperm(full)], quantised=False)
    for size in (min(size, seen) for size in SIZES):
        few = train[0][:size], train[1][:size]
        predicted = {
            "transferred": _fitted(_renewed(taught, net.space), *few)(test[0]),
            "from scratch": _fitted(Predictor(net.space), *few)(test[0]),
            "ridge": torch.from_numpy(Ridge().fit(*(x.numpy() for x in few)).predict(test[0].numpy())),
            "permuted source": _fitted(_renewed(misled, net.space), *few)(test[0]),
        }
        for arm, values in predicted.items():
            found[arm][f"tau {size}"] = float(kendalltau(values.detach().numpy(), test[1].numpy()).statistic)
    main = 40 if not smoke else min(40, seen)
    return {arm: {"kendall tau": values[f"tau {main}"], **values} for arm, values in found.items()}


def _fitted(predictor: Predictor, codes: Tensor, accuracy: Tensor, quantised: bool = True) -> Predictor:
    """Least squares with Adam, all networks in every update."""
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        (predictor(codes, quantised) - accuracy).square().mean().backward()
        optimizer.step()
    return predictor


def _renewed(source: Predictor, space: Space) -> Predictor:
    """What a predictor of quantised networks starts from."""
    predictor = Predictor(space)
    predictor.load_state_dict(source.state_dict())
    predictor.forget(everything=False)
    return predictor


ARMS = ("transferred", "from scratch", "ridge", "permuted source")

PROOF = Study(
    name="apq",
    proves=("APQ",),
    data="120 networks in full precision and 40 of 160 quantised ones, of a supernet on Fashion-MNIST at 14x14 pixels; "
    "scored on 300 pictures with statistics of their own, quantised without further training",
    trial=trial,
    arms=ARMS,
    baseline="from scratch",
    metric="kendall tau",
    expected="transferred > from scratch with 20 and 40 quantised networks, the gap closes at 80; the predictor that "
    "was taught permuted accuracies is no better than one from scratch",
    notes="Not as expected with 20 and 40 quantised networks: a tie with the predictor from scratch, which the spread "
    "over seeds hides anyway. With 80 (tau 80 of each run) the transferred one leads on every seed, and the "
    "permuted one is behind both. What we think, untested: networks that are rounded to 2 bits without training "
    "fall to chance, so most of the ranking is about bits, of which full precision knows nothing; the paper trains "
    "each candidate. The search itself was not compared with searching architecture and bits one after the other.",
)
