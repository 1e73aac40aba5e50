"""Every option of every command rejects bad input with one line on stderr; options make the right recipe."""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from command_line import FAST, environment
from huggingface_hub import constants
from transformers.utils import logging

from hf_awq_offload import AwqOffloadConfig
from hf_awq_offload.cli import recipe_options
from hf_awq_offload.cli.main import main
from hf_awq_offload.cli.parser import build_parser, parse
from hf_awq_offload.cli.preflight import check
from hf_awq_offload.cli.recipe_options import given_fields, recipe_fields
from hf_awq_offload.recipe_fields import RecipeFields

# Option -> (bad value, exit code, part of the message). {model}, {empty} and {file} are paths; positional arguments
# come from GOOD_POSITIONALS.
BAD_VALUES = {
    "quantize": {
        "--config": (["{folder}/none.yaml"], 2, "can't be read"),
        "--dtype": (["float99"], 2, "--dtype is 'float99'; pass one of auto, bfloat16, float16, float32 (did you mean"),
        "--revision": (["no-such-branch"], 1, "nobody/nothing"),
        "--subfolder": (["none"], 1, "none holds no config.json"),
        "--cache-dir": (["{file}"], 1, "nobody/nothing"),
        "--variant": (["none"], 1, "none"),
        "--max-shard-size": (["a few"], 2, "max_shard_size is 'a few'"),
        "--push-to-hub": (["two words"], 2, "'two words' is not a repository name"),
        "--bits": (["five"], 2, "invalid int value: 'five'"),
        "--group-size": (["100"], 2, "--group-size is 100"),
        "--overrides": (["down_proj"], 2, "is not valid JSON"),
        "--mtp": (["later"], 2, "mtp is 'later'"),
        "--format": (["gguf"], 2, "format is 'gguf'"),
        "--dataset": (["{folder}/none.txt"], 1, "there is no such file"),
        "--tokenizer": (["{empty}"], 1, "{empty}"),
        "--text-column": ([""], 2, "--text-column is ''"),
        "--n-samples": (["0"], 2, "--n-samples is 0"),
        "--max-seq-len": (["7"], 2, "--max-seq-len is 7"),
        "--batch-tokens": (["0"], 2, "--batch-tokens is 0"),
        "--n-grid": (["-1"], 2, "--n-grid is -1"),
        "--min-expert-tokens": (["-1"], 2, "--min-expert-tokens is -1"),
        "--rounding": (["gptq"], 2, "rounding is 'gptq'"),
        "--propagate": (["both"], 2, "propagate is 'both'"),
        "--modules-to-not-convert": ([""], 2, "--modules-to-not-convert is ['']"),
        "--execution-device": (["gpu"], 2, "--execution-device is 'gpu'"),
        "--offload": (["ram"], 2, "offload is 'ram'"),
        "--max-memory": (["8GiB"], 2, "is not of the form KEY=VALUE"),
        "--checkpoint-dir": (["{folder}"], 1, "holds other files"),
        "--report-dir": (["{file}"], 2, "--report-dir {file} is a file"),
        "--seed": (["-1"], 2, "seed is -1"),
        "--backend": (["marlin"], 2, "backend is 'marlin'"),
    },
    "evaluate": {
        "--against": (["{empty}"], 1, "holds no config.json"),
        "--dataset": (["{folder}/none.txt"], 1, "there is no such file"),
        "--text-column": (["body"], 1, "body"),
        "--tokenizer": (["{empty}"], 1, "{empty}"),
        "--window": (["0"], 2, "not a positive integer"),
        "--stride": (["513"], 2, "--stride is 513, more than --window (512)"),
        "--tokens": (["some"], 2, "not a positive integer"),
        "--new-tokens": (["-1"], 2, "not an integer of 0 or more"),
        "--tasks": (["a,,b"], 2, "empty name"),
        "--tasks-path": (["{empty}"], 2, "require --tasks"),
        "--limit": (["10"], 2, "require --tasks"),
        "--max-kl": (["0"], 2, "not a positive number"),
        "--batch-tokens": (["0"], 2, "batch_tokens is 0"),
        "--execution-device": (["nowhere"], 2, "nowhere"),
        "--max-memory": (["8GiB"], 2, "is not of the form KEY=VALUE"),
        "--device-map": (["nowhere"], 1, "nowhere"),
        "--dtype": (["float99"], 2, "--dtype is 'float99'; pass one of"),
        "--revision": (["no-such-branch"], 1, "nobody/nothing"),
        "--subfolder": (["none"], 1, "none holds no config.json"),
        "--cache-dir": (["{file}"], 1, "nobody/nothing"),
        "--variant": (["none"], 1, "none"),
        "--against-revision": (["main"], 2, "--against-revision requires --against"),
    },
    "inspect": {
        "--revision": (["no-such-branch"], 1, "nobody/nothing"),
        "--subfolder": (["none"], 1, "none holds no config.json"),
        "--cache-dir": (["{file}"], 1, "nobody/nothing"),
    },
    "convert": {
        "--to": (["gguf"], 2, "invalid choice: 'gguf'"),
        "--scale-dtype": (["int8"], 2, "invalid choice: 'int8'"),
        "--revision": (["no-such-branch"], 1, "nobody/nothing"),
        "--subfolder": (["none"], 1, "none holds no config.json"),
        "--cache-dir": (["{file}"], 1, "nobody/nothing"),
    },
    "demo": {"--out": (["{file}"], 1, "is a file")},
}
GOOD_POSITIONALS = {
    "quantize": ["{model}", "{folder}/out"],
    "evaluate": ["{model}"],
    "inspect": ["{model}"],
    "convert": ["{model}", "{folder}/out"],
    "demo": [],
}
ALSO_NEEDED = {
    "--text-column": ["--dataset", "{table}"],
    "--dtype": ["--dataset", "{file}"],
    "--device-map": ["--dataset", "{file}"],
    "--stride": ["--dataset", "{file}"],
    "--variant": ["--dataset", "{file}"],
}
FLAGS = {
    "quantize": [
        *("--plan", "--resume", "--overwrite", "--image-text", "--trust-remote-code", "--private"),
        "--local-files-only",
        *("--zero-point", "--duo-scaling", "--clip", "--all-experts", "--from-quantized", "--prefetch"),
    ],
    "evaluate": ["--image-text", "--trust-remote-code", "--local-files-only", "--streamed", "--prefetch"],
    "inspect": ["--headers-only", "--local-files-only"],
    "convert": ["--overwrite", "--local-files-only"],
    "demo": ["--no-speed"],
}
COMMON = ["--json", "--debug", "--quiet", "--verbose"]


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    """Forbids the network, and restores transformers' verbosity afterwards."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


@pytest.fixture
def paths(tmp_path, tiny_llama_dir) -> dict[str, str]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("A text of some words. " * 20)
    (tmp_path / "table.csv").write_text("text,other\nsome words,more words\n")
    names = {"folder": tmp_path, "model": tiny_llama_dir, "empty": tmp_path / "empty"}
    names |= {"file": tmp_path / "text.txt", "table": tmp_path / "table.csv"}
    return {name: str(path) for name, path in names.items()}


def values_of(command: str) -> list[str]:
    """Returns the options that take a value."""
    return [action.option_strings[0] for action in actions_of(command) if action.nargs != 0]


def actions_of(command: str) -> list[argparse.Action]:
    """Returns the argparse actions of a command's options."""
    actions = build_parser()[1][command]._actions
    return [each for each in actions if each.option_strings and not isinstance(each, argparse._HelpAction)]


