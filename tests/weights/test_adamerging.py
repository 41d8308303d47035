import pytest
import torch
from helpers import CNN, images
from weights.composing import INPUTS, LABELS, logits, plain, put, ready, total, tuned

from transfuse import transfer
from transfuse.core.batch import Batch
from transfuse.core.errors import InputError
from transfuse.weights import AdaMerging


def test_at_first_it_is_task_arithmetic_with_the_starting_coefficient():
    for per, blocks in (("layer", 8), ("task", 1)):
        run = ready(method := AdaMerging(per))
        assert method.coefficients.shape == (3, blocks, 1)
        for name, p in method.deploy(run["target"]).named_parameters():
            base = run["target"].get_parameter(name)
            expected = base + 0.3 * sum(run[f"source.{i}"].get_parameter(name) - base for i in range(3))
            assert torch.allclose(p, expected, atol=1e-6), name


def test_coefficients_are_used_within_zero_and_one():
    run = ready(method := AdaMerging(start=0.0))
    assert torch.equal(logits(method, run), plain(run["target"]))
    put(method, -1.0)
    assert torch.equal(logits(method, run), plain(run["target"]))
    put(method, 7.0)
    high = logits(method, run)
    put(method, 1.0)
    assert torch.equal(logits(method, run), high)


def test_the_loss_is_the_sum_of_the_tasks_mean_entropies_and_reads_no_labels():
    method = AdaMerging()
    data = {"one": (INPUTS, LABELS), "two": images(12, seed=5)}
    run = ready(method, data=data)
    assert all(d.sample(3).labels is None for d in method.streams(run).values())
    batches = {name: Batch(inputs=inputs) for name, (inputs, _) in data.items()}
    model = method.deploy(run["target"]).eval()
    expected = 0.0
    for batch in batches.values():
        p = model(batch.inputs).softmax(-1)
        expected += float(-(p * p.log()).sum(-1).mean())
    assert total(method.loss(batches, run)).item() == pytest.approx(expected, abs=1e-5)


def test_predictions_become_surer():
    base = CNN(norm=True)
    data = {"one": INPUTS, "two": images(24, seed=4)[0]}

    def unsure(steps: int, lr: float) -> float:
        model = transfer(
            AdaMerging(), [tuned(base, s) for s in (1, 2)], base, data, test=images(), steps=steps, lr=lr, batch_size=12
        ).model
        with torch.no_grad():
            p = model(INPUTS).softmax(-1)
        return float(-(p * p.log()).sum(-1).mean())

    assert unsure(30, 0.05) < unsure(1, 1e-9) - 0.01


def test_arguments_out_of_range_are_refused():
    with pytest.raises(InputError, match="per is 'block'"):
        AdaMerging("block")
    with pytest.raises(InputError, match="start is 1.5"):
        AdaMerging(start=1.5)
