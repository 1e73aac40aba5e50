"""Which tests of the suite a card is needed for: those that are skipped without one, or then run on a stand-in for it.

`test_gpu_command.py` checks that no file of the suite is missing here. tests/simulated_gpu/inside is for the simulated
GPU, but for the file that is named here: it tests the product, on any device of type "cuda".
"""

from __future__ import annotations

CARD_TESTS = (
    "tests/search/test_rounding.py::test_the_kernel_rounds_as_the_loop_does",
    "tests/offload/test_onloader.py::test_every_tensor_travels_to_an_accelerator_and_back",
    "tests/simulated_gpu/inside/test_product_on_cuda.py",
    "tests/ops/test_behaviour.py",
    "tests/ops/test_schema.py",
    "tests/ops/test_triton_trial.py",
    "tests/ops/test_cuda_graphs.py",
)
NOT_SIMULATED = ("tests/ops/test_cuda_graphs.py",)
"""The simulated GPU has no CUDA graphs."""
ONLY = "not (test_behaviour or test_schema) or triton or tinygemm"
"""For pytest's -k: of the files that go through all backends, those that run on a card."""

SIMULATED_TESTS = ("tests/ops/test_behaviour.py::test_grids", *CARD_TESTS[:2])
"""A few of them; `tests/simulated_gpu/suites.py` runs the others on the simulated GPU."""
