"""Prints what the planner says that decoder layers take on a GPU, beside what runs take on a simulated one, in MiB.

    PYTHONPATH=tests python tests/simulated_gpu/memory_by_shape.py                               all shapes, minutes
    PYTHONPATH=tests python tests/simulated_gpu/memory_by_shape.py "hidden 512" "32 experts"     some of them

The shapes are those of inside/test_memory_bounds.py: 16 × 128 tokens, groups of 64.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from unittest import mock

import simulated_gpu

if __name__ == "__main__":
    simulated_gpu.add_project_to_path()
    simulated_gpu.start()
    sys.path.insert(0, str(Path(__file__).parent / "inside"))

    import test_memory_bounds as bounds
    import torch
    from models import save_model
    from transformers.utils import logging

    from hf_awq_offload import planning
    from simulated_gpu import triton_stand_ins

    triton_stand_ins.install()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    print("| layer | planned | taken | of the plan | least planned |\n|---|---|---|---|---|")
    for name in sys.argv[1:] or bounds.SHAPES:
        with tempfile.TemporaryDirectory() as scratch:
            source = save_model(bounds.SHAPES[name]().to(torch.bfloat16), Path(scratch) / "source")
            planned = bounds.planned_bytes(source)
            with mock.patch.object(planning, "require_fit"):
                least = bounds.planned_bytes(source, max_memory={str(bounds.GPU): 1})
            found = bounds.taken(source, Path(scratch) / "out")
        in_mib = [round(size / bounds.MIB) for size in (planned, found.reserved, least)]
        print(f"| {name} | {in_mib[0]} | {in_mib[1]} | {found.reserved / planned:.2f} | {in_mib[2]} |", flush=True)
