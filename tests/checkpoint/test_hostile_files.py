"""Files of a checkpoint that say what no tool writes are refused by name: nothing hangs, crashes or reaches out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_awq_offload import CheckpointError
from hf_awq_offload.checkpoint.inspection import inspect_checkpoint
from hf_awq_offload.checkpoint.opened import parsed_quantization, read_json, weight_map
from hf_awq_offload.checkpoint.safetensors import read_tensor, tensor_places
from hf_awq_offload.checkpoint.source import fields_beside, open_source
from hf_awq_offload.json_text import MAX_DEPTH, parse_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_sound_json_is_read_as_python_reads_it(value):
    text = json.dumps(value)
    assert parse_json(text) == parse_json(text.encode(), strict=True) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "deep"),
        ('{"a":' * 100_000, "deep"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "deep"),
        ("9" * 5000, "digits"),
        (b"\xff\xfe{\x00}\x00", "utf-8"),
    ],
    ids=["lists", "objects", "one too deep", "digits", "UTF-16"],
)
def test_json_that_python_takes_or_stumbles_over_is_a_value_error(text, why):
    with pytest.raises(ValueError, match=why):
        parse_json(text)


def test_a_key_that_is_there_twice_is_refused_where_keys_are_unique():
    text = '{"a": 1, "b": 2, "a": 3}'
    assert parse_json(text) == {"a": 3, "b": 2}
    for how in ({"strict": True}, {"unique_keys": True}):
        with pytest.raises(ValueError, match="the key 'a' twice"):
            parse_json(text, **how)


def test_json_is_read_to_the_depth_that_is_allowed():
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None


@pytest.mark.parametrize("text", ["NaN", "[-Infinity]", '"\\ud800"', '{"a": {"\\udfff": 1}}'])
def test_a_header_takes_no_json_that_is_none(text):
    assert parse_json(text) is not None  # config files of transformers have infinities
    with pytest.raises(ValueError, match=r"not valid JSON|surrogates"):
        parse_json(text, strict=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_deep_brackets_in_a_checkpoint_are_an_error_of_ours(name, tmp_path):
    (tmp_path / name).write_text('{"a":' * 50_000)
    with pytest.raises(CheckpointError, match="deep"):
        read_json(tmp_path / name)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    for name in ("config.json", "model.safetensors"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        tensor_places(tmp_path / "model.safetensors")


def test_an_endless_file_is_not_read_to_its_end(tmp_path):
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_json(tmp_path / "config.json")


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a regular file"):
        tensor_places(tmp_path / "model.safetensors")
    assert inspect_checkpoint(tmp_path).is_damaged


# -- safetensors -------------------------------------------------------------------------------------------------------


def written(path: Path, header: Any, size: int = 0) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * size)
    return path


def entry(start: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


BOMB = {f"t{number}": entry(0, 64) for number in range(1000)}
HEADERS: dict[str, tuple[Any, int, str]] = {
    "tensors that share bytes": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "begins at byte"),
    "a small file that asks for much memory": (BOMB, 64, "begins at byte"),
    "a gap": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "begins at byte"),
    "bytes after the last tensor": ({"a": entry(0, 4)}, 9, "where the header says"),
    "a dimension that no machine has": ({"a": entry(0, 0, [2**63, 0])}, 0, "has the entry"),
    "dimensions that overflow": ({"a": entry(0, 0, [2**62, 4, 0])}, 0, "has the shape"),
    "a shape that is a text": ({"a": entry(0, 1) | {"shape": ""}}, 1, "has the entry"),
    "offsets that are an object": ({"a": entry(0, 1) | {"data_offsets": {"0": 0, "1": 1}}}, 1, "has the entry"),
    "a dimension that is true": ({"a": entry(0, 1, [True])}, 1, "has the entry"),
    "a name that a terminal would obey": ({"a\x1b[2J": entry(0, 1)}, 1, "is called"),
    "a name with half a character": ({"\ud800": entry(0, 1)}, 1, "surrogates"),
    "a name of many letters": ({"a" * 5000: entry(0, 1)}, 1, "is called"),
    "metadata that are none": ({"__metadata__": {"a": 1}, "a": entry(0, 1)}, 1, "metadata"),
    "a list": ([], 0, "a list"),
    "a name twice": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', 1, "twice"),
    "UTF-16": (json.dumps({"a": entry(0, 1)}).encode("utf-16"), 1, "utf-8"),
    "deep brackets": (b"[" * 50_000, 0, "deep"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_the_library_refuses_or_nothing_can_hold_is_refused(what, tmp_path):
    header, size, why = HEADERS[what]
    with pytest.raises(CheckpointError, match=why):
        tensor_places(written(tmp_path / "model.safetensors", header, size))


@given(
    st.dictionaries(
        st.text("ab.²\n", max_size=3),
        st.builds(entry, st.integers(0, 8), st.integers(0, 8), st.none() | st.lists(st.integers(0, 4), max_size=3)),
        max_size=3,
    ),
    st.integers(0, 9),
)
def test_what_is_read_the_library_reads_too(tmp_path_factory, header, size):
    file = written(tmp_path_factory.getbasetemp() / "any.safetensors", header, size)
    try:
        places = tensor_places(file)
    except CheckpointError:
        return
    stored = dict(safetensors.deserialize(file.read_bytes()))
    assert {name: list(place.shape) for name, place in places.items()} == {n: t["shape"] for n, t in stored.items()}
    assert all(bytes(read_tensor(places[name]).flatten().tolist()) == bytes(t["data"]) for name, t in stored.items())


def test_a_tensor_whose_file_is_gone_is_an_error_of_ours(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    place = tensor_places(tmp_path / "model.safetensors")["a"]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="put it back"):
        read_tensor(place)


# -- the index ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["..", ".", "", "../x.safetensors", "/etc/passwd", "a/b", "a\\b", "C:x", "a\0b", "\x1b[2J", ".hidden", "é" * 200],
)
def test_an_index_names_files_beside_it_alone(name, tmp_path):
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="expected names of files beside it"):
        weight_map(file)


# -- config.json and what is packed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["awq", ["awq"], 4, True])
@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config"])
def test_a_quantization_config_that_is_no_object_is_not_taken_for_full_precision(value, place, tmp_path):
    config = {place: {"quantization_config": value} if place == "text_config" else value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        open_source([tmp_path / "model.safetensors"], fields_beside(tmp_path / "model.safetensors"))
    if place != "text_config":
        with pytest.raises(CheckpointError, match="expected a JSON object"):
            parsed_quantization(config)
        assert inspect_checkpoint(tmp_path).is_damaged


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
GROUP = {"targets": ["Linear"], "weights": WEIGHTS, "format": "pack-quantized"}


def packed(**changes: Any) -> dict[str, Any]:
    group = {name: changes.pop(name) for name in ("targets", "weights") if name in changes}
    fields = {"quant_method": "compressed-tensors", "config_groups": {"g": GROUP | group}}
    return {"quantization_config": fields | changes}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (packed(config_groups=[1]), "config_groups is"),
        (packed(targets=[["Linear"]]), "targets of g"),
        (packed(targets="Linear"), "targets of g"),
        (packed(targets=["re:("]), "not a valid regular expression"),
        (packed(targets=["re:a{99999999999999999999}"]), "not a valid regular expression"),
        (packed(ignore=[3]), "ignore is"),
        (packed(ignore=5), "ignore is"),
        (packed(weights=WEIGHTS | {"group_size": True}), "group_size True"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4.0}}, r"bits=4\.0"),
        ({"quantization_config": {"quant_method": "awq", "zero_point": "false"}}, "zero_point='false'"),
        ({"quantization_config": {"quant_method": "awq", "version": 4}}, "transformers refuses"),
        ({"quantization_config": {"quant_method": "awq", "modules_to_not_convert": "lm_head"}}, "list of names"),
        (
            {"quantization_config": {"quant_method": "awq", "modules_to_not_convert": ["("]}},
            "not a valid regular expression",
        ),
        ({"quantization_config": {"quant_method": "awq", "meta": [1]}}, "meta is a list"),
    ],
)
def test_a_field_of_another_type_is_named(config, why):
    with pytest.raises(CheckpointError, match=why):
        parsed_quantization(config)


@pytest.mark.parametrize(
    "weight_shape",
    [
        torch.tensor(8),
        torch.tensor([8, 32, 1]),
        torch.tensor([8.0, 32.0]),
        torch.tensor([8, -32]),
        torch.tensor([0, 0]),
    ],
    ids=str,
)
def test_inspect_reports_a_weight_shape_that_is_none(weight_shape, tmp_path):
    tensors = {
        "a.weight_packed": torch.zeros(8, 4, dtype=torch.int32),
        "a.weight_scale": torch.ones(8, 1),
        "a.weight_shape": weight_shape,
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(packed()))
    (finding,) = [finding for finding in inspect_checkpoint(tmp_path).findings if finding.where == "a"]
    assert "weight_shape" in finding.what


def test_digits_that_are_no_numbers_in_a_name_are_no_layer(tmp_path):
    save_file({"model.²³.layers.0.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert inspect_checkpoint(tmp_path).layer_bytes == {"model.²³.layers.0": 8}
