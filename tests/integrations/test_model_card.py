"""The card says what is known, keeps what others wrote, and reveals no secrets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from models import tiny_llama

from hf_awq_offload import AwqOffloadConfig, quantize, quantize_model
from hf_awq_offload.formats.compressed_tensors_config import PackedCheckpointConfig
from hf_awq_offload.formats.grid_choice import GridChoice
from hf_awq_offload.integrations.companions import bring_companions
from hf_awq_offload.integrations.hub import full_precision_bytes, record_evaluation
from hf_awq_offload.integrations.model_card import (
    BEGIN,
    END,
    PICTURE,
    CardFacts,
    draw_losses,
    hub_id,
    proposed_name,
    updated,
    write_card,
)
from hf_awq_offload.integrations.origin import Origin
from hf_awq_offload.report import GroupReport, LayerReport, QuantizationReport
from hf_awq_offload.reporting.evaluation import Evaluation

CONFIG = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "modules_to_not_convert": ["lm_head"],
    "meta": {"quantizer": ["hf_awq_offload:0"], "dataset": "wikitext2", "n_samples": 128, "seed": 0},
}
GROUP = GroupReport(("q_proj",), "input_layernorm", 0.5, loss_nearest=0.4, loss=0.1)
REPORT = QuantizationReport(layers=[LayerReport(f"model.layers.{i}", (GROUP,), 1.0) for i in range(3)])


def facts(**changes) -> CardFacts:
    return CardFacts(**{"quantization_config": CONFIG, "report": REPORT, "repo_id": "me/model-AWQ"} | changes)


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_new_card_says_what_was_done_and_measured_and_how_to_load_it():
    evaluations = {"wikitext2": Evaluation(perplexity=7.25, kl_nats=0.0123, top1_agreement=0.95, tokens=1000)}
    card = updated(
        None,
        facts(
            base_model="org/model", evaluations=evaluations, quantized_bytes=4_200_000, full_precision_bytes=16_000_000
        ),
        has_picture=True,
    )
    assert metadata(card) == {
        "base_model": "org/model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["awq", "4-bit"],
    }
    for words in (
        "# model-AWQ",
        "[org/model](https://huggingface.co/org/model)",
        "asymmetric, groups of 128 input channels",
        "| dataset | wikitext2 |",
        "| n_samples | 128 |",
        "| in full precision | `lm_head` |",
        "| wikitext2 | 7.250 | 0.01230 | 95.0% | 1000 |",
        "Weights: 4.2 MB, 16.0 MB before.",
        "quantized linears): 0.25 × round-to-nearest.",
        f"]({PICTURE})",
        'AutoModelForCausalLM.from_pretrained("me/model-AWQ"',
        "vllm serve me/model-AWQ",
        "sglang.launch_server --model-path me/model-AWQ",
    ):
        assert words in card, words


def packed_config(*grids: GridChoice) -> dict:
    targets = {f"target{i}": grid for i, grid in enumerate(grids)}
    return PackedCheckpointConfig(grids=targets, ignore=["lm_head"]).to_dict() | {"meta": CONFIG["meta"]}


def test_a_card_of_packed_weights():
    card = updated(None, facts(quantization_config=packed_config(GridChoice(8, -1, False))), has_picture=False)
    assert metadata(card)["tags"] == ["awq", "compressed-tensors", "8-bit"]
    for words in (
        "An 8-bit version: symmetric, one group per row.",
        "| dataset | wikitext2 |",
        "| in full precision | `lm_head` |",
        "compressed-tensors, if there are no zero points",
        "vllm serve",
    ):
        assert words in card, words


def test_a_card_of_mixed_precision_names_no_server_for_bits_that_few_serve():
    grids = [GridChoice(4, 128, True), GridChoice(3, 32, False)]
    card = updated(None, facts(quantization_config=packed_config(*grids)), has_picture=False)
    assert metadata(card)["tags"] == ["awq", "compressed-tensors", "3-bit", "4-bit"]
    assert "4 bits, asymmetric, groups of 128 input channels; 3 bits, symmetric, groups of 32 input channels" in card
    assert "vllm" not in card


def test_what_is_not_known_is_not_said():
    card = updated(None, CardFacts(quantization_config={"quant_method": "awq"}), has_picture=False)
    for words in ("base_model", "Measured", PICTURE, "None", "nan"):
        assert words not in card


def test_of_a_card_that_is_there_only_our_section_is_replaced():
    existing = (
        "---\nlicense: mit\nbase_model: theirs/model\ntags:\n- chat\ncustom: {a: 1}\n---\n# Title\n\nBefore.\n\n"
        f"{BEGIN}\nold\n{END}\n\nAfter.\n"
    )
    card = updated(existing, facts(base_model="org/model"), has_picture=False)
    assert metadata(card) == {
        "license": "mit",
        "base_model": "theirs/model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["chat", "awq", "4-bit"],
        "custom": {"a": 1},
    }
    body = card.split("---\n", 2)[2]
    assert body.startswith(f"# Title\n\nBefore.\n\n{BEGIN}\n")
    assert body.endswith(f"{END}\n\nAfter.\n")
    assert "old" not in body
    assert updated(card, facts(base_model="org/model"), has_picture=False) == card


@pytest.mark.parametrize("existing", ["", "# Mine\n\nNo metadata.\n", "---\n---\n", "Text --- with dashes ---\n"])
def test_a_card_without_metadata_or_section_keeps_its_text(existing):
    card = updated(existing, facts(), has_picture=False)
    assert metadata(card)["tags"] == ["awq", "4-bit"]
    for line in existing.splitlines():
        assert line in card
    assert card.count(BEGIN) == card.count(END) == 1


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/model", "org/model"),
        ("gpt2", "gpt2"),
        ("/home/me/.cache/huggingface/hub/models--org--model/snapshots/0123abcd", "org/model"),
        ("/home/me/secret-project/model", None),
        ("./model", None),
        ("~/models/mine", None),
        ("C:\\models\\mine", None),
        ("a/b/c", None),
        ("", None),
        (None, None),
    ],
)
def test_a_folder_of_the_users_is_no_name_on_the_hub(source, name):
    assert hub_id(source) == name


def test_a_folder_that_looks_like_a_name_is_none(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("org/model") is None


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/model", "model-AWQ"),
        ("/home/me/.cache/huggingface/hub/models--org--model/snapshots/0123abcd", "model-AWQ"),
        ("/home/me/secret-project/tuned/", "tuned-AWQ"),
        ("org/model-AWQ", "model-AWQ"),  # saved once more
        ("./model-awq", "model-awq"),
        ("", "model-AWQ"),
        (None, "model-AWQ"),
    ],
)
def test_a_card_is_named_by_what_was_quantized(source, name):
    assert proposed_name(source) == name


def test_tokens_and_credentials_do_not_get_into_a_card(monkeypatch):
    own = "a-token-of-another-form"
    monkeypatch.setenv("HF_TOKEN", own)
    other = "hf_" + "AbcdefghijKLMNOP123"
    meta = {"dataset": f"https://user:{other}@host/data?token={own}", "n_samples": 1}
    card = updated(None, facts(quantization_config=CONFIG | {"meta": meta}), has_picture=False)
    assert "host/data" in card
    for secret in (own, other, "user:"):
        assert secret not in card


def test_the_picture_needs_matplotlib_and_the_card_does_not(tmp_path, monkeypatch):
    write_card(tmp_path, facts())
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert PICTURE in (tmp_path / "README.md").read_text()
    assert not draw_losses(QuantizationReport(), tmp_path / "none.png")
    without = tmp_path / "without"
    without.mkdir()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("hf_awq_offload.reporting.charts.find_spec", lambda name: None)
    write_card(without, facts())
    assert [path.name for path in without.iterdir()] == ["README.md"]
    assert PICTURE not in (without / "README.md").read_text()


def test_a_saved_model_has_a_card_and_its_tokenizer(tmp_path, tiny_llama_dir: Path):
    model = tiny_llama()
    model.config.name_or_path = str(tiny_llama_dir)
    before_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    quantize_model(model, AwqOffloadConfig(n_grid=0, clip=False, rounding="nearest", group_size=32))
    assert full_precision_bytes(model) == before_bytes
    record_evaluation(model, "some text", Evaluation(perplexity=12.5, kl_nats=None, top1_agreement=None, tokens=7))
    model.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| some text | 12.500 |  |  | 7 |" in card
    assert str(tiny_llama_dir) not in card
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (tiny_llama_dir / "tokenizer.json").read_bytes()
    assert (tmp_path / "saved" / "heldout.txt").exists()  # a file of an unknown kind, and small
    model.dequantize().save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense" / "README.md").exists()


def test_a_checkpoint_that_was_streamed_has_the_same_card(tmp_path, tiny_llama_dir: Path):
    recipe = AwqOffloadConfig(n_grid=2, clip=False, n_samples=2, max_seq_len=32)
    quantize(tiny_llama_dir, tmp_path / "out", recipe)
    card = (tmp_path / "out" / "README.md").read_text()
    size_bytes = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    before_bytes = (tiny_llama_dir / "model.safetensors").stat().st_size
    assert f"Weights: {size_bytes / 1e6:.1f} MB, {before_bytes / 1e6:.1f} MB before." in card
    assert "| calibration_tokens | 64 |" in card
    assert (tmp_path / "out" / PICTURE).exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()
    for secret in (str(tiny_llama_dir), str(tmp_path), "base_model"):
        assert secret not in card


def test_a_tokenizer_comes_along_whole_or_not_at_all(tmp_path):
    origin, folder = tmp_path / "origin", tmp_path / "folder"
    (origin / "additional_chat_templates").mkdir(parents=True)
    tokenizer = ["tokenizer_config.json", "vocab.json", "merges.txt", "additional_chat_templates/tools.jinja"]
    others = ["preprocessor_config.json", "processor_config.json", "LICENSE.txt", "config.json", "notes.txt"]
    for name in [*tokenizer, *others, "model.safetensors", "README.md"]:
        (origin / name).write_text("of the origin")
    folder.mkdir()
    bring_companions(Origin(str(origin)), folder)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*tokenizer, *others}

    other = tmp_path / "with a tokenizer of its own"
    other.mkdir()
    (other / "tokenizer_config.json").write_text("its own")
    bring_companions(Origin(str(origin)), other)
    assert {path.name for path in other.iterdir()} == {"tokenizer_config.json", *others}
    assert (other / "tokenizer_config.json").read_text() == "its own"
    for nowhere in ("", str(tmp_path / "nowhere" / "at" / "all")):
        bring_companions(Origin(nowhere), other)
