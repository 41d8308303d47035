from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from transfuse.core.errors import InputError
from transfuse.datasets import (
    Splits,
    dirichlet,
    edge_fashion,
    fashion_classes,
    fashion_clients,
    fashion_domains,
    fashion_mnist,
    fashion_tasks,
    load,
    rotated_fashion,
    shifted_fashion,
)
from transfuse.datasets.fashion import DEBIAN
from transfuse.datasets.pictures import edges, noisy, rotated, shifted, smaller

PICTURES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class TestPictures:
    def test_a_quarter_turn_is_exact_and_counter_clockwise(self) -> None:
        assert torch.allclose(rotated(PICTURES, 90), PICTURES.rot90(1, dims=(2, 3)), atol=1e-5)

    def test_no_turn_changes_nothing_and_turning_back_undoes(self) -> None:
        assert torch.allclose(rotated(PICTURES, 0), PICTURES, atol=1e-6)
        bump = torch.zeros(1, 1, 21, 21)
        bump[..., 8:13, 12:16] = 1
        assert (rotated(rotated(bump, 30), -30) - bump).abs().mean() < 0.02

    def test_a_turn_keeps_lengths_in_pictures_that_are_not_square(self) -> None:
        wide = torch.zeros(1, 1, 5, 9)
        wide[..., 2, 4] = 1  # the middle stays in the middle
        wide[..., 2, 6] = 1  # two to the right goes to two above
        assert torch.nonzero(rotated(wide, 90)[0, 0] > 0.9).tolist() == [[0, 4], [2, 4]]

    def test_contrast_is_about_the_middle_grey(self) -> None:
        values = torch.tensor([0.0, 0.5, 0.75, 1.0]).view(1, 1, 2, 2)
        assert shifted(values, -1).flatten().tolist() == [1, 0.5, 0.25, 0]
        assert shifted(values, 0.5, 0.1).flatten().tolist() == pytest.approx([0.35, 0.6, 0.725, 0.85])
        assert shifted(values, 4).flatten().tolist() == [0, 0.5, 1, 1]

    def test_noise_has_its_deviation_and_its_seed(self) -> None:
        grey = torch.full((4, 1, 50, 50), 0.5)
        assert noisy(grey, 0.1, seed=1).std().item() == pytest.approx(0.1, rel=0.03)
        assert noisy(grey, 0.1, seed=1).equal(noisy(grey, 0.1, seed=1))
        assert not noisy(grey, 0.1, seed=1).equal(noisy(grey, 0.1, seed=2))
        with pytest.raises(InputError, match="0 or more, found -1"):
            noisy(grey, -1)

    def test_edges_agree_with_scipy_and_see_nothing_in_a_flat_picture(self) -> None:
        ndimage = pytest.importorskip("scipy.ndimage")
        image = PICTURES[0, 0].numpy()
        expected = np.hypot(ndimage.sobel(image, 0, mode="nearest"), ndimage.sobel(image, 1, mode="nearest")) / 4
        assert np.allclose(edges(PICTURES)[0, 0].numpy(), expected.clip(0, 1), atol=1e-5)
        assert edges(torch.full((1, 1, 5, 5), 0.7)).max() < 1e-6
        step = torch.zeros(1, 1, 5, 6)
        step[..., 3:] = 1
        assert edges(step)[0, 0, 2].tolist() == [0, 0, 1, 1, 0, 0]

    def test_smaller_averages_squares(self) -> None:
        assert torch.allclose(smaller(PICTURES, 4)[0, 0, 0, 0], PICTURES[0, 0, :2, :2].mean())
        with pytest.raises(InputError, match="must divide the 8x8 pixels of these pictures, found 3"):
            smaller(PICTURES, 3)


