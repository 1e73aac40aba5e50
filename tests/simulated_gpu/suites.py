"""What runs on simulated GPUs: the tests of the simulation, and those of the product that a device could make fail."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """Arguments of pytest, and how many devices there are."""

    name: str
    devices: int
    arguments: tuple[str, ...]


INSIDE = "tests/simulated_gpu/inside"
PARTS = ("memory", "streams", "operators", "devices")
ON_THE_SECOND = ("--execution-device", "cuda:1")
"""The product runs on cuda:1 while cuda:0 is the current device: what forgets its device is found."""
TYPES = "test_a_model_type_is_quantized_saved_reloaded_and_folds_as_recorded"

SUITES = [
    Suite("the simulation", 2, tuple(f"{INSIDE}/test_simulated_{part}.py" for part in PARTS)),
    Suite(
        "the product on one device",
        1,
        (
            f"{INSIDE}/test_product_on_cuda.py",
            f"{INSIDE}/test_probing_memory.py",
            f"{INSIDE}/test_statistics_on_cuda.py",
        ),
    ),
    Suite(
        "counts and memory of the search",
        1,
        (
            f"{INSIDE}/test_search_counts.py",
            f"{INSIDE}/test_ranking_memory.py",
            f"{INSIDE}/test_rounding_on_cuda.py",
            f"{INSIDE}/test_memory_bounds.py",
        ),
    ),
    Suite("the product on two devices", 2, (f"{INSIDE}/test_product_on_cuda.py",)),
    Suite(
        "kernels and searches",
        2,
        (
            *ON_THE_SECOND,
            f"{INSIDE}/test_linear_on_cuda.py",
            "tests/ops/test_behaviour.py",
            "tests/ops/test_int4pack.py",
            "tests/ops/test_native_layout.py",
            "tests/ops/test_triton_trial.py",
            "tests/ops/test_schema.py",
            "tests/search/test_rounding.py",
            "-k",
            "not (test_behaviour or test_schema) or triton or tinygemm",
        ),
    ),
    Suite(
        "streaming and journals",
        2,
        (
            *ON_THE_SECOND,
            "tests/offload/test_onloader.py",
            "tests/offload/test_offload_folder.py::test_finished_layers_leave_ram_one_by_one",
            "tests/test_streamed.py::test_reading_ahead_changes_no_bit",
            "tests/test_streamed.py::test_in_the_other_format_too",
            "tests/test_streamed.py::test_running_out_of_memory_halves_the_micro_batch_and_goes_on",
            "tests/offload/test_journal.py::test_a_stopped_run_goes_on_after_its_last_layer_to_the_same_bits[2]",
            "tests/offload/test_journal.py::test_smaller_batches_after_running_out_of_memory_are_remembered",
            "tests/pipeline/test_propagation.py::test_the_next_layer_sees_what_the_setting_says",
            "tests/calibration/test_layer_inputs.py",
        ),
    ),
    Suite(
        "experts, images, paused passes and other architectures",
        2,
        (
            *ON_THE_SECOND,
            "tests/model/test_experts.py::test_every_expert_is_quantized_and_starved_ones_are_named",
            "tests/integrations/test_vision_language.py::test_the_decoder_is_quantized_and_all_else_stays",
            "tests/integrations/test_peft.py::test_experts_taken_apart_get_adapters_of_their_own",
            "tests/architectures/test_paused_resume.py::test_it_goes_on_after_its_last_layer_to_the_same_bits[2]",
            *(f"tests/architectures/test_causal_lm.py::{TYPES}[{name}]" for name in ("falcon", "deepseek_v3", "bloom")),
            f"tests/architectures/test_image_text.py::{TYPES}[qwen2_5_vl]",
        ),
    ),
]
