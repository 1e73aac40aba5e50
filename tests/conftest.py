"""Fixtures for all tests, and how hypothesis searches."""

from pathlib import Path

import pytest
from hypothesis import settings

import hf_awq_offload

# Examples are the same in every run: a red build can be repeated. Deadlines measure the machine, not the code.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_llama_dir() -> Path:
    """The trained tiny Llama that comes with the package, with its tokenizer."""
    return Path(hf_awq_offload.__file__).parent / "assets" / "tiny_llama"