class TestDirichlet:
    LABELS = torch.arange(5000) % 10

    def shares(self, alpha: float, seed: int = 0) -> Tensor:
        parts = dirichlet(self.LABELS, 8, alpha, seed)
        return torch.stack([self.LABELS[p].bincount(minlength=10) for p in parts]).float()

    def test_every_sample_is_in_one_part(self) -> None:
        parts = dirichlet(self.LABELS, 8, 0.3)
        assert torch.cat(parts).sort().values.equal(torch.arange(5000))

    def test_small_alpha_is_skewed_and_large_alpha_is_even(self) -> None:
        assert self.shares(1e4).std(dim=0).max() < 3
        assert (self.shares(1e4) > 0).all()
        assert self.shares(0.05).max(dim=0).values.mean() > 300
        assert (self.shares(0.3) / 500).max(dim=0).values.mean() > (self.shares(3) / 500).max(dim=0).values.mean() + 0.2

    def test_shares_have_the_variance_of_the_distribution(self) -> None:
        alpha, parts = 0.5, 8
        drawn = torch.cat([self.shares(alpha, seed).flatten() / 500 for seed in range(40)])
        expected = (1 / parts) * (1 - 1 / parts) / (parts * alpha + 1)
        assert drawn.var().item() == pytest.approx(expected, rel=0.1)

    def test_the_seed_decides(self) -> None:
        first = dirichlet(self.LABELS, 4, 0.3, seed=1)
        assert all(a.equal(b) for a, b in zip(first, dirichlet(self.LABELS, 4, 0.3, seed=1), strict=True))
        assert not first[0].equal(dirichlet(self.LABELS, 4, 0.3, seed=2)[0])

    def test_each_part_has_the_fewest(self) -> None:
        assert min(map(len, dirichlet(self.LABELS, 8, 0.1, seed=3, fewest=200))) >= 200

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0, 1.0), "1 part or more and alpha above 0"),
            ((2, 0.0), "1 part or more and alpha above 0"),
            ((10, 1.0, 0, 501), "5000 samples cannot give 10 parts 501 each"),
            ((10, 0.01, 0, 450), "100 draws never gave each of 10 parts 450"),
        ],
    )
    def test_refuses_what_cannot_be(self, arguments: tuple[float, ...], message: str) -> None:
        with pytest.raises(InputError, match=message):
            dirichlet(self.LABELS, *arguments)


