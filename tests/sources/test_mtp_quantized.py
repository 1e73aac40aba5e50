"""mtp="quantize": the decoder layer for multi-token prediction is quantized on what servers feed it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from killing import Run, digests, run_to_the_end, steps_of
from models import save_model, tiny_llama, token_batch, token_recipe
from mtp_sources import SOURCES, MtpSource
from quantized_sources import fp8_blocks
from safetensors.torch import load_file, save_file
from stopped_runs import stopped_run
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_awq_offload import plan, quantize
from hf_awq_offload.calibration import opened_inputs
from hf_awq_offload.calibration.mtp_inputs import MtpInputs
from hf_awq_offload.calibration.skeleton import NotAChainError
from hf_awq_offload.checkpoint.conversion import convert_checkpoint
from hf_awq_offload.checkpoint.opened import read_json
from hf_awq_offload.checkpoint.source import open_source
from hf_awq_offload.checkpoint.stored_tensor import read
from hf_awq_offload.formats.awq import PackedWeight
from hf_awq_offload.formats.grid import Grid
from hf_awq_offload.formats.name_patterns import matches
from hf_awq_offload.nn.awq_linear import AwqLinear

TOKENS = token_batch(6, 20)  # the data of `token_recipe`
NEAREST = {"rounding": "nearest", "n_grid": 0, "clip": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """Kind -> its checkpoint, which no test changes."""
    return {kind: source.save(tmp_path_factory.mktemp(kind) / "source") for kind, source in SOURCES.items()}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def dequantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts `weight` in the place of packed AWQ tensors."""
    result = {name: value for name, value in tensors.items() if name.rpartition(".")[2] in ("weight", "bias")}
    result |= {name: value for name, value in tensors.items() if name.endswith("e_score_correction_bias")}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        packed = PackedWeight(**{part: tensors[f"{name}.{part}"] for part in PackedWeight._fields})
        result[f"{name}.weight"] = AwqLinear.from_packed(packed, None, Grid(4, 32, True), torch.float32).weight.detach()
    return result


def error(source: MtpSource, folder: Path, result: Path) -> float:
    """Returns the relative error of the quantized layer's output on its true inputs."""
    inputs = source.inputs(folder, TOKENS)
    true = source.outputs(folder, tensors_of(folder), inputs)
    found = source.outputs(folder, dequantized(tensors_of(result)), inputs)
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("kind", SOURCES)
def test_the_layer_is_packed_and_computes_what_it_did(kind, made, tmp_path):
    source = SOURCES[kind]
    before = digests(made[kind])
    report = quantize(made[kind], tmp_path / "out", token_recipe(mtp="quantize"))
    assert report.layers[-1].name == source.layer
    original, result = tensors_of(made[kind]), tensors_of(tmp_path / "out")
    packed = {name.removesuffix(".qweight") for name in result if name.endswith(".qweight")}
    twins = {name.replace("model.layers.1.", f"{source.layer}.") for name in packed if "layers.1." in name}
    assert {name for name in packed if name.startswith(f"{source.layer}.")} == twins
    assert twins
    for name, value in original.items():  # all that is not packed is there, and what is no part of the layer unchanged
        assert name in result or name.removesuffix(".weight") in packed, name
        if name.startswith(f"{source.projection}.") or name in source.others:
            assert torch.equal(result[name], value), name
    quantize(made[kind], tmp_path / "nearest", token_recipe(mtp="quantize", **NEAREST))
    assert 0 < error(source, made[kind], tmp_path / "out") < 0.9 * error(source, made[kind], tmp_path / "nearest") < 0.2
    assert digests(made[kind]) == before


@pytest.mark.parametrize("kind", SOURCES)
def test_inputs_are_those_that_servers_compute(kind, made, tmp_path, monkeypatch):
    seen, counted = [], []
    entering = MtpInputs.entering

    def watched(self, batches, hidden):
        counted.extend(self.counted(batches))
        for batch in entering(self, batches, hidden):
            seen.append(batch)
            yield batch

    monkeypatch.setattr(MtpInputs, "entering", watched)
    quantize(made[kind], tmp_path / "out", token_recipe(mtp="quantize"))
    expected = SOURCES[kind].inputs(made[kind], TOKENS)
    torch.testing.assert_close(torch.cat(seen)[:, :-1], expected, rtol=1e-3, atol=1e-4)
    assert torch.cat(counted)[:, :-1].all()
    assert not torch.cat(counted)[:, -1].any()


