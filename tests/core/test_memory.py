from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from processes import on_ranks

from transfuse.core.errors import InputError
from transfuse.core.memory import Memory, Others
from transfuse.core.streams import as_data
from transfuse.core.sync import Sync, sync_for

IDS = torch.tensor([7, 3, 20, 11])


def lengths(memory: Memory) -> torch.Tensor:
    return memory["rows"].norm(dim=1)


def test_rows_are_found_by_the_ids_of_the_root_data_set():
    memory = Memory(IDS, 5)
    assert memory["ids"][memory.find(torch.tensor([20, 3]))].tolist() == [20, 3]
    assert len(memory) == 4


def test_an_update_moves_the_rows_of_the_batch_and_leaves_the_others_bit_exact():
    memory, values = Memory(IDS, 5), torch.randn(2, 5)
    before = memory["rows"].clone()
    rows = memory.find(torch.tensor([11, 3]))
    memory.update(rows, values, momentum=0.25)
    expected = 0.25 * before[rows] + 0.75 * values
    assert torch.allclose(memory["rows"][rows], expected / expected.norm(dim=1, keepdim=True))
    rest = memory.find(torch.tensor([7, 20]))
    assert torch.equal(memory["rows"][rest], before[rest])


def test_rows_have_length_one_from_the_beginning_and_stay_so():
    memory = Memory(IDS, 5)
    assert torch.allclose(lengths(memory), torch.ones(4))
    memory.update(torch.arange(4), 100 * torch.randn(4, 5))
    assert torch.allclose(lengths(memory), torch.ones(4))


def test_no_gradient_reaches_a_memory():
    memory, values = Memory(IDS, 5), torch.randn(4, 5, requires_grad=True)
    memory.update(torch.arange(4), values)
    assert not memory["rows"].requires_grad
    assert list(memory.parameters()) == []


def test_a_saved_memory_is_loaded_with_its_size():
    memory, other = Memory(IDS, 5), Memory(torch.arange(9), 3)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other["rows"], memory["rows"]) and torch.equal(other["ids"], memory["ids"])


def test_says_which_samples_it_cannot_look_up():
    memory = Memory(IDS, 5)
    with pytest.raises(InputError, match="pass a data set rather than batches"):
        memory.find(None)
    with pytest.raises(InputError, match="occurs twice in one batch"):
        memory.find(torch.tensor([3, 3]))
    for unknown in (4, 99):
        with pytest.raises(InputError, match=f"sample {unknown} is not among the 4"):
            memory.find(torch.tensor([3, unknown]))
    with pytest.raises(InputError, match="found 3 with 2 different ids"):
        Memory(torch.tensor([1, 1, 2]), 5)


def test_data_tells_the_ids_that_its_batches_have():
    tensors = {"inputs": torch.randn(6, 2), "labels": torch.arange(6), "index": torch.arange(6) * 10}
    subset = torch.utils.data.Subset(torch.utils.data.TensorDataset(tensors["inputs"], tensors["labels"]), [4, 2])
    for data in (as_data(tensors["inputs"]), as_data(tensors), as_data(subset)):
        assert torch.equal(data.ids, data.sample(6).index)
    assert as_data(subset).all_labels().tolist() == [4, 2]


# Others


def shares(others: Others, row: int) -> list[float]:
    torch.manual_seed(0)
    drawn = others.draw(torch.tensor([row]), 60_000)
    return (torch.bincount(drawn[0], minlength=len(others.order)) / 60_000).tolist()


def test_the_sample_itself_is_never_drawn_and_all_others_alike():
    for row in (0, 2, 4):
        expected = [0.0 if i == row else 0.25 for i in range(5)]
        assert shares(Others(5), row) == pytest.approx(expected, abs=0.01)
        assert shares(Others(5), row)[row] == 0


def test_samples_of_the_same_group_are_never_drawn():
    others = Others(6, torch.tensor([1, 0, 1, -100, 0, -100]))
    assert shares(others, 0) == pytest.approx([0, 0.25, 0, 0.25, 0.25, 0.25], abs=0.01)
    assert shares(others, 4) == pytest.approx([0.25, 0, 0.25, 0.25, 0, 0.25], abs=0.01)
    assert shares(others, 3) == pytest.approx([0.2, 0.2, 0.2, 0, 0.2, 0.2], abs=0.01)


def test_every_row_draws_its_own():
    others = Others(50, torch.arange(50) // 10)
    rows = torch.arange(50)
    drawn = others.draw(rows, 100)
    assert drawn.shape == (50, 100)
    assert (drawn // 10 != rows[:, None] // 10).all()


@pytest.mark.parametrize("groups", [torch.zeros(3, dtype=torch.long), None])
def test_says_when_there_are_no_others(groups):
    with pytest.raises(InputError, match="so there are no others to draw"):
        Others(3 if groups is not None else 1, groups)


# Several processes


def work(folder: Path, rank: int) -> None:
    sync = sync_for("cpu")
    rows = sync.gather(torch.arange(rank + 1)[:, None] + 10.0 * rank)
    index = sync.gather(torch.arange(rank, dtype=torch.int64) + 5)
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps((rows.tolist(), index.tolist())))
    torch.distributed.destroy_process_group()


def test_processes_gather_all_rows_in_their_order_however_many_each_has(tmp_path):
    assert torch.equal(Sync("cpu").gather(torch.ones(2, 3)), torch.ones(2, 3))
    assert on_ranks(work, tmp_path) == [([[0.0], [10.0], [11.0]], [5])] * 2
