"""The recipe validates every field; the checkpoint config is the interchange standard."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from models import tiny_llama
from transformers import AwqConfig

from hf_awq_offload.config import AwqOffloadConfig
from hf_awq_offload.errors import AwqOffloadError, CheckpointError, ConfigError
from hf_awq_offload.formats.awq_config import AwqCheckpointConfig
from hf_awq_offload.integrations.saving import config_of_result
from hf_awq_offload.recipe_fields import RecipeFields

NO_INTEGER = [True, 4.0, "4", None, [4], torch.tensor(4)]
NO_FLAG = [0, 1, None, "true", "False", 1.0, [True]]

BAD_VALUES = {
    "bits": [1, 5, 6, 16, 0, -4, *NO_INTEGER],
    "group_size": [0, -2, 1, 16, 31, 127, 129, 256, *NO_INTEGER],
    "zero_point": [flag for flag in NO_FLAG if flag is not None],
    "overrides": [3, "down_proj", ["down_proj"], True],
    "format": [None, True, "", "gemm", "AWQ", "compressed_tensors", ["awq"]],
    "dataset": [None, True, False, 0, 3.5, "", "   "],
    "tokenizer": [3, True, 1.5, [], {"name": "gpt2"}],
    "text_column": [0, True, b"text", ["text"]],
    "n_samples": [0, -1, *NO_INTEGER],
    "max_seq_len": [7, 0, -512, *NO_INTEGER],
    "batch_tokens": [0, -1, True, 4.0, "4", [4]],
    "n_grid": [-1, *NO_INTEGER],
    "duo_scaling": NO_FLAG,
    "clip": NO_FLAG,
    "min_expert_tokens": [-1, *NO_INTEGER],
    "all_experts": NO_FLAG,
    "rounding": [None, True, "", "gptq", "Nearest", ["nearest"]],
    "propagate": [None, True, "", "both", "Original", ["original"]],
    "modules_to_not_convert": ["lm_head", "", 3, True, [3], ["lm_head", None], [""], b"lm_head"],
    "mtp": [None, True, "", "Keep", ["drop"]],
    "from_quantized": NO_FLAG,
    "execution_device": ["gpu", "", "cuda:", 1.5, True, ["cpu"], "meta"],
    "offload": [None, True, "", "ram", "Disk", ["disk"]],
    "prefetch": NO_FLAG,
    "max_memory": ["8GiB", 8, [("cpu", 8)], {"cpu": 0}, {"cpu": "8 apples"}, {"tpux": 8}, {"cpu": None}, {"cpu": True}],
    "checkpoint_dir": ["", 3, True, ["journal"]],
    "report_dir": ["", 3, True, ["report"]],
    "seed": [-1, 2**63, *NO_INTEGER],
    "backend": ["", "marlin", "CPU", None, True, 4, ["cpu"]],
}

GOOD_VALUES = {
    "bits": [2, 3, 4, 8],
    "group_size": [-1, 32, 64, 128],
    "zero_point": [None, True, False],
    "overrides": [None, {"down_proj$": {"bits": 8, "group_size": 64, "zero_point": False}}],
    "format": ["auto", "awq", "compressed-tensors"],
    "dataset": [
        "builtin",
        "wikitext2",
        ["a text"],
        Path("corpus.txt"),
        torch.zeros(2, 8, dtype=torch.int64),
        iter("ab"),
    ],
    "tokenizer": [None, "gpt2", Path("tokenizer"), str.split],
    "text_column": [None, "text"],
    "n_samples": [1, 128, 10**6],
    "max_seq_len": [8, 512, 10**6],
    "batch_tokens": [None, 1, 4096],
    "n_grid": [0, 1, 20],
    "duo_scaling": [True, False],
    "clip": [True, False],
    "min_expert_tokens": [0, 1, 4096],
    "all_experts": [True, False],
    "rounding": ["nearest", "error_feedback"],
    "propagate": ["original", "quantized"],
    "modules_to_not_convert": [None, [], ["lm_head"], ("lm_head", r"layers\.0\.")],
    "mtp": ["keep", "drop"],
    "from_quantized": [True, False],
    "execution_device": [None, "cpu", torch.device("cpu")],
    "offload": ["auto", "cpu", "disk"],
    "prefetch": [True, False],
    "max_memory": [None, {}, {"cpu": 2**30}],
    "checkpoint_dir": [None, "journal", Path("journal")],
    "report_dir": [None, "report", Path("report")],
    "seed": [0, 2**63 - 1],
    "backend": ["auto", "torch", "cpu", "triton", "tinygemm", "xpu"],
}


def cases(values: dict[str, list]) -> list:
    """Gives cases ids without memory addresses, so that all processes collect the same ids."""
    return [
        pytest.param(name, value, id=f"{name}={re.sub(' at 0x.*', '>', repr(value)):.40}")
        for name, list_ in values.items()
        for value in list_
    ]


def field_names() -> list[str]:
    parameters = inspect.signature(AwqOffloadConfig.__init__).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD]


def test_fields_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        AwqOffloadConfig(4, 128)


def test_help_shows_every_field_with_its_default_and_its_meaning():
    shown = " ".join(inspect.getdoc(AwqOffloadConfig).split())
    for field in dataclasses.fields(RecipeFields):
        assert f" {field.name}: {field.metadata['help']} " in shown
        assert inspect.signature(AwqOffloadConfig).parameters[field.name].default == field.default


def test_these_cases_cover_every_field():
    assert list(BAD_VALUES) == field_names()
    assert list(GOOD_VALUES) == field_names()


@pytest.mark.parametrize(("name", "value"), cases(BAD_VALUES))
def test_a_bad_value_is_refused_and_the_message_says_which_and_what_to_pass(name, value):
    with pytest.raises(ConfigError) as caught:
        AwqOffloadConfig(**{name: value})
    message = str(caught.value)
    assert message.startswith(name), "which field"
    assert repr(value) in message or type(value).__name__ in message or "empty string" in message, "what was found"
    assert "pass " in message.lower() or "must be" in message, "what to do"


@pytest.mark.parametrize(("name", "value"), cases(GOOD_VALUES))
def test_a_good_value_is_accepted_and_kept(name, value):
    config = AwqOffloadConfig(**{name: value})
    kept = getattr(config, name)
    normalized = {"modules_to_not_convert": list, "execution_device": str}.get(name, lambda same: same)
    assert kept is value or kept == normalized(value)


@pytest.mark.parametrize(("name", "value"), [("tokenizer", ""), ("tokenizer", "  "), ("text_column", "")])
def test_an_empty_name_is_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        AwqOffloadConfig(**{name: value})


@pytest.mark.parametrize("error", [ConfigError, CheckpointError])
def test_errors_are_value_errors_and_caught_by_the_base_class(error):
    assert issubclass(error, ValueError)
    assert issubclass(error, AwqOffloadError)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("bits", 5, ["bits is 5", "pass 4", "2, 3 or 8"]),
        ("group_size", 100, ["group_size is 100", "128", "64", "32", "-1"]),
        ("max_seq_len", 4, ["max_seq_len is 4", "at least 8"]),
        ("n_grid", -1, ["n_grid is -1", "0 for no scale search"]),
        ("seed", 2**63, [str(2**63), "2**63 - 1"]),
        ("modules_to_not_convert", "lm_head", ["'lm_head'", "list"]),
        ("execution_device", "gpu", ["'gpu'", "'cuda'", "'cpu'"]),
    ],
)
def test_a_message_names_what_was_found_and_what_is_allowed(name, value, words):
    with pytest.raises(ConfigError) as caught:
        AwqOffloadConfig(**{name: value})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "xpu:7", torch.device("cuda", 3)])
def test_an_accelerator_that_the_machine_lacks_is_refused(monkeypatch, device):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(ConfigError, match=r"accelerators are: none\. Pass 'cpu' or None"):
        AwqOffloadConfig(execution_device=device)


def test_an_accelerator_index_beyond_the_last_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert AwqOffloadConfig(execution_device="cuda:1").execution_device == "cuda:1"
    with pytest.raises(ConfigError, match="2 of type 'cuda'"):
        AwqOffloadConfig(execution_device="cuda:2")
    with pytest.raises(ConfigError, match="2 of type 'cuda'"):
        AwqOffloadConfig(execution_device="xpu")


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("bit", "bits"),
        ("w_bits", "bits"),
        ("groupsize", "group_size"),
        ("nsamples", "n_samples"),
        ("max_seq_length", "max_seq_len"),
        ("zeropoint", "zero_point"),
        ("device", "execution_device"),
        ("modules_not_to_convert", "modules_to_not_convert"),
    ],
)
def test_an_unknown_field_names_the_nearest(unknown, nearest):
    with pytest.raises(ConfigError, match=f"no field '{unknown}'; did you mean '{nearest}'"):
        AwqOffloadConfig(**{unknown: 1})


def test_a_field_unlike_any_other_is_refused_too():
    with pytest.raises(ConfigError, match=r"no field 'ζ'.*Known: bits, group_size"):
        AwqOffloadConfig(**{"ζ": 1})


def test_an_unknown_field_does_not_offer_the_name_under_which_the_recipe_is_registered():
    with pytest.raises(ConfigError) as caught:
        AwqOffloadConfig(quant_methods="awq")
    assert "'quant_method'" not in str(caught.value)


class Tokenizer:
    def __call__(self, text):
        return text


def a_generator():
    yield "a text"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dataset": torch.zeros(2, 8, dtype=torch.int64)},
        {"dataset": [torch.zeros(8, dtype=torch.int64)]},
        {"dataset": ["private text"]},
        {"dataset": a_generator()},
        {"dataset": datasets.Dataset.from_dict({"text": ["private text"]})},
        {"dataset": Path("folder") / "corpus.txt"},
        {"dataset": lambda: None},
        {"tokenizer": Tokenizer()},
        {"tokenizer": Path("folder")},
        {"execution_device": torch.device("cpu")},
        {"modules_to_not_convert": ("lm_head",)},
    ],
    ids=lambda fields: ", ".join(f"{key}: {type(value).__name__}" for key, value in fields.items()) or "defaults",
)
def test_to_dict_is_json_and_never_spells_out_data(fields):
    config = AwqOffloadConfig(**fields)
    text = json.dumps(config.to_dict())
    assert "private text" not in text
    assert json.loads(text) == config.to_dict()
    assert json.loads(config.to_json_string()) == config.to_dict()
    assert "private text" not in repr(config)
    assert list(config.to_dict()) == ["quant_method", *field_names()]


def test_to_dict_keeps_paths_and_devices_by_their_text():
    path = Path("folder") / "corpus.txt"
    fields = AwqOffloadConfig(dataset=path, tokenizer=path, execution_device=torch.device("cpu")).to_dict()
    assert (fields["dataset"], fields["tokenizer"], fields["execution_device"]) == (str(path), str(path), "cpu")


def test_to_dict_and_back_is_the_same_recipe():
    recipe = AwqOffloadConfig(group_size=64, dataset="some/data", modules_to_not_convert=["lm_head"], seed=3)
    again = AwqOffloadConfig.from_dict(recipe.to_dict())
    assert again.to_dict() == recipe.to_dict()
    assert again.quant_method == "awq_offload"


class TestZeroPointsByDefault:
    @pytest.mark.parametrize(("bits", "zero_point"), [(2, True), (3, True), (4, True), (8, False)])
    def test_fewer_than_8_bits_have_them(self, bits, zero_point):
        assert AwqOffloadConfig(bits=bits).choice("a").zero_point is zero_point

    @pytest.mark.parametrize("zero_point", [True, False])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_what_is_given_is_kept(self, bits, zero_point):
        recipe = AwqOffloadConfig(bits=bits, zero_point=zero_point)
        recipe.update(bits=8)
        again = AwqOffloadConfig.from_dict(recipe.to_dict())
        for kept in (recipe, again):
            assert (kept.zero_point, kept.choice("a").zero_point) == (zero_point, zero_point)

    def test_other_bits_later_decide_anew(self):
        recipe = AwqOffloadConfig()
        recipe.update(bits=8)
        assert recipe.base_choice == (8, 128, False)
        again = AwqOffloadConfig.from_dict(recipe.to_dict())
        again.update(bits=3)
        assert again.base_choice == (3, 128, True)

    def test_overrides_go_by_their_own_bits(self):
        recipe = AwqOffloadConfig(bits=8, overrides={"down_proj$": {"bits": 2}, "^lm": {"zero_point": True}})
        assert recipe.choice("mlp.down_proj") == (2, 128, True)
        assert recipe.choice("mlp.up_proj") == (8, 128, False)
        assert recipe.choice("lm_head") == (8, 128, True)

    def test_a_given_value_holds_for_overrides_too(self):
        recipe = AwqOffloadConfig(zero_point=True, overrides={"down_proj$": {"bits": 8}})
        assert recipe.choice("mlp.down_proj") == (8, 128, True)

    def test_4_bits_are_awq_and_asymmetric_as_before(self):
        config = config_of_result(tiny_llama(num_hidden_layers=1), AwqOffloadConfig(), {})
        assert config.to_dict()["zero_point"] is True


def test_changing_what_to_dict_returned_does_not_change_the_recipe():
    recipe = AwqOffloadConfig(modules_to_not_convert=["lm_head"])
    recipe.to_dict()["modules_to_not_convert"].append("model")
    assert recipe.modules_to_not_convert == ["lm_head"]


def test_the_recipe_has_a_list_of_module_names_of_its_own():
    names = ["lm_head"]
    recipe = AwqOffloadConfig(modules_to_not_convert=names)
    names.append("model")
    assert recipe.modules_to_not_convert == ["lm_head"]


def test_from_dict_refuses_the_config_of_another_method():
    with pytest.raises(ConfigError, match="'gptq'"):
        AwqOffloadConfig.from_dict({"quant_method": "gptq", "bits": 4})


def test_from_dict_leaves_the_dict_as_it_was():
    fields = AwqOffloadConfig().to_dict()
    before = dict(fields)
    AwqOffloadConfig.from_dict(fields)
    assert fields == before


def test_from_dict_returns_keywords_that_are_no_fields():
    recipe, unused = AwqOffloadConfig.from_dict({"bits": 4}, return_unused_kwargs=True, group_size=32, revision="main")
    assert recipe.group_size == 32
    assert unused == {"revision": "main"}


def test_from_dict_validates_what_is_given_beside_the_dict():
    with pytest.raises(ConfigError, match="bits is 5"):
        AwqOffloadConfig.from_dict({}, bits=5)


def test_deepcopy_shares_the_dataset_so_that_a_generator_survives():
    data, tokenizer = a_generator(), Tokenizer()
    recipe = AwqOffloadConfig(dataset=data, tokenizer=tokenizer)
    copied = copy.deepcopy(recipe)
    assert copied is not recipe
    assert copied.dataset is data
    assert copied.tokenizer is tokenizer
    assert list(copied.dataset) == ["a text"]
    assert copied.to_dict() == recipe.to_dict()


def test_deepcopy_inside_another_object_shares_the_dataset_too():
    recipe = AwqOffloadConfig(dataset=a_generator())
    copied = copy.deepcopy({"quantization_config": recipe, "other": [1]})
    assert copied["quantization_config"].dataset is recipe.dataset


def test_changing_a_field_of_a_deepcopy_leaves_the_original():
    recipe = AwqOffloadConfig(modules_to_not_convert=["lm_head"])
    copied = copy.deepcopy(recipe)
    copied.n_samples = 1
    copied.modules_to_not_convert.append("model")
    assert recipe.n_samples == 128
    assert recipe.modules_to_not_convert == ["lm_head"]


@pytest.mark.parametrize(
    ("n_grid", "clip", "rounding", "needed"),
    [
        (20, True, "error_feedback", True),
        (20, False, "nearest", True),
        (0, True, "nearest", True),
        (0, False, "error_feedback", True),
        (0, False, "nearest", False),
    ],
)
def test_calibration_is_needed_for_scales_clipping_and_error_feedback_only(n_grid, clip, rounding, needed):
    config = AwqOffloadConfig(n_grid=n_grid, clip=clip, rounding=rounding)
    assert config.needs_calibration is needed


STANDARD_FIELDS = [
    "quant_method",
    "bits",
    "group_size",
    "zero_point",
    "version",
    "modules_to_not_convert",
    "desc_act",
    "lm_head",
    "meta",
]


def test_a_checkpoint_config_has_exactly_the_fields_of_the_standard():
    fields = AwqCheckpointConfig(group_size=64, zero_point=False, modules_to_not_convert=["lm_head"]).to_dict()
    assert list(fields) == STANDARD_FIELDS
    assert fields == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": False,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
        "desc_act": False,
        "lm_head": False,
        "meta": {},
    }
    assert type(fields["quant_method"]) is str
    assert json.loads(json.dumps(fields)) == fields


def test_a_checkpoint_config_shares_nothing_with_its_dict():
    config = AwqCheckpointConfig(modules_to_not_convert=["lm_head"], meta={"quantizer": ["x"]})
    fields = config.to_dict()
    fields["modules_to_not_convert"].append("model")
    fields["meta"]["quantizer"].append("y")
    assert config.modules_to_not_convert == ["lm_head"]
    assert config.meta == {"quantizer": ["x"]}


def test_a_checkpoint_config_takes_nothing_of_the_recipe_but_the_format():
    recipe = AwqOffloadConfig(group_size=32, zero_point=False, dataset=["private text"], seed=7)
    model = tiny_llama(num_hidden_layers=1)
    config = config_of_result(model, recipe, {"seed": 7})
    fields = config.to_dict()
    assert fields.pop("modules_to_not_convert")  # all linears: none is quantized
    assert fields == {
        **{name: value for name, value in AwqCheckpointConfig().to_dict().items() if name != "modules_to_not_convert"},
        "group_size": 32,
        "zero_point": False,
        "meta": {"seed": 7},
    }


@pytest.mark.parametrize("group_size", [-1, 16, 32, 64, 128, 512])
@pytest.mark.parametrize("zero_point", [True, False])
def test_a_standard_config_is_read_back_from_transformers_own_class(group_size, zero_point):
    meta = {"quantizer": ["x:1"]}
    fields = AwqCheckpointConfig(
        group_size=group_size, zero_point=zero_point, modules_to_not_convert=["lm_head"], meta=meta
    ).to_dict()
    parsed = AwqConfig.from_dict({key: value for key, value in fields.items() if key != "quant_method"})
    assert AwqCheckpointConfig.from_awq_config(parsed).to_dict() == fields


def test_a_version_in_capitals_as_autoawq_wrote_it_is_read():
    assert AwqCheckpointConfig.from_awq_config(AwqConfig(version="GEMM")).version == "gemm"


@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast", "llm-awq"])
def test_every_version_that_transformers_knows_is_read(version):
    assert AwqCheckpointConfig.from_awq_config(AwqConfig(version=version)).version == version


def test_other_versions_are_refused_with_a_remedy():
    config = AwqConfig()
    config.format = "marlin"
    with pytest.raises(CheckpointError, match=r"version is 'marlin'; supported: gemm, gemv.* Load it with the tool"):
        AwqCheckpointConfig.from_awq_config(config)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bit_widths_are_refused(bits):
    config = AwqConfig()
    config.bits = bits
    with pytest.raises(CheckpointError, match=f"bits={bits}; the AWQ format stores 4"):
        AwqCheckpointConfig.from_awq_config(config)


@pytest.mark.parametrize("group_size", [0, -2, -128, 64.0, "128", None, True])
def test_impossible_group_sizes_are_refused(group_size):
    config = AwqConfig()
    config.group_size = group_size
    with pytest.raises(CheckpointError, match="group_size="):
        AwqCheckpointConfig.from_awq_config(config)