def one_line(captured) -> str:
    assert captured.out == ""
    lines = captured.err.splitlines()
    (line,) = (line for line in lines if line.startswith("error: "))
    assert lines[-1] == line
    assert "Traceback" not in captured.err
    return line


@pytest.mark.parametrize("command", BAD_VALUES)
def test_there_is_a_bad_value_for_every_option(command):
    flags = [each.option_strings[0] for each in actions_of(command) if each.nargs == 0]
    assert set(BAD_VALUES[command]) == set(values_of(command)), "give it a bad value in BAD_VALUES"
    assert set(flags) == {*FLAGS[command], *COMMON}, "name it in FLAGS"


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command, options in BAD_VALUES.items() for option in options]
)
def test_a_bad_value_is_one_line(command, option, paths, capsys):
    words, code, message = BAD_VALUES[command][option]
    positionals = GOOD_POSITIONALS[command]
    if option in ("--revision", "--cache-dir"):
        positionals = ["nobody/nothing", *positionals[1:]]
    line = [command, *positionals, option, *words, *ALSO_NEEDED.get(option, [])]
    if command == "convert" and option != "--to":
        line += ["--to", "gemm"]
    if command == "quantize":
        line += [word for word in FAST if option not in FAST or word not in FAST[FAST.index(option) :][:2]]
    assert main([word.format(**paths) for word in line]) == code
    assert message.format(**paths) in one_line(capsys.readouterr())
    assert not (Path(paths["folder"]) / "out").exists()
    assert not list(Path(paths["folder"]).glob("*.journal")) + list(Path(paths["folder"]).glob(".*"))


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command, flags in FLAGS.items() for option in [*flags, *COMMON]]
)
def test_a_flag_takes_no_value(command, option, paths, capsys):
    line = [command, *GOOD_POSITIONALS[command], f"{option}=yes"]
    assert main([word.format(**paths) for word in line]) == 2
    assert f"{option}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command, options in BAD_VALUES.items() for option in options]
)
def test_a_value_that_is_left_out_is_missed(command, option, paths, capsys):
    assert main([*(word.format(**paths) for word in [command, *GOOD_POSITIONALS[command]]), option]) == 2
    assert "expected one argument" in one_line(capsys.readouterr())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "no command given; expected one of quantize, evaluate, inspect, convert, demo"),
        (["quantise", "a", "b"], "invalid choice: 'quantise'"),
        (["quantize"], "the following arguments are required: SRC"),
        (["quantize", "a"], "the following arguments are required: OUT"),
        (["quantize", "a", "b", "c"], "unexpected argument: c"),
        (["quantize", "a", "b", "--bit", "4"], "unknown option: --bit (did you mean --bits"),
        (["quantize", "a", "b", "--group_size=64"], "did you mean --group-size"),
        (["evaluate", "a", "--max-kl", "1"], "--max-kl requires --against"),
        (["quantize", "a", "b", "--private"], "name a repository with --push-to-hub"),
        (["quantize", "a", "b", "--quiet", "--verbose"], "not allowed with argument --quiet"),
        (["quantize", "a", "b", "--max-memory", "=8GiB"], "not of the form KEY=VALUE"),
        (["quantize", "a", "b", "--overrides", "[1]"], "is not a JSON object"),
        (["evaluate"], "required: MODEL"),
        (["inspect"], "required: CHECKPOINT"),
        (["convert", "a", "b"], "required: --to"),
        (["demo", "now"], "unexpected argument: now"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(line, message, capsys):
    assert main(line) == 2
    assert message in one_line(capsys.readouterr())


@pytest.mark.parametrize("command", ["quantize", "convert"])
@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("{folder}/none", "{folder}/out", "There is no folder {folder}/none"),
        ("{empty}", "{folder}/out", "{empty} holds no config.json"),
        ("{file}", "{folder}/out", "{file} is a file"),
        ("{model}", "{file}", "{file} is a file"),
        ("{model}", "{model}", "is the source itself"),
        ("{model}", "{folder}", "{folder} exists and is not empty; nothing was changed"),
    ],
)
def test_wrong_paths_are_told_before_anything_is_loaded(command, source, out, message, paths, capsys, monkeypatch):
    monkeypatch.setattr("hf_awq_offload.cli.command.importlib", None)
    line = [command, source, out, *(["--to", "gemv"] if command == "convert" else [])]
    assert main([word.format(**paths) for word in line]) == 1
    assert message.format(**paths) in one_line(capsys.readouterr())


