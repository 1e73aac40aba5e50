"""The table of docs/serving.md has every kind of checkpoint; its cells say what was found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import tiny_llama

from served.checkpoints import kinds
from served.compare import Agreement, agreement
from served.environments import READERS
from served.table import FIRST, LAST, Answer, table, write

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_every_kind_and_reader_stands_in_the_page():
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(FIRST)
    lines = rest.partition(LAST)[0].splitlines()
    rows = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in lines if line.startswith("|")]
    assert rows[0] == ("model", "format", *(reader.title for reader in READERS.values()))
    assert [row[:2] for row in rows[2:]] == [kind.columns for kind in kinds()]
    assert not any("not run" in row for row in rows)


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        (Agreement(difference=0.02, to_source=0.5, regret=0.001), True),
        (Agreement(difference=0.3, to_source=0.5, regret=0.001), False),
        (Agreement(difference=0.05, to_source=0.05, regret=0.001), True),  # 8 bits: little is lost
        (Agreement(difference=0.02, to_source=0.5, regret=0.4), False),
    ],
)
def test_a_reader_agrees_if_it_is_much_closer_than_quantization_moved_the_model(found, holds):
    assert found.holds == holds
    assert Answer(next(kinds()), "vLLM", agreement=found).differs != holds


def test_what_a_reader_computed_is_compared_at_the_last_tokens_of_prompts(tmp_path):
    torch.manual_seed(0)
    model = tiny_llama()
    model.save_pretrained(tmp_path / "kind")
    tiny_llama(seed=1).save_pretrained(tmp_path / "kind-source")
    prompts = torch.randint(3, 64, (2, 8))
    tokens = prompts
    with torch.no_grad():
        for _ in range(3):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
        log_p = model(prompts).logits.log_softmax(-1)[:, :-1].gather(-1, prompts[:, 1:, None]).squeeze(-1)
    server = {"log_p": log_p[:, -5:].tolist(), "follow": tokens[:, 8:].tolist()}
    found = agreement(tmp_path / "kind", prompts.tolist(), server)
    assert found.difference < 1e-5
    assert found.regret < 1e-5
    assert found.to_source > 0.1
    server["follow"] = ((tokens[:, 8:] + 1) % 64).tolist()
    assert agreement(tmp_path / "kind", prompts.tolist(), server).regret > 0.01


def test_errors_stand_below_the_table_and_the_page_keeps_its_text(tmp_path):
    first, second = list(kinds())[:2]
    answers = [
        Answer(first, "vLLM", agreement=Agreement(0.02, 0.5, 0)),
        Answer(second, "vLLM", error="ValueError: no kernel"),
    ]
    lines = table(answers)
    assert lines[2:4] == ["| Llama | AWQ | 0.020 of 0.50 |", "| Llama | AWQ, symmetric | does not load |"]
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{FIRST}\nold\n{LAST}\n\nafter\n")
    write(page, answers, ["all equal"])
    text = page.read_text()
    assert text.startswith("before\n\n")
    assert text.endswith("\n\nafter\n")
    assert "old" not in text
    assert "- vLLM, Llama, AWQ, symmetric: ValueError: no kernel" in text
    assert "- all equal" in text
