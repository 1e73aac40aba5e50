"""Writes what transformers 5 says of a model's dtype and rotary embedding in the words of transformers 4, too.

    transformers 5                                    transformers 4
    dtype: "bfloat16"                                 torch_dtype: "bfloat16"
    rope_parameters: {rope_type: "llama3",            rope_theta: 500000.0
        rope_theta: 500000.0, factor: 8.0, …}         rope_scaling: {rope_type: "llama3", factor: 8.0, …}
    rope_parameters: {rope_type: "default",           rope_theta: 10000.0, partial_rotary_factor: 0.5
        rope_theta: 10000.0,                              (rotary_emb_base and rotary_pct in GPT-NeoX)
        partial_rotary_factor: 0.5}
    rope_parameters: {full_attention: {…},            rope_theta, rope_scaling: of full_attention
        sliding_attention: {…}}                       rope_local_base_freq: of sliding_attention (Gemma 3)

A reader that knows the old keys only takes a base of 10,000, no scaling and fp32 where it does not find them, and says
nothing. transformers 5 reads both, as its `convert_rope_params_to_dict` does for each kind of model.

Which old keys a kind of model had is not listed here; the candidates are tried. `read` parses a config as transformers
5 does. Keys are added only if it returns the same with and without them; those come first that give back
`rope_parameters` by themselves, without the new keys. Where layers of different types differ, so that old keys can be
understood in more than one way, only those are used.

Sources: `RotaryEmbeddingConfigMixin` (transformers 5), the config classes of transformers 4.57.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

Config = dict[str, Any]
"""A config.json, or a part of it that describes a part of the model."""

Reader = Callable[[Config], Config]
"""Parses a config.json and returns all of its fields, also those that it leaves to their defaults."""

BASES = ("rope_theta", "rotary_emb_base")
SHARES = ("partial_rotary_factor", "rotary_pct")
BASES_BY_LAYER_TYPE = (
    ("rope_theta", "rope_local_base_freq"),
    ("global_rope_theta", "local_rope_theta"),
    ("rope_theta",),
)
"""Old keys for the base of full attention and, if it has its own, of sliding attention."""
FULL, SLIDING = "full_attention", "sliding_attention"

UNSCALED = ("default", "axial")
"""Types of rotary embeddings without parameters of their own; transformers 4 wrote no rope_scaling for them."""

APART = ("quantization_config", "compression_config", "rope_parameters", "rope_scaling")
"""Entries that describe no part of the model."""


def with_older_keys(config: Config, read: Reader | None) -> Config:
    """Returns a copy of a config.json with the old keys beside the new ones; no key that is there changes.

    Args:
        config: the whole config.json.
        read: the reader of this kind of model. Without one, or if it can't read `config`, the commonest keys are added.
    """
    result = copy.deepcopy(config)
    expected = None if read is None else _outcome(read, config)
    if expected is None:
        read = None
    for path in _parts(config):
        dtype = _at(config, path).get("dtype")
        if isinstance(dtype, str):
            _add_first(result, path, [{"torch_dtype": dtype}], read, expected)
        rope = _at(expected or config, path).get("rope_parameters")  # a config.json may leave it to its default
        if isinstance(rope, dict) and rope:
            candidates = list(_old_forms(rope, _at(config, path)))
            proven = [keys for keys in candidates if _gives_back(result, path, keys, read, expected)]
            _add_first(result, path, proven + (candidates if _is_uniform(rope) else []), read, expected)
    return result


def _old_forms(rope: Config, part: Config) -> Iterator[Config]:
    """Yields sets of old keys that may say the same as `rope_parameters`, the commonest first."""
    if not _is_nested(rope):
        share = rope.get("partial_rotary_factor")
        for base in BASES:
            theta = {} if rope.get("rope_theta") is None else {base: rope["rope_theta"]}
            for shares in [{}] if share is None else [*({key: share} for key in SHARES), {}]:
                for scaling in _scalings(rope, part):
                    yield {**theta, **shares, **scaling}
        return
    full, sliding = rope.get(FULL), rope.get(SLIDING)
    if not isinstance(full, dict) or not isinstance(sliding, dict | None):
        return
    for bases in BASES_BY_LAYER_TYPE:
        thetas = [of_type.get("rope_theta") for of_type in (full, sliding or full)]
        if len(bases) == 1 and thetas[0] != thetas[1]:
            continue
        for scaling in _scalings(full, part):
            yield {**dict(zip(bases, thetas, strict=False)), **scaling}


def _is_nested(rope: Config) -> bool:
    """Whether there is an entry per layer type."""
    return any(isinstance(value, dict) for value in rope.values())


def _is_uniform(rope: Config) -> bool:
    """Whether all layers have the same rotary embedding."""
    values = list(rope.values())
    return not _is_nested(rope) or all(value == values[0] for value in values)


def _scalings(rope: Config, part: Config) -> Iterator[Config]:
    """Yields `rope_scaling` as it may have been before transformers 5 added to it; nothing if there is no scaling."""
    own = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    length = "original_max_position_embeddings"
    if part.get(length) is not None and own.get(length) == part[length]:
        del own[length]  # Phi-3 refuses a rope_scaling of more than three entries
    if not own.keys() - {"rope_type", "type"} and own.get("rope_type", own.get("type")) in (*UNSCALED, None):
        yield {}
        return
    if "type" in own:  # from before transformers 4.43, which copies it to rope_type; vLLM refuses two that differ
        yield {"rope_scaling": {key: value for key, value in own.items() if key != "rope_type"}}
    yield {"rope_scaling": own}


def _add_first(
    result: Config, path: list[str], candidates: list[Config], read: Reader | None, expected: Config | None
) -> None:
    """Adds the first set of keys with which the config is read as before; keys that are there stay as they are."""
    for keys in candidates:
        new = {key: value for key, value in copy.deepcopy(keys).items() if key not in _at(result, path)}
        changed = copy.deepcopy(result)
        _at(changed, path).update(new)
        if read is None or _outcome(read, changed) == expected:
            _at(result, path).update(new)
            return


def _gives_back(config: Config, path: list[str], keys: Config, read: Reader | None, expected: Config | None) -> bool:
    """Whether the old keys alone, without `rope_parameters`, are read as both together."""
    changed = copy.deepcopy(config)
    part = _at(changed, path)
    part.pop("rope_parameters", None)
    part |= {**copy.deepcopy(keys), **{key: part[key] for key in keys if key in part}}
    return read is not None and _outcome(read, changed) == expected


def _outcome(read: Reader, config: Config) -> Config | None:
    """What the reader makes of a config; None if it can't read it."""
    try:
        return read(copy.deepcopy(config))
    except Exception:  # config classes raise errors of many kinds
        return None


def _parts(config: Config, path: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Yields the path of the config and of every dict in it that may be the config of a part of the model."""
    yield list(path)
    for key, value in config.items():
        if isinstance(value, dict) and key not in APART:
            yield from _parts(value, (*path, key))


def _at(config: Config, path: list[str]) -> Config:
    """The part at a path; empty if there is none."""
    for key in path:
        part = config.get(key)
        config = part if isinstance(part, dict) else {}
    return config
