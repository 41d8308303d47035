"""Recipes of mergekit's, in our words. Which keys are understood: docs/mergekit.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transfuse.core.errors import InputError, nearest

ARITHMETIC = {"normalize": "normalize", "lambda": "scale"}
PER_MODEL = {"weight": "weight", "density": "density", "gamma": "outliers", "epsilon": "spread"}


def _thinned(
    name: str, consensus: bool | None = None, normalize: bool = False, **more: str
) -> tuple[str, dict[str, Any]]:
    given: dict[str, Any] = {"normalize": normalize} | ({} if consensus is None else {"consensus": consensus})
    return name, {"defaults": given | {"density": 1.0}, "names": {**ARITHMETIC, **PER_MODEL, **more}}


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("Linear", {"names": {"weight": "weight", "normalize": "normalize"}, "base": "model"}),
    "slerp": ("SLERP", {"names": {"t": "t"}, "base": "first"}),
    "nuslerp": ("NuSLERP", {"names": {"weight": "weight"}}),
    "multislerp": ("MultiSLERP", {"names": {"weight": "weight", "normalize_weights": "normalize"}}),
    "karcher": ("Karcher", {"names": {"max_iter": "steps", "tol": "tolerance"}, "base": "model"}),
    "task_arithmetic": (
        "TaskArithmetic",
        {"names": {**ARITHMETIC, "weight": "weight"}, "defaults": {"normalize": False}},
    ),
    "ties": _thinned("TIES", normalize=True),
    "dare_linear": _thinned("DARE", consensus=False),
    "dare_ties": _thinned("DARE", consensus=True),
    "della_linear": _thinned("DELLA", consensus=False),
    "della": _thinned("DELLA", consensus=True, normalize=True),
    "breadcrumbs": _thinned("Breadcrumbs", consensus=False),
    "breadcrumbs_ties": _thinned("Breadcrumbs", consensus=True),
    "sce": ("SCE", {"names": {"select_topk": "density"}}),
    "model_stock": ("ModelStock", {"names": {"filter_wise": "rows"}}),
    "nearswap": ("NearSwap", {"names": {"t": "t"}}),
    "passthrough": ("Passthrough", {"names": {"scale": "scale"}, "base": "model"}),
}
"""Ours by mergekit's name: the class, its arguments by mergekit's names, defaults where ours are others, and what
mergekit's `base_model` is: the ancestor, the first model (`"first"`), or one model among others (`"model"`)."""
KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "name",
)  # fmt: skip
IGNORED = {"int8_mask": "masks take no memory here", "rescale": "DARE and DELLA always rescale"}
LAYERS = tuple(f"*.{'[0-9]' * digits}.*" for digits in (1, 2, 3))
EMBEDDINGS = ("embed", "wte", "wpe")
"""Names of what is in a layer, and of tables of tokens and positions."""
MODEL_WISE = ("weight", "density", "gamma", "epsilon", "scale")


def is_mergekit(content: Mapping[str, Any]) -> bool:
    """Whether a recipe is written in mergekit's words."""
    return "merge_method" in content


