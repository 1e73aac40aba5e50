"""Pushes to and loads from a hub on loopback, in processes of their own, because HF_ENDPOINT is read once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Hub, Repository
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_awq_offload.cli.demo import SHIPPED_MODEL

pytestmark = pytest.mark.slow
TOKEN = "hf_" + "notASecretButLooksLikeOne"

QUANTIZE = """
import json, os, sys, urllib.request
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from hf_awq_offload import AwqOffloadConfig
logging.set_verbosity_debug()
folder = Path(sys.argv[1])
recipe = AwqOffloadConfig(n_grid=2, clip=False, n_samples=2, max_seq_len=64)

def refuse(*refusals):
    body = json.dumps(refusals).encode()
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/control", body).close()
"""


@pytest.fixture
def hub():
    with Hub(TOKEN) as hub:
        yield hub


def run(hub: Hub, script: str, folder: Path, home: str = "home") -> str:
    """Runs `script` against `hub` in a process of its own; returns what it printed."""
    command = [sys.executable, "-c", script, str(folder)]
    result = subprocess.run(
        command, env=hub.environment(folder / home), capture_output=True, text=True, cwd=folder, check=False
    )
    assert TOKEN not in result.stdout + result.stderr
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def assert_nothing_leaks(repository: Repository, *secrets: str) -> None:
    for path, content in repository.files.items():
        for secret in (TOKEN, *secrets):
            assert secret.encode() not in content, f"{secret} is in {path}"


def test_what_is_pushed_by_one_process_is_loaded_by_another(hub, tmp_path):
    hub.repositories["tester/base"] = Repository(
        {file.name: file.read_bytes() for file in SHIPPED_MODEL.iterdir() if file.suffix in (".json", ".safetensors")}
    )
    hub.repositories["tester/base"].files |= {"onnx/model.onnx": b"weights", "package/deeper/code.py": b"# code"}
    own_readme = "---\nlicense: psfl\ntags:\n- mine\n---\n# My model\n\nWords of mine.\n"
    hub.repositories["tester/saved"] = Repository({"README.md": own_readme.encode()})
    push = f"""{QUANTIZE}
model = AutoModelForCausalLM.from_pretrained("tester/base", dtype="auto", quantization_config=recipe)
model.push_to_hub("tester/pushed", max_shard_size="500KB")
(folder / "saved").mkdir()
(folder / "saved" / "README.md").write_text({own_readme!r})
model.save_pretrained(folder / "saved", push_to_hub=True, repo_id="tester/saved", max_shard_size="500KB")
model.save_pretrained(folder / "local")
"""
    run(hub, push, tmp_path)
    pushed, saved = hub.repositories["tester/pushed"], hub.repositories["tester/saved"]
    shards = sorted(name for name in pushed.files if name.endswith(".safetensors"))
    assert len(shards) > 2
    names = {"config.json", "generation_config.json", "model.safetensors.index.json", "README.md", "awq_losses.png"}
    companions = {"tokenizer.json", "tokenizer_config.json", "training.json", "package/deeper/code.py"}
    assert set(pushed.files) == {*names, *shards, *companions}
    assert not hub.count("onnx"), "weights in other formats are not downloaded"
    assert hub.count("POST .*/commit/") == 2
    for name in ("tokenizer.json", *shards, "config.json"):
        assert saved.files[name] == pushed.files[name] == (tmp_path / "saved" / name).read_bytes(), name
    for repository in (pushed, saved):
        assert_nothing_leaks(repository, str(tmp_path), str(SHIPPED_MODEL))

    card = pushed.files["README.md"].decode()
    metadata = card.split("---\n")[1]
    for line in ("base_model: tester/base", "base_model_relation: quantized", "library_name: transformers"):
        assert line in metadata
    assert "tags:\n- awq\n- 4-bit\n" in metadata
    assert "More Information Needed" not in card
    for line in (
        'from_pretrained("tester/pushed"',
        "vllm serve tester/pushed",
        "sglang.launch_server --model-path tester/pushed",
    ):
        assert line in card
    kept = saved.files["README.md"].decode()
    assert "license: psfl" in kept
    assert "- mine\n- awq\n- 4-bit" in kept
    assert "# My model\n\nWords of mine.\n\n<!-- hf_awq_offload: begin" in kept

    load = f"""{QUANTIZE}
