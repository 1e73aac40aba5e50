"""Has real servers read this package's checkpoints, and writes what came of it into docs/serving.md.

    make served                                   (or: PYTHONPATH=.:tests python -m served --folder .served)
    python -m served --folder .served --readers vLLM --kinds Llama --no-write

Environments of 2 to 4 GB each and the checkpoints are made once, in --folder, and used again; delete the folder when
done. Each reader runs in a process of its own; if it dies, the next process goes on with the next checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .checkpoints import Kind, kinds, make
from .compare import agreement
from .environments import READERS, Reader, python_of
from .table import Answer, write
from .triton_kernels import compare

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Has real servers read this package's checkpoints.")
    parser.add_argument(
        "--folder", type=Path, required=True, help="where environments, checkpoints and answers are kept"
    )
    parser.add_argument("--readers", nargs="+", choices=list(READERS), default=list(READERS))
    parser.add_argument("--kinds", default="", help="only kinds whose name has this in it")
    parser.add_argument("--no-write", action="store_true", help="print the answers, leave docs/serving.md as it is")
    args = parser.parse_args()
    folder = args.folder.resolve()
    chosen = [kind for kind in kinds() if args.kinds in kind.name]
    places = [_made(kind, folder / "kinds") for kind in chosen]
    answers = []
    for name in args.readers:
        found = _ask(READERS[name], folder, places)
        for kind, place in zip(chosen, places, strict=True):
            answer = _answer(kind, name, place, found[place.name])
            print(answer, flush=True)
            answers.append(answer)
    kernels = []
    if "vLLM" in args.readers:
        kernels = compare(next((folder / "environments" / "vllm_reads").glob("lib/python*/site-packages")))
        print("\n".join(kernels))
    if not args.no_write:
        write(REPOSITORY / "docs" / "serving.md", answers, kernels)
    sys.exit(any(answer.differs for answer in answers))


def _made(kind: Kind, folder: Path) -> Path:
    place = folder / kind.name
    if not (place / "prompts.json").exists():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        make(kind, place)
    return place


def _ask(reader: Reader, folder: Path, places: list[Path]) -> dict[str, dict[str, Any]]:
    """Returns what `reader` printed for each checkpoint, by the checkpoint's name."""
    python = python_of(reader, folder / "environments")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found: dict[str, dict[str, Any]] = {}
    while waiting := [place for place in places if place.name not in found]:
        if reader.one_by_one:
            waiting = waiting[:1]
        log = folder / f"{reader.script}.log"
        with log.open("a") as errors:
            done = subprocess.run(
                [python, HERE / f"{reader.script}.py", *waiting],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                check=False,
            )
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind"')]
        found |= {line["kind"]: line for line in lines}
        if len(lines) < len(waiting):  # it died of the next one
            died = waiting[len(lines)].name
            found[died] = {"kind": died, "error": f"the process ended with {done.returncode}; see {log.name}"}
    return found


def _answer(kind: Kind, reader: str, place: Path, found: dict[str, Any]) -> Answer:
    if "error" in found:
        return Answer(kind, reader, error=found["error"])
    prompts = json.loads((place / "prompts.json").read_text())["prompts"]
    return Answer(kind, reader, agreement=agreement(place, prompts, found))


if __name__ == "__main__":
    main()
