"""Token mixers whose cost grows linearly with the text, and decoders in which they take the place of attention.

All but mLSTM are one recurrence with a gate a_t of its own: with keys k, queries q and values v of a head,

    S_t = diag(a_t) S_{t-1} + k_t v_t^T            out_t = S_t^T q_t
    out = M v,   M_ij = sum_d q_id k_jd prod_{s = j+1..i} a_sd   for j <= i, else 0

as one matrix (`matrix`), in chunks (`forward`), or token by token with a state of fixed size (`step`).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.core.errors import InputError

FLOOR = -30.0
"""Of sums of log-gates: exp(-30) is 1e-13, nothing beside what is near."""
State = tuple[Tensor, ...]


def decay(log_gates: Tensor) -> Tensor:
    """exp of the sum of the log-gates after j up to i, 0 where j > i: `(..., i, j, d)` from `(..., tokens, d)`."""
    total = log_gates.cumsum(-2)
    between = (total.unsqueeze(-2) - total.unsqueeze(-3)).clamp(FLOOR, 0.0).exp()
    tokens = log_gates.shape[-2]
    return between * torch.ones(tokens, tokens, device=between.device).tril().unsqueeze(-1)


def mixing_matrix(query: Tensor, key: Tensor, log_gates: Tensor) -> Tensor:
    """M `(batch, heads, tokens, tokens)` of queries and keys `(batch, heads, tokens, d)`.

    Args:
        log_gates: log a_t <= 0, `(batch, heads, tokens, d)`, or with a last dimension of 1 where all d share a gate.
    """
    if log_gates.shape[-1] == 1:
        return (query @ key.mT) * decay(log_gates).squeeze(-1)
    return torch.einsum("bhid,bhjd,bhijd->bhij", query, key, decay(log_gates))


def mix_step(query: Tensor, key: Tensor, value: Tensor, log_gates: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token, `(batch, heads, d)` each, on a state `(batch, heads, d, value's d)`."""
    state = state * log_gates.exp().unsqueeze(-1) + key.unsqueeze(-1) * value.unsqueeze(-2)
    return (query.unsqueeze(-2) @ state).squeeze(-2), state


def mix_chunks(query: Tensor, key: Tensor, value: Tensor, log_gates: Tensor, size: int) -> Tensor:
    """M v in pieces of `size` tokens: a matrix within each, and the state of all before it."""
    state = query.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1])
    found = []
    for q, k, v, log_a in zip(*(part.split(size, -2) for part in (query, key, value, log_gates)), strict=True):
        total = log_a.cumsum(-2)
        found.append(mixing_matrix(q, k, log_a) @ v + (q * total.clamp(min=FLOOR).exp()) @ state)
        end = total[..., -1:, :]
        state = state * end.clamp(min=FLOOR).exp().mT + (k * (end - total).clamp(min=FLOOR).exp()).mT @ v
    return torch.cat(found, -2)


