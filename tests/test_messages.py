"""Words that several messages share: sizes, and how to install the package."""

from __future__ import annotations

from email.message import Message

import pytest

from hf_awq_offload import messages
from hf_awq_offload.messages import how_to_install, size_text


@pytest.mark.parametrize(
    ("count_bytes", "text"),
    [
        (0, "0.0 MiB"),
        (4_400_000, "4.2 MiB"),
        (10 * 2**20, "10.0 MiB"),
        (11 * 2**20, "0.01 GiB"),
        (3.21 * 2**30, "3.21 GiB"),
        (140 * 2**30, "140.00 GiB"),
    ],
)
def test_a_size_never_shows_as_nothing(count_bytes, text):
    assert size_text(count_bytes) == text


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        ([], "`pip install .` in a clone of hf_awq_offload's repository"),
        (["Paper, https://arxiv.org/abs/1"], "`pip install .` in a clone of hf_awq_offload's repository"),
        (["Paper, https://a", "Repository, https://b.c/d/e"], "`pip install git+https://b.c/d/e`"),
    ],
)
def test_the_address_to_install_from_is_the_one_in_the_metadata(urls, expected, monkeypatch):
    installed = Message()
    for url in urls:
        installed["Project-URL"] = url
    monkeypatch.setattr(messages, "metadata", lambda name: installed)
    assert how_to_install() == expected
