"""What is fuzzed: each target makes an input from a seed and runs what reads such input.

A target fails if anything but an error of the package comes out, if a file outside its folder is touched, or if a file
is read that the safetensors library refuses.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "formats"))

import safetensors
import torch
from mutations import HOSTILE, changed_bytes, changed_value
from one_of_each_format import CHECKPOINTS
from quantized_checkpoints import SPELLED, dequantized, headers_of
from safetensors.torch import save
from torch import nn

from hf_awq_offload.calibration.dataset import load_calibration_set
from hf_awq_offload.checkpoint.inspection import inspect_checkpoint
from hf_awq_offload.checkpoint.opened import index_problems, parsed_quantization, weight_map
from hf_awq_offload.checkpoint.safetensors import read_tensor, tensor_places
from hf_awq_offload.checkpoint.source import fields_beside, open_source
from hf_awq_offload.cli.outcome import CommandError, UsageError
from hf_awq_offload.cli.parser import parse
from hf_awq_offload.cli.preflight import check
from hf_awq_offload.cli.recipe_file import read_recipe_file
from hf_awq_offload.config import AwqOffloadConfig
from hf_awq_offload.errors import AwqOffloadError
from hf_awq_offload.formats.awq_config import AwqCheckpointConfig
from hf_awq_offload.formats.dtypes import DTYPES
from hf_awq_offload.formats.source import StoredHeader, source_format
from hf_awq_offload.integrations.config_look import require_readable_config
from hf_awq_offload.json_text import parse_json
from hf_awq_offload.offload.hidden_states import HiddenWriter
from hf_awq_offload.offload.journal import Journal

Run = Callable[[Random, Path], None]
EXPECTED = (AwqOffloadError, UsageError, CommandError)

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.experts.3.down_proj", "lm_head", "visual.blocks.0.qkv"]


def json_text(random: Random, folder: Path) -> None:
    """Parses JSON that may have any fault."""
    text = changed_bytes(random.choice(_texts()), random)
    with suppress(ValueError):
        parse_json(text)


@cache
def _texts() -> list[bytes]:
    values = [fields for fields, _ in CHECKPOINTS.values()] + [CONFIG, _index(), {"a": [1, 2.5, None, "é\n", {}]}]
    return [json.dumps(value).encode() for value in values]


def recipe(random: Random, folder: Path) -> None:
    """Makes a recipe from a dict, as `AwqOffloadConfig.from_dict` does."""
    fields = changed_value(random.choice(RECIPES), random)
    made = AwqOffloadConfig.from_dict(fields)
    for name in NAMES[:2]:
        made.grid(name, 128, torch.float16)
    made.to_dict()


RECIPES: list[dict[str, Any]] = [
    {},
    {"quant_method": "awq_offload", "bits": 4, "group_size": 64, "zero_point": True, "dataset": [[1, 2, 3]]},
    {"bits": 3, "overrides": {"down_proj$": {"bits": 8}, "q_proj": {"group_size": 32}}, "format": "compressed-tensors"},
    {"max_memory": {"cpu": "8GiB", 0: 2**30}, "execution_device": "cpu", "seed": 3, "n_grid": 0, "clip": False},
    {"modules_to_not_convert": ["lm_head", "layers\\.\\d+\\.mlp"], "checkpoint_dir": "j", "report_dir": None},
    {"tokenizer": "a/b", "text_column": "text", "n_samples": 4, "max_seq_len": 16, "batch_tokens": 8, "mtp": "drop"},
]


def recipe_file(random: Random, folder: Path) -> None:
    """Reads a recipe file in YAML or JSON, and makes a recipe of it."""
    text = random.choice(YAMLS)
    if random.random() < 0.4:
        with suppress(ValueError):
            text = json.dumps(changed_value(RECIPES[random.randrange(1, len(RECIPES))], random)).encode()
    file = folder / "recipe.yaml"
    file.write_bytes(changed_bytes(text, random) if random.random() < 0.8 else text)
    AwqOffloadConfig(**read_recipe_file(str(file)))


YAMLS = [
    b"bits: 4\ngroup_size: 64\noverrides:\n  down_proj$: {bits: 8}\n  q_proj: &a {group_size: 32}\n  k_proj: *a\n",
    b"dataset: builtin\nmodules_to_not_convert: [lm_head, 'mlp\\.gate$']\nmax_memory: {cpu: 8GiB}\nseed: 0x10\n",
    b"clip: no\nn_grid: 1_0\nreport_dir: ~\ntext_column: !!str 5\ntokenizer: |\n  a\n  b\n",
    b"a: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: &c [*b,*b,*b]\noverrides: {x: *c}\n",
]


def command_line(random: Random, folder: Path) -> None:
    """Parses a command line and checks its paths."""
    words = list(random.choice(LINES))
    for _ in range(random.randint(1, 3)):
        at = random.randint(0, len(words))
        words[at : at + random.randint(0, 1)] = [random.choice(WORDS)]
    with suppress(SystemExit):  # --help
        sys.stdout, before = io.StringIO(), sys.stdout
        try:
            check(parse(words))
        finally:
            sys.stdout = before


LINES = [
    ["quantize", "SRC", "OUT", "--bits", "3", "--overrides", '{"a": {"bits": 8}}', "--max-memory", "cpu=8GiB"],
    ["evaluate", "SRC", "--window", "64", "--stride", "32", "--tokens", "100", "--json"],
    ["inspect", "SRC", "--headers-only", "--subfolder", "a"],
    ["convert", "SRC", "OUT", "--to", "gemm"],
    ["demo", "--no-speed"],
]
WORDS = [
    *("--plan", "--resume", "--dtype", "--revision", "--subfolder", "--config", "--push-to-hub", "--private", "--clip"),
    *("--no-clip", "--overrides", "--max-memory", "--bits", "--help", "--tasks", "--limit", "--device-map", "--", "-"),
    *("quantize", "--seed", "--modules-to-not-convert", "a=b=c", "{}", "[" * 2000, '{"a":' * 400, '{"a":1,"a":2}'),
    *(value for value in HOSTILE if isinstance(value, str)),
]


# -- checkpoints -------------------------------------------------------------------------------------------------------


CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "rope_theta": 1e4,
    "dtype": "bfloat16", "tie_word_embeddings": False, "rope_scaling": None, "eos_token_id": [1, 2],
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True},
}  # fmt: skip
LOADED = [
    CONFIG["quantization_config"],
    {"quant_method": "awq", "w_bit": 4, "q_group_size": 8, "modules_to_not_convert": ["lm_head", "visual"], "meta": {}},
    {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {
            "targets": ["Linear", "re:model\\.layers\\.\\d+\\.mlp.*"], "input_activations": None,
            "weights": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 8},
        }},
        "ignore": ["lm_head", "re:visual.*"], "kv_cache_scheme": None,
    },
]  # fmt: skip


def loaded_config(random: Random, folder: Path) -> None:
    """Reads the quantization_config of a checkpoint that is loaded, and asks it for the grid of some linears."""
    config = {"quantization_config": changed_value(random.choice(LOADED), random)}
    parsed = parsed_quantization(config)
    if isinstance(parsed, AwqCheckpointConfig):
        _ = parsed.choice, parsed.layout, parsed.to_dict()
    elif parsed is not None:
        linear = nn.Linear(1, 1, device="meta")
        for name in NAMES:
            parsed.choice_for([name], linear)
        parsed.to_dict()


def source_config(random: Random, folder: Path) -> None:
    """Recognizes a quantized source whose quantization_config has been changed, and dequantizes it."""
    fields, tensors = CHECKPOINTS[random.choice(sorted(CHECKPOINTS))]
    fields = changed_value(fields, random)
    if not isinstance(fields, dict | None):
        source_format(headers_of(tensors), fields, tensors.__getitem__)
    elif source_format(headers_of(tensors), fields, tensors.__getitem__) is not None:
        dequantized(tensors, fields)


def source_headers(random: Random, folder: Path) -> None:
    """Recognizes a quantized source with headers that no tensor may have, without reading it."""
    fields, tensors = CHECKPOINTS[random.choice(sorted(CHECKPOINTS))]
    headers: dict[str, StoredHeader] = dict(headers_of(tensors))
    name = random.choice(sorted(headers))
    shape = [random.choice([0, 1, 2, 3, 4, 8, 16, 17, 32, 64, 2**31, 2**62]) for _ in range(random.randrange(5))]
    headers[name] = StoredHeader(random.choice([*DTYPES, headers[name].dtype]), tuple(shape))
    source_format(headers, fields, tensors.__getitem__)


def source_tensors(random: Random, folder: Path) -> None:
    """Dequantizes a source of which one or two tensors have other values, shapes or dtypes."""
    fields, tensors = CHECKPOINTS[random.choice(sorted(CHECKPOINTS))]
    changed = dict(tensors)
    for _ in range(random.randint(1, 2)):
        name = random.choice(sorted(changed))
        changed[name] = _another_tensor(changed[name], random)
    if random.random() < 0.1:
        del changed[random.choice(sorted(changed))]
    with suppress(AssertionError):  # `recognize` found nothing quantized
        dequantized(changed, fields)


def _another_tensor(tensor: torch.Tensor, random: Random) -> torch.Tensor:
    shape = list(tensor.shape)
    if random.random() < 0.4:
        shape = [random.choice([0, 1, 2, 3, 4, 8, 16, 17, 33]) for _ in range(random.randrange(5))]
    dtype = random.choice(sorted(SPELLED, key=str)) if random.random() < 0.3 else tensor.dtype
    size = torch.empty((), dtype=dtype).element_size()
    numel = torch.Size(shape).numel()
    content = bytes([random.choice([0, 1, 127, 128, 255])]) * max(1, numel * size)
    if random.random() < 0.5:
        content = random.randbytes(max(1, numel * size))
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[: numel * size].clone().view(dtype).reshape(shape)


@cache
def _file(format: str) -> bytes:
    tensors = {name: tensor.contiguous() for name, tensor in CHECKPOINTS[format][1].items()}
    return save({name: value for name, value in tensors.items() if value.dtype in SPELLED}, {"format": "pt"})


def _changed_file(content: bytes, random: Random) -> bytes:
    """Changes a safetensors file: its header as JSON, mostly with a length that fits, or any of its bytes."""
    if random.random() < 0.3:
        return changed_bytes(content, random)
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    with suppress(ValueError):
        text = json.dumps(changed_value(header, random), ensure_ascii=random.random() < 0.9)
        encoded = text.encode("utf-8", "surrogatepass")
        size = len(encoded) if random.random() < 0.9 else random.choice([0, 1, 2**31, 2**63, 2**64 - 1])
        return size.to_bytes(8, "little") + encoded + rest[: random.choice([len(rest), len(rest), len(rest) // 2])]
    return content


def safetensors_file(random: Random, folder: Path) -> None:
    """Reads a safetensors file; what the library refuses has to be refused."""
    content = _changed_file(_file(random.choice(["gptq", "awq", "modelopt", "fp8"])), random)
    file = folder / "model.safetensors"
    file.write_bytes(content)
    places = tensor_places(file)
    for place in places.values():
        if place.dtype in DTYPES:
            read_tensor(place)
    if all(place.dtype in DTYPES for place in places.values()):
        safetensors.deserialize(content)


def _index() -> dict[str, Any]:
    return {
        "metadata": {"total_size": 100},
        "weight_map": {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"},
    }


def index(random: Random, folder: Path) -> None:
    """Reads an index, whose files have to lie beside it."""
    file = folder / "model.safetensors.index.json"
    if random.random() < 0.3:
        file.write_bytes(changed_bytes(json.dumps(_index()).encode(), random))
    else:
        with suppress(ValueError):
            text = json.dumps(changed_value(_index(), random), ensure_ascii=False)
            file.write_bytes(text.encode("utf-8", "surrogatepass"))
    for name in set(weight_map(file).values()):
        assert (folder / name).parent == folder
        assert name not in ("", ".", "..")
    list(index_problems(folder))


def source_folder(random: Random, folder: Path) -> None:
    """Opens a whole checkpoint of several formats whose header, config or bytes have been changed."""
    format = random.choice(sorted(CHECKPOINTS))
    fields, content = CHECKPOINTS[format][0], _file(format)
    config: Any = {"model_type": "llama", "quantization_config": fields}
    if random.random() < 0.5:
        content = _changed_file(content, random)
    else:
        config = changed_value(config, random)
    file = folder / "model.safetensors"
    file.write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    open_source([file], fields_beside(file))


def inspected(random: Random, folder: Path) -> None:
    """Inspects a checkpoint, which has to report damage and not fail on it."""
    format = random.choice(["awq", "pack-quantized", "gptq"])
    content, config = _file(format), copy.deepcopy(CONFIG)
    config["quantization_config"] = LOADED[2] if format == "pack-quantized" else LOADED[0]
    if random.random() < 0.6:
        content = _changed_file(content, random)
    else:
        config = changed_value(config, random)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    inspect_checkpoint(folder, headers_only=random.random() < 0.3)


def config_json(random: Random, folder: Path) -> None:
    """Reads config.json as a whole, as the first look at a source does."""
    text = json.dumps(changed_value({k: v for k, v in CONFIG.items() if k != "quantization_config"}, random))
    (folder / "config.json").write_text(text, encoding="utf-8")
    require_readable_config(folder, 20)


# -- the journal -------------------------------------------------------------------------------------------------------


PRINT = {"source": {"tensors": 3}, "recipe": {"bits": 4}}


def journal(random: Random, folder: Path) -> None:
    """Opens a journal that has been changed; whatever it says, no file outside is touched."""
    place = folder / "journal"
    for file in place.glob("*") if place.is_dir() else ():
        file.unlink()
    place.mkdir(exist_ok=True)
    outside = folder / "hidden-00000.bin"
    outside.write_bytes(b"mine")
    for name, content in _journal_files(str(folder)).items():
        (place / name).write_bytes(content)
    victim = random.choice(["journal.json", "layer-00000.json", "layer-00001.json", "layer-00001.json"])
    content = (place / victim).read_bytes()
    if victim != "journal.json" and random.random() < 0.8:
        commit = changed_value(json.loads(json.loads(content)["commit"]), random)
        text = json.dumps(commit)
        seal = hashlib.sha256(text.encode()).hexdigest()
        content = json.dumps({"commit": text, "sha256": seal}).encode()
    else:
        content = changed_bytes(content, random)
    (place / victim).write_bytes(content)
    with closing(Journal(place, PRINT)) as opened:
        for number in range(4):
            states = opened.hidden(number)
            if states is not None:
                assert all(batch.isfinite().all() for batch in states.batches)
        for commit in opened.commits.values():
            assert commit.file.parent == place
            commit.tensors()
        opened.commit(9, "layers.9", {}, 4, {}, None)  # removes earlier hidden states
    assert outside.read_bytes() == b"mine"


@cache
def _journal_files(root: str) -> dict[str, bytes]:
    place = Path(root) / "made"
    group = {"consumers": ["q"], "producer": None, "alpha": None, "loss_nearest": 1.0, "loss": 0.5}
    with closing(Journal(place, PRINT)) as made:
        for number in range(2):
            writer = HiddenWriter(place / f"hidden-{number + 1:05}.bin.partial")
            writer.append(torch.ones(2, 3, 4))
            name = f"layers.{number}"
            report = {"layer": {"name": name, "groups": [group], "seconds": 1.0}, "left_out": {}, "choices": "x"}
            made.commit(number, name, {f"{name}.q": torch.ones(2)}, 4, report, writer)
    return {file.name: file.read_bytes() for file in place.iterdir() if file.name != "journal.lock"}


# -- calibration data --------------------------------------------------------------------------------------------------


class CharacterTokenizer:
    """Has a token for each byte, and a chat template of its own."""

    eos_token_id, bos_token_id, chat_template = 0, 1, "x"

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [byte % 60 for byte in text.encode("utf-8", "replace")]}

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> dict[str, list[int]]:
        return self("".join(turn["role"] + turn["content"] for turn in messages))


ROWS: list[list[Any]] = [
    ["a text of some length", "and another one"],
    [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 6, 7]],
    [{"text": "a text of some length", "id": 3}, {"text": "more", "id": None}],
    [{"input_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9], "attention_mask": [1] * 9, "labels": [-100] * 4 + [5] * 5}],
    [{"messages": [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "good day"}]}],
    [{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}], "images": [1]}],
    [{"input_ids": [[1, 2, 3]], "pixel_values": [[[0.5, 1.0]]], "loss_mask": [[1, 0, 1]]}],
]


def _read(data: Any) -> None:
    config = AwqOffloadConfig(dataset=data, n_samples=4, max_seq_len=16)
    load_calibration_set(
        config,
        load_tokenizer=CharacterTokenizer,  # type: ignore[arg-type]
        vocab_size=64,
        accepts=frozenset({"input_ids", "attention_mask", "pixel_values"}),
    )


def rows(random: Random, folder: Path) -> None:
    """Reads calibration data in memory, in all its forms."""
    data = changed_value(random.choice(ROWS), random)
    _read([data] if isinstance(data, str) else data)  # a text is the name of a file or folder


def data_file(random: Random, folder: Path) -> None:
    """Reads calibration data from JSON, JSON lines, text or CSV."""
    suffix = random.choice([".json", ".json", ".jsonl", ".jsonl", ".txt", ".csv"])
    data = random.choice(ROWS)
    if random.random() < 0.5:
        data = changed_value(data, random)
    lines = data if suffix == ".jsonl" and isinstance(data, list) else [data]
    content = "\n".join(map(json.dumps, lines)).encode()
    if suffix == ".csv":
        content = b"text,id\n" + content
    file = folder / f"data{suffix}"
    file.write_bytes(changed_bytes(content, random) if random.random() < 0.6 else content)
    _read(str(file))


def parquet_file(random: Random, folder: Path) -> None:
    """Reads calibration data from a parquet file whose bytes have been changed."""
    file = folder / "data.parquet"
    file.write_bytes(changed_bytes(_parquet(), random, most=3))
    _read(str(file))


@cache
def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["some text", "more text"] * 8, "n": list(range(16))}), stream)
    return stream.getvalue()


TARGETS: dict[str, tuple[Run, int]] = {
    "any JSON text": (json_text, 150),
    "recipe as a dict": (recipe, 115),
    "headers of a source": (source_headers, 250),
    "quantization_config of a loaded checkpoint": (loaded_config, 200),
    "quantization_config of a source": (source_config, 80),
    "safetensors file": (safetensors_file, 60),
    "index": (index, 40),
    "tensors of a source": (source_tensors, 30),
    "calibration data in memory": (rows, 20),
    "source as a folder": (source_folder, 10),
    "inspected checkpoint": (inspected, 6),
    "journal": (journal, 6),
    "calibration file": (data_file, 10),
    "recipe file": (recipe_file, 8),
    "config.json": (config_json, 6),
    "parquet file": (parquet_file, 5),
    "command line": (command_line, 4),
}
"""Name -> what runs it, and its executions in a thousand: what is fast is run more often."""
