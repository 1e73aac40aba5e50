"""Writes what readers answered into a page, between two marks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .checkpoints import Kind
from .compare import Agreement
from .environments import READERS

FIRST, LAST = "<!-- made by make served -->", "<!-- end of what make served makes -->"


@dataclass
class Answer:
    """What a reader made of a checkpoint: how close it is, or why it did not load; neither if it was not asked."""

    kind: Kind
    reader: str
    agreement: Agreement | None = None
    error: str = ""

    @property
    def differs(self) -> bool:
        """Whether the reader computed something else, which is worse than not to load."""
        return self.agreement is not None and not self.agreement.holds

    def __str__(self) -> str:
        return f"{self.reader}, {', '.join(self.kind.columns)}: {self.error or self.agreement}"

    @property
    def cell(self) -> str:
        if self.agreement is None:
            return "does not load" if self.error else READERS[self.reader].left_out
        found = f"{self.agreement.difference:.3f} of {self.agreement.to_source:.2f}"
        return found if self.agreement.holds else f"**differs**, {found}"


def table(answers: list[Answer]) -> list[str]:
    """Returns the lines of the table, and one line for each error."""
    readers = list(dict.fromkeys(answer.reader for answer in answers))
    rows: dict[tuple[str, str], dict[str, Answer]] = {}
    for answer in answers:
        rows.setdefault(answer.kind.columns, {})[answer.reader] = answer
    lines = ["| model | format | " + " | ".join(READERS[reader].title for reader in readers) + " |"]
    lines += ["|---" * (len(readers) + 2) + "|"]
    for columns, row in rows.items():
        cells = (row[reader].cell if reader in row else "not run" for reader in readers)
        lines.append(f"| {' | '.join(columns)} | {' | '.join(cells)} |")
    errors = [f"- {answer}" for answer in answers if answer.error]
    return [*lines, *([""] if errors else []), *errors]


def write(page: Path, answers: list[Answer], kernels: list[str]) -> None:
    """Puts the table, and what was found about vLLM's Triton kernels, between the marks of `page`."""
    before, _, rest = page.read_text(encoding="utf-8").partition(FIRST)
    _, _, after = rest.partition(LAST)
    lines = table(answers)
    if kernels:
        lines += ["", "vLLM's Triton kernels for AWQ, in Triton's interpreter:", "", *(f"- {line}" for line in kernels)]
    page.write_text("\n".join([before + FIRST, "", *lines, "", LAST]) + after, encoding="utf-8")
