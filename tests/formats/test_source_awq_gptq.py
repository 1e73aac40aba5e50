"""AWQ checkpoints of their makers, and GPTQ checkpoints packed bit by bit, read value by value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_checkpoints import dequantized, recognize, same_bits, uniform
from references.awq_reader import read_state_dict
from safetensors.torch import load_file

from hf_awq_offload.errors import CheckpointError
from hf_awq_offload.formats.awq import pack_weight
from hf_awq_offload.formats.awq_variants import to_gemv
from hf_awq_offload.formats.grid import Grid, dequantize, group_parameters, group_range, quantize

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
GEMM_OF = {
    "autoawq-gemm": "autoawq-gemm", "autoawq-gemv": "autoawq-gemm", "autoawq-gemv-fast": "autoawq-gemm",
    "gptqmodel-gemm": "gptqmodel-gemm",
}  # fmt: skip


def awq_checkpoint(name: str) -> tuple[dict, dict]:
    fields = json.loads((CHECKPOINTS / name / "config.json").read_text())["quantization_config"]
    return load_file(CHECKPOINTS / name / "model.safetensors"), fields


@pytest.mark.parametrize("name", [*GEMM_OF, "llm-awq"])
def test_awq_is_what_an_independent_reader_reads(name):
    tensors, fields = awq_checkpoint(name if name in GEMM_OF else "autoawq-gemv-fast")
    if name == "llm-awq":
        fields["version"] = "llm-awq"
        tensors = {key.replace("qzeros", "scaled_zeros"): tensor for key, tensor in tensors.items()}
    expected = read_state_dict(CHECKPOINTS / GEMM_OF.get(name, "autoawq-gemm"))
    result = dequantized(tensors, fields)
    assert len(result) == 7 * len({key.split(".")[2] for key in result})
    for key, weight in result.items():
        assert same_bits(weight, expected[key].float()), key
    source = recognize(tensors, fields)
    assert (source.name, source.bits, source.is_native, source.unused) == ("AWQ, 4 bits", 4, False, ())
    parts = {part for weight in source.weights for part in weight.parts.values()}
    assert {key for key in tensors if "q_proj" in key} <= parts


AWQ_LINEAR = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("name", list(GEMM_OF))
@pytest.mark.parametrize("change", ["missing", "longer", "flat", "dtype", "empty"])
def test_awq_that_contradicts_itself_is_refused_and_named(name, part, change):
    tensors, fields = awq_checkpoint(name)
    tensor = tensors.pop(f"{AWQ_LINEAR}.{part}")
    changed = {
        "longer": torch.cat([tensor, tensor[:1]]), "flat": tensor.flatten(), "dtype": tensor.to(torch.int64),
        "empty": tensor[:0],
    }  # fmt: skip
    if change != "missing":
        tensors[f"{AWQ_LINEAR}.{part}"] = changed[change]
    missing = change == "missing" and part != "qweight"
    with pytest.raises(CheckpointError, match=f"has no {AWQ_LINEAR}.{part}," if missing else AWQ_LINEAR):
        recognize(tensors, fields)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": "marlin"}, "marlin"),
        ({"bits": 8}, "8 bits"),
        ({"group_size": 7}, "group_size 7"),
        ({"group_size": 0}, "0"),
    ],
)
def test_an_awq_config_that_can_not_be_read_is_refused(changes, named):
    tensors, fields = awq_checkpoint("autoawq-gemm")
    with pytest.raises(CheckpointError, match=named):
        recognize(tensors, fields | changes)


def gemv(group_size: int) -> tuple[dict, torch.Tensor]:
    """A linear of 256 input channels in GEMV, whose padding hides the number of groups, and its weight."""
    grid = Grid(4, group_size, True)
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(group_size))
    parameters = group_parameters(group_range(weight, grid), grid)
    codes = quantize(weight, parameters, grid)
    packed = to_gemv(pack_weight(codes, parameters))
    return {f"a.{name}": part for name, part in packed._asdict().items()}, dequantize(codes, parameters, grid)


@pytest.mark.parametrize(
    ("group_size", "fields"),
    [
        (128, {}),  # what AutoAWQ and llm-awq take if the config does not say
        (64, {"group_size": 64}),
        (64, {"q_group_size": 64, "w_bit": 4}),  # llm-awq's names
        (32, {"group_size": 32, "q_group_size": 64, "bits": 4, "w_bit": 8}),
        (256, {"group_size": -1}),
    ],
)
def test_the_group_size_of_padded_formats_is_that_of_the_config(group_size, fields):
    tensors, weight = gemv(group_size)
    result = dequantized(tensors, {"quant_method": "awq", "version": "GEMV", **fields})
    assert same_bits(result["a.weight"], weight)


def test_awq_of_other_bits_under_llm_awqs_name_is_refused():
    tensors, _ = gemv(128)
    with pytest.raises(CheckpointError, match="AWQ weights of 8 bits, not 4"):
        recognize(tensors, {"quant_method": "awq", "version": "gemv", "w_bit": 8})


def test_awq_without_its_config_is_refused():
    tensors, _ = awq_checkpoint("autoawq-gemm")
    with pytest.raises(CheckpointError, match=r"quantization_config in config\.json"):
        recognize(tensors, None)


def stream(values: list[int], bits: int) -> list[int]:
    """int32 words that hold the values one after the other, the first in the lowest bits."""
    line = sum(value << (bits * i) for i, value in enumerate(values))
    words = [(line >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(values) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


class GptqLinear:
    """A linear with random integers, packed as GPTQ does, and its weight."""

    def __init__(self, bits=4, out=32, in_features=64, group_size=16, act_order=False, version="gptq", seed=0):
        generator = torch.Generator().manual_seed(seed)
        n = -(-in_features // group_size)
        codes = torch.randint(0, 2**bits, (out, in_features), generator=generator)
        zeros = torch.randint(1, 2**bits, (n, out), generator=generator)
        groups = torch.arange(in_features) // group_size
        if act_order:
            groups = groups[torch.randperm(in_features, generator=generator)]
        scales = uniform((n, out), seed, torch.float16)
        stored_zeros = zeros - 1 if version == "gptq" else zeros
        self.tensors = {
            "a.qweight": torch.tensor([stream(row, bits) for row in codes.tolist()], dtype=torch.int32)
            .t()
            .contiguous(),
            "a.qzeros": torch.tensor([stream(row, bits) for row in stored_zeros.tolist()], dtype=torch.int32),
            "a.scales": scales,
            "a.g_idx": groups.to(torch.int32),
            "a.bias": torch.zeros(out),
        }
        self.weight = torch.empty(out, in_features)
        for j in range(in_features):
            self.weight[:, j] = (codes[:, j] - zeros[groups[j]]).float() * scales[groups[j]].float()
        self.fields = {
            "quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": act_order,
            "checkpoint_format": version,
        }  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([2, 3, 4, 8]), st.booleans(), st.sampled_from(["gptq", "gptq_v2"]),
    st.integers(1, 2), st.integers(1, 3), st.sampled_from([8, 32]), st.integers(0, 5),
)  # fmt: skip
def test_gptq(bits, act_order, version, outs, ins, group_size, seed):
    linear = GptqLinear(bits, 32 * outs, 32 * ins, group_size, act_order, version, seed)
    assert same_bits(dequantized(linear.tensors, linear.fields)["a.weight"], linear.weight)
    source = recognize(linear.tensors, linear.fields)
    assert (source.name, source.bits) == (f"GPTQ, {bits} bits", bits)
    assert set(source.weights[0].parts.values()) == linear.tensors.keys() - {"a.bias"}
    # In fp16, gptqmodel's (integer difference) · Δ in the dtype of Δ.
    integers = torch.round(linear.weight.t() / linear.tensors["a.scales"][linear.tensors["a.g_idx"].long()].float())
    half = linear.tensors["a.scales"][linear.tensors["a.g_idx"].long()] * integers.to(torch.int32)
    assert same_bits(dequantized(linear.tensors, linear.fields)["a.weight"].half(), half.t().contiguous())


def test_gptq_without_g_idx():
    for group_size in (16, 48, -1):
        linear = GptqLinear(group_size=64 if group_size == -1 else group_size)
        del linear.tensors["a.g_idx"]
        result = dequantized(linear.tensors, linear.fields | {"group_size": group_size})
        assert same_bits(result["a.weight"], linear.weight)


def test_gptq_adds_one_to_a_whole_word_as_gptqmodel_does():
    """A stored zero point of 15 becomes 0 and carries into the next one."""
    linear = GptqLinear(out=8)
    linear.tensors["a.qzeros"][:] = 0x000000F3
    result = dequantized(linear.tensors, linear.fields)["a.weight"]
    zeros = torch.tensor([4, 0, 2, 1, 1, 1, 1, 1])
    scales = linear.tensors["a.scales"][0].float()
    codes = dequantized(linear.tensors | {"a.qzeros": torch.zeros(4, 1, dtype=torch.int32)}, linear.fields | {
        "checkpoint_format": "gptq_v2"
    })["a.weight"][:, 0] / scales  # fmt: skip
    assert torch.equal(result[:, 0], (codes.round() - zeros) * scales)


def test_gptq_of_several_bits():
    four, eight = GptqLinear(4), GptqLinear(8)
    tensors = four.tensors | {name.replace("a.", "b."): tensor for name, tensor in eight.tensors.items()}
    fields = four.fields | {"dynamic": {"b": {"bits": 8}}}
    result = dequantized(tensors, fields)
    assert same_bits(result["a.weight"], four.weight)
    assert same_bits(result["b.weight"], eight.weight)
    assert recognize(tensors, fields).bits == 4
    with pytest.raises(CheckpointError, match=r"b\.qweight"):
        recognize(tensors, four.fields)


def gptq(**changes) -> dict:
    tensors = GptqLinear(act_order=True).tensors
    for name, tensor in changes.items():
        tensors.pop(f"a.{name}", None)
        if tensor is not None:
            tensors[f"a.{name}"] = tensor
    return tensors


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (gptq(qweight=None), r"a\."),
        (gptq(qzeros=None), r"a\.qzeros"),
        (gptq(scales=None), r"a\.scales"),
        (gptq(g_idx=None), r"a\.g_idx"),
        (gptq(g_idx=torch.zeros(50, dtype=torch.int32)), r"a\.qweight"),
        (gptq(scales=uniform((4, 31))), r"a\.qweight"),
        (gptq(scales=uniform((5, 32))), r"a\.qweight"),
        (gptq(qzeros=torch.ones(4, 5, dtype=torch.int32)), r"a\.qweight"),
        (gptq(qweight=torch.ones(8, 32, dtype=torch.int16)), r"a\.qweight"),
        (gptq(qweight=torch.ones(7, 32, dtype=torch.int32)), r"a\.qweight"),
        (gptq(weight=torch.ones(32, 64)), r"a\.weight"),
    ],
)
def test_gptq_that_contradicts_itself_is_refused_and_named(tensors, named):
    with pytest.raises(CheckpointError, match=named):
        recognize(tensors, GptqLinear(act_order=True).fields)


@pytest.mark.parametrize(("changes", "named"), [
    ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'[.]"),
    ({"is_marlin_format": True}, r"checkpoint_format is 'gptq' \(Marlin\)"),
    ({"checkpoint_format": "gptq_p"}, "checkpoint_format is 'gptq_p'[.]"),
    ({"bits": 3}, r"fit \[4\] bits, and the config says 3"),
    ({"bits": "4"}, "bits in the quantization_config is '4'"),
    ({"checkpoint_format": 2}, "checkpoint_format in the quantization_config is 2; expected str"),
])  # fmt: skip
def test_a_gptq_config_that_can_not_be_read_is_refused(changes, named):
    linear = GptqLinear()
    with pytest.raises(CheckpointError, match=named):
        recognize(linear.tensors, linear.fields | changes)


@pytest.mark.parametrize(("group", "named"), [(-1, "-1 … 3"), (4, "0 … 4")])
def test_g_idx_that_names_no_group_is_refused(group, named):
    linear = GptqLinear()
    linear.tensors["a.g_idx"][5] = group
    with pytest.raises(CheckpointError, match=rf"a\.g_idx names the groups {named}; expected 0 … 3"):
        dequantized(linear.tensors, linear.fields)
