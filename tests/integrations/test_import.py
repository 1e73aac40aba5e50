"""Importing the package loads neither torch nor transformers, yet registers it, whatever the import order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKPOINT = Path(__file__).parents[1] / "data" / "checkpoints" / "autoawq-gemm"

LOAD = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(CHECKPOINT)!r})
assert type(model.model.layers[0].mlp.up_proj).__name__ == "AwqLinear"
"""
LOOK = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert {"awq_offload"} <= AUTO_QUANTIZATION_CONFIG_MAPPING.keys() & AUTO_QUANTIZER_MAPPING.keys()
"""
STOCK = "from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer as stock"
LATER = f"""
{LOOK}
{STOCK}
hf_awq_offload.use_for_compressed_tensors()
from hf_awq_offload import AwqOffloadConfig, AwqOffloadQuantizer
assert AUTO_QUANTIZER_MAPPING["compressed-tensors"] is AUTO_QUANTIZER_MAPPING["awq_offload"] is AwqOffloadQuantizer
assert AUTO_QUANTIZATION_CONFIG_MAPPING["awq_offload"] is AwqOffloadConfig
"""
RECIPE = f"""
{LOOK}
recipe = AUTO_QUANTIZATION_CONFIG_MAPPING["awq_offload"].from_dict({{"bits": 8}})
assert (type(recipe).__name__, recipe.bits) == ("AwqOffloadConfig", 8)
"""


def python(program: str) -> None:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def test_nothing_heavy_is_imported():
    python("import sys, hf_awq_offload; assert not {'torch', 'transformers', 'accelerate'} & sys.modules.keys()")


@pytest.mark.parametrize(
    "before",
    [
        "import hf_awq_offload",
        "import transformers, hf_awq_offload",
        "from transformers import LlamaForCausalLM; import hf_awq_offload",
        "import hf_awq_offload; from transformers.generation.utils import GenerationMixin",
    ],
)
def test_checkpoints_load_in_whatever_order_things_are_imported(before):
    python(before + "\n" + LOAD)


@pytest.mark.parametrize("program", [LOOK, LATER, RECIPE], ids=["looked up", "chosen later", "a recipe's config"])
def test_transformers_mappings_have_the_package(program):
    python("import hf_awq_offload\n" + program)


def test_the_watch_is_gone_once_it_has_seen_what_it_waits_for():
    python(
        "import sys, hf_awq_offload; from hf_awq_offload.integrations.stand_ins import _Watch\n"
        "assert any(isinstance(finder, _Watch) for finder in sys.meta_path)\n"
        "import transformers.quantizers.auto as auto\n"
        "assert not any(isinstance(finder, _Watch) for finder in sys.meta_path)\n"
        "assert type(auto.__loader__) is type(auto.__spec__.loader) is type(sys.__loader__) or "
        "type(auto.__loader__).__name__ == 'SourceFileLoader'"
    )


def test_an_unknown_name_is_an_attribute_error():
    python(
        "import hf_awq_offload\n"
        "try:\n    hf_awq_offload.nothing\n"
        "except AttributeError as error:\n    assert 'nothing' in str(error)\n"
        "else:\n    raise AssertionError\n"
        "assert set(hf_awq_offload.__all__) <= set(dir(hf_awq_offload))"
    )