@pytest.mark.parametrize(
    ("kind", "format"), [("qwen2", "compressed-tensors"), ("glm4_moe", "awq"), ("qwen3_next", "compressed-tensors")]
)
def test_every_path_writes_the_same(kind, format, made, tmp_path):
    recipe = {"mtp": "quantize", "format": format}
    quantize(made[kind], tmp_path / "streamed", token_recipe(**recipe))
    expected = tensors_of(tmp_path / "streamed")
    for offload in ("cpu", "disk"):
        model = AutoModelForCausalLM.from_pretrained(
            made[kind],
            quantization_config=token_recipe(offload=offload, **recipe),
            dtype="auto",
            offload_folder=tmp_path / "scratch",
        )
        assert not [name for name, _ in model.named_modules() if name.startswith(SOURCES[kind].layer)]
        model.save_pretrained(tmp_path / offload)
        found = tensors_of(tmp_path / offload)
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert read_json(tmp_path / offload / "config.json") == read_json(tmp_path / "streamed" / "config.json")


@pytest.mark.parametrize("kind", SOURCES)
def test_the_config_names_what_stays_dense_and_no_more(kind, made, tmp_path):
    source = SOURCES[kind]
    beside = {source.projection} | {
        name.removesuffix(".weight") for name, shape in source.others.items() if len(shape) == 2
    }
    for format, field in (("awq", "modules_to_not_convert"), ("compressed-tensors", "ignore")):
        quantize(made[kind], tmp_path / format, token_recipe(mtp="quantize", format=format))
        named = set(read_json(tmp_path / format / "config.json")["quantization_config"][field])
        stored = tensors_of(tmp_path / format)
        packed = {name.rpartition(".")[0] for name in stored if name.endswith((".qweight", ".weight_packed"))}
        assert all(any(matches(pattern, name) for pattern in named) for name in beside)
        assert not [name for name in packed if any(matches(pattern, name) for pattern in named)]
        assert any(name.startswith(f"{source.layer}.") for name in packed)


def test_the_result_loads_and_converts(made, tmp_path):
    quantize(made["glm4_moe"], tmp_path / "out", token_recipe(mtp="quantize"))
    quantize(made["glm4_moe"], tmp_path / "kept", token_recipe())
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(tmp_path / name)(TOKENS).logits for name in ("out", "kept")]
    assert torch.equal(*logits)  # the model itself is quantized as without the layer
    convert_checkpoint(tmp_path / "out", tmp_path / "converted", to="compressed-tensors")
    assert "model.layers.2.mlp.experts.0.up_proj.weight_packed" in tensors_of(tmp_path / "converted")


def test_the_model_in_memory_is_what_it_is_without_the_layer(made):
    models = [
        AutoModelForCausalLM.from_pretrained(made["qwen2"], quantization_config=token_recipe(mtp=mtp), dtype="auto")
        for mtp in ("quantize", "keep")
    ]
    assert [name for name, _ in models[0].named_modules()] == [name for name, _ in models[1].named_modules()]
    with torch.no_grad():
        assert torch.equal(models[0](TOKENS).logits, models[1](TOKENS).logits)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"model": "disk", "lm_head": "cpu"}])
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_a_device_map_does_not_need_to_know_of_the_layer(device_map, made, tmp_path):
    quantize(made["qwen2"], tmp_path / "streamed", token_recipe(mtp="quantize"))
    model = AutoModelForCausalLM.from_pretrained(
        made["qwen2"],
        quantization_config=token_recipe(mtp="quantize"),
        dtype="auto",
        device_map=device_map,
        offload_folder=tmp_path / "offloaded",
    )
    model.save_pretrained(tmp_path / "out")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "streamed")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("commits", [1, 2, 3])
def test_a_stopped_run_goes_on_to_the_same_bytes(commits, made, tmp_path, monkeypatch):
    recipe = token_recipe(mtp="quantize")
    quantize(made["glm4_moe"], tmp_path / "undisturbed", recipe)
    journal = stopped_run(made["glm4_moe"], tmp_path, monkeypatch, commits, mtp="quantize")
    quantize(made["glm4_moe"], tmp_path / "out", recipe, checkpoint_dir=journal)
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


