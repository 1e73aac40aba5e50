"""A streamed checkpoint has the same card, picture, tokenizer and processor beside its weights as one from memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from image_models import llava_processor, sample, tiny_llava
from models import token_recipe
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from hf_awq_offload import AwqOffloadConfig, quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers on loading processors without torchvision

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def both(source: Path, scratch: Path, auto_class, recipe) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Returns the files that the in-memory run writes, and those of the streamed one."""
    model = auto_class.from_pretrained(source, quantization_config=recipe(), dtype="auto")
    model.save_pretrained(scratch / "memory")
    quantize(source, scratch / "streamed", recipe(), model_class=auto_class)
    return contents(scratch / "memory"), contents(scratch / "streamed")


@pytest.fixture
def source(tiny_llama_dir, tmp_path) -> Path:
    """A checkpoint in the Hub's cache, with a template, a generation config, a licence and files that nothing needs."""
    folder = tmp_path / "models--someone--Tiny" / "snapshots" / "0123"
    shutil.copytree(tiny_llama_dir, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "LICENSE").write_text("do what you like")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true, "eos_token_id": 2}')
    (folder / "training_args.bin").write_bytes(b"1")
    return folder


def test_a_language_model(source, tmp_path):
    in_memory, streamed = both(source, tmp_path, AutoModelForCausalLM, lambda: token_recipe(group_size=64))
    assert streamed.keys() == in_memory.keys()
    assert [name for name in streamed if streamed[name] != in_memory[name]] == []
    expected = {
        "README.md",
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
        "generation_config.json",
        "config.json",
    }
    assert expected <= streamed.keys()
    assert "training_args.bin" not in streamed
    card = streamed["README.md"].decode()
    assert "base_model: someone/Tiny" in card
    assert "base_model_relation: quantized" in card
    assert "# Tiny-AWQ\n" in card
    assert 'from_pretrained("your-name/Tiny-AWQ"' in card
    assert "Weights: " in card
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "streamed")
    chat = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "user: a\n"


def test_an_image_text_model(tmp_path):
    processor = llava_processor()
    tiny_llava().save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    samples = [sample(processor, seed=seed) for seed in range(3)]
    recipe = lambda: AwqOffloadConfig(dataset=samples, group_size=32, n_grid=4, n_samples=3)  # noqa: E731
    in_memory, streamed = both(tmp_path / "source", tmp_path, AutoModelForImageTextToText, recipe)
    assert streamed.keys() == in_memory.keys()
    assert [name for name in streamed if streamed[name] != in_memory[name]] == []
    assert {"README.md", "processor_config.json", "tokenizer.json"} <= streamed.keys()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "streamed")
    with torch.no_grad():
        assert loaded(**samples[0]).logits.isfinite().all()


def test_a_tokenizer_that_the_recipe_has_goes_along_where_the_source_has_none(tiny_llama_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model.save_pretrained(tmp_path / "source")
    recipe = lambda: token_recipe(group_size=64, tokenizer=tokenizer)  # noqa: E731
    in_memory, streamed = both(tmp_path / "source", tmp_path, AutoModelForCausalLM, recipe)
    assert streamed == in_memory
    assert "tokenizer.json" in streamed
