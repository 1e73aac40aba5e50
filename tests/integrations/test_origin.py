"""Arguments that say where a model comes from reach its tokenizer, the files that come along, and the card."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import FAST, ROOT, environment
from hub_cache import add_to_cache, commit_of
from huggingface_hub import constants
from tiny_tokenizer import TEXTS, VOCAB_SIZE, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_awq_offload import AwqOffloadConfig, CalibrationDataError, plan, quantize, quantize_model
from hf_awq_offload.cli.main import main
from hf_awq_offload.integrations.origin import Origin, origin_of

NAME = "org/tiny"
TOKEN = "hf_" + "aTokenThatIsInNoFileAtAll"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Two revisions of a model that differ in tokenizer and licence alone."""
    root = tmp_path_factory.mktemp("revisions")
    main_folder = make_model(root / "main")
    shutil.copytree(main_folder, root / "v2")
    for name in ("main", "v2"):
        make_tokenizer(adds_bos=name == "v2").save_pretrained(root / name)
        (root / name / "LICENSE").write_text(name)
    (root / "v2" / "extra.txt").write_text("only there")
    return {name: root / name for name in ("main", "v2")}


@pytest.fixture
def cache(tmp_path, folders, monkeypatch) -> Path:
    """A cache that is not the default one; the network is forbidden."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "default cache"))
    add_to_cache(tmp_path / "cache", NAME, folders)
    return tmp_path / "cache"


def recipe(**fields) -> AwqOffloadConfig:
    defaults = {"dataset": TEXTS, "n_samples": 2, "max_seq_len": 32, "n_grid": 2, "clip": False, "group_size": 32}
    return AwqOffloadConfig(**defaults | fields)


def data_of(folder: Path) -> str:
    """Returns the hash of the calibration data's token ids, which tells which tokenizer made them."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]["meta"]["dataset"]


@pytest.fixture(scope="module")
def data_of_revision(folders, tmp_path_factory) -> dict[str, str]:
    """Revision -> hash of the calibration data with its tokenizer, from a folder."""
    found = {}
    for name, folder in folders.items():
        out = tmp_path_factory.mktemp("local") / name
        quantize(folder, out, recipe())
        found[name] = data_of(out)
    assert found["main"] != found["v2"]
    return found


def by_quantize(out: Path, **arguments) -> None:
    quantize(NAME, out, recipe(), **arguments)


def by_auto_class(out: Path, **arguments) -> None:
    AutoModelForCausalLM.from_pretrained(NAME, quantization_config=recipe(), **arguments).save_pretrained(out)


def by_models_class(out: Path, **arguments) -> None:
    LlamaForCausalLM.from_pretrained(NAME, quantization_config=recipe(), **arguments).save_pretrained(out)


def in_memory(out: Path, **arguments) -> None:
    quantize_model(AutoModelForCausalLM.from_pretrained(NAME, dtype="auto", **arguments), recipe()).save_pretrained(out)


@pytest.mark.parametrize("way", [by_quantize, by_auto_class, by_models_class, in_memory])
@pytest.mark.parametrize("revision", ["v2", commit_of(NAME, "v2"), None])
def test_tokenizer_files_and_card_are_of_the_revision(way, revision, cache, folders, data_of_revision, tmp_path):
    of = "main" if revision is None else "v2"
    arguments = {"cache_dir": cache} | ({} if revision is None else {"revision": revision})
    out = tmp_path / "out"
    way(out, **arguments)
    for name in (*TOKENIZER_FILES, "LICENSE"):
        assert (out / name).read_bytes() == (folders[of] / name).read_bytes(), name
        assert not (out / name).is_symlink()
    assert (out / "extra.txt").exists() == (of == "v2")
    assert data_of(out) == data_of_revision[of]
    card = (out / "README.md").read_text()
    assert f"base_model: {NAME}\n" in card
    assert f"[{NAME}](https://huggingface.co/{NAME}/tree/{commit_of(NAME, of)})" in card
    named = f"`v2`, commit `{commit_of(NAME, 'v2')}`" if revision == "v2" else f"commit `{commit_of(NAME, of)}`"
    assert f"| revision of the original | {named} |" in card


