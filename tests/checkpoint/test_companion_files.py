"""Which files come along with rewritten weights: all that belong to a model, no weights, nothing private."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_cache import add_to_cache, commit_of
from hypothesis import given
from hypothesis import strategies as st

from hf_awq_offload.checkpoint import companion_copies
from hf_awq_offload.checkpoint.companion_copies import copy_all_companions, listed
from hf_awq_offload.checkpoint.companion_files import (
    MOST_BYTES,
    Reason,
    companions,
    module_folders,
    why_left_out,
)
from hf_awq_offload.checkpoint.source_folders import folder_on_this_machine, places_of_files

COME_ALONG = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "qwen.tiktoken",
    "tekken.json",
    "bpe.codes",
    "vocab.bpe",
    "normalizer.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tools.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
    "params.json",
    "configuration_own.py",
    "modeling_own.py",
    "encoding/encoder.py",
    "package/__init__.py",
    "package/deeper/layers.py",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "LICENSE",
    "LICENCE.txt",
    "LICENSE.md",
    "license",
    "COPYING",
    "NOTICE",
    "USE_POLICY.md",
    "Use-Policy.md",
    "LLAMA_3_COMMUNITY_LICENSE.pdf",
    "NOTICE.txt",
    "requirements.txt",
    "labels.txt",
    "something.unheard_of",
    "configuration.json",
    "recipe.yaml",
    "deploy.md",
]
STAY_BEHIND = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.fp16.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00009.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors.index.fp16.json",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "model.gguf",
    "own-Q4_K_M.gguf",
    "ggml-model-q4_0.bin",
    "model.onnx",
    "model.onnx_data",
    "model.onnx.data",
    "model.tflite",
    "model.mlmodel",
    "weights.npz",
    "x.ckpt",
    "openvino_model.xml",
    "openvino_model.bin",
    "onnx/model.onnx",
    "onnx/tokenizer.json",
    "openvino/config.json",
    "coreml/a.mlpackage/Data/weights.bin",
    "original/params.json",
    "original/consolidated.00.pth",
    "original/tokenizer.model",
    "gguf/q4.gguf",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_3.pth",
    "trainer_state.json",
    "training_args.bin",
    "runs/Nov27/events.out.tfevents.17.host",
    "all_results.json",
    "checkpoint-500/tokenizer.json",
    "checkpoint-500/model.safetensors",
    "global_step100/x.pt",
    "wandb/run/files/config.yaml",
    ".gitattributes",
    ".git/config",
    ".git/HEAD",
    ".cache/huggingface/x.metadata",
    ".DS_Store",
    "__pycache__/modeling.cpython-311.pyc",
    ".env",
    "package/__pycache__/layers.pyc",
    "README.md",
    "README_zh.md",
    "readme.txt",
    "logo.png",
    "figures/loss.jpg",
    "demo.mp4",
    "voice.wav",
    "assets/a.svg",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "train.jsonl",
    "eval.csv",
    "data/part-0.parquet",
    "server.key",
    "cert.pem",
    "training.log",
]


@pytest.mark.parametrize("path", COME_ALONG)
def test_what_belongs_to_a_model_comes_along(path):
    assert why_left_out(path, 1000) is None


@pytest.mark.parametrize("path", STAY_BEHIND)
def test_weights_states_and_what_is_nobody_elses_business_stay_behind(path):
    assert why_left_out(path, 1000) is not None


@pytest.mark.parametrize("path", ["../stolen.txt", "a/../../stolen.txt", "/etc/stolen.txt"])
def test_no_name_leads_out_of_the_folder(path):
    assert companions({path: 9}, lambda name: "").kept == []


def test_a_large_file_of_an_unknown_kind_stays_behind_and_a_large_tokenizer_does_not():
    assert why_left_out("something.unheard_of", MOST_BYTES) is None
    assert why_left_out("something.unheard_of", MOST_BYTES + 1) is Reason.LARGE
    for path in ("tokenizer.json", "additional_chat_templates/tools.jinja", "LICENSE", "modeling_own.py"):
        assert why_left_out(path, 10 * MOST_BYTES) is None


NAMES = st.text("abz09_-. (é", min_size=1, max_size=9).filter(lambda name: name.strip(".") == name)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)


@given(
    PATHS, st.sampled_from(["safetensors", "bin", "pt", "pth", "gguf", "onnx", "msgpack", "h5", "npz", "SAFETENSORS"])
)
def test_no_name_makes_weights_come_along(path, extension):
    sizes = {f"{path}.{extension}": 10, "config.json": 2, "tokenizer.json": 2}
    found = companions(sizes, lambda name: "{}")
    assert found.kept == ["config.json", "tokenizer.json"]


@given(st.dictionaries(PATHS, st.integers(0, 2 * MOST_BYTES), max_size=8))
def test_every_file_comes_along_or_stays_behind_for_a_reason(sizes):
    found = companions(sizes, lambda name: "")
    assert sorted([*found.kept, *found.left_out]) == sorted(sizes)
    assert found.told.items() <= found.left_out.items()


def test_modules_of_sentence_transformers_keep_their_weights():
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    sizes = {"modules.json": 9, "2_Dense/model.safetensors": 2 * MOST_BYTES, "2_Dense/config.json": 9}
    sizes |= {
        "1_Pooling/config.json": 9,
        "3_Dense/model.safetensors": 9,
        "3_Dense/config.json": 9,
        "model.safetensors": 9,
    }
    found = companions(sizes, {"modules.json": json.dumps(modules)}.__getitem__)
    assert found.kept == ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "modules.json"]
    assert found.told == {"3_Dense/config.json": Reason.OTHER_MODEL}
    with_transformer = [{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    assert module_folders(json.dumps(with_transformer)) == frozenset()
    for broken in ("", "{", "[1]", '{"path": 1}', "null"):
        assert module_folders(broken) == frozenset()


def test_what_code_or_a_config_names_comes_along_if_it_is_small():
    contents = {
        "modeling_own.py": 'torch.load(folder / "speakers.pt"); open("assets/mel.npz"); "huge.pt"; "pytorch_model.bin"',
        "preprocessor_config.json": '{"watermark": "mark.png"}',
        "README.md": "![](logo.png)",
    }
    sizes = {name: len(text) for name, text in contents.items()} | {"huge.pt": MOST_BYTES + 1}
    sizes |= dict.fromkeys(
        ["speakers.pt", "assets/mel.npz", "mark.png", "logo.png", "pytorch_model.bin", "other.pt"], 9
    )
    found = companions(sizes, contents.__getitem__)
    assert found.kept == ["assets/mel.npz", "mark.png", "modeling_own.py", "preprocessor_config.json", "speakers.pt"]
    assert found.told == {"huge.pt": Reason.PERHAPS_WEIGHTS, "other.pt": Reason.PERHAPS_WEIGHTS}


def test_a_folder_of_weights_is_another_model_but_its_code_is_not():
    sizes = dict.fromkeys(["fp32/model.safetensors", "fp32/tokenizer.json", "fp32/deeper/x.txt", "fp32/modeling.py"], 9)
    found = companions(sizes | {"tokenizer.json": 9}, lambda name: "")
    assert found.kept == ["fp32/modeling.py", "tokenizer.json"]


def test_a_change_of_format_keeps_the_card_and_its_pictures():
    sizes = dict.fromkeys(["README.md", "awq_losses.png", "quant_config.json", "model.safetensors", ".git/HEAD"], 9)
    assert companions(sizes, lambda name: "").kept == []
    assert companions(sizes, lambda name: "", same_model=True).kept == [
        "README.md",
        "awq_losses.png",
        "quant_config.json",
    ]


# -- copying -----------------------------------------------------------------------------------------------------------


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of {folder.name}")
    return folder


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_is_there_stays_as_it_is(tmp_path):
    source = write(tmp_path / "source", "config.json", "LICENSE", "a/b/c/deep.txt", "model.safetensors")
    target = write(tmp_path / "target", "config.json")
    assert copy_all_companions(source, target) == ["LICENSE", "a/b/c/deep.txt"]
    assert (target / "config.json").read_text() == "config.json of target"
    assert copy_all_companions(source, target) == []
    assert files_in(target) == {"config.json", "LICENSE", "a/b/c/deep.txt"}


def test_two_tokenizers_or_processors_are_never_mixed(tmp_path):
    tokenizer = ("tokenizer_config.json", "vocab.json", "merges.txt", "additional_chat_templates/tools.jinja")
    processor = ("preprocessor_config.json", "chat_template.json")
    source = write(tmp_path / "source", *tokenizer, *processor, "tokenization_own.py", "NOTICE")
    own = write(tmp_path / "own tokenizer", "tokenizer_config.json")
    copy_all_companions(source, own)
    assert files_in(own) == {"tokenizer_config.json", *processor, "tokenization_own.py", "NOTICE"}
    own = write(tmp_path / "own processor", "processor_config.json")
    copy_all_companions(source, own)
    assert files_in(own) == {"processor_config.json", *tokenizer, "tokenization_own.py", "NOTICE"}


def test_a_folder_inside_its_source_is_not_copied_into_itself(tmp_path):
    source = write(tmp_path / "source", "config.json", "LICENSE", "out/half.txt")
    copy_all_companions(source, source / "out")
    assert files_in(source / "out") == {"half.txt", "config.json", "LICENSE"}


def test_no_link_leads_out_of_a_folder(tmp_path, caplog, monkeypatch):
    private = write(tmp_path / "private", "secret.txt", "more/secrets.txt")
    source = write(tmp_path / "source", "config.json", "LICENSE")
    (source / "stolen.txt").symlink_to(private / "secret.txt")
    (source / "by_number.json").symlink_to("../private/secret.txt")
    (source / "stolen").symlink_to(private)
    (source / "loop").symlink_to(source)
    (source / "NOTICE").symlink_to("LICENSE")
    (source / "gone.txt").symlink_to(source / "nothing")
    told = []
    monkeypatch.setattr(companion_copies.logger, "warning", told.append)
    target = tmp_path / "target"
    target.mkdir()
    assert copy_all_companions(source, target) == ["LICENSE", "NOTICE", "config.json"]
    assert not (target / "NOTICE").is_symlink()
    (line,) = told
    for name in ("stolen.txt", "by_number.json", "stolen "):
        assert f"{name.strip()} (a link out of the folder)" in line
    assert list(listed(source)[1]) == ["by_number.json", "stolen", "stolen.txt"]


def test_links_in_the_cache_of_the_hub_are_followed_to_its_own_blobs_alone(tmp_path):
    source = write(tmp_path / "source", "config.json", "tokenizer.json", "1_Pooling/config.json")
    repository = add_to_cache(tmp_path / "cache", "org/name", {"main": source, "v2": source})
    secret = write(tmp_path / "private", "secret.txt") / "secret.txt"
    snapshot = repository / "snapshots" / commit_of("org/name", "v2")
    (snapshot / "stolen.txt").symlink_to(secret)
    sizes, leading_out = listed(snapshot)
    assert list(sizes) == ["1_Pooling/config.json", "config.json", "tokenizer.json"]
    assert list(leading_out) == ["stolen.txt"]
    assert folder_on_this_machine("org/name", "v2", tmp_path / "cache") == snapshot
    assert folder_on_this_machine("org/name", commit_of("org/name", "v2"), tmp_path / "cache") == snapshot
    assert folder_on_this_machine("org/name", "v3", tmp_path / "cache") is None
    assert folder_on_this_machine("org/other", None, tmp_path / "cache") is None
    assert folder_on_this_machine("no/such/folder") is None
    assert places_of_files(tmp_path / "source", subfolder="1_Pooling") == [tmp_path / "source" / "1_Pooling", source]


def test_what_stays_behind_and_may_be_missed_is_named(tmp_path, monkeypatch):
    source = write(tmp_path / "source", "speakers.pt", "train.jsonl", "model.safetensors", "logo.png", "w4/model.bin")
    write(source, "w4/config.json")
    told = []
    monkeypatch.setattr(companion_copies.logger, "warning", told.append)
    (tmp_path / "target").mkdir()
    copy_all_companions(source, tmp_path / "target")
    (line,) = told
    for name in ("speakers.pt (perhaps weights)", "train.jsonl (data)", "w4/ (in a folder of weights)"):
        assert name in line
    for name in ("model.safetensors", "logo.png", "model.bin"):
        assert name not in line
