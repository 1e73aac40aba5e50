"""`report_dir` is checked before calibration; the report is complete, and its failures never cost the model."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from killing import digests
from models import save_model, tiny_llama, tiny_mixtral, token_recipe
from report_samples import PLAN, facts, sample
from stopped_runs import stopped_run
from transformers import AutoModelForCausalLM

import hf_awq_offload
from hf_awq_offload import AwqOffloadConfig, ConfigError, StorageError, plan, quantize, quantize_model
from hf_awq_offload.nn.awq_linear import AwqLinear
from hf_awq_offload.report import LayerReport, QuantizationReport
from hf_awq_offload.reporting import charts, files
from hf_awq_offload.reporting.charts import MOST_FAMILIES, OTHERS, charts_of
from hf_awq_offload.reporting.document import document_of
from hf_awq_offload.reporting.families import all_families, family_name
from hf_awq_offload.reporting.files import PICTURES, write_report
from hf_awq_offload.trainer import AwqQuantizeCallback

SCHEMA = json.loads((Path(files.__file__).parent / "report.schema.json").read_text())
ALL_FILES = {"report.json", "report.html", *(f"{name}.png" for name in PICTURES)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_model(tiny_llama(num_hidden_layers=5), tmp_path_factory.mktemp("llama"))


def document(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "report.json").read_text())
    Draft202012Validator(SCHEMA).validate(found)
    return found


def by_from_pretrained(source: Path, out: Path, recipe: AwqOffloadConfig) -> QuantizationReport:
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=recipe)
    model.save_pretrained(out)
    return model.hf_quantizer.report


def by_quantize_model(source: Path, out: Path, recipe: AwqOffloadConfig) -> QuantizationReport:
    model = quantize_model(AutoModelForCausalLM.from_pretrained(source), recipe)
    model.save_pretrained(out)
    return model.hf_quantizer.report


@pytest.mark.parametrize("call", [by_from_pretrained, by_quantize_model, quantize])
@pytest.mark.parametrize("format", ["awq", "compressed-tensors"])
def test_all_ways_to_quantize_write_a_report_and_no_trace_of_it_into_the_checkpoint(call, format, llama, tmp_path):
    report = call(llama, tmp_path / "out", token_recipe(report_dir=tmp_path / "deep" / "report", format=format))
    folder = tmp_path / "deep" / "report"
    assert {path.name for path in folder.iterdir()} == ALL_FILES
    found = document(folder)
    assert found["settings"]["format"] == format
    assert found["model"] == llama.name
    assert found["summary"]["loss"] == pytest.approx(sum(layer.loss for layer in report.layers))
    assert found["summary"]["loss_ratio"] == pytest.approx(
        sum(layer.loss for layer in report.layers) / sum(layer.loss_nearest for layer in report.layers)
    )
    assert (found["summary"]["layers"], found["summary"]["groups"], found["summary"]["linears"]) == (5, 20, 35)
    assert [LayerReport.from_dict({k: v for k, v in layer.items() if not k.startswith("loss")})
            for layer in found["layers"]] == report.layers  # fmt: skip
    assert found["left_out"] == report.left_out
    assert (found["plan"] is not None) == (call is quantize)
    if call is quantize:
        assert found["plan"]["layers"] == 5
    for path in (tmp_path / "out").glob("*.json"):
        assert "report" not in path.read_text()


def test_the_report_changes_no_bit_and_a_journal_does_not_mind_it(llama, tmp_path, monkeypatch):
    quantize(llama, tmp_path / "reference", token_recipe())
    stopped_run(llama, tmp_path, monkeypatch, commits=2)
    recipe = token_recipe(report_dir=tmp_path / "report")
    quantize(llama, tmp_path / "out", recipe, checkpoint_dir=tmp_path / "journal")
    assert digests(tmp_path / "out") == digests(tmp_path / "reference")
    found = document(tmp_path / "report")
    assert all(layer["memory"] and layer["seconds"] > 0 for layer in found["layers"])
    assert found["summary"]["seconds"] == pytest.approx(sum(layer["seconds"] for layer in found["layers"]))


def test_a_report_of_experts_and_of_a_run_without_data(tmp_path):
    quantize_model(tiny_mixtral(), token_recipe(report_dir=tmp_path / "experts", min_expert_tokens=100))
    found = document(tmp_path / "experts")
    assert found["summary"]["starved_experts"] == sum(len(layer["starved_experts"]) for layer in found["layers"]) > 0
    assert found["settings"]["min_expert_tokens"] == 100
    recipe = token_recipe(report_dir=tmp_path / "without", n_grid=0, clip=False, rounding="nearest")
    quantize_model(tiny_llama(), recipe)
    found = document(tmp_path / "without")
    assert found["summary"]["loss_ratio"] is None
    assert found["summary"]["identity_share"] == 1
    assert {path.stem for path in (tmp_path / "without").glob("*.png")} == {"identity", "time", "memory"}


def test_a_field_that_is_missing_or_of_another_type_does_not_pass_the_schema():
    Draft202012Validator.check_schema(SCHEMA)
    validator, whole = Draft202012Validator(SCHEMA), json.loads(json.dumps(document_of(sample(3), facts(PLAN))))
    assert validator.is_valid(whole)
    assert set(SCHEMA["properties"]) == set(whole)
    for part in (whole, whole["summary"], whole["plan"], whole["layers"][0], whole["layers"][0]["groups"][0]):
        for name in list(part):
            kept = part.pop(name)
            assert not validator.is_valid(whole), name
            part[name] = [kept]
            assert not validator.is_valid(whole) or name in ("settings",), name
            part[name] = kept
    assert validator.is_valid(whole)


def test_records_of_an_earlier_release_make_a_report(tmp_path):
    group = {"consumers": ["o_proj"], "producer": None, "alpha": None, "loss_nearest": 0.4, "loss": 0.1}
    layer = {"name": "model.layers.0", "groups": [group], "seconds": 1.0, "starved_experts": {}}
    write_report(tmp_path, QuantizationReport([LayerReport.from_dict(layer)]), facts())
    found = document(tmp_path)
    assert found["summary"]["identity_reasons"] == {"not recorded": 1}
    assert found["summary"]["loss_scaled"] is None
    assert not (tmp_path / "memory.png").exists()


# -- before anything is calibrated -------------------------------------------------------------------------------------


def refused(call: Any, error: type[Exception], message: str, llama: Path, folder: Path, monkeypatch) -> None:
    """Asserts that the call raises this error before calibration data are loaded."""

    def fail(*args, **kwargs):
        raise AssertionError("calibration data were loaded")

    monkeypatch.setattr("hf_awq_offload.integrations.preparation.load_calibration_set", fail)
    with pytest.raises(error, match=message):
        call(llama, folder.parent / "out", token_recipe(report_dir=folder))
    assert not (folder.parent / "out").exists()


CALLS = pytest.mark.parametrize("call", [by_from_pretrained, by_quantize_model, quantize])


@CALLS
def test_without_matplotlib_the_extra_is_named_first(call, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    refused(call, ConfigError, r"pip install matplotlib", llama, tmp_path / "report", monkeypatch)
    assert not (tmp_path / "report").exists()


@CALLS
def test_a_file_in_the_place_of_the_folder_is_refused(call, llama, tmp_path, monkeypatch):
    (tmp_path / "report").write_text("mine")
    refused(call, ConfigError, "report_dir .* is a file; name a folder", llama, tmp_path / "report", monkeypatch)
    assert (tmp_path / "report").read_text() == "mine"


def test_a_folder_that_can_not_be_written_to_is_refused(llama, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    below = tmp_path / "file" / "report"
    with pytest.raises(StorageError, match=r"can't be written to.*Correct the folder's permissions, or name another"):
        quantize_model(tiny_llama(), token_recipe(report_dir=below))

    def read_only(path, *args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", read_only)
    refused(quantize, StorageError, "Read-only file system", llama, tmp_path / "report", monkeypatch)


def test_a_full_disk_is_refused(llama, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    message = r"1 MiB free; expected 32 MiB\. Make room"
    refused(by_from_pretrained, StorageError, message, llama, tmp_path / "report", monkeypatch)


def test_a_trainer_that_is_to_quantize_at_its_end_fails_at_its_beginning(monkeypatch, tmp_path):
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    callback = AwqQuantizeCallback(token_recipe(report_dir=tmp_path / "report"))
    with pytest.raises(ConfigError, match=r"pip install matplotlib"):
        callback.on_train_begin(SimpleNamespace(output_dir=tmp_path), None, None, model=tiny_llama())


def test_planning_writes_no_report(llama, tmp_path):
    recipe = token_recipe(report_dir=tmp_path / "report")
    plan(llama, recipe)
    assert not (tmp_path / "report").exists()
    assert recipe.report_dir == tmp_path / "report"


# -- when all is quantized ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("a bug")], ids=str)
def test_a_report_that_fails_at_the_end_costs_no_model(error, tmp_path, monkeypatch, caplog):
    def fail(self):
        raise error

    monkeypatch.setattr(charts.Chart, "png", fail)
    model = quantize_model(tiny_llama(), token_recipe(report_dir=tmp_path))
    assert isinstance(model.model.layers[0].mlp.down_proj, AwqLinear)
    assert f"could not be written to {tmp_path}" in caplog.text
    assert str(error) in caplog.text
    assert ("Traceback" in caplog.text) == isinstance(error, ValueError)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "whole, or not there"
    document(tmp_path)


def test_an_earlier_report_is_replaced_and_other_files_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write_report(tmp_path, sample(2), facts())
    assert (tmp_path / "loss.png").exists()
    before = (tmp_path / "report.html").read_text()
    without = QuantizationReport([LayerReport("model.layers.0", (), 1.0)])
    write_report(tmp_path, without, facts())
    assert document(tmp_path)["summary"]["layers"] == 1
    assert not (tmp_path / "loss.png").exists()
    assert (tmp_path / "report.html").read_text() != before
    assert (tmp_path / "notes.txt").read_text() == "mine"


# -- many groups, many experts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("consumers", "name"),
    [
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn: q_proj, k_proj, v_proj"),
        (("mlp.down_proj",), "mlp.down_proj"),
        (("mlp.experts.12.down_proj",), "mlp.experts.*.down_proj"),
        (("mlp.experts.0.w1", "mlp.experts.0.w3", "mlp.experts.1.w1"), "mlp.experts.*: w1, w3"),
        (("mlp.gate_proj", "mlp.experts.0.gate_proj"), "mlp.gate_proj, mlp.experts.*.gate_proj"),
        (("fc1", "fc2"), "fc1, fc2"),
        (("layer2.conv1d",), "layer2.conv1d"),
        (("blocks.0.1.fc",), "blocks.*.*.fc"),
    ],
)
def test_groups_that_do_the_same_have_one_name(consumers, name):
    assert family_name(consumers) == name


def test_families_keep_every_group():
    report = sample(3, experts=5)
    families = all_families(report)
    assert list(families) == [
        "self_attn: q_proj, k_proj, v_proj", "self_attn.o_proj", "mlp.experts.*: gate_proj, up_proj",
        "mlp.experts.*.down_proj",
    ]  # fmt: skip
    assert [len(family.groups) for family in families.values()] == [3, 3, 3, 15]
    total = sum(layer.loss for layer in report.layers)
    assert sum(family.loss for family in families.values()) == pytest.approx(total)


def test_of_very_many_kinds_of_groups_those_with_least_loss_are_one():
    report = sample(2, more_names=tuple(f"{letter}.proj" for letter in "abcdefghijklmnop"))
    drawn, cells = charts._drawn_families(report), charts._cells(report, charts._drawn_families(report))
    assert len(drawn) == MOST_FAMILIES
    assert list(drawn)[-1] == OTHERS
    assert sum(len(family.groups) for family in drawn.values()) == 2 * 20
    assert sum(len(cell.groups) for row in cells.values() for cell in row if cell is not None) == 2 * 20


def test_pictures_carry_no_colour_of_their_own_and_no_name_as_markup():
    report = sample(3, more_names=("<b>$x_1$ & co",))
    for chart in charts_of(report, facts(PLAN)):
        svg = chart.svg()
        assert svg.startswith("<svg viewBox=")
        plain = svg.replace("url(#", "url(").replace('href="#', 'href="')
        assert "#" not in plain, plain[max(0, plain.find("#") - 40) : plain.find("#") + 40]
        assert {name.partition(")")[0] for name in svg.split("var(--")[1:]} <= charts.LIGHT.keys()
        assert "<b>" not in svg
        if chart.name == "alpha":
            assert "&lt;b&gt;$x_1$ &amp; co" in svg
        if chart.name == "time":
            assert "planned mean per layer" in svg


def test_the_picture_of_the_model_card_is_the_report_s(tmp_path):
    report = sample(4)
    assert hf_awq_offload.integrations.model_card.draw_losses(report, tmp_path / "card.png")
    assert (tmp_path / "card.png").read_bytes() == charts_of(report, facts())[0].png()