def test_a_damaged_layer_is_quantized_again_to_the_same_bytes(made, tmp_path, monkeypatch):
    recipe = token_recipe(mtp="quantize")
    quantize(made["qwen2"], tmp_path / "undisturbed", recipe)
    journal = stopped_run(made["qwen2"], tmp_path, monkeypatch, 3, mtp="quantize")
    (journal / "layer-00002.safetensors").write_bytes(b"nothing")
    for hidden in journal.glob("hidden-*.bin"):
        hidden.unlink()
    quantize(made["qwen2"], tmp_path / "out", recipe, checkpoint_dir=journal)
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


def test_a_run_killed_in_the_layer_goes_on_to_the_same_bytes(made, tmp_path):
    recipe = {"dataset": TOKENS.tolist(), "n_samples": 6, "max_seq_len": 20, "batch_tokens": 40, "group_size": 32}
    recipe |= {"n_grid": 3, "mtp": "quantize"}

    def run(name: str) -> Run:
        return Run(made["qwen2"], tmp_path / name / "out", tmp_path / name / "journal", recipe)

    steps = steps_of(run("undisturbed"))
    expected = digests(tmp_path / "undisturbed" / "out")
    commit = [number for number, words in enumerate(steps, 1) if words == "before write_all"][2]
    for step in (commit, commit + 3):
        finished, _ = run_to_the_end(run(f"{step}"), kill_at_step=step)
        assert not finished
        assert run_to_the_end(run(f"{step}"))[0]
        assert digests(tmp_path / f"{step}" / "out") == expected


def test_without_data_the_layer_is_rounded_to_nearest(made, tmp_path):
    report = quantize(made["qwen3_next"], tmp_path / "out", token_recipe(mtp="quantize", **NEAREST))
    assert report.layers[-1].name == "mtp.layers.0"
    assert error(SOURCES["qwen3_next"], made["qwen3_next"], tmp_path / "out") < 0.2


def test_the_plan_counts_the_layer(made):
    planned = {mtp: plan(made["qwen2"], token_recipe(mtp=mtp), probe=False) for mtp in ("keep", "quantize")}
    assert planned["quantize"].layers == planned["keep"].layers + 1
    assert plan(made["qwen2"], token_recipe(mtp="quantize"), probe=True).layers == 3


def test_the_plan_counts_what_enters_the_layer(made):
    much = {"dataset": token_batch(400, 20).tolist(), "n_samples": 400}
    planned = {mtp: plan(made["qwen2"], token_recipe(mtp=mtp, **much), probe=False) for mtp in ("keep", "quantize")}
    assert planned["quantize"].ram_peak_bytes > planned["keep"].ram_peak_bytes


def test_a_source_in_fp8_gives_what_its_dequantized_copy_gives(made, tmp_path):
    store, fields = fp8_blocks(32)
    config = json.loads((made["qwen2"] / "config.json").read_text()) | {"dtype": "bfloat16"}
    stored: dict[str, Tensor] = {}
    for name, value in tensors_of(made["qwen2"]).items():
        stored |= store(name, value) or {name: value.bfloat16()}
    for folder, tensors, more in (("fp8", stored, {"quantization_config": fields}), ("dense", {}, {})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config | more))
        source = tmp_path / "fp8" / "model.safetensors"
        tensors = tensors or {
            name: read(value).bfloat16() for name, value in open_source([source], fields).tensors.items()
        }
        save_file(tensors, tmp_path / folder / "model.safetensors", {"format": "pt"})
        quantize(tmp_path / folder, tmp_path / f"{folder}-out", token_recipe(mtp="quantize"))
    found, expected = tensors_of(tmp_path / "fp8-out"), tensors_of(tmp_path / "dense-out")
    assert f"{LAYER}.self_attn.q_proj.qweight" in found
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def changed(source: Path, folder: Path, rename: dict[str, str | None], **more: Tensor) -> Path:
    """Copies a checkpoint; tensors get other names, or None and are left out."""
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = {rename.get(name, name): value for name, value in tensors_of(source).items()}
    tensors |= {name.replace("__", "."): value for name, value in more.items()}
    save_file({name: value for name, value in tensors.items() if name}, folder / "model.safetensors", {"format": "pt"})
    return folder


