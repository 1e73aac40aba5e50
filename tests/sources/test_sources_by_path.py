"""Every cell of the table in docs/sources.md: what becomes of a source on a path."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from made_sources import AGAIN, MADE, MTP_PREFIX
from models import token_batch, token_recipe
from transformers import AutoModelForCausalLM

import hf_awq_offload
from hf_awq_offload import AwqOffloadError, plan, quantize
from hf_awq_offload.checkpoint.opened import read_json
from hf_awq_offload.checkpoint.safetensors import tensor_places
from hf_awq_offload.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "sources.md"
PATHS = ["`from_pretrained`, RAM", "`from_pretrained`, disk", "`quantize`", "`plan`", "`hf-awq-offload quantize`"]
LONGEST_MESSAGE = 700


def cells() -> list[tuple[str, str, str]]:
    """Returns (source, path, what happens) of each cell of the table."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert rows[0] == ["Source", *PATHS]
    return [(row[0], path, cell) for row in rows[1:] for path, cell in zip(PATHS, row[1:], strict=True)]


CELLS = cells()
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    ),  # PEFT asks for a deprecated attribute
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """Row -> its checkpoint, which no test changes."""
    return {row: make(tmp_path_factory.mktemp("source") / "checkpoint") for row, make in MADE.items()}


def run(path: str, source: Path, out: Path, **fields: Any) -> None:
    """Takes a source along a path; raises what it raises, and leaves the result, if any, in `out`."""
    if path.startswith("`from_pretrained`"):
        recipe = token_recipe(offload="disk" if path.endswith("disk") else "cpu", **fields)
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=recipe, dtype="auto", offload_folder=out.with_name("scratch")
        )
        model.save_pretrained(out)
    elif path == "`quantize`":
        quantize(source, out, token_recipe(**fields))
    elif path == "`plan`":
        plan(source, token_recipe(**fields), probe=False)
    else:
        data = out.with_name("ids.json")
        data.write_text(json.dumps(token_batch(6, 20).tolist()))
        options = ["--dataset", str(data), "--group-size", "32", "--n-grid", "3", "--max-seq-len", "20", "--debug"]
        options += ["--from-quantized"] if fields.get("from_quantized") else []
        code = main(["quantize", str(source), str(out), *options])
        assert code == 0, code


@pytest.mark.parametrize(("row", "path", "cell"), CELLS, ids=[f"{row}: {path}" for row, path, _ in CELLS])
def test_cell(row, path, cell, made, tmp_path, capsys):
    source, out = made[row], tmp_path / "out"
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    fields = {"from_quantized": True} if row.endswith(AGAIN) else {}
    if not cell.endswith("Error"):
        run(path, source, out, **fields)
        check_result(cell, out)
    elif path == PATHS[-1]:
        with pytest.raises(AssertionError, match=r"[12]"):
            run(path, source, out, **fields)
        printed = capsys.readouterr().err
        last = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(last) == 1
        assert f"hf_awq_offload.errors.{cell}" in printed  # by --debug
        assert len(last[0]) < LONGEST_MESSAGE
    else:
        with pytest.raises(AwqOffloadError) as caught:
            run(path, source, out, **fields)
        assert type(caught.value) is getattr(hf_awq_offload, cell)
        assert len(str(caught.value)) < LONGEST_MESSAGE
    if cell.endswith("Error") or cell == "planned":
        assert not out.exists()
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def check_result(cell: str, out: Path) -> None:
    """Checks that a cell's result is what the cell says."""
    if cell == "planned":
        return
    if cell == "the base is quantized":  # the adapters are what is saved
        assert (out / "adapter_model.safetensors").exists()
        return
    names = {name for file in out.glob("*.safetensors") for name in tensor_places(file)}
    assert any(name.endswith(".qweight") for name in names)
    quantization = read_json(out / "config.json")["quantization_config"]
    assert ("dequantized_from" in quantization["meta"]) == (cell == "dequantized")
    assert any(name.startswith(MTP_PREFIX) for name in names) == (cell == "kept")
    if cell == "kept":
        skipped = quantization["modules_to_not_convert"]
        assert any(re.match(rf"{re.escape(MTP_PREFIX)}(eh_proj)?", name) for name in skipped)
