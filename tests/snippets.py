"""Runs the code blocks of one documentation page, one after the other, as its reader would.

    python tests/snippets.py PAGE MODELS     (working directory: an empty folder)

Python blocks share one namespace, bash blocks are processes of their own; all share the working directory. The names of
models and files that a page invents (PLACEHOLDERS) are replaced by small ones in the folder MODELS. A block that can't
run here is marked in the page, in an HTML comment before it:

    <!-- not run: needs a GPU -->
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PLACEHOLDERS = {
    "path/or/name/of/a/70B": "dense",
    "path/or/name/of/a/mixture-of-experts": "mixture",
    "path/or/name/of/an/image-text-model": "image-text",
    "path/or/name/of/an/AWQ-checkpoint": "autoawq-gemv",
    "path/or/name": "dense",
    "my-texts.jsonl": "texts.jsonl",
    "held-out.txt": "held-out.txt",
}
"""Maps a name on a page to a name in the folder of models; longer matches are replaced first."""

RUN = ("python", "bash")
SHOWN = ("json", "text", "yaml", "toml", "html")
"""Languages of blocks that are not programs."""

FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n+)?^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int  # the line of the page on which the code begins
    reason: str | None  # why it is not run, if it is not


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["code"], text.count("\n", 0, found.start("code")) + 1, found["reason"])
        for found in FENCE.finditer(text)
    ]


def substituted(code: str, models: Path) -> str:
    names = sorted(PLACEHOLDERS, key=len, reverse=True)
    pattern = "|".join(map(re.escape, names))
    return re.sub(pattern, lambda found: str(models / PLACEHOLDERS[found.group()]), code)


def run(page: Path, models: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language not in RUN or block.reason is not None:
            continue
        print(f"{page.name}:{block.line}", file=sys.stderr)
        code = substituted(block.code, models)
        if block.language == "bash":
            subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
        else:
            exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), namespace)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
