"""Write anew what the suite compares with, and docs/architectures.md: `python tests/architectures/record.py [type …]`.

Given model types, only these are run and the others keep what was recorded of them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from behaviour import check
from document import render
from shrink import tiny_causal_lm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from unsupported import CAUSAL_LM

HERE = Path(__file__).parent


def main(chosen: list[str]) -> None:
    torch.set_num_threads(1)
    path = HERE / "causal_lm.json"
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    recorded = {name: found for name, found in recorded.items() if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    for model_type in chosen or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if model_type in CAUSAL_LM:
            recorded.pop(model_type, None)
            continue
        with tempfile.TemporaryDirectory() as folder:
            recorded[model_type] = check(tiny_causal_lm(model_type), Path(folder))
        print(model_type, recorded[model_type]["scaled"], "of", recorded[model_type]["quantized"], flush=True)
        path.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n", encoding="utf-8")
    (HERE.parents[1] / "docs" / "architectures.md").write_text(render(recorded), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