LAYER = "model.layers.2"
STAY = {
    "no norm of the embeddings": {f"{LAYER}.enorm.weight": f"{LAYER}.other_norm.weight"},
    "no projection": {f"{LAYER}.eh_proj.weight": None},
    "a part of the layer is missing": {f"{LAYER}.mlp.up_proj.weight": None},
    "a part of the layer that the model's layers lack": {
        f"{LAYER}.shared_head.norm.weight": f"{LAYER}.self_attn.q_norm.weight"
    },
}


@pytest.mark.parametrize("case", STAY)
def test_what_is_not_known_is_kept_and_a_warning_says_so(case, made, tmp_path, caplog):
    source = changed(made["qwen2"], tmp_path / "source", STAY[case])
    with caplog.at_level(logging.WARNING):
        quantize(source, tmp_path / "out", token_recipe(mtp="quantize"))
    assert "despite mtp='quantize'" in caplog.text
    original, result = tensors_of(source), tensors_of(tmp_path / "out")
    assert all(torch.equal(result[name], value) for name, value in original.items() if name.startswith(LAYER))
    named = read_json(tmp_path / "out" / "config.json")["quantization_config"]["modules_to_not_convert"]
    assert f"{LAYER}.mlp.down_proj" in named


@pytest.mark.parametrize("path", ["quantize", "from_pretrained"])
def test_layers_that_form_no_chain_leave_the_layer_as_it_is(path, made, tmp_path, monkeypatch, caplog):
    def no_chain(*args, **kwargs):
        raise NotAChainError("layers share something")

    monkeypatch.setattr(opened_inputs, "record_skeleton", no_chain)
    with caplog.at_level(logging.WARNING):
        if path == "quantize":
            quantize(made["qwen2"], tmp_path / "out", token_recipe(mtp="quantize"))
        else:
            recipe = token_recipe(mtp="quantize")
            model = AutoModelForCausalLM.from_pretrained(made["qwen2"], quantization_config=recipe, dtype="auto")
            model.save_pretrained(tmp_path / "out")
    assert "despite mtp='quantize'" in caplog.text
    original, result = tensors_of(made["qwen2"]), tensors_of(tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.qweight" in result
    assert all(torch.equal(result[name], value) for name, value in original.items() if name.startswith(LAYER))
    named = read_json(tmp_path / "out" / "config.json")["quantization_config"]["modules_to_not_convert"]
    assert f"{LAYER}.mlp.down_proj" in named


def test_of_several_layers_the_first_is_quantized(made, tmp_path, caplog):
    original = tensors_of(made["qwen2"])
    second = {
        name.replace(LAYER, "model.layers.3").replace(".", "__"): value.clone()
        for name, value in original.items()
        if name.startswith(LAYER)
    }
    source = changed(made["qwen2"], tmp_path / "source", {}, **second)
    with caplog.at_level(logging.WARNING):
        quantize(source, tmp_path / "out", token_recipe(mtp="quantize"))
    assert "Only the first layer for multi-token prediction is quantized, model.layers.2" in caplog.text
    result = tensors_of(tmp_path / "out")
    assert f"{LAYER}.mlp.up_proj.qweight" in result
    assert all(torch.equal(result[name.replace("__", ".")], value) for name, value in second.items())


def test_a_checkpoint_without_such_layers_is_quantized_as_ever(tmp_path):
    source = save_model(tiny_llama(), tmp_path / "source")
    for mtp in ("quantize", "keep"):
        quantize(source, tmp_path / mtp, token_recipe(mtp=mtp))
    assert digests(tmp_path / "quantize") == digests(tmp_path / "keep")


def test_drop_drops_the_experts_of_such_a_layer(made, tmp_path):
    quantize(made["glm4_moe"], tmp_path / "out", token_recipe(mtp="drop", **NEAREST))
    assert not [name for name in tensors_of(tmp_path / "out") if name.startswith(LAYER)]


def test_keep_and_drop_are_what_they_were(made, tmp_path):
    original = {name: value for name, value in tensors_of(made["qwen2"]).items() if name.startswith(LAYER)}
    quantize(made["qwen2"], tmp_path / "keep", token_recipe(mtp="keep"))
    quantize(made["qwen2"], tmp_path / "drop", token_recipe(mtp="drop"))
    kept = tensors_of(tmp_path / "keep")
    assert all(torch.equal(kept[name], value) for name, value in original.items())
    assert not [name for name in tensors_of(tmp_path / "drop") if name.startswith(LAYER)]
    assert json.loads((tmp_path / "drop" / "config.json").read_text())["num_nextn_predict_layers"] == 0