def translated(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The same recipe in our words, and what in it means nothing here.

    Raises:
        InputError: a key or a method has no counterpart; it is named.
    """
    for key in content:
        if key not in KEYS:
            raise InputError(f"{key!r} of a mergekit recipe is not understood: {nearest(key, KEYS)}")
    name = content["merge_method"]
    if name not in METHODS:
        raise InputError(f"mergekit's method {name!r} has no counterpart here: {nearest(str(name), METHODS)}")
    ours, how = METHODS[name]
    notes: list[str] = []
    slices = content.get("slices") or []
    if bool(slices) == bool(content.get("models")):
        raise InputError("a mergekit recipe has 'models' or 'slices', one of them")
    base = content.get("base_model")
    found: dict[str, Any] = {"method": {"name": ours}}
    if slices:
        columns, depths = _slices(slices, base, how, notes)
        found["slices"] = columns
    else:
        columns = [[_parent(entry["model"]) | {"of": entry} for entry in _ordered(content["models"], base, how)]]
        depths = [None]
        found["models"] = [{k: v for k, v in parent.items() if k != "of"} for parent in columns[0]]
    if base is not None and how.get("base", "ancestor") == "ancestor":
        found["base"] = _parent(base)
    given = _arguments(content, slices, columns, depths, how, notes)
    found["method"] |= given
    if slices:
        found["slices"] = [[{k: v for k, v in p.items() if k != "of"} for p in column] for column in columns]
    if dtype := content.get("out_dtype") or content.get("dtype"):
        found["dtype"] = dtype
    if vocabulary := _vocabulary(content, base, notes):
        found["vocabulary"] = vocabulary
    return found, notes


def _ordered(entries: Sequence[Mapping[str, Any]], base: str | None, how: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The models that are merged, in our order: without the ancestor, or with the base first."""
    kind = how.get("base", "ancestor")
    if kind == "first":
        if base is None:
            raise InputError("mergekit's slerp goes from 'base_model' to another model, and none is given")
        return sorted(entries, key=lambda entry: entry["model"] != base)
    return [e for e in entries if e["model"] != base] if kind == "ancestor" else list(entries)


def _slices(
    slices: Sequence[Mapping[str, Any]], base: str | None, how: Mapping[str, Any], notes: list[str]
) -> tuple[list[list[dict[str, Any]]], list[int | None]]:
    """The ranges of every slice, and how many layers each has."""
    columns, depths = [], []
    for part in slices:
        sources = _ordered(part["sources"], base, how)
        if any("layer_range" not in source for source in sources):
            raise InputError("every source of a slice needs its 'layer_range'")
        ranges = [_parent(s["model"]) | {"layers": list(s["layer_range"]), "of": s} for s in sources]
        sizes = {end - start for start, end in (r["layers"] for r in ranges)}
        if len(sizes) > 1:
            raise InputError(f"the ranges of one slice have {sorted(sizes)} layers: they must be equally many")
        columns.append(ranges)
        depths.append(sizes.pop())
    return columns, depths


def _arguments(
    content: Mapping[str, Any],
    slices: Sequence[Mapping[str, Any]],
    columns: Sequence[Sequence[Mapping[str, Any]]],
    depths: Sequence[int | None],
    how: Mapping[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    """Arguments of our method: mergekit looks at the model first, then at the slice, then at the whole recipe."""
    names: dict[str, str] = how["names"]
    defaults: dict[str, Any] = dict(how.get("defaults", {}))
    wholes = content.get("parameters") or {}
    parts = [part.get("parameters") or {} for part in slices] or [{}]
    owns = [[dict(parent["of"].get("parameters") or {}) for parent in column] for column in columns]
    asked = {key for level in (wholes, *parts, *(own for row in owns for own in row)) for key in level}
    given = dict(defaults)
    for key in sorted(asked):
        if key in IGNORED and key not in names:
            notes.append(f"{key}: {IGNORED[key]}")
            if key == "rescale" and (wholes.get(key) is False) == (
                content["merge_method"].startswith(("dare", "della"))
            ):
                raise InputError("'rescale' other than mergekit's default is not supported: leave it out")
            continue
        if key == "nuslerp_row_wise" or key == "nuslerp_flatten":
            continue
        if key not in names:
            known = (*names, *IGNORED)
            raise InputError(
                f"{content['merge_method']} has no parameter {key!r} that is understood: {nearest(key, known)}"
            )

        def of_slice(i: int, number: int | None, key: str = key) -> Any:
            for level in ((owns[i][number],) if number is not None else ()) + (parts[i], wholes):
                if key in level:
                    return level[key]
            return defaults.get(names[key], 1.0)

        def settled(number: int | None) -> Any:
            return _joined([_setting(of_slice(i, number), depths[i]) for i in range(len(columns))], depths)

        per_model = key in MODEL_WISE and any(key in own for row in owns for own in row)
        given[names[key]] = [settled(n) for n in range(len(columns[0]))] if per_model else settled(None)
    if content["merge_method"] == "nuslerp":
        flatten, rows = (wholes.get(k, d) for k, d in (("nuslerp_flatten", True), ("nuslerp_row_wise", False)))
        given["along"] = "tensor" if flatten else "columns" if rows else "rows"
    return given


def _setting(value: Any, depth: int | None) -> Any:
    """A number; a list over the layers of its slice; or values by a part of the tensor's name."""
    if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
        return {f"*{v['filter']}*" if v.get("filter", "*") != "*" else "*": _setting(v["value"], depth) for v in value}
    if isinstance(value, list):
        numbers = [float(v) for v in value]
        return numbers[0] if len(numbers) == 1 else {"depth": numbers if depth is None else _spread(numbers, depth)}
    return value


def _spread(numbers: Sequence[float], depth: int) -> list[float]:
    """A list over a slice, as one value for each of its layers."""
    found = []
    for layer in range(depth):
        place = (layer / (depth - 1) if depth > 1 else 1.0) * (len(numbers) - 1)
        low = min(int(place), len(numbers) - 2)
        found.append(numbers[low] + (numbers[low + 1] - numbers[low]) * (place - low))
    return found


def _joined(settings: Sequence[Any], depths: Sequence[int | None]) -> Any:
    """What holds in each slice, as one setting over all layers: a list with one value per layer is exact."""
    if len(settings) == 1 or all(setting == settings[0] and not _has_depth(setting) for setting in settings):
        return settings[0]
    if any(isinstance(setting, Mapping) and setting.keys() != {"depth"} for setting in settings):
        patterns = list(
            dict.fromkeys(p for s in settings if isinstance(s, Mapping) and s.keys() != {"depth"} for p in s)
        )
        by_pattern = [s if isinstance(s, Mapping) and s.keys() != {"depth"} else {"*": s} for s in settings]
        return {p: _joined([s.get(p, s.get("*", 1.0)) for s in by_pattern], depths) for p in patterns}
    each = [
        setting["depth"] if isinstance(setting, Mapping) else [float(setting)] * int(depth or 1)
        for setting, depth in zip(settings, depths, strict=True)
    ]
    layers = {"depth": [value for values in each for value in values]}
    # Embeddings belong to the first slice, what is behind the layers to the last.
    outside = dict.fromkeys((f"*{part}*" for part in EMBEDDINGS), each[0][0]) | {"*": each[-1][0]}
    return dict.fromkeys(LAYERS, layers) | outside


def _has_depth(setting: Any) -> bool:
    return isinstance(setting, Mapping) and ("depth" in setting or any(_has_depth(v) for v in setting.values()))


def _parent(model: str) -> dict[str, Any]:
    """mergekit writes `model+adapter`."""
    path, _, adapter = str(model).partition("+")
    return {"model": path} | ({"adapter": adapter} if adapter else {})


def _vocabulary(content: Mapping[str, Any], base: str | None, notes: list[str]) -> str | None:
    source: Any = content.get("tokenizer_source")
    if isinstance(tokenizer := content.get("tokenizer"), Mapping):
        if unknown := tokenizer.keys() - {"source"}:
            raise InputError(f"'tokenizer' takes 'source' here, not {', '.join(map(repr, sorted(unknown)))}")
        source = tokenizer.get("source")
    if (template := content.get("chat_template")) not in (None, "auto"):
        raise InputError(f"chat_template is {template!r}: the reference's own is carried over; change it in the result")
    if source is None:
        return None
    first = (content.get("models") or [{}])[0].get("model")
    if source == "union" or source == "base":
        return str(source)
    if source == base or (base is None and source == first):
        return "base"
    raise InputError(
        f"the tokenizer of {source!r} cannot be chosen: name 'base' or 'union', or make that model the base"
    )
