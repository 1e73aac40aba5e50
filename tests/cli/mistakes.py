"""Makes mistakes on the command line, one of each kind, and writes what the program answers into docs/mistakes.md.

    python tests/cli/mistakes.py            # prints the table
    python tests/cli/mistakes.py --write    # writes it into the page

Each command runs in a process of its own, in a fresh folder with a user's files. No command may print a traceback, or
change or remove a file that was there before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "mistakes.md"
BEGIN, END = "<!-- made by tests/cli/mistakes.py -->", "<!-- end -->"
PROGRAM = "hf-awq-offload"
FAST = "--n-samples 4 --max-seq-len 32 --n-grid 2 --no-clip"
DONE_LAYERS = 2
PRELOADED = [
    *(f"hf_awq_offload.cli.{command}" for command in ("quantize", "evaluate", "inspect", "convert")),
    *("transformers.models.llama.modeling_llama", "datasets", "peft", "matplotlib.figure"),
]
"""What the server that runs are forked from imports once, for all of them."""


@dataclass(frozen=True)
class Mistake:
    """A command that can't succeed."""

    kind: str  # a heading of the table
    what: str  # in the user's words
    command: str  # without the program's name; relative paths are those of `make_files`
    code: int
    cause: str  # words of the answer that name what is wrong
    fault: str | None = None  # a function of FAULTS, called in the process beforehand
    hidden: str = ""  # further options, which the table leaves out


@dataclass(frozen=True)
class Answer:
    """What a command did."""

    code: int
    stdout: str
    stderr: str
    harmed: list[str]  # files that were there before and changed or vanished
    new: list[str]  # files that were not there before

    @property
    def last_line(self) -> str:
        lines = (self.stderr.strip() or self.stdout.strip()).splitlines()
        return lines[-1] if lines else ""