def test_a_branch_that_moves_on_before_the_model_is_saved_changes_nothing(cache, folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(NAME, quantization_config=recipe(), cache_dir=cache)
    (cache / "models--org--tiny" / "refs" / "main").write_text(commit_of(NAME, "v2"))
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "main"


@pytest.mark.parametrize("first", [False, True])
def test_a_quantized_model_that_is_saved_again_keeps_to_its_revision(first, cache, folders, tmp_path):
    for name, folder in folders.items():
        quantize(folder, tmp_path / name, recipe())
        (tmp_path / name / "LICENSE").write_text(f"quantized {name}")
    add_to_cache(cache, "org/quantized", {name: tmp_path / name for name in folders})
    load = f"""
from transformers import AutoModelForCausalLM
import hf_awq_offload
{"" if first else "hf_awq_offload.AwqOffloadConfig"}
model = AutoModelForCausalLM.from_pretrained("org/quantized", revision="v2", cache_dir={str(cache)!r})
model.save_pretrained({str(tmp_path / "again")!r})
"""
    subprocess.run([sys.executable, "-c", load], env=environment(), check=True, cwd=tmp_path)
    assert (tmp_path / "again" / "LICENSE").read_text() == "quantized v2"
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (folders["v2"] / "tokenizer.json").read_bytes()


def test_the_command_line_takes_what_from_pretrained_takes(cache, folders, data_of_revision, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    out = tmp_path / "out"
    source = [NAME, "--revision", "v2", "--cache-dir", str(cache), "--local-files-only"]
    data = ["--dataset", str(tmp_path / "texts.txt"), "--group-size", "32", *FAST]
    assert main(["quantize", NAME, str(out), *source[1:], *data]) == 0
    for name in (*TOKENIZER_FILES, "LICENSE", "extra.txt"):
        assert (out / name).read_bytes() == (folders["v2"] / name).read_bytes(), name
    assert main(["quantize", NAME, str(out), *source[1:], *data, "--overwrite"]) == 0, "extra.txt came from the source"
    (out / "extra.txt").write_text("the user's own by now")
    assert main(["quantize", NAME, str(out), *source[1:], *data, "--overwrite"]) == 1
    assert "extra.txt is not part of a checkpoint" in capsys.readouterr().err
    assert main(["inspect", *source, "--headers-only"]) == 0
    evaluate = ["evaluate", *source, "--dataset", str(tmp_path / "texts.txt"), "--tokens", "40", "--window", "16"]
    evaluate += ["--new-tokens", "0", "--json", "--against", NAME]
    assert main([*evaluate, "--against-revision", "main"]) == 1
    assert "tokenizers of the two models differ" in capsys.readouterr().err
    assert main([*evaluate, "--against-revision", "main", "--tokenizer", str(folders["v2"])]) == 0
    assert json.loads(capsys.readouterr().out)["kl_nats"] == 0


# -- subfolders --------------------------------------------------------------------------------------------------------


def in_subfolder(folders: dict[str, Path], root: Path, has_tokenizer: bool) -> Path:
    """Lays out a repository with a model in `sub`, its tokenizer there or in the root, and another model in `other`."""
    shutil.copytree(folders["v2"], root / "sub")
    shutil.copytree(folders["main"], root / "other")
    for name in (*TOKENIZER_FILES, "LICENSE"):
        shutil.copyfile(folders["main"] / name, root / name)
        if not has_tokenizer:
            (root / "sub" / name).unlink()
    (root / "NOTICE").write_text("of all")
    return root


@pytest.mark.parametrize("has_tokenizer", [True, False])
@pytest.mark.parametrize("is_local", [True, False])
def test_the_tokenizer_of_a_subfolder_is_there_or_in_the_root(
    has_tokenizer, is_local, cache, folders, data_of_revision, tmp_path
):
    repository = in_subfolder(folders, tmp_path / "repository", has_tokenizer)
    of = "v2" if has_tokenizer else "main"
    source, arguments = str(repository), {"subfolder": "sub"}
    if not is_local:
        add_to_cache(cache, "org/several", {"main": repository})
        source, arguments = "org/several", {"subfolder": "sub", "cache_dir": cache}
    quantize(source, tmp_path / "streamed", recipe(), **arguments)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=recipe(), **arguments)
    model.save_pretrained(tmp_path / "saved")
    for out in (tmp_path / "streamed", tmp_path / "saved"):
        for name in (*TOKENIZER_FILES, "LICENSE"):
            assert (out / name).read_bytes() == (folders[of] / name).read_bytes(), name
        assert data_of(out) == data_of_revision[of]
        assert (out / "NOTICE").read_text() == "of all"
        assert (out / "extra.txt").exists()
        assert not (out / "other").exists()
        assert not (out / "sub").exists()
        assert len(AutoTokenizer.from_pretrained(out)("the quick brown fox")["input_ids"]) > 3


def test_the_command_line_knows_subfolders(folders, tmp_path, capsys):
    repository = in_subfolder(folders, tmp_path / "repository", has_tokenizer=False)
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    out, data = tmp_path / "out", ["--dataset", str(tmp_path / "texts.txt")]
    line = ["quantize", str(repository), str(out), "--subfolder", "sub", "--group-size", "32", *data, *FAST]
    assert main(line) == 0
    assert (out / "tokenizer.json").read_bytes() == (folders["main"] / "tokenizer.json").read_bytes()
    evaluate = ["evaluate", str(repository), "--subfolder", "sub", *data, "--tokens", "40", "--window", "16"]
    assert main([*evaluate, "--new-tokens", "0"]) == 0
    assert main(["inspect", str(repository), "--subfolder", "sub"]) == 0
    assert main(["inspect", str(repository), "--subfolder", "none"]) == 1
    assert "none holds no config.json" in capsys.readouterr().err


# -- another repository's tokenizer, and secrets -----------------------------------------------------------------------


def test_a_tokenizer_that_is_named_is_of_its_own_revision_and_in_the_same_cache(
    cache, folders, data_of_revision, tmp_path
):
    only_tokenizer = tmp_path / "only tokenizer"
    shutil.copytree(folders["main"], only_tokenizer)
    (only_tokenizer / "model.safetensors").unlink()
    add_to_cache(cache, "org/tokenizer", {"main": only_tokenizer})
    quantize(NAME, tmp_path / "out", recipe(tokenizer="org/tokenizer"), revision="v2", cache_dir=cache)
    assert data_of(tmp_path / "out") == data_of_revision["main"]
    quantize(NAME, tmp_path / "own", recipe(tokenizer=NAME), revision="v2", cache_dir=cache)
    assert data_of(tmp_path / "own") == data_of_revision["v2"]


def test_a_plan_uses_the_revision(cache, folders):
    shutil.rmtree(cache / "models--org--tiny" / "snapshots" / commit_of(NAME, "main"))
    assert plan(NAME, recipe(), probe=False, revision="v2", cache_dir=cache).tokens == 64


def test_a_token_is_in_no_file_and_no_text(cache, tmp_path):
    out = tmp_path / "out"
    fields = {"report_dir": tmp_path / "report", "checkpoint_dir": tmp_path / "journal"}
    model = AutoModelForCausalLM.from_pretrained(
        NAME, quantization_config=recipe(**fields), cache_dir=cache, token=TOKEN
    )
    assert model.hf_quantizer.origin.arguments["token"] == TOKEN
    model.save_pretrained(out)
    torch.save(model, tmp_path / "whole model.pt")
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
    origin = model.hf_quantizer.origin
    assert TOKEN not in repr(origin) + repr(model.hf_quantizer.__dict__)
    assert "token" not in pickle.loads(pickle.dumps(origin)).arguments
    assert copy.deepcopy(origin).arguments["token"] == TOKEN
    assert pickle.loads(pickle.dumps(origin)).commit == commit_of(NAME, "main")


def test_a_model_whose_config_names_another_origin_is_not_taken_for_what_it_was(cache, folders):
    model = AutoModelForCausalLM.from_pretrained(NAME, revision="v2", cache_dir=cache)
    assert origin_of(model).commit == commit_of(NAME, "v2")
    model.config.name_or_path = str(folders["main"])
    assert origin_of(model) == Origin(str(folders["main"]))


# -- code that comes with a checkpoint ---------------------------------------------------------------------------------

CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\n"
    "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n",
    "modeling_own.py": "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
    "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n",
    "tokenization_own.py": "from transformers import PreTrainedTokenizerFast\n"
    "class OwnTokenizer(PreTrainedTokenizerFast):\n    mark = '{mark}'\n",
}