def rotate(x: Tensor, first: int = 0) -> Tensor:
    """Rotary positions, the first token of `(..., tokens, d)` being number `first` (Su et al., 2021, base 10,000)."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** -(torch.arange(half, device=x.device) / half)
    angle = (first + torch.arange(x.shape[-2], device=x.device)).unsqueeze(-1) * frequency
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Mixer(nn.Module):
    """Base: projections, the recurrence, an RMS norm of each head, an output gate where there is one, a projection.

    Queries are divided by sqrt(head_dim); behind the norm this changes nothing but the weight of its epsilon.

    Args:
        dim: width of the token stream.
        heads: of queries, keys and values alike.
        head_dim: of each; None for dim / heads.
        bias: whether queries, keys, values and output have biases.

    Raises:
        InputError: `heads` does not divide `dim` and no `head_dim` is given; (in the forward pass) the mask is not
            causal.
    """

    gated = True
    chunk = 16
    """Tokens that are mixed by one matrix."""

    def __init__(self, dim: int, heads: int, head_dim: int | None = None, bias: bool = False):
        if head_dim is None and dim % heads:
            raise InputError(f"dim must be a multiple of heads, found dim={dim} and heads={heads}: or give head_dim")
        super().__init__()
        self.heads, self.head_dim = heads, head_dim or dim // heads
        inner = heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(inner, dim, bias=bias)
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-5)
        self.gate = nn.Linear(dim, inner, bias=False) if self.gated else None

    def log_gates(self, x: Tensor) -> Tensor:
        """log a_t, `(batch, heads, tokens, d or 1)`, of the stream `(batch, tokens, dim)`."""
        return x.new_zeros(x.shape[0], self.heads, x.shape[1], 1)

    def feature(self, x: Tensor, first: int) -> Tensor:
        """What is done to queries and keys `(batch, heads, tokens, d)`, the first being token number `first`."""
        return x

    def parts(self, x: Tensor, real: Tensor | None = None, first: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values, log-gates; a padding token has no key and leaves the state as it is."""
        query, key, value = (self._split(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        query, key = self.feature(query, first) / math.sqrt(self.head_dim), self.feature(key, first)
        log_a = self.log_gates(x)
        if real is not None:
            keep = real[:, None, :, None]
            key, log_a = torch.where(keep, key, 0), torch.where(keep, log_a, 0)
        return query, key, value, log_a

    def matrix(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """M `(batch, heads, tokens, tokens)`."""
        query, key, _, log_a = self.parts(x, real_tokens(mask))
        return mixing_matrix(query, key, log_a)

    def parallel(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The same as the mixer itself, by the whole matrix at once."""
        return self.output(x, self.matrix(x, mask) @ self._split(self.v_proj(x)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(batch, tokens, dim)` to the same shape.

        Args:
            mask: as attention takes it, `(batch, 1, tokens, tokens)`, true or 0 where a token may look; causal.
        """
        return self.output(x, mix_chunks(*self.parts(x, real_tokens(mask)), self.chunk))

    def start(self, batch: int) -> State:
        """The state before the first token; its last entry counts tokens."""
        return self.o_proj.weight.new_zeros(batch, self.heads, self.head_dim, self.head_dim), torch.tensor(0)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token `(batch, dim)` and what was before it: its output, and the state after it."""
        past, count = state
        query, key, value, log_a = (p.squeeze(-2) for p in self.parts(x.unsqueeze(1), first=int(count)))
        out, past = mix_step(query, key, value, log_a, past)
        return self.output(x.unsqueeze(1), out.unsqueeze(-2)).squeeze(1), (past, count + 1)

    def output(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Norm of each head, output gate and projection of `(batch, heads, tokens, head_dim)`."""
        mixed = self.norm(mixed).transpose(1, 2).flatten(2)
        return self.o_proj(mixed if self.gate is None else mixed * F.silu(self.gate(x)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class LinearAttention(Mixer):
    """phi(q)^T phi(k), phi(x) = elu(x) + 1, not normalised (Katharopoulos et al., 2020, arXiv:2006.16236)."""

    gated = False

    def feature(self, x: Tensor, first: int) -> Tensor:
        return F.elu(x) + 1


class RetNet(Mixer):
    """A fixed decay of each head, 1 - 2**(-5 - head), and rotary positions (Sun et al., 2023, arXiv:2307.08621)."""

    def __init__(self, dim: int, heads: int, head_dim: int | None = None, bias: bool = False):
        super().__init__(dim, heads, head_dim, bias)
        if self.head_dim % 2:
            raise InputError(f"rotary positions turn pairs of numbers, found heads of width {self.head_dim}")

    def log_gates(self, x: Tensor) -> Tensor:
        gamma = 1 - 2.0 ** (-5 - torch.arange(self.heads, device=x.device, dtype=x.dtype))
        return gamma.log()[None, :, None, None].expand(x.shape[0], -1, x.shape[1], 1)

    def feature(self, x: Tensor, first: int) -> Tensor:
        return rotate(x, first)


class GLA(Mixer):
    """A gate for every dimension of the keys, sigmoid(W2 W1 x)**(1/16), W1 of rank 16 (Yang et al., 2023,
    arXiv:2312.06635)."""

    def __init__(self, dim: int, heads: int, head_dim: int | None = None, bias: bool = False):
        super().__init__(dim, heads, head_dim, bias)
        self.decay = nn.Sequential(nn.Linear(dim, 16, bias=False), nn.Linear(16, heads * self.head_dim))

    def log_gates(self, x: Tensor) -> Tensor:
        return self._split(F.logsigmoid(self.decay(x)) / 16)


class SSD(Mixer):
    """Mamba-2's state space: one gate per head, a = exp(-exp(A) softplus(W x + b)) (Dao & Gu, 2024, arXiv:2405.21060).

    c = q, b = k, x = v. There is no short convolution, and the input is not multiplied by the step.
    """

    def __init__(self, dim: int, heads: int, head_dim: int | None = None, bias: bool = False):
        super().__init__(dim, heads, head_dim, bias)
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.dt = nn.Linear(dim, heads)
        steps = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        with torch.no_grad():
            self.dt.bias.copy_(steps + (-torch.expm1(-steps)).log())  # softplus of it gives these steps

    def log_gates(self, x: Tensor) -> Tensor:
        return -(self.log_rate.exp() * F.softplus(self.dt(x))).mT.unsqueeze(-1)


class MLSTM(Mixer):
    """Exponential input gate, sigmoid forget gate, and a normaliser, stabilised (Beck et al., 2024, arXiv:2405.04517).

        C_t = f_t C_{t-1} + i_t k_t v_t^T     n_t = f_t n_{t-1} + i_t k_t     out_t = C_t^T q_t / max(|n_t^T q_t|, 1)

    All in logarithms: m_t = max(log f_t + m_{t-1}, log i_t) is taken out of C and n.
    """

    def __init__(self, dim: int, heads: int, head_dim: int | None = None, bias: bool = False):
        super().__init__(dim, heads, head_dim, bias)
        self.input_gate, self.forget_gate = nn.Linear(dim, heads), nn.Linear(dim, heads)
        with torch.no_grad():
            for gate in (self.input_gate, self.forget_gate):
                nn.init.xavier_uniform_(gate.weight, gain=0.1)
            self.input_gate.bias.fill_(-math.log(2))
            self.forget_gate.bias.copy_(torch.linspace(3, 6, heads))

    def log_gates(self, x: Tensor) -> Tensor:
        return F.logsigmoid(self.forget_gate(x)).mT.unsqueeze(-1)

    def matrix(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """M with the normaliser in it."""
        real = real_tokens(mask)
        query, key, _, log_f = self.parts(x, real)
        total = log_f.cumsum(-2)
        log_d = total - total.mT + self._log_input(x, real).unsqueeze(-2)
        tokens = x.shape[1]
        log_d = log_d.masked_fill(torch.ones(tokens, tokens, device=x.device).triu(1).bool(), -torch.inf)
        most = log_d.amax(-1, keepdim=True).clamp(min=FLOOR)  # where all is padding there is no maximum
        found = (query @ key.mT) * (log_d - most).exp()
        return found / torch.maximum(found.sum(-1, keepdim=True).abs(), (-most).exp())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(batch, tokens, dim)` to the same shape, by the whole matrix."""
        return self.parallel(x, mask)

    def start(self, batch: int) -> State:
        past, count = super().start(batch)
        return past, past[..., 0], past[..., 0, 0] + FLOOR, count

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        past, norm, most, count = state
        query, key, value, log_f = (p.squeeze(-2) for p in self.parts(x.unsqueeze(1), first=int(count)))
        log_f, log_i = log_f.squeeze(-1), self._log_input(x.unsqueeze(1), None).squeeze(-1)
        new = torch.maximum(log_f + most, log_i).clamp(min=FLOOR)
        f, i = ((log_f + most - new).exp().unsqueeze(-1), (log_i - new).exp().unsqueeze(-1))
        past = past * f.unsqueeze(-1) + (i * key).unsqueeze(-1) * value.unsqueeze(-2)
        norm = norm * f + i * key
        size = torch.maximum((norm * query).sum(-1).abs(), (-new).exp()).unsqueeze(-1)
        out = (query.unsqueeze(-2) @ past).squeeze(-2) / size
        return self.output(x.unsqueeze(1), out.unsqueeze(-2)).squeeze(1), (past, norm, new, count + 1)

    def _log_input(self, x: Tensor, real: Tensor | None) -> Tensor:
        log_i = self.input_gate(x).mT
        return log_i if real is None else log_i.masked_fill(~real[:, None], -torch.inf)


class Softmax(Mixer):
    """Attention itself, without a norm or gate: what a student with its teacher's projections must be equal to."""

    gated = False

    def matrix(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, _, _ = self.parts(x)
        tokens = x.shape[1]
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        if (real := real_tokens(mask)) is not None:
            seen = (seen & real[:, None, None, :]) | torch.eye(tokens, dtype=torch.bool, device=x.device)
        return (query @ key.mT).masked_fill(~seen, -torch.inf).softmax(-1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.parallel(x, mask)

    def output(self, x: Tensor, mixed: Tensor) -> Tensor:
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


MIXERS: dict[str, type[Mixer]] = {
    "linear": LinearAttention,
    "retnet": RetNet,
    "gla": GLA,
    "ssd": SSD,
    "mlstm": MLSTM,
    "softmax": Softmax,
}


class HuggingFaceMixer(nn.Module):
    """A mixer as a Hugging Face decoder layer calls its attention. It keeps no cache."""

    def __init__(self, mixer: Mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **more: Any) -> tuple[Tensor, None]:
        if more.get("past_key_values") is not None:
            raise InputError("a decoder with subquadratic mixers has no key-value cache: call it with use_cache=False")
        return self.mixer(hidden_states, attention_mask), None


def subquadratic_student(teacher: nn.Module, mixer: str = "gla", copy_qkv: bool = True) -> nn.Module:
    """A copy of a decoder in which every attention is replaced by a mixer; all else has the teacher's weights.

    Args:
        teacher: a :class:`~transfuse.models.DecoderLM`, or of Hugging Face's a decoder with `model.layers` whose
            attention has `q_proj`, `k_proj`, `v_proj` and `o_proj` (Llama, SmolLM2, Mistral, Qwen).
        mixer: of `MIXERS`. Its new parts are drawn from torch's global generator.
        copy_qkv: whether the projections are the teacher's too; grouped keys and values are repeated for every head.

    Raises:
        InputError: unknown mixer; the teacher has other layers.
    """
    if mixer not in MIXERS:
        raise InputError(f"unknown mixer {mixer!r}, known are {', '.join(MIXERS)}")
    student = copy.deepcopy(teacher)
    layers = getattr(getattr(student, "model", None), "layers", None)
    if isinstance(layers, nn.ModuleList) and all(hasattr(layer, "self_attn") for layer in layers):
        config: Any = student.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for layer in layers:
            layer.self_attn = HuggingFaceMixer(
                _replaced(layer.self_attn, MIXERS[mixer], config.num_attention_heads, head_dim, copy_qkv)
            )
        config.use_cache = False
        if getattr(student, "generation_config", None) is not None:
            student.generation_config.use_cache = False  # type: ignore[union-attr]
        return student
    blocks = getattr(student, "blocks", None)
    if isinstance(blocks, nn.ModuleList) and all(hasattr(getattr(b, "attn", None), "qkv") for b in blocks):
        for block in blocks:
            old: Any = block.attn
            block.attn = _replaced(old, MIXERS[mixer], old.heads, old.proj.in_features // old.heads, copy_qkv)
        return student
    raise InputError(
        f"{type(teacher).__name__} has neither `blocks` with `attn.qkv`, as DecoderLM, nor `model.layers` with "
        "`self_attn`, as Hugging Face decoders: replace its attention yourself, by a Mixer of transfuse.models.mixers"
    )


def unroll(weight: Tensor, head_dim: int, heads: int) -> Tensor:
    """Rows of grouped keys or values repeated in place for every query head: kv head i serves heads i*n to (i+1)*n - 1.

    Raises:
        InputError: the number of groups does not divide the number of heads.
    """
    groups = weight.shape[0] // head_dim
    if weight.shape[0] % head_dim or heads % groups:
        raise InputError(f"{weight.shape[0]} rows in heads of {head_dim} cannot be shared evenly by {heads} heads")
    return weight.unflatten(0, (groups, head_dim)).repeat_interleave(heads // groups, 0).flatten(0, 1)


def _replaced(attention: Any, mixer: type[Mixer], heads: int, head_dim: int, copy_qkv: bool) -> Mixer:
    if hasattr(attention, "qkv"):
        names = ("weight", "bias")
        given = {n: getattr(attention.qkv, n).chunk(3) for n in names}
        old = {f"{p}_proj.{n}": given[n][i] for i, p in enumerate("qkv") for n in names}
        old |= {f"o_proj.{n}": getattr(attention.proj, n) for n in names}
        output = attention.proj
    else:
        old = {f"{p}.{n}": v for p in ("q_proj", "k_proj", "v_proj", "o_proj")
               for n, v in getattr(attention, p).named_parameters()}  # fmt: skip
        old |= {n: unroll(v, head_dim, heads) for n, v in old.items() if n[0] in "kv"}
        output = attention.o_proj
    bias = "q_proj.bias" in old
    made = mixer(output.out_features, heads, head_dim, bias).to(output.weight)
    if copy_qkv:
        own = made.state_dict()
        with torch.no_grad():
            for name, value in own.items():
                if name in old:
                    value.copy_(old[name])
                elif name == "o_proj.bias":  # of a teacher that has biases elsewhere only
                    value.zero_()
    return made


def real_tokens(mask: Tensor | None) -> Tensor | None:
    """Which tokens are no padding, `(batch, tokens)`, of an attention mask `(batch, 1, tokens, tokens)`.

    Raises:
        InputError: a token may look at a later one.
    """
    if mask is None:
        return None
    seen = mask if mask.dtype == torch.bool else mask >= 0
    if seen.triu(1).any():
        raise InputError("the mask lets a token look at a later one: these mixers are causal")
    return seen[:, 0, -1]  # the last token sees every real one, and itself: as padding it has none after it