TABLE: dict[str, list[tuple[Any, ...]]] = {
    "The source": [
        ("a folder that is not there", "quantize ./lama out", 1, "There is no folder ./lama"),
        ("a name that is neither here nor on the Hub", "quantize lama out", 1, "no folder lama, and it could not"),
        ("a file", "quantize notes.txt out", 1, "notes.txt is a file"),
        ("a folder without config.json", "quantize texts out", 1, "texts holds no config.json"),
        ("config.json is not valid JSON", "quantize broken-config out", 1, "config.json"),
        ("no weights", "quantize no-weights out", 1, "no-weights"),
        ("a download that broke off", "quantize truncated out", 1, "model.safetensors"),
        ("large files are git-lfs pointers", "quantize pointers out", 1, "git-lfs pointer"),
        ("a tensor is missing", "quantize lacking out", 1, "model.layers.1.mlp.up_proj.weight"),
        ("config.json is another model's", "quantize other-shapes out", 1, "by config.json"),
        ("weights hold NaN", f"quantize nan out {FAST}", 1, "model.layers.1.mlp.up_proj"),
        ("the index leads out of the folder", "quantize leading-out out", 1, "../model/model.safetensors"),
        ("an adapter, not a model", "quantize adapter out", 1, "adapter"),
        ("a model type that nobody knows", "quantize unknown-type out", 1, "lama4"),
        ("an encoder-decoder model", "quantize t5 out", 1, "encoder-decoder"),
        ("code that comes with the checkpoint", "quantize with-code out", 1, "--trust-remote-code"),
        ("quantized already", "quantize quantized out", 2, "quantized already"),
        ("a variant that is not there", "quantize model out --variant fp16", 1, "fp16"),
        ("a subfolder that is not there", "quantize model out --subfolder text", 1, "model/text"),
        ("the wrong class", "quantize model out --image-text", 1, "--image-text"),
        ("not quantized, to be converted", "convert model out --to gemv", 1, "model is not quantized"),
        ("damaged, to be inspected", "inspect truncated", 3, "damaged"),
    ],
    "OUT": [
        ("there is something", "quantize model quantized", 1, "exists and is not empty"),
        ("there are other files", "quantize model thesis --overwrite", 1, "thesis.tex is not part of a checkpoint"),
        ("there is an adapter", "quantize model with-adapter --overwrite", 1, "adapter_config.json is not part"),
        ("there are other weights", "quantize model with-weights --overwrite", 1, "lora.safetensors is not part"),
        ("an empty variable", "quantize model '' --overwrite", 1, "OUT is empty"),
        ("the working directory", "quantize model . --overwrite", 1, "is the working directory"),
        ("the folder above", "quantize model .. --overwrite", 1, "holds the working directory"),
        ("the root", "quantize model / --overwrite", 1, "is a mount point"),
        ("the home folder", 'quantize model "$HOME" --overwrite', 1, "home folder"),
        ("the source", "quantize model model --overwrite", 1, "is the source itself"),
        ("above the source", "quantize hub/model hub --overwrite", 1, "holds the source itself"),
        ("a link to the source", "quantize model link-to-model --overwrite", 1, "is the source itself"),
        ("a file", "quantize model notes.txt", 1, "notes.txt is a file"),
        ("below a file", "quantize model notes.txt/out", 1, "notes.txt"),
        ("where nothing can be written", "quantize model /proc/out", 1, "/proc"),
        ("the journal inside OUT", "quantize model out --checkpoint-dir out/journal", 2, "--checkpoint-dir"),
        ("the report inside OUT", "quantize model out --report-dir out/report", 2, "--report-dir"),
        ("convert onto the source", "convert quantized quantized --to gemv --overwrite", 1, "is the source itself"),
    ],
    "The data": [
        ("a file that is not there", "quantize model out --dataset ./text.jsonl", 1, "./text.jsonl"),
        ("a data set that can't be downloaded", "quantize model out --dataset c4", 1, "c4"),
        ("an empty file", "quantize model out --dataset texts/empty.txt", 1, "empty"),
        ("a broken line", "quantize model out --dataset texts/broken.jsonl", 1, "line 3"),
        ("not a text", "quantize model out --dataset model/model.safetensors", 1, "model.safetensors"),
        (
            "a column that is not there",
            "quantize model out --dataset texts/good.jsonl --text-column txt",
            1,
            "'txt'",
        ),
        ("columns to choose from", "quantize model out --dataset texts/columns.jsonl", 1, "--text-column"),
        ("token ids of another tokenizer", "quantize model out --dataset texts/ids.jsonl", 1, "vocabulary"),
        ("samples that are too long", "quantize model out --max-seq-len 100000", 1, "positions"),
        ("no tokenizer", "quantize no-tokenizer out", 1, "tokenizer"),
        ("a tokenizer that is not there", "quantize model out --tokenizer ./gpt", 1, "./gpt"),
        ("too short a text", "evaluate model --dataset texts/short.txt", 1, "tokens"),
    ],
    "Options": [
        ("no command", "", 2, "no command given"),
        ("no such command", "quantise model out", 2, "quantise"),
        ("no OUT", "quantize model", 2, "OUT"),
        ("no such option", "quantize model out --groupsize 64", 2, "--group-size"),
        ("an option cut short", "quantize model out --samples 4", 2, "--samples"),
        ("a value that is not allowed", "quantize model out --bits 5", 2, "bits"),
        ("a word for a number", "quantize model out --bits four", 2, "four"),
        ("a group size that does not fit", "quantize model out --group-size 100", 2, "--group-size"),
        ("a dtype that is not there", "quantize model out --dtype float17", 2, "float17"),
        ("a layer that is not there", "quantize model out --modules-to-not-convert lm_haed", 2, "lm_haed"),
        ("JSON that is none", "quantize model out --overrides '{down_proj: 8}'", 2, "--overrides"),
        ("a pattern that matches nothing", 'quantize model out --overrides \'{"donw": {"bits": 8}}\'', 2, "donw"),
        ("a limit without a device", "quantize model out --max-memory 8GiB", 2, "--max-memory"),
        ("a limit that is not a size", "quantize model out --max-memory cpu=lots", 2, "lots"),
        ("a limit that is too low", "quantize model out --max-memory cpu=10MiB", 1, "GiB"),
        ("a size that is none", "quantize model out --max-shard-size huge", 2, "huge"),
        ("a device that is not there", "quantize model out --execution-device cuda:7", 2, "cuda:7"),
        ("bits that the format can't hold", "quantize model out --format awq --bits 3", 2, "format"),
        ("a recipe that is not there", "quantize model out --config recipe.yml", 2, "recipe.yml"),
        ("a recipe that is no YAML", "quantize model out --config broken.yaml", 2, "not valid YAML"),
        ("a recipe with an unknown key", "quantize model out --config unknown.yaml", 2, "group_size"),
        ("options that exclude each other", "inspect model --quiet --verbose", 2, "--quiet"),
        ("options without effect", "quantize model out --private", 2, "--push-to-hub"),
        ("a name that no repository can have", "quantize model out --push-to-hub 'my model'", 2, "my model"),
        ("no login on the Hub", "quantize model out --push-to-hub me/model", 1, "needs a login"),
        ("a window of one token", "evaluate model --window 1", 2, "--window"),
        ("a format that is not there", "convert quantized out --to gguf", 2, "gguf"),
        ("an option of another command", "inspect model --bits 4", 2, "--bits"),
    ],
    "The journal": [
        ("one of an earlier run", f"quantize model half-done {FAST}", 1, "--resume"),
        ("with another recipe", f"quantize model half-done --resume {FAST} --bits 3", 1, "bits"),
        ("of another source", f"quantize other-model half-done --resume {FAST}", 1, "source"),
        ("one that is in use", f"quantize model half-done --resume {FAST}", 1, "in use by process", "in_use"),
        ("a folder with other files", "quantize model out --checkpoint-dir thesis", 1, "holds other files"),
    ],
    "Signals": [
        ("Ctrl-C before the first layer", "quantize model out", 130, "nothing is left behind", "ctrl_c_at_once"),
        ("Ctrl-C after two layers", "quantize model out", 130, "--resume", "ctrl_c"),
        ("SIGTERM after two layers", "quantize model out", 130, "--resume", "sigterm"),
    ],
    "The disk": [
        ("no room from the start", "quantize model out", 1, "of disk space", "small_disk"),
        ("full after two layers", "quantize model out", 1, "--resume", "full_disk"),
        ("files may not be that large", "quantize model out", 1, "File too large", "file_size_limit"),
    ],
}
"""Kind -> the fields of its mistakes, after the kind."""
MISTAKES = [
    Mistake(kind, *row, hidden=FAST if kind in ("Signals", "The disk") else "")
    for kind, rows in TABLE.items()
    for row in rows
]


