"""Regenerates the suites' expectations and docs/architectures.md: `python tests/architectures/record.py [type …]`.

Given model types, only these are run and the others keep what was recorded of them; what is now listed as unsupported
is taken out.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from behaviour import check
from document import render
from images import samples_and_texts
from shrink import tiny_causal_lm, tiny_image_text
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from unsupported import CAUSAL_LM, IMAGE_TEXT

HERE = Path(__file__).parent


def check_causal_lm(model_type: str) -> dict[str, Any]:
    """Returns what the suite finds for one type; runs in a pool's process."""
    _be_quiet()
    with tempfile.TemporaryDirectory() as folder:
        return check(tiny_causal_lm(model_type), Path(folder))


def check_image_text(model_type: str) -> dict[str, Any]:
    """Does the same as `check_causal_lm` for image-text models."""
    _be_quiet()
    model = tiny_image_text(model_type)
    inputs, dataset, with_images = samples_and_texts(model)
    with tempfile.TemporaryDirectory() as folder:
        return check(model, Path(folder), inputs, dataset) | {"images": with_images}


def _be_quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


SUITES = {
    "causal_lm": (check_causal_lm, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - CAUSAL_LM.keys()),
    "image_text": (check_image_text, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - IMAGE_TEXT.keys()),
}


def record(suite: str, chosen: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Runs the chosen types of a suite; returns the suite's whole record."""
    path = HERE / f"{suite}.json"
    check_type, known = SUITES[suite]
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    recorded = {name: found for name, found in recorded.items() if name in known}
    with ProcessPoolExecutor(max_workers=2) as pool:
        running = {pool.submit(check_type, name): name for name in sorted(known & set(chosen))}
        for done in as_completed(running):
            name = running[done]
            try:
                recorded[name] = done.result()
            except Exception as error:  # of any kind; the suite will show it in full
                print(suite, name, "failed:", repr(error)[:300], flush=True)
                continue
            print(suite, name, recorded[name]["scaled"], "of", recorded[name]["quantized"], flush=True)
            _write(path, recorded)
    _write(path, recorded)
    return recorded


def _write(path: Path, recorded: dict[str, dict[str, Any]]) -> None:
    path.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n", encoding="utf-8")


def main(chosen: list[str]) -> None:
    recorded = {suite: record(suite, chosen or known) for suite, (_, known) in SUITES.items()}
    (HERE.parents[1] / "docs" / "architectures.md").write_text(render(**recorded), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
