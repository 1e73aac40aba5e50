"""Write anew what the suite compares with, and docs/architectures.md: `python tests/architectures/record.py [type …]`.

Given model types, only these are run and the others keep what was recorded of them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from behaviour import check
from document import render
from shrink import tiny_causal_lm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from unsupported import CAUSAL_LM

HERE = Path(__file__).parent


def check_type(model_type: str) -> dict[str, Any]:
    """In a process of its own pool: what the suite finds of one type."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        return check(tiny_causal_lm(model_type), Path(folder))


def main(chosen: list[str]) -> None:
    path = HERE / "causal_lm.json"
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - CAUSAL_LM.keys()
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    recorded = {name: found for name, found in recorded.items() if name in known}
    with ProcessPoolExecutor(max_workers=2) as pool:
        running = {pool.submit(check_type, name): name for name in sorted(set(chosen or known) & known)}
        for done in as_completed(running):
            name = running[done]
            try:
                recorded[name] = done.result()
            except Exception as error:  # of any kind; the suite will show it whole
                print(name, "failed:", repr(error)[:300], flush=True)
                continue
            print(name, recorded[name]["scaled"], "of", recorded[name]["quantized"], flush=True)
            path.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n", encoding="utf-8")
    (HERE.parents[1] / "docs" / "architectures.md").write_text(render(recorded), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