# -- the user's files --------------------------------------------------------------------------------------------------


def make_files(folder: Path, quantized: Path, half_done: Path) -> None:
    """Makes the user's files.

    Args:
        folder: an empty one.
        quantized: a quantized checkpoint.
        half_done: the journal of a run from `model` to `half-done` that was stopped.
    """
    import torch
    from safetensors.torch import load_file, save_file

    import hf_awq_offload

    shipped = Path(hf_awq_offload.__file__).parent / "assets" / "tiny_llama"
    tensors = load_file(shipped / "model.safetensors")
    wrong = "model.layers.1.mlp.up_proj.weight"

    def model(name: str, **config: Any) -> Path:
        made = shutil.copytree(shipped, folder / name)
        if config:
            described = json.loads((made / "config.json").read_text()) | config
            (made / "config.json").write_text(json.dumps(described))
        return made

    def save(made: Path, saved: dict[str, torch.Tensor]) -> None:
        save_file(saved, made / "model.safetensors", {"format": "pt"})

    model("model")
    model("hub/model")
    (folder / "link-to-model").symlink_to("model")
    save(model("other-model"), tensors | {wrong: tensors[wrong] * 2})
    (model("broken-config") / "config.json").write_text('{"model_type": "llama",')
    (model("no-weights") / "model.safetensors").unlink()
    os.truncate(model("truncated") / "model.safetensors", 3_000_000)
    (model("pointers") / "model.safetensors").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5775872\n"
    )
    save(model("lacking"), {name: tensors[name] for name in tensors if name != wrong})
    model("other-shapes", intermediate_size=768)
    save(model("nan"), tensors | {wrong: torch.full_like(tensors[wrong], torch.nan)})
    leading_out = model("leading-out")
    (leading_out / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../model/model.safetensors")}
    (leading_out / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "model"}')
    model("unknown-type", model_type="lama4", architectures=["Lama4ForCausalLM"])
    model("t5", model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)
    own_code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (model("with-code", model_type="own", auto_map=own_code) / "own.py").write_text("raise SystemExit('code ran')\n")
    no_tokenizer = model("no-tokenizer")
    for file in no_tokenizer.glob("tokenizer*"):
        file.unlink()

    shutil.copytree(quantized, folder / "quantized")
    shutil.copytree(quantized, folder / "thesis")
    (folder / "thesis" / "thesis.tex").write_text("Three years of work.")
    shutil.copytree(quantized, folder / "with-adapter")
    (folder / "with-adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"lora_A.weight": torch.ones(2, 2)}, folder / "with-adapter" / "adapter_model.safetensors")
    shutil.copytree(quantized, folder / "with-weights")
    save_file({"lora_A.weight": torch.ones(2, 2)}, folder / "with-weights" / "lora.safetensors")
    shutil.copytree(half_done, folder / "half-done.journal")

    texts = folder / "texts"
    texts.mkdir()
    words = "The quick brown fox jumps over the lazy dog. " * 40
    (texts / "empty.txt").write_text("")
    (texts / "short.txt").write_text("a")
    (texts / "good.jsonl").write_text(json.dumps({"text": words}) + "\n")
    (texts / "broken.jsonl").write_text((json.dumps({"text": words}) + "\n") * 2 + '{"text": "never en\n')
    (texts / "columns.jsonl").write_text(json.dumps({"question": words, "answer": words}) + "\n")
    (texts / "ids.jsonl").write_text(json.dumps({"input_ids": [7, 8, 900_000] * 20}) + "\n")
    (folder / "notes.txt").write_text("Remember the milk.")
    (folder / "broken.yaml").write_text("bits: 4\n  group_size: [64\n")
    (folder / "unknown.yaml").write_text("groupsize: 64\n")
    (folder / "home").mkdir()


def prepare(scratch: Path) -> tuple[Path, Path]:
    """Returns a quantized checkpoint and the journal of a stopped run, made by the program itself."""
    folder = scratch / "prepared"
    folder.mkdir()
    import hf_awq_offload

    shutil.copytree(Path(hf_awq_offload.__file__).parent / "assets" / "tiny_llama", folder / "model")
    made = run_in(folder, f"quantize model quantized {FAST}")
    stopped = run_in(folder, f"quantize model half-done {FAST}", "ctrl_c")
    if (made.code, stopped.code) != (0, 130):
        raise RuntimeError(f"preparing failed: {made} {stopped}")
    return folder / "quantized", folder / "half-done.journal"


# -- faults ------------------------------------------------------------------------------------------------------------


def _at_layer(index: int, happen: Callable[[], None]) -> None:
    """Lets something happen before the layer with this index is quantized."""
    from hf_awq_offload.pipeline import loop

    original = loop.quantize_with_statistics

    def happening(context: Any, *args: Any, **kwargs: Any) -> Any:
        if context.name == f"model.layers.{index}":
            happen()
        return original(context, *args, **kwargs)

    loop.quantize_with_statistics = happening


def _kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def ctrl_c_at_once() -> None:
    _at_layer(0, _kill(signal.SIGINT))


def ctrl_c() -> None:
    _at_layer(DONE_LAYERS, _kill(signal.SIGINT))


def sigterm() -> None:
    _at_layer(DONE_LAYERS, _kill(signal.SIGTERM))


def in_use() -> None:
    """Lets another process hold the journal's lock."""
    import fcntl

    held = os.open("half-done.journal/journal.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)


def small_disk() -> None:
    """Pretends that a disk has 1 MiB left."""
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=2**20)


def full_disk() -> None:
    """Pretends that the disk is full from the third layer on."""
    import errno

    from hf_awq_offload.offload import journal

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    _at_layer(DONE_LAYERS, lambda: setattr(journal, "write_all", fail))


def file_size_limit() -> None:
    """Limits files to 300 kB, as `ulimit -f` does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


FAULTS = {
    function.__name__: function
    for function in (ctrl_c_at_once, ctrl_c, sigterm, in_use, small_disk, full_disk, file_size_limit)
}


# -- running -----------------------------------------------------------------------------------------------------------


def run_in(folder: Path, command: str, fault: str | None = None) -> Answer:
    """Runs a command in `folder`, in a process of its own; relative paths are in `folder`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, when the server imports it
    before = _digests(folder)
    with tempfile.TemporaryDirectory() as scratch:
        streams = Path(scratch, "stdout"), Path(scratch, "stderr")
        process = context.Process(target=_work, args=(folder, command, fault, *streams))
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()
            raise RuntimeError(f"{command} has not ended after 300 s")
        printed = [stream.read_text(encoding="utf-8") for stream in streams]
    after = _digests(folder)
    harmed = sorted(
        name for name in before if after.get(name) != before[name] and not name.endswith("/journal.lock")
    )  # the lock says which process holds it
    assert process.exitcode is not None
    return Answer(process.exitcode, *printed, harmed, sorted(after.keys() - before.keys()))


def _work(folder: Path, command: str, fault: str | None, stdout: Path, stderr: Path) -> None:
    for stream, number in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ |= {
        "HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": tempfile.gettempdir(),
    }
    import torch

    torch.set_num_threads(1)
    from hf_awq_offload.cli.main import main

    if fault is not None:
        FAULTS[fault]()
    words = [os.path.expandvars(word) for word in shlex.split(command)]
    code = main(words)
    sys.stdout.flush()
    sys.exit(code)


def _digests(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file below a folder, and where every link leads."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@contextmanager
def fresh_folders() -> Iterator[Callable[[], Path]]:
    """Yields a function that returns a folder with the user's files, as they were at the beginning."""
    with tempfile.TemporaryDirectory(prefix="mistakes-") as scratch:
        prepared = prepare(Path(scratch))
        folder = Path(scratch, "you")

        def fresh() -> Path:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make_files(folder, *prepared)
            return folder

        yield fresh


def answers(mistakes: list[Mistake]) -> Iterator[tuple[Mistake, Answer, Path]]:
    """Makes mistakes one by one; yields the answer and the folder of each."""
    with fresh_folders() as fresh:
        folder = fresh()
        for mistake in mistakes:
            answer = run_in(folder, f"{mistake.command} {mistake.hidden}".strip(), mistake.fault)
            yield mistake, answer, folder
            if answer.harmed:
                folder = fresh()
            for name in answer.new:
                (folder / name).unlink(missing_ok=True)
                _remove_empty(folder, (folder / name).parent)


def _remove_empty(folder: Path, inside: Path) -> None:
    """Removes a folder and those around it, up to `folder`, as long as they are empty."""
    while inside != folder and inside.is_dir() and not any(inside.iterdir()):
        inside.rmdir()
        inside = inside.parent


# -- the table ---------------------------------------------------------------------------------------------------------


def shown(line: str, folder: Path) -> str:
    """Returns a line of output without what differs between machines and runs."""
    line = line.replace(str(folder), "/home/you").replace(os.path.realpath(folder), "/home/you")
    line = re.sub(r"process \d+ on [^\s;]+", "process 4711 on this-machine", line)
    line = re.sub(r"\b[0-9a-f]{12,}\b", "…", line)
    return re.sub(r"\d+\.\d+ (GiB|MiB)", r"… \1", line)


def table(rows: list[tuple[Mistake, str]]) -> str:
    """Returns the page's tables, one for each kind of mistake."""
    lines = []
    for kind in dict.fromkeys(mistake.kind for mistake, _ in rows):
        lines += [f"## {kind}", "", "| mistake | command | exit code | answer |", "|---|---|---|---|"]
        for mistake, answer in rows:
            if mistake.kind == kind:
                command = f"{PROGRAM} {mistake.command}".strip().replace("|", r"\|")
                answer = answer.replace("|", r"\|").replace("`", "'")
                lines.append(f"| {mistake.what} | `{command}` | {mistake.code} | `{answer}` |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", default="", help="commands that hold these words")
    options = parser.parse_args()
    rows = []
    for mistake, answer, folder in answers([each for each in MISTAKES if options.only in each.command]):
        line = shown(answer.last_line, folder)
        rows.append((mistake, line))
        odd = [] if answer.code == mistake.code else [f"exit code {answer.code}"]
        odd += [] if mistake.cause in answer.last_line else [f"lacks {mistake.cause!r}"]
        odd += [f"harmed {answer.harmed}"] if answer.harmed else []
        odd += [f"new {answer.new}"] if answer.new else []
        odd += [f"{len(answer.stderr.splitlines())} lines"] if len(answer.stderr.splitlines()) > 1 else []
        odd += ["TRACEBACK"] if "Traceback" in answer.stderr else []
        print(f"{mistake.kind}: {mistake.what}: {PROGRAM} {mistake.command}\n    {line[:600]}", flush=True)
        if odd:
            print(f"  ! {'; '.join(odd)}", flush=True)
    if options.write:
        text = PAGE.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n\n{table(rows)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
