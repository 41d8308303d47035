import pytest
import torch
from helpers import VOCABULARY, language_model, llama
from torch import nn

from transfuse.core.decoding import Reader, choose, generate, left_padded
from transfuse.core.errors import InputError


@pytest.fixture(scope="module", name="llama")
def tiny_llama():
    return llama(vocab_size=23, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, bos_token_id=1)


@pytest.fixture(scope="module")
def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=23,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=None,
    )
    return transformers.GPT2LMHeadModel(config).eval()


class Wrapped(nn.Module):
    """The same model as no cache knows it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        positions = None if attention_mask is None else (attention_mask.cumsum(1) - 1).clamp(min=0)
        return self.model(input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits


def prompts(rows=3, n=5, vocabulary=VOCABULARY, seed=0):
    return torch.randint(1, vocabulary, (rows, n), generator=torch.Generator().manual_seed(seed))


def padded(tokens, by=3):
    mask = torch.cat([torch.zeros(len(tokens), by), torch.ones_like(tokens)], 1).long()
    return torch.cat([tokens.new_zeros(len(tokens), by), tokens], 1), mask


def test_greedy_is_the_most_probable_token_each_time():
    model = language_model()
    expected = prompts()
    for _ in range(6):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(model, prompts(), new_tokens=6), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cache_changes_nothing_and_hugging_face_says_the_same(name, request):
    model = request.getfixturevalue(name)
    tokens = prompts(vocabulary=23)
    found = generate(model, tokens, new_tokens=8)
    assert torch.equal(found, generate(Wrapped(model), tokens, new_tokens=8))
    theirs = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False)
    assert torch.equal(found, theirs)
    assert len({tuple(row[5:].tolist()) for row in found}) > 1  # it is not one loop for all


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cached_reader_reads_one_token_at_a_time(name, request):
    model = request.getfixturevalue(name).eval()
    tokens, mask = prompts(vocabulary=23, n=9), torch.ones(3, 9, dtype=torch.bool)
    whole = Reader(model).logits(tokens, mask)
    reader, seen = Reader(model), []
    model.register_forward_pre_hook(
        hook := lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        for begin, stop in ((0, 4), (4, 5), (5, 9)):
            logits = reader.read(tokens[:, begin:stop], mask[:, begin:stop])
            assert torch.allclose(logits, whole[:, stop - 1], atol=1e-5)
    model._forward_pre_hooks.clear()
    assert hook and seen == [4, 1, 4]


@pytest.mark.parametrize("name", ["plain", "llama", "gpt2", "wrapped"])
def test_left_padding_changes_nothing(name, request):
    model = {"plain": language_model}.get(name, lambda: request.getfixturevalue(name.replace("wrapped", "llama")))()
    model = Wrapped(model) if name == "wrapped" else model
    long, short = prompts(1, 7), prompts(1, 4, seed=1)
    tokens = torch.cat([long, padded(short)[0]])
    mask = torch.cat([torch.ones_like(long), padded(short)[1]])
    together = generate(model, tokens, new_tokens=6, mask=mask)
    assert torch.equal(together[0], generate(model, long, new_tokens=6)[0])
    assert torch.equal(together[1, 3:], generate(model, short, new_tokens=6)[0])
    assert torch.equal(together[:, :7], tokens)


def test_padding_on_the_right_is_refused_and_can_be_moved():
    tokens, mask = torch.tensor([[1, 2, 0, 0], [3, 4, 5, 0]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    with pytest.raises(InputError, match="left_padded"):
        generate(language_model(), tokens, new_tokens=1, mask=mask)
    moved, real = left_padded(tokens, mask)
    assert moved.tolist() == [[0, 0, 1, 2], [0, 3, 4, 5]] and real.tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    generate(language_model(), moved, new_tokens=1, mask=real)


def test_a_model_that_cannot_be_told_of_padding_says_so():
    model = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY))
    assert generate(model, prompts(), new_tokens=2).shape == (3, 7)
    tokens, mask = padded(prompts())
    with pytest.raises(InputError, match="no attention_mask"):
        generate(model, tokens, new_tokens=2, mask=mask)


def test_what_has_a_context_reads_the_last_tokens_of_a_text():
    model = language_model()  # 16 tokens
    tokens = prompts(n=20)
    expected = tokens
    for _ in range(3):
        expected = torch.cat([expected, model(expected[:, -16:])[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(model, tokens, new_tokens=3), expected)


def test_a_text_that_outgrows_a_hugging_face_model_is_refused_before_anything_is_read(llama):
    assert generate(llama, prompts(n=30), new_tokens=3).shape == (3, 33)  # the last token is not read
    with pytest.raises(InputError, match="reads 32 tokens, and these texts grow to 33"):
        generate(llama, prompts(n=30), new_tokens=4)
    with pytest.raises(InputError, match="grow to 33"):  # nobody knew whether it would end before
        generate(llama, prompts(n=30), new_tokens=4, end=22)
    with pytest.raises(InputError, match="grow to 33"):
        generate(llama, prompts(n=33), new_tokens=4, end=22)


def test_draws_can_be_repeated_and_follow_the_probabilities():
    model = language_model()
    one, other = (
        generate(model, prompts(), new_tokens=8, temperature=1.0, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(one, other)
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(20000, -1)
    drawn = choose(logits, 1.0, generator=torch.Generator().manual_seed(0)).bincount(minlength=4) / 20000
    assert torch.allclose(drawn, logits[0].exp(), atol=0.015)
    sharp = choose(logits, 0.5, generator=torch.Generator().manual_seed(0)).bincount(minlength=4) / 20000
    assert torch.allclose(sharp, torch.tensor([1.0, 4, 9, 16]) / 30, atol=0.015)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"top_k": 2}, {2, 3}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.39}, {3}),
        ({"top_p": 0.41}, {2, 3}),
        ({"top_p": 0.71}, {1, 2, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.5}, {2, 3}),
    ],
)
def test_top_k_and_top_p_draw_from_these_tokens(settings, allowed):
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(500, -1)
    drawn = choose(logits, 1.0, generator=torch.Generator().manual_seed(0), **settings)
    assert set(drawn.tolist()) == allowed


def test_a_row_that_has_ended_is_filled_and_the_others_go_on(llama):
    tokens = prompts(vocabulary=23)
    free = generate(llama, tokens, new_tokens=8)[:, 5:].tolist()
    end = free[0][2]
    assert end not in free[1]
    found = generate(llama, tokens, new_tokens=8, end=end)[:, 5:].tolist()
    for row, without in zip(found, free, strict=True):
        stop = without.index(end) if end in without else len(without)
        assert row == without[:stop] + [end] * (8 - stop)


def test_modes_and_gradients_are_left_alone():
    model = language_model()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    generate(model, prompts(), new_tokens=2)
    assert [m.training for m in model.modules()] == modes and model.training
    assert all(p.grad is None for p in model.parameters())


def test_models_in_step_see_the_same_text_and_what_they_say_is_put_together(llama):
    large, small, tokens = llama, Wrapped(language_model_of(23)), prompts(vocabulary=23)
    asked = []

    def fuse(logits):
        asked.append([row.shape for row in logits])
        return logits[0] + logits[1]

    found = generate([large, small.model], tokens, new_tokens=5, fuse=fuse)
    expected = tokens
    with torch.no_grad():
        for _ in range(5):
            both = large(expected).logits[:, -1] + small.model(expected)[:, -1]
            expected = torch.cat([expected, both.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, expected) and asked == [[(3, 23), (3, 23)]] * 5


def language_model_of(vocabulary):
    from transfuse.models import DecoderLM

    torch.manual_seed(2)
    return DecoderLM(vocabulary, dim=8, depth=1, heads=2, context=16)


@pytest.mark.parametrize("name", ["plain", "llama"])
def test_a_prefix_is_read_by_its_model_alone(name, request):
    model = language_model() if name == "plain" else request.getfixturevalue("llama")
    other = language_model_of(23)
    prefix, (tokens, mask) = torch.tensor([4, 2, 7]), padded(prompts(n=3), 2)
    seen = []
    found = generate(
        [model, other],
        tokens,
        mask=mask,
        fuse=lambda logits: seen.append(logits) or logits[0],
        new_tokens=4,
        prefixes={0: prefix},
    )
    whole = torch.cat([prefix.expand(3, -1), tokens[:, 2:]], 1)
    assert torch.equal(found[:, 5:], generate(model, whole, new_tokens=4)[:, 6:])
    assert torch.allclose(seen[0][1], other(tokens[:, 2:])[:, -1], atol=1e-6)


def test_adapters_and_learned_prompts_of_peft_decode_as_their_models_do(llama):
    peft = pytest.importorskip("peft")
    import copy

    tokens, mask = padded(prompts(vocabulary=23), 2)
    lora = peft.get_peft_model(
        copy.deepcopy(llama), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    assert Reader(lora).caches
    found = generate(lora, tokens, new_tokens=5, mask=mask)
    assert torch.equal(found, generate(Wrapped(lora.base_model.model), tokens, new_tokens=5, mask=mask))
    prompt = peft.get_peft_model(
        copy.deepcopy(llama), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    assert not Reader(prompt).caches
    bare = prompts(vocabulary=23)
    expected = bare
    with torch.no_grad():
        for _ in range(4):
            logits = prompt(input_ids=expected, attention_mask=torch.ones_like(expected)).logits[:, -1]
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(prompt, bare, new_tokens=4), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new_tokens": 0}, "new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"tokens": torch.zeros(2, 0, dtype=torch.long)}, "at least one token"),
        ({"tokens": torch.zeros(2, 3)}, "whole numbers"),
        ({"mask": torch.zeros(3, 5)}, "without any"),
        ({"mask": torch.ones(3, 4)}, "mask has shape"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        generate(language_model(), **{"tokens": prompts(), "new_tokens": 2, **change})


def test_an_encoder_with_a_decoder_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2)
    with pytest.raises(InputError, match="encoder and a decoder"):
        Reader(transformers.T5ForConditionalGeneration(config))
