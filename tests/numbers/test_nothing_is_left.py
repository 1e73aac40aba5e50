"""Eight quantizations of all kinds in one process leave no file, thread, mapping, scratch file or tensor behind.

`tests/bench/soak.py` does the same 200 times, and looks at resident memory too.
"""

from __future__ import annotations

import tempfile

from models import save_model, tiny_llama
from soaking import KINDS, one


def test_counts_after_the_first_round_stay_the_same(tmp_path, monkeypatch):
    source = save_model(tiny_llama(vocab_size=512, eos_token_id=2), tmp_path / "source")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    counts = [one(index, source) for index in range(len(KINDS) + 8)]  # the first round fills caches
    before, after = counts[7], counts[12]  # the same kind
    assert after.files == before.files
    assert after.threads == before.threads
    assert after.tensors == before.tensors
    assert after.scratch == before.scratch == 0
    assert after.mappings <= before.mappings + 10  # the allocator's own come and go
