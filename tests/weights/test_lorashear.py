"""LoRAShear and the structures it prunes: what the sheet says must hold exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import digest, language_model, ragged_tokens, trainer
from torch import Tensor, nn

from transfuse import transfer
from transfuse.core.adapters import factors
from transfuse.core.batch import Batch, align_tokens
from transfuse.core.errors import InputError
from transfuse.core.outputs import find_logits
from transfuse.core.streams import as_data
from transfuse.core.trainer import Trainer
from transfuse.weights import LoRAShear
from transfuse.weights.lorashear import FADING, GONE, WHOLE, mixture, outside, saliency
from transfuse.weights.structures import find_structures, shrink, zeroed

TEXT = align_tokens(Batch(inputs=ragged_tokens()))


def llama(layers: int = 2, keys: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=11, hidden_size=16, intermediate_size=12, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=keys, max_position_embeddings=16)  # fmt: skip
    return LlamaForCausalLM(config)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return find_logits(model.eval()(**TEXT.inputs))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shear(target: nn.Module | None = None, **arguments: Any) -> Trainer:
    given = {"share": 0.25, "rank": 2, "periods": 2, "rounds": 2, "held_out": 3, "protect": 0.25, **arguments}
    steps = given.pop("steps", 16)
    data = {"code": as_data(ragged_tokens()), "docs": as_data(ragged_tokens(10, 2))}
    return trainer(
        LoRAShear(**given), language_model(depth=2) if target is None else target, None, data, task="language-model",
        steps=steps, optimizer="adamw", lr=1e-2,
    )  # fmt: skip


def states(run: Trainer) -> Tensor:
    method: Any = run.method
    return torch.cat([method.groups[node.name.replace(".", "/")] for node in method._nodes])


# Structures


@pytest.mark.parametrize("keys", [1, 2, 4])
def test_zeroed_groups_can_be_sliced_away_and_leave_the_answers_equal(keys):
    model = llama(keys=keys)
    small, nodes = copy.deepcopy(model), find_structures(model)
    gone = {node.name: torch.tensor([0]) for node in nodes if node.count > 1}
    expected = size(model)
    params = dict(model.named_parameters())
    for node in nodes:
        if node.name in gone:
            expected -= node.vectors(params, gone[node.name]).numel()
            for part in node.parts:
                part.put(params[part.name].data, gone[node.name], 0.0)
    shrink(small, {name: [g for g in range(n.count) if g not in gone[name]]
                   for n in nodes for name in [n.name] if name in gone})  # fmt: skip
    assert (logits(small) - logits(model)).abs().max() < 1e-5
    assert size(small) == expected < size(model)
    assert small.config.intermediate_size == 11
    assert small.config.num_key_value_heads == max(1, keys - 1)
    assert small.config.num_attention_heads == (4 if keys == 1 else 4 - 4 // keys)
    assert {n.kind for n in nodes} == {"head", "channel"}


def test_a_block_of_this_library_shrinks_as_well():
    model = language_model(depth=2)
    small = shrink(copy.deepcopy(model), {"blocks.0.attn": [1], "blocks.1.mlp": range(5)})
    assert small.blocks[0].attn.heads == 1
    assert small.blocks[0].attn.qkv.weight.shape == (12, 8)
    assert small.blocks[1].mlp.fc1.out_features == 5
    params = dict(model.named_parameters())
    by_name = {n.name: n for n in find_structures(model)}
    for name, groups in (("blocks.0.attn", [0]), ("blocks.1.mlp", list(range(5, 32)))):
        for part in by_name[name].parts:
            part.put(params[part.name].data, torch.tensor(groups), 0.0)
    assert (logits(small) - logits(model)).abs().max() < 1e-5


def test_a_smaller_model_can_be_made_again_for_its_weights():
    small = shrink(llama(), {"model.layers.0.mlp": range(4), "model.layers.1.self_attn": [0]})
    assert small.config.intermediate_size == 12, "one number cannot say what differs between layers"
    fresh = shrink(llama(), {name: range(count) for name, count in small.config.structures.items()})
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(logits(fresh), logits(small))
    even = shrink(llama(), {f"model.layers.{i}.{part}": [1] for i in range(2) for part in ("mlp", "self_attn")})
    assert not hasattr(even.config, "structures")
    plain = type(even)(even.config)
    plain.load_state_dict(even.state_dict())
    assert (logits(plain) - logits(even)).abs().max() < 1e-6


def test_a_trial_puts_every_bit_back():
    model = language_model(depth=2)
    before, answers = digest(model), logits(model)
    for node in find_structures(model):
        with zeroed(model, node, torch.tensor([0, 1])):
            assert node.vectors(dict(model.named_parameters()), torch.tensor([0, 1])).abs().max() == 0
            assert (logits(model) - answers).abs().max() > 0
    assert digest(model) == before


def test_models_and_nodes_that_are_not_known_are_refused():
    with pytest.raises(InputError, match="no structures that are known"):
        find_structures(nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(InputError, match="no structures are called 'blocks'"):
        shrink(language_model(), {"blocks": [0]})
    with pytest.raises(InputError, match="nothing would be left"):
        shrink(language_model(), {"blocks.0.mlp": []})


# Saliency, half-space, mixture


def test_saliency_is_its_closed_form_on_two_groups():
    x, moved = [torch.tensor([[3.0, 4.0], [0.0, 2.0]])], [torch.tensor([[1.0, 0.0], [0.0, -1.0]])]
    criteria = torch.tensor([[5.0, 2.0], [5 / 2**0.5, 2 / 2**0.5], [1.6, 0.0], [3.0, 2.0], [4.5, 2.0]])
    normal = criteria / criteria.norm(dim=1, keepdim=True)
    assert torch.allclose(saliency(x, moved, (0.2,) * 5), normal.sum(0) / 5, atol=1e-6)
    for i in range(5):
        one = saliency(x, moved, [float(i == j) for j in range(5)])
        assert one.norm().item() == pytest.approx(1.0, abs=1e-6)


def test_saliency_before_the_adapters_have_learned_is_finite():
    x = [torch.ones(3, 2), torch.zeros(2, 4)]
    found = saliency(x, [torch.zeros(3, 2), torch.zeros(2, 4)], (0.2,) * 5)
    assert found.isfinite().all()
    assert (found[:3] > found[3:].max()).all()


def test_the_half_space():
    x = torch.tensor([[1.0, 0.0]])
    assert outside(torch.tensor([[-0.1, 0.0]]), x, 0.0)
    assert not outside(torch.tensor([[0.5, 0.0]]), x, 0.0)
    assert outside(torch.tensor([[0.5, 0.0]]), x, 0.9)
    assert outside(torch.tensor([[0.5, 0.0]]), torch.zeros(1, 2), 0.0), "what is zero stays zero"


def test_the_mixture_follows_what_was_lost():
    assert torch.allclose(mixture(torch.tensor([0.0, 1.0, 3.0]), 0.0), torch.tensor([0, 0.25, 0.75]).double())
    assert torch.allclose(mixture(torch.tensor([2.0, 2.0]), 0.0), torch.full((2,), 0.5).double())
    assert torch.allclose(mixture(torch.tensor([-5.0, 1.0]), 0.0), torch.tensor([0.0, 1.0]).double())
    assert torch.allclose(mixture(torch.tensor([-1.0, -2.0]), 0.2), torch.full((2,), 0.5).double())
    assert torch.allclose(mixture(torch.tensor([0.0, 1.0]), 0.2), torch.tensor([0.1, 0.9]).double())


# Fading


def test_a_fading_group_shrinks_to_zero_in_a_straight_line_with_what_the_adapter_adds():
    """The product over t of (T - t - 1) / (T - t) is 1 - j / T after j steps."""
    run = shear()
    run._start(False)
    run._enter_stage()
    method: Any = run.method
    node, groups = method._nodes[1], torch.tensor([3, 7])
    params = dict(run.run["target"].named_parameters())
    for p in method.additions.values():
        nn.init.normal_(p)
    effective = logits(run.run["adapted"])
    x, moved = node.vectors(params, groups), method._moved(node, groups, params)
    assert moved.abs().max() > 0.1
    method.groups[node.name.replace(".", "/")][groups] = FADING
    method.epsilon = -1e9  # never projected
    with torch.no_grad():
        method._fade(node, groups, params, 1.0, run.run)
    assert (logits(run.run["adapted"]) - effective).abs().max() < 1e-4, "moving alone changes nothing"
    assert torch.allclose(node.vectors(params, groups), x + moved, atol=1e-6)
    assert method._moved(node, groups, params).abs().max() == 0
    for t in range(5):
        with torch.no_grad():
            method._fade(node, groups, params, (5 - t - 1) / (5 - t), run.run)
        assert torch.allclose(node.vectors(params, groups), (1 - (t + 1) / 5) * (x + moved), atol=1e-5)
    assert node.vectors(params, groups).abs().max() == 0
    assert (method.groups[node.name.replace(".", "/")][groups] == GONE).all()


@pytest.mark.parametrize("make", [lambda: language_model(depth=2), llama], ids=["blocks", "llama"])
def test_exactly_k_groups_are_gone_and_none_of_those_that_stay_whole(make):
    run = shear(make())
    model = run.fit()
    method: Any = run.method
    for kind in ("head", "channel"):
        nodes = [n for n in method._nodes if n.kind == kind]
        total = sum(n.count for n in nodes)
        found = torch.cat([method.groups[n.name.replace(".", "/")] for n in nodes])
        assert int((found == GONE).sum()) == round(0.25 * total) > 0
    whole = method.found["deviation"].argmax()
    assert (method.groups[method._nodes[whole].name.replace(".", "/")] == WHOLE).all()
    assert (states(run) == WHOLE).sum() == method._nodes[whole].count
    params = dict(run.run["target"].named_parameters())
    for node in method._nodes:
        gone = (method.groups[node.name.replace(".", "/")] == GONE).nonzero().flatten()
        if len(gone):  # also after recovery
            assert node.vectors(params, gone).abs().max() == 0
            assert method._moved(node, gone, params).abs().max() == 0
    assert (logits(model) - logits(run.run["adapted"])).abs().max() < 1e-5
    assert size(model) < size(make())
    assert type(model) is type(make())


def test_one_period_of_one_step_is_pruning_at_once_by_the_same_saliency():
    steps = 10
    run = shear(share=0.5, protect=0.0, periods=1, warmup=0.2, prune=1 / steps, steps=steps, weights=(1, 0, 0, 0, 0))
    chosen = {}

    def watch(trainer: Trainer, record: Any) -> None:
        if trainer.updates == 3:
            chosen["states"] = states(trainer).clone()
        if trainer.updates == 2:
            params = dict(trainer.run["target"].named_parameters())
            nodes = [n for n in trainer.method._nodes if n.kind == "channel"]
            chosen["norms"] = torch.cat([n.vectors(params, torch.arange(n.count)).norm(dim=1) for n in nodes])

    run.listener = watch
    run.fit()
    nodes = run.method._nodes
    channels = torch.cat([
        s for n, s in zip(nodes, chosen["states"].split([n.count for n in nodes]), strict=True) if n.kind == "channel"
    ])  # fmt: skip
    assert set(channels.tolist()) <= {0, GONE}
    smallest = chosen["norms"].argsort()[: len(channels) // 2]
    assert set((channels == GONE).nonzero().flatten().tolist()) == set(smallest.tolist())


def test_at_the_end_of_a_period_adapters_of_kept_groups_move_into_the_weights():
    run = shear(warmup=0.25, prune=0.5, steps=16)
    before = {}

    def watch(trainer: Trainer, record: Any) -> None:
        layer: Any = trainer.run["adapted"].get_submodule("blocks.0.mlp.fc1")
        b, _, _ = factors(layer)
        if trainer.updates == 7:
            before["b"] = float(b.abs().max())
        if trainer.updates == 8:
            before["after"] = float(b.abs().max())

    run.listener = watch
    run.fit()
    assert before["b"] > 0
    assert before["after"] == 0


def test_recovery_stops_when_nothing_gets_better_and_reads_instructions_last():
    options: dict[str, Any] = {"test": ragged_tokens(6, 1), "task": "language-model", "batch_size": 6, "lr": 1e-12}
    data = {"code": ragged_tokens(), "chat": ragged_tokens(9, 3)}
    method = LoRAShear(share=0.25, rank=2, periods=1, rounds=9, held_out=3, protect=0.25, instructions=["chat"])
    result = transfer(method, None, language_model(depth=2), data, steps=60, **options)
    lines = next(p for p in result.report.panels if p.title.startswith("Loss of every source"))
    # The full model, the pruned one, and two stale rounds of each part: the other fourteen were not needed.
    assert len(lines.series["source 0"]) == 1 + 1 + 2 + 2


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"share": 0.0}, "share is 0"), ({"protect": 1.0}, "protect is 1"), ({"rank": 0}, "rank is 0"),
     ({"prune": 0.95}, r"prune is 0\.95"), ({"periods": 0}, "periods is 0"), ({"weights": (1, 0)}, "weights is"),
     ({"floor": 2}, "floor is 2"), ({"epsilon": 1.0}, "epsilon is 1"), ({"alpha": 0}, "alpha is 0")],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        LoRAShear(**arguments)


def test_more_groups_than_may_go_are_refused():
    with pytest.raises(InputError, match=r"groups \(head\) should go, but only"):
        shear(share=0.9).fit()


def test_training_in_epochs_small_data_and_unknown_instructions_are_refused():
    def run(method: LoRAShear, **options: Any) -> None:
        transfer(method, None, language_model(depth=2), ragged_tokens(), test=ragged_tokens(), task="language-model",
                 batch_size=6, **options)  # fmt: skip

    with pytest.raises(InputError, match="say steps="):
        run(LoRAShear(held_out=3), epochs=1)
    with pytest.raises(InputError, match="holds 32 samples"):
        run(LoRAShear(), steps=4)
    with pytest.raises(InputError, match="no stream 'chat'"):
        run(LoRAShear(held_out=3, instructions=["chat"]), steps=4)
    with pytest.raises(InputError, match=r"ema is 0\.9"):
        run(LoRAShear(held_out=3), steps=4, ema=0.9)
