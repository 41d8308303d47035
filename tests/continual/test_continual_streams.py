"""What every continual learner has from its base: tasks as stages, heads, deployed models, errors, exact resumes."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from continual.examples_continual import EXAMPLES, Net, accuracy, example, ready, tasks, trainer
from helpers import digest
from torch import nn

from transfuse import transfer
from transfuse.continual import ADAM, CUBER, EWC, GPM, FineTune, Learner, LwF, Replay, SimpleCIL, TaskModel
from transfuse.core.composition import Then
from transfuse.core.errors import InputError, LayerError, MethodError
from transfuse.core.streams import as_data
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training
from transfuse.distill import Labels

SHARED = (FineTune, EWC, LwF, Replay, GPM, CUBER)


def run_of(name: str, **options: Any) -> Trainer:
    found = EXAMPLES[name]()
    return trainer(found.method, found.target, found.data, **options)


# Stages and heads


def test_stage_i_trains_on_the_ith_data_set():
    seen: list[tuple[int, set[int]]] = []

    class Spy(FineTune):
        def loss(self, task: int, target: Any, batch: Any, run: Any) -> Any:
            seen.append((task, set(self.task_heads.classes(task)[batch.labels].tolist())))
            return super().loss(task, target, batch, run)

    run = trainer(Spy(), Net(), tasks(), steps=4)
    run.fit()
    for task, classes in enumerate(({0, 1}, {1, 2}, {3, 4})):
        assert set.union(*(found for t, found in seen if t == task)) == classes
    assert run.updates == 12


def test_epochs_are_those_of_one_task():
    run = trainer(FineTune(), Net(), tasks(), epochs=2)
    run.fit()
    assert run.updates == 3 * 2 * 3


def test_every_task_has_a_head_that_only_it_trains():
    heads: list[dict[str, torch.Tensor]] = []

    def look(run: Trainer, record: Any) -> None:
        if run.clock.step == run.clock.steps:
            heads.append({n: p.detach().clone() for n, p in run.method.task_heads.named_parameters()})

    trainer(FineTune(), Net(), tasks(), listener=look).fit()
    moved = [{n[0] for n in b if not torch.equal(a[n], b[n])} for a, b in pairwise(heads)]
    assert moved == [{"1"}, {"2"}]
    assert heads[0]["0/weight"].shape == (2, 8) and heads[0]["0/bias"].shape == (2,)


def test_heads_have_a_bias_where_the_targets_own_has_one():
    method = FineTune()
    ready(method, Net(bias=False), tasks())
    assert [n for n, _ in method.task_heads.named_parameters()] == ["0/weight", "1/weight", "2/weight"]


def test_the_targets_own_head_is_not_trained_where_tasks_have_heads():
    net = Net()
    before = net.fc.weight.detach().clone()
    trainer(FineTune(), net, tasks()).fit()
    assert torch.equal(net.fc.weight, before)


def test_the_deployed_model_answers_over_all_classes_and_rules_out_those_of_other_tasks():
    model = trainer(FineTune(), Net(classes=2), tasks(), steps=40).fit().eval()
    logits = model(tasks()[1][0], task=1)
    assert logits.shape == (24, 5)
    assert torch.isneginf(logits[:, [0, 3, 4]]).all() and logits[:, [1, 2]].isfinite().all()
    assert min(accuracy(model, tasks(seed=1))) > 0.8


def test_the_deployed_model_computes_what_training_saw():
    method, net = FineTune(), Net(dropout=0.0)
    run = trainer(method, net, tasks())
    model = run.fit().eval()
    x = tasks()[1][0]
    net.eval()
    features = net.linear(net.norm(net.conv(x)).relu().flatten(1)).relu()
    assert torch.allclose(model(x, task=1)[:, [1, 2]], method.task_heads(features, 1))


def test_mappings_of_inputs_work_as_tensors_do():
    class Named(Net):
        def forward(self, pixels: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
            return super().forward(pixels * gain[:, None, None, None])

    data = [{"pixels": x, "gain": torch.ones(len(x)), "labels": y} for x, y in tasks()]
    model = trainer(FineTune(), Named(), data, steps=30).fit().eval()
    x, y = tasks(seed=1)[2]
    assert (model(pixels=x, gain=torch.ones(len(x)), task=2).argmax(1) == y).float().mean() > 0.8


@pytest.mark.parametrize("cls", SHARED, ids=lambda c: c.__name__)
def test_a_shared_head_is_the_targets_own(cls):
    net = Net(dropout=0.0)
    before = net.fc.weight.detach().clone()
    model = trainer(cls(heads="shared"), net, tasks()).fit().eval()
    x = tasks()[0][0]
    answers = model(x, task=2) if isinstance(model, TaskModel) else model(x)
    assert not torch.equal(net.fc.weight, before) and answers.isfinite().all() and answers.shape == (24, 5)


def test_the_deployed_model_does_not_follow_the_target():
    run = trainer(FineTune(), Net(), tasks())
    model = run.fit()
    before = digest(model)
    with torch.no_grad():
        run.run["target"].linear.weight.add_(1)
    assert digest(model) == before


@pytest.mark.parametrize("name", ["LwF", "CUBER", "ADAM"])
def test_deploying_in_the_middle_changes_nothing(name):
    found = EXAMPLES[name]()

    def score(run: Trainer, record: Any) -> None:
        run.method.deploy(run.target).eval()

    plain = run_of(name, steps=3)
    scored = trainer(found.method, found.target, found.data, steps=3, listener=score)
    plain.fit(), scored.fit()
    assert digest(plain.method) == digest(scored.method)


# Errors


def test_a_wrong_task_is_an_error_and_so_is_none():
    model = trainer(FineTune(), Net(), tasks()).fit()
    x = tasks()[0][0]
    for wrong in (3, -1):
        with pytest.raises(InputError, match=f"knows the tasks 0 to 2, found task={wrong}"):
            model(x, task=wrong)
    with pytest.raises(InputError, match="found task=None: say which it is"):
        model(x)


def test_a_task_without_labels_is_an_error_before_training():
    data = tasks()
    data[1] = (data[1][0], torch.full_like(data[1][1], -100))
    with pytest.raises(InputError, match="task '1' has no labelled sample"):
        trainer(FineTune(), Net(), data).fit()
    with pytest.raises(InputError, match="task '1' has no labelled sample"):
        trainer(SimpleCIL(), Net(), [data[0], data[1][0]]).fit()


def test_a_task_without_samples_is_an_error():
    with pytest.raises(InputError, match="the data set is empty"):
        trainer(FineTune(), Net(), [tasks()[0], (torch.empty(0, 1, 6, 6), torch.empty(0, dtype=torch.long))])


def test_unlabelled_samples_of_a_task_are_left_out():
    data = tasks()
    data[0][1][::2] = -100
    model = trainer(FineTune(), Net(), data, steps=40).fit().eval()
    assert accuracy(model, tasks(seed=1))[0] > 0.8


def test_samples_that_are_looked_at_are_labelled_ones():
    x, y = tasks()[0]
    few = torch.full_like(y, -100)
    few[[3, 20]] = y[[3, 20]]
    method = FineTune()
    run = ready(method, Net(), [(x, few)])
    for count, sizes in ((None, 2), (1, 1), (5, 2)):
        found = [label for batch in method.examples(0, run, count) for label in batch.labels.tolist()]
        assert len(found) == sizes and set(found) <= {0, 1}
    trainer(EWC(samples=5), Net(), [(x, few), tasks()[1]], steps=3).fit()


def test_a_class_that_a_shared_head_has_no_row_for_is_an_error():
    with pytest.raises(InputError, match=r"task '2' has the classes \[3, 4\], the target's head has rows for 0 to 3"):
        trainer(FineTune(heads="shared"), Net(classes=4), tasks()).fit()


def test_negative_classes_are_an_error():
    data = tasks()
    data[0][1][0] = -1
    with pytest.raises(InputError, match="task '0' has the classes"):
        trainer(FineTune(), Net(), data).fit()


def test_labels_that_change_while_a_task_is_learned_are_an_error():
    method = FineTune()
    run = ready(method, Net(), tasks())
    with pytest.raises(InputError, match=r"task 0 has the classes \[0, 1\], found a label \[3\]"):
        method.task_heads.rows(torch.tensor([3]), 0)
    assert method.task_heads.rows(torch.tensor([2, -100, 1]), 1).tolist() == [1, -100, 0]
    assert run.task == "classification"


def test_an_iterator_is_refused_because_tasks_are_read_more_than_once():
    with pytest.raises(InputError, match="task '0' is an iterator"):
        trainer(FineTune(), Net(), [iter([tasks()[0]])]).fit()


def test_a_list_of_pairs_is_not_mistaken_for_the_batches_of_one_task():
    with pytest.raises(InputError, match="expected a list of tasks, found one data set of 3 batches"):
        transfer(FineTune(), target=Net(), data=tasks(), steps=4, batch_size=8)
    named = {"first": tasks()[0], "second": tasks()[1]}
    model = transfer(FineTune(), target=Net(), data=named, steps=4, batch_size=8).model
    assert model.tasks == 2


def test_heads_are_task_or_shared():
    with pytest.raises(InputError, match="heads is 'both', it must be one of task, shared"):
        FineTune(heads="both")


def test_a_target_that_works_on_the_outputs_of_its_head_is_refused():
    class Scaled(Net):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images).log_softmax(-1)

    with pytest.raises(LayerError, match="are not simply those of its last linear layer 'fc'"):
        trainer(FineTune(), Scaled(), tasks()).fit()


def test_a_target_without_a_linear_layer_is_refused():
    net = nn.Sequential(nn.Conv2d(1, 5, 6), nn.Flatten())
    with pytest.raises(LayerError, match="no linear layer"):
        trainer(FineTune(), net, tasks()).fit()


def test_learners_are_not_added_but_may_follow():
    for wrong in (lambda: FineTune() + EWC(), lambda: 0.5 * EWC(), lambda: LwF() * 2):
        with pytest.raises((MethodError, TypeError)):
            wrong()
    both = Then(Labels(), FineTune(heads="shared"))
    data = {"data": as_data(tasks()[0])}
    run = Trainer(both, {"target": Net()}, data, Training(steps=4, batch_size=8))
    run.fit()
    assert run.updates == 4


# Resumes


class Killed(BaseException):
    pass


def kill_at(update: int) -> Any:
    def listener(run: Trainer, record: Any) -> None:
        if run.updates == update:
            raise Killed

    return listener


CASES = {
    "CUBER with AdamW": (lambda: EXAMPLES["CUBER"](), {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}),
    "EWC online": (lambda: example(EWC(online=True, samples=6)), {}),
    "LwF shared": (lambda: example(LwF(heads="shared")), {}),
    "ADAM ssf": (lambda: example(ADAM(pet="ssf")), {}),
}


@pytest.mark.parametrize("share", [0.4, 1.0], ids=["2/5", "last but one"])
@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_a_learner_ends_bit_equal(case, share, tmp_path: Path):
    build, options = CASES[case]

    def run(**more: Any) -> Trainer:
        found = build()
        return trainer(found.method, found.target, found.data, **{"steps": 3, **options, **more})

    whole = run()
    expected = digest(whole.fit())
    moment = 1 + round(share * (whole.updates - 2))
    with pytest.raises(Killed):
        run(folder=tmp_path, listener=kill_at(moment)).fit()
    torch.manual_seed(99)
    resumed = run(folder=tmp_path)
    assert digest(resumed.fit(resume=True)) == expected
    assert digest(resumed.method) == digest(whole.method)


@pytest.mark.parametrize("name", EXAMPLES)
def test_plain_attributes_do_not_change_during_training(name):
    """What is not in the state dict is lost in a resume."""
    run = run_of(name, steps=2)

    def plain(module: nn.Module) -> dict[str, Any]:
        return {k: copy.copy(v) for k, v in vars(module).items() if not k.startswith("_")}

    before = plain(run.method)
    run.fit()
    assert plain(run.method) == before


def test_every_learner_has_an_example():
    import transfuse.continual as family

    learners = {n for n in family.__all__ if isinstance(c := getattr(family, n), type) and issubclass(c, Learner)}
    assert learners - {"Learner"} == set(EXAMPLES)
