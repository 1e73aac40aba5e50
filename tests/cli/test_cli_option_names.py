"""Errors on the command line name options, where those of Python name fields."""

from __future__ import annotations

import pytest

from hf_awq_offload.cli.main import main
from hf_awq_offload.cli.recipe_options import with_options


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("bits is 5; pass 4.", "--bits is 5; pass 4."),
        (
            "Set n_samples or max_seq_len lower, prefetch=False.",
            "Set --n-samples or --max-seq-len lower, --no-prefetch.",
        ),
        ("Raise max_memory['cpu'].", "Raise --max-memory 'cpu'."),
        ("overrides['x'] matches no linear's name.", "--overrides 'x' matches no linear's name."),
        ("Pass format='awq' or 'auto', or bits=4.", "Pass --format awq or 'auto', or --bits 4."),
        ("pass from_quantized=True (--from-quantized).", "pass --from-quantized."),
        ("Set text_column.", "Set --text-column."),
        ("out_dir out holds checkpoint_dir (a/b).", "OUT out holds --checkpoint-dir (a/b)."),
    ],
)
def test_a_field_is_named_as_its_option(message, expected):
    assert with_options(message) == expected


@pytest.mark.parametrize(
    "message",
    [
        "/data/n_samples/max_seq_len.txt is a file.",
        "The format of the dataset is unknown; the seed of it all.",
        "The column 'text_column' and my_n_samples.",
        "--n-samples is fine.",
    ],
)
def test_what_is_no_field_stays(message):
    assert with_options(message) == message


def test_an_error_names_the_option(tiny_llama_dir, tmp_path, capsys):
    assert main(["quantize", str(tiny_llama_dir), str(tmp_path / "out"), "--n-samples", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: --n-samples is 0; pass ")