@pytest.mark.parametrize("command", ["quantize", "convert"])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "OUT is empty"),
        (".", "OUT . is the working directory"),
        ("..", "OUT .. holds the working directory"),
        ("../precious", "letter.txt is not part of a checkpoint, and would be deleted"),
    ],
)
def test_overwriting_never_deletes_what_is_no_checkpoint(command, out, message, paths, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("hf_awq_offload.cli.command.importlib", None)
    (tmp_path / "work" / ".git").mkdir(parents=True)
    (tmp_path / "work" / "thesis.tex").write_text("mine")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "letter.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "work")
    line = [command, paths["model"], out, "--overwrite"]
    assert main([*line, *(["--to", "gemv"] if command == "convert" else [])]) == 1
    assert message in one_line(capsys.readouterr())
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [".git", "thesis.tex"]
    assert (tmp_path / "precious" / "letter.txt").read_text() == "mine"


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_every_field_of_the_recipe_is_an_option_with_its_default_and_its_meaning():
    parameters = [p for p in inspect.signature(AwqOffloadConfig.__init__).parameters.values() if p.name != "self"]
    assert {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD} == {
        name: option.default for name, option in recipe_fields().items()
    }
    help_text = " ".join(build_parser()[1]["quantize"].format_help().split())
    for option in recipe_fields().values():
        assert len(option.meaning) > 10, option.name
        assert option.option in help_text


def test_options_make_the_recipe_that_python_makes():
    line = ["quantize", "a", "b", "--bits", "8", "--no-zero-point", "--group-size", "-1", "--n-grid=0", "--no-clip"]
    line += ["--overrides", '{"down_proj$": {"bits": 4}}', "--overrides", '{"q_proj$": {"group_size": 64}}']
    line += ["--modules-to-not-convert", "lm_head", "--modules-to-not-convert", "gate"]
    line += ["--max-memory", "cpu=8GiB", "--max-memory", '{"cuda:0": 1000}', "--dataset", "corpus.txt"]
    fields = given_fields(parse(line))
    assert fields == {
        "bits": 8,
        "zero_point": False,
        "group_size": -1,
        "n_grid": 0,
        "clip": False,
        "overrides": {"down_proj$": {"bits": 4}, "q_proj$": {"group_size": 64}},
        "modules_to_not_convert": ["lm_head", "gate"],
        "max_memory": {"cpu": "8GiB", "cuda:0": 1000},
        "dataset": "corpus.txt",
    }
    assert AwqOffloadConfig(**fields).max_memory == {"cpu": 2**33, "cuda:0": 1000}


def test_a_new_field_is_an_option_without_more(monkeypatch):
    @dataclass(kw_only=True)
    class PatientFields(RecipeFields):
        patience: int | None = field(default=None, metadata={"help": "how long to wait."})

    monkeypatch.setattr(recipe_options, "RecipeFields", PatientFields)
    patience = recipe_fields()["patience"]
    assert (patience.option, patience.kind, patience.meaning) == ("--patience", "integer", "how long to wait.")
    assert given_fields(parse(["quantize", "a", "b", "--patience", "3"])) == {"patience": 3}


def test_command_line_options_override_the_file(tmp_path, tiny_llama_dir):
    (tmp_path / "recipe.yaml").write_text("bits: 8\ngroup_size: 64\noverrides: {down_proj$: {bits: 4}}\n")
    line = ["quantize", str(tiny_llama_dir), str(tmp_path / "out"), "--config", str(tmp_path / "recipe.yaml")]
    options = parse([*line, "--bits", "4"])
    check(options)
    assert options.fields == {"bits": 4, "group_size": 64, "overrides": {"down_proj$": {"bits": 4}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("group-sise: 64", "has the key 'group-sise', which is not a field of the recipe; did you mean group_size"),
        ("model: llama", "known: bits, group_size"),
        ("- bits", "holds a list"),
        ("4", "holds a int"),
        ("bits: [", "is not valid YAML"),
        ("bits: 5", "bits is 5"),
        ("1: 2", "has the key 1"),
        (b"\xff\xfe\x00", "is not valid YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(content, message, tmp_path, tiny_llama_dir, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["quantize", str(tiny_llama_dir), str(tmp_path / "out"), "--config", str(file)]) == 2
    assert message in one_line(capsys.readouterr())


def test_an_empty_file_is_the_default_recipe(tmp_path, tiny_llama_dir):
    (tmp_path / "recipe.yaml").write_text("# nothing\n")
    options = parse(["quantize", str(tiny_llama_dir), "out", "--config", str(tmp_path / "recipe.yaml")])
    check(options)
    assert options.fields == {}


# -- how it starts, how it ends ----------------------------------------------------------------------------------------


def test_options_are_parsed_without_torch():
    program = """
import sys
from hf_awq_offload.cli.main import main
assert main(["quantize", "--help"]) == main(["--version"]) == 0
assert main(["quantize", "a", "b", "--bit", "4"]) == 2
assert main(["inspect", "./none"]) == 1
print(sorted({"torch", "transformers", "numpy", "yaml", "accelerate"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert result.stdout.endswith("[]\n")


def test_errors_are_json_too(tmp_path, capsys):
    assert main(["inspect", str(tmp_path), "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "command": "inspect",
        "error": {
            "type": "CommandError",
            "message": f"{tmp_path} holds no config.json; expected a checkpoint folder.",
            "exit_code": 1,
        },
    }
    assert captured.err.startswith("error: ")
    assert main(["inspect", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main(["inspect", str(tmp_path), "--debug"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: ")


def test_without_lm_eval_the_extra_is_named(monkeypatch, tiny_llama_dir, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(tiny_llama_dir), "--tasks", "hellaswag"]) == 1
    assert "pip install lm-eval" in one_line(capsys.readouterr())
