"""Sets of strings have another order in every process: results have not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RUN = """
import hashlib, json, sys
from dataclasses import asdict
sys.path[:0] = sys.argv[1:]
import torch
torch.set_num_threads(1)
from models import tiny_mixtral, token_recipe
from transformers.utils import logging
from hf_awq_offload import quantize_model
logging.disable_progress_bar()
model = quantize_model(tiny_mixtral(num_local_experts=8), token_recipe(min_expert_tokens=100))
layers = [asdict(layer) for layer in model.hf_quantizer.report.layers]
for layer in layers:
    assert len(layer["starved_experts"]) == 8
    for measured in ("seconds", "phase_seconds", "memory"):
        del layer[measured]
tensors = {
    name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for name, value in model.state_dict().items()
}
print(json.dumps([layers, tensors]))
"""


def test_pooled_statistics_of_experts_do_not_depend_on_the_seed_of_hashes():
    here = Path(__file__).resolve().parent.parent
    outputs = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", RUN, str(here), str(here.parent)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(done.stdout)
    assert "mlp.experts.7" in outputs[0]
    assert outputs[0] == outputs[1]
