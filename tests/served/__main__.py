"""Has real servers read this package's checkpoints, and writes what came of it into docs/serving.md.

    make served                                   (or: PYTHONPATH=.:tests python -m served --folder .served)
    python -m served --folder .served --readers vLLM --kinds Llama --no-write

Environments of 2 to 4 GB each, checkpoints and answers are made once, in --folder, and used again; delete the folder to
start over. Each reader runs in a process of its own; if it dies, the next process goes on with the next checkpoint.
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
        left_out = {kind.name for kind in chosen if READERS[name].left_out and kind.fields["format"] == "awq"}
        found = _ask(READERS[name], folder, [place for place in places if place.name not in left_out])
        for kind, place in zip(chosen, places, strict=True):
            answer = Answer(kind, name) if kind.name in left_out else _answer(kind, name, place, found[place.name])
            print(answer, flush=True)
            answers.append(answer)
    kernels, kernels_agree = list[str](), True
    if "vLLM" in args.readers:
        packages = next((folder / "environments" / "vllm_reads").glob("lib/python*/site-packages"))
        command = [sys.executable, "-m", "served.triton_kernels", packages]  # Triton's interpreter is chosen at import
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        kernels, kernels_agree = done.stdout.splitlines(), done.returncode == 0
        print(done.stdout)
    if not args.no_write:
        write(REPOSITORY / "docs" / "serving.md", answers, kernels)
    sys.exit(not kernels_agree or any(answer.differs for answer in answers))


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
    kept, log = folder / f"{reader.script}.jsonl", folder / f"{reader.script}.log"
    found = {line["kind"]: line for line in map(json.loads, kept.read_text().splitlines())} if kept.exists() else {}
    while waiting := [place for place in places if place.name not in found]:
        asked = waiting[:1] if reader.one_by_one else waiting
        command = [python, HERE / f"{reader.script}.py", *asked]
        answered = 0
        with log.open("a") as errors, kept.open("a") as answers:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"kind"'):
                    answers.write(line)
                    answers.flush()
                    found[json.loads(line)["kind"]] = json.loads(line)
                    answered += 1
        status = process.wait()
        if answered < len(asked):  # it died of the next one
            died = asked[answered].name
            found[died] = {"kind": died, "error": f"the process ended with {status}; see {log.name}"}
    return found


def _answer(kind: Kind, reader: str, place: Path, found: dict[str, Any]) -> Answer:
    if "error" in found:
        return Answer(kind, reader, error=found["error"])
    prompts = json.loads((place / "prompts.json").read_text())["prompts"]
    return Answer(kind, reader, agreement=agreement(place, prompts, found))


if __name__ == "__main__":
    main()