def with_code(folder: Path, mark: str, prefix: str = "") -> Path:
    """Turns a checkpoint into one that needs code of its own, for model and tokenizer."""
    for name, code in CODE.items():
        (folder / name).write_text(code.replace("{mark}", mark))
    (folder / "package").mkdir()
    (folder / "package" / "deeper.py").write_text(f"MARK = {mark!r}\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": f"{prefix}configuration_own.OwnConfig",
        "AutoModelForCausalLM": f"{prefix}modeling_own.OwnForCausalLM",
        "AutoModelForSequenceClassification": f"{prefix}modeling_own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "OwnTokenizer"}
    tokenizer["auto_map"] = {"AutoTokenizer": [None, f"{prefix}tokenization_own.OwnTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("way", [by_quantize, by_auto_class])
@pytest.mark.parametrize("prefix", ["", f"{NAME}--"])
def test_code_comes_along_and_the_result_needs_nothing_else(way, prefix, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    revisions = {}
    for name, folder in folders.items():
        shutil.copytree(folder, tmp_path / name)
        revisions[name] = with_code(tmp_path / name, name, prefix)
    add_to_cache(tmp_path / "cache", NAME, revisions)
    out = tmp_path / "out"
    way(out, revision="v2", code_revision="v2", cache_dir=tmp_path / "cache", trust_remote_code=True)
    shutil.rmtree(tmp_path / "cache")
    for name in (*CODE, "package/deeper.py"):
        assert (out / name).read_bytes() == (revisions["v2"] / name).read_bytes()
    assert "--" not in json.dumps(json.loads((out / "config.json").read_text())["auto_map"])
    load = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
import hf_awq_offload
model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(out)!r}, trust_remote_code=True)
assert type(model).__name__ == "OwnForCausalLM"
assert tokenizer.mark == "v2"
assert len(tokenizer("the quick fox")["input_ids"]) > 2
"""
    subprocess.run([sys.executable, "-c", load], env=environment(PYTHONPATH=str(ROOT)), check=True)


def test_nobody_is_asked_where_nobody_can_answer(folders, tmp_path):
    """Standard input is a pipe that stays open: a question would wait for 15 seconds."""
    shutil.copytree(folders["main"], tmp_path / "source")
    with_code(tmp_path / "source", "main")
    call = f"""
from transformers import AutoModelForCausalLM
from hf_awq_offload import AwqOffloadConfig
recipe = AwqOffloadConfig(dataset=["some words"] * 99, n_samples=2, max_seq_len=32, group_size=32)
try:
    AutoModelForCausalLM.from_pretrained({str(tmp_path / "source")!r}, quantization_config=recipe)
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise SystemExit("it ran code")
"""
    lines = [
        [sys.executable, "-c", call],
        [sys.executable, "-m", "hf_awq_offload", "quantize", str(tmp_path / "source"), str(tmp_path / "out")],
    ]
    for line, code in zip(lines, (0, 1), strict=True):
        reading, writing = os.pipe()
        try:
            result = subprocess.run(
                line, env=environment(), stdin=reading, capture_output=True, text=True, check=False, cwd=tmp_path
            )
        finally:
            os.close(reading)
            os.close(writing)
        assert result.returncode == code, result.stderr
        assert "Do you wish" not in result.stdout + result.stderr
    assert "trust_remote_code" in result.stderr


def test_a_tokenizer_with_code_needs_the_same_consent(folders, tmp_path):
    shutil.copytree(folders["main"], tmp_path / "source")
    before = (tmp_path / "source" / "config.json").read_text()
    with_code(tmp_path / "source", "main")
    (tmp_path / "source" / "config.json").write_text(before)  # the model itself needs no code
    (tmp_path / "source" / "tokenizer.json").unlink()
    with pytest.raises(CalibrationDataError, match="trust_remote_code"):
        quantize(tmp_path / "source", tmp_path / "out", recipe())
    assert not (tmp_path / "out").exists()
