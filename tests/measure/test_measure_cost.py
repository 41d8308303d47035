import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError
from transfuse.measure import cost

# Two operations, a multiplication and an addition, for every product.


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        digest.update(f"{name} {value.shape} {id(value)}".encode() + value.detach().numpy().tobytes())
    digest.update(str([module.training for module in model.modules()]).encode())
    digest.update(torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()


class Restless(nn.Module):
    """Changes itself whenever it runs, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += torch.rand(3)
        self.replaced = self.replaced + 1
        return x


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_leaves_the_model_as_found():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), Restless())
    model[1].eval()  # a frozen layer in a model that trains
    before = fingerprint(model)
    cost(model, torch.randn(2, 3, 8, 8, generator=torch.Generator()), runs=2)
    assert fingerprint(model) == before
    assert model.training
    assert not model[1].training


def test_leaves_the_model_as_found_when_it_fails():
    model = nn.Sequential(Restless(), nn.Linear(4, 2))
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="shapes"):
        cost(model, torch.ones(2, 5))
    assert fingerprint(model) == before


def settings() -> list[bool]:
    return [
        torch.is_grad_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    ]


def test_leaves_the_global_settings_as_found():
    before = settings()
    cost(nn.Linear(2, 2), torch.ones(1, 2))
    assert settings() == before


def test_a_counter_that_fails_gives_none():
    class Particular(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if settings() != usual:
                raise KeyError("the model wants its fused kernels")
            return super().forward(x)

    usual = [False] + settings()[1:]
    before = settings()
    measured = cost(Particular(2, 2), torch.ones(1, 2))
    assert measured.flops is None
    assert measured.parameters == 6
    assert settings() == before


def test_counts_parameters_and_bytes():
    model = nn.Sequential(nn.Linear(10, 4), nn.BatchNorm1d(4))
    model[0].requires_grad_(False)
    measured = cost(model, torch.randn(3, 10))
    assert measured.parameters == 10 * 4 + 4 + 4 + 4
    assert measured.trainable == 4 + 4
    assert measured.bytes == 4 * (measured.parameters + 4 + 4) + 8  # running mean and variance, batches seen


def test_half_the_precision_is_half_the_bytes():
    model = nn.Linear(8, 8)
    full = cost(model, torch.ones(1, 8)).bytes
    assert cost(model.bfloat16(), torch.ones(1, 8, dtype=torch.bfloat16)).bytes == full / 2


def test_counts_tied_tensors_once():
    model = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 20, bias=False))
    model[1].weight = model[0].weight
    measured = cost(model, torch.tensor([[1, 2]]))
    assert (measured.parameters, measured.bytes) == (120, 480)
    model[0].register_buffer("transposed", model[0].weight.detach().T)
    assert cost(model, torch.tensor([[1, 2]])).bytes == 480


@pytest.mark.parametrize(
    ("build", "shape", "flops"),
    [
        (lambda: nn.Linear(10, 4), (10,), 2 * 10 * 4),
        (lambda: nn.Conv2d(3, 8, 3), (3, 8, 8), 2 * 8 * 6 * 6 * 3 * 9),
        (lambda: nn.LSTM(16, 32, batch_first=True), (10, 16), 2 * 10 * (16 + 32) * 4 * 32),
        (Attention, (4, 10, 8), 2 * 2 * 4 * 10 * 10 * 8),
        (
            lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
            (10, 32),
            2 * 10 * (32 * 96 + 32 * 32 + 2 * 32 * 64) + 2 * 2 * 10 * 10 * 32,
        ),
    ],
    ids=["linear", "convolution", "lstm", "attention", "encoder layer"],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_counts_operations_per_sample(build: Callable[[], nn.Module], shape, flops, batch):
    assert cost(build(), torch.randn(batch, *shape), runs=1).flops == flops


def test_operations_that_cannot_be_counted_are_not_zero():
    assert cost(nn.ReLU(), torch.ones(2, 3)).flops is None


def test_calls_a_model_with_a_mapping_by_name():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, *, mask: Tensor, x: Tensor, scale: float) -> Tensor:
            return scale * self.layer(x * mask)

    inputs = {"scale": 2.0, "x": torch.ones(5, 4), "mask": torch.ones(5, 4)}
    assert cost(Named(), inputs).flops == 2 * 4 * 2


def test_latency_is_the_median_in_milliseconds_after_a_warm_up(monkeypatch):
    seconds = [9.0, 9.0, 0.002, 5.0, 0.001, 0.003, 0.004]  # two to warm up, five to be timed
    ticks = iter([tick for length in seconds for tick in (100.0, 100.0 + length)])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    assert cost(nn.Linear(2, 2), torch.ones(1, 2), runs=5).latency_ms == pytest.approx(3)


def test_runs_in_eval_mode_without_gradients():
    class Witness(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return x

    cost(Witness(), torch.ones(1, 2))


@pytest.mark.parametrize("inputs", [{"x": "text"}, torch.tensor(1.0), torch.ones(0, 2), {}])
def test_refuses_inputs_without_a_batch(inputs):
    with pytest.raises(InputError, match="expected a batch"):
        cost(nn.Linear(2, 2), inputs)


def test_refuses_to_time_nothing():
    with pytest.raises(InputError, match="at least 1 run"):
        cost(nn.Linear(2, 2), torch.ones(1, 2), runs=0)