model = AutoModelForCausalLM.from_pretrained("tester/pushed")
tokenizer = AutoTokenizer.from_pretrained("tester/pushed")
from safetensors.torch import save_file
state = {{name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}}  # tied
save_file(state, folder / "loaded.safetensors")
print(json.dumps([type(model.model.layers[0].mlp.up_proj).__name__, tokenizer("Return a list")["input_ids"]]))
model.push_to_hub("tester/again")
"""
    linear, token_ids = json.loads(run(hub, load, tmp_path, home="another home").splitlines()[-1])
    assert linear == "AwqLinear"
    assert token_ids
    loaded, local = load_file(tmp_path / "loaded.safetensors"), load_file(tmp_path / "local" / "model.safetensors")
    assert loaded.keys() == local.keys()
    assert all(torch.equal(loaded[name], local[name]) for name in local)
    downloaded = tmp_path / "another home" / "hub" / "models--tester--pushed" / "snapshots" / pushed.sha
    for name in (*shards, "config.json", "tokenizer.json"):
        assert (downloaded / name).read_bytes() == pushed.files[name], name
    again = hub.repositories["tester/again"]
    assert "vllm serve tester/again" in again.files["README.md"].decode()
    assert again.files["tokenizer.json"] == pushed.files["tokenizer.json"]
    assert hub.unknown == []


def test_a_push_that_fails_says_why_leaves_what_there_was_and_can_be_repeated(hub, tmp_path):
    push = f"""{QUANTIZE}
from huggingface_hub.errors import HfHubHTTPError
model = AutoModelForCausalLM.from_pretrained({str(SHIPPED_MODEL)!r}, dtype="auto", quantization_config=recipe)
errors = {{}}

def attempt(name, save, *refusals):
    refuse(*refusals)
    try:
        save()
    except (HfHubHTTPError, RuntimeError) as error:
        errors[name] = str(error)
    refuse()

def push():
    model.push_to_hub("tester/model", max_shard_size="500KB")

def save():
    model.save_pretrained(folder / "saved", push_to_hub=True, repo_id="tester/model", max_shard_size="500KB")

attempt("401", save, dict(pattern="repos/create", status=401, message="Invalid username or password."))
print(json.dumps(sorted(path.name for path in folder.iterdir())))
attempt("quota", push, dict(pattern="PUT /lfs/", status=403, message="Storage quota exceeded.", after=2))
attempt("500", save, dict(pattern="/commit/", status=500, message="Internal error."))
print(json.dumps(errors))
push()
"""
    before, errors = map(json.loads, run(hub, push, tmp_path).splitlines()[-2:])
    assert "saved" not in before or not list((tmp_path / "saved").glob("*.partial"))
    assert "401" in errors["401"]
    for name, reason in (("quota", "Storage quota exceeded"), ("500", "500")):
        assert reason in errors[name]
        assert "was not pushed to tester/model" in errors[name]
        assert "Call push_to_hub again" in errors[name]
    repository = hub.repositories["tester/model"]
    assert repository.commits == 1  # the last attempt's: no failed one left anything visible
    assert hub.count("PUT /lfs/") > len(hub.uploads)  # some were refused
    assert len(hub.uploads) == len(set(hub.uploads)) == len(hub.objects)  # and none was sent again after it had arrived
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved") is not None  # whole, though never pushed
    assert_nothing_leaks(repository, str(tmp_path), str(SHIPPED_MODEL))
    assert "base_model" not in repository.files["README.md"].decode()  # a folder of the user's is no hub id