class TestOnly:
    DATA = TensorDataset(torch.arange(6.0)[:, None], torch.tensor([0, 1, 2, 0, 1, 2]))

    def test_labels_count_from_zero_in_the_order_given(self) -> None:
        found = Splits(self.DATA, None, self.DATA, ("a", "b", "c"), "mine").only([2, 0])
        assert found.classes == ("c", "a") and found.validate is None
        assert [t.tolist() for t in found.test.tensors] == [[[0], [2], [3], [5]], [1, 0, 1, 0]]

    def test_labels_can_be_kept(self) -> None:
        found = Splits(self.DATA, classes=("a", "b", "c")).only([2, 0], renumber=False)
        assert found.classes == ("a", "b", "c")
        assert found.train.tensors[1].tolist() == [0, 2, 0, 2]

    @pytest.mark.parametrize(("classes", "message"), [([], "each once"), ([1, 1], "each once"), ([1, 7], r"\[7\]")])
    def test_refuses_other_classes(self, classes: list[int], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Splits(self.DATA).only(classes)

    def test_refuses_a_part_without_labels(self) -> None:
        with pytest.raises(InputError, match="found list as the test part of data"):
            Splits(self.DATA, test=[self.DATA]).only([1])


def test_labels_are_checked_in_every_list_dict_and_source() -> None:
    good, bad = TestOnly.DATA, TensorDataset(torch.zeros(1, 1), torch.tensor([3]))
    for part in ({"train": [good, bad]}, {"train": good, "test": {"x": bad}}, {"train": good, "source": bad}):
        with pytest.raises(InputError, match="must be 0 to 2"):
            Splits(**part, classes=("a", "b", "c"))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,200 training pictures (1,100 when 100 are put aside to validate) and 200 test pictures of noise."""
    folder = tmp_path_factory.mktemp("fashion")
    draws = np.random.default_rng(0)
    for part, count in (("train", 1200), ("t10k", 200)):
        images = draws.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for what, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
            (folder / f"{part}-{what}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes(), 1))
    return folder


class TestFashion:
    def test_domains_share_no_picture(self, few: Path) -> None:
        plain = fashion_mnist(few, size=300).train.tensors
        found = fashion_domains(lambda images: 1 - images, "negative", source=200, target=100, folder=few)
        assert found.source.tensors[0].equal(plain[0][:200])
        assert found.train.tensors[0].equal(1 - plain[0][200:]) and found.train.tensors[1].equal(plain[1][200:])
        assert [len(p) for p in (found.validate, found.test)] == [100, 200]

    @pytest.mark.parametrize("variant", [rotated_fashion, shifted_fashion, edge_fashion])
    def test_variants_change_the_target_alone(self, few: Path, variant: Any) -> None:
        found = variant(source=50, target=50, side=14, folder=few)
        plain = smaller(fashion_mnist(few, size=100).train.tensors[0], 14)
        assert found.source.tensors[0].equal(plain[:50])
        assert (found.train.tensors[0] - plain[50:]).abs().mean() > 0.05
        assert found.train.tensors[0].min() >= 0 and found.train.tensors[0].max() <= 1

    def test_tasks_share_classes_with_the_one_before_and_no_pictures(self, few: Path) -> None:
        found = fashion_tasks(per_class=30, renumber=False, folder=few)
        assert [len(t) for t in found.train] == [120] * 6 and [len(t) for t in found.test] == [80] * 6
        own = [set(t.tensors[1].unique().tolist()) for t in found.train]
        assert all(len(a & b) == 2 for a, b in pairwise(own))
        assert [set(t.tensors[1].unique().tolist()) for t in found.test] == own
        pictures = torch.cat([t.tensors[0] for t in found.train]).flatten(1)
        assert len(pictures.unique(dim=0)) == 720
        numbered = fashion_tasks(per_class=30, folder=few)
        assert all(t.tensors[1].bincount().tolist() == [30] * 4 for t in numbered.train)

    def test_tasks_follow_the_seed(self, few: Path) -> None:
        streams = [fashion_tasks(2, per_class=5, seed=s, renumber=False, folder=few) for s in (0, 0, 1)]
        classes = [stream.train[0].tensors[1].unique().tolist() for stream in streams]
        assert classes[0] == classes[1] != classes[2]

    def test_clients_are_tested_on_their_own_mix(self, few: Path) -> None:
        found = fashion_clients(clients=5, size=1000, folder=few)
        assert len(found.train) == len(found.test) == 5 and found.validate is None
        assert sum(map(len, found.train)) + sum(map(len, found.test)) == 1000
        for train, test in zip(found.train, found.test, strict=True):
            mixes = [d.tensors[1].bincount(minlength=10) / len(d) for d in (train, test)]
            assert (mixes[0] - mixes[1]).abs().max() < 0.05
        assert len(fashion_clients(clients=2, size=500, fractions=(0.5, 0.2, 0.3), folder=few).validate) == 2

    def test_recipes_can_load_them(self, few: Path) -> None:
        assert load("fashion-classes", classes=[6, 0], folder=str(few)).classes == ("Shirt", "T-shirt/top")
        assert len(load("fashion-tasks", tasks=2, per_class=10, folder=str(few)).train) == 2
        assert len(fashion_classes([1], size=100, folder=few).test) == 20

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda few: fashion_tasks(classes=2, overlap=2, folder=few), "fewer overlapping"),
            (lambda few: fashion_tasks(per_class=60, folder=few), "class . has 110 training pictures, too few for 60"),
            (lambda few: rotated_fashion(source=0, folder=few), "at least 1 picture"),
            (lambda few: rotated_fashion(source=1000, target=1000, folder=few), "found 2000"),
            (lambda few: edge_fashion(source=10, target=10, side=5, folder=few), "found 5"),
        ],
    )
    def test_wrong_arguments_are_refused(self, few: Path, call: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            call(few)

    @pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs apt install dataset-fashion-mnist")
    def test_real_data_is_as_documented(self) -> None:
        found = fashion_tasks()
        assert [len(t) for t in found.train] == [600] * 6 and [len(t) for t in found.test] == [4000] * 6
