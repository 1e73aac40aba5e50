"""Defines the commands and their options."""

from __future__ import annotations

import argparse
import difflib
import math
from importlib.metadata import version
from typing import Any, NoReturn

from .outcome import UsageError
from .recipe_options import LIMITS, add_recipe_options

PROGRAM = "hf-awq-offload"
DISTRIBUTION = "hf_awq_offload"
EPILOG = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 damage found (inspect), 4 above --max-kl, 130 interrupted."
OVERWRITE = "replace the checkpoint in OUT; a folder with other files is refused"
CONVERSION_TARGETS = ("gemm", "gemv", "compressed-tensors")
SCALE_DTYPES = ("float16", "bfloat16", "float32")


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError where argparse would print and exit."""

    def __init__(self, prog: str, **kwargs: Any):
        super().__init__(prog, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help.")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses a command line; the result also holds its `command`, and the whole `command_line` as a list of words.

    Raises:
        UsageError: the command line is wrong.
    """
    parser, commands = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = commands[options.command] if options.command else parser
        raise UsageError(f"{_unknown(unknown[0], known)}; see {known.prog} --help.")
    if options.command is None:
        raise UsageError(f"no command given; expected one of {', '.join(commands)}. See {PROGRAM} --help.")
    options.command_line = [PROGRAM, *arguments]
    return options


def _unknown(word: str, parser: argparse.ArgumentParser) -> str:
    if not word.startswith("-"):
        return f"unexpected argument: {word}"
    names = {name.lstrip("-"): name for action in parser._actions for name in action.option_strings}
    near = [names[found] for found in difflib.get_close_matches(word.partition("=")[0].lstrip("-"), names, n=3)]
    return f"unknown option: {word}" + (f" (did you mean {' or '.join(near)}?)" if near else "")


def build_parser() -> tuple[Parser, dict[str, argparse.ArgumentParser]]:
    """Returns the parser, and the parsers of its commands by name."""
    parser = Parser(PROGRAM, description="AWQ quantization, one decoder layer at a time.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"{DISTRIBUTION} {version(DISTRIBUTION)}")
    parser.set_defaults(json=False, debug=False, quiet=False, verbose=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (description, add_options) in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description + ".", epilog=EPILOG)
        add_options(command)
        add_common_options(command)
    return parser, dict(commands.choices)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON document; everything else goes to stderr")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    louder = group.add_mutually_exclusive_group()
    louder.add_argument("--quiet", action="store_true", help="show only errors; no warnings, no progress bars")
    louder.add_argument("--verbose", action="store_true", help="say also what is read, chosen and written")


def add_quantize_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="full-precision checkpoint: a folder, or a name on the Hub")
    parser.add_argument(
        "out", metavar="OUT", nargs="?", help="folder for the quantized checkpoint; appears once it is complete"
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--plan",
        action="store_true",
        help="print the memory, disk space and time that the run would need, and stop; OUT may be left out",
    )
    run.add_argument("--resume", action="store_true", help="resume from the journal of an earlier run")
    run.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    run.add_argument("--config", metavar="FILE", help="recipe as YAML or JSON; command-line options override the file")
    add_loading_options(run)
    run.add_argument("--max-shard-size", default="50GB", metavar="SIZE", help="largest safetensors file [50GB]")
    run.add_argument("--push-to-hub", metavar="ID", help="push the result to this repository")
    run.add_argument("--private", action="store_true", help="with --push-to-hub: create the repository as private")
    recipe = "the fields of AwqOffloadConfig; defaults in brackets"
    add_recipe_options(parser.add_argument_group("recipe", recipe))


def add_loading_options(group: argparse._ActionsContainer) -> None:
    group.add_argument("--image-text", action="store_true", help="the model is an AutoModelForImageTextToText")
    group.add_argument(
        "--dtype", default="auto", metavar="DTYPE", help="the model's dtype, such as bfloat16 [the checkpoint's]"
    )
    add_source_options(group)
    group.add_argument("--variant", metavar="NAME", help="weights of this variant, such as fp16")
    group.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the checkpoint")


def add_source_options(group: argparse._ActionsContainer) -> None:
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit on the Hub")
    group.add_argument("--subfolder", metavar="DIR", help="folder of the model in the checkpoint [its root]")
    group.add_argument("--cache-dir", metavar="DIR", help="where downloads are kept [HF_HUB_CACHE]")
    group.add_argument("--local-files-only", action="store_true", help="download nothing")


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="any checkpoint: a folder, or a name on the Hub")
    parser.add_argument("--against", metavar="BASE", help="measure KL divergence and top-1 agreement with this model")
    parser.add_argument("--against-revision", metavar="REV", help="branch, tag or commit of BASE [main]")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset", default="wikitext2", metavar="DATA", help="a text file, or the name of a data set [wikitext2]"
    )
    data.add_argument("--text-column", metavar="NAME", help="column of the data set that holds the text")
    data.add_argument("--tokenizer", metavar="NAME", help="tokenizer, by name or path [MODEL's own]")
    data.add_argument("--window", type=_positive, default=512, metavar="TOKENS", help="length of a window [512]")
    data.add_argument("--stride", type=_positive, metavar="TOKENS", help="step between windows [half of --window]")
    data.add_argument(
        "--tokens", type=_positive, default=100_000, metavar="N", help="number of tokens to read, at most [100000]"
    )
    other = parser.add_argument_group("measurements")
    other.add_argument(
        "--new-tokens",
        type=_natural,
        default=32,
        metavar="N",
        help="number of tokens to decode when timing; 0 skips it [32]",
    )
    other.add_argument(
        "--max-kl", type=_positive_number, metavar="NATS", help="end with exit code 4 if KL to BASE is above this"
    )
    other.add_argument(
        "--tasks", type=_names, metavar="A,B", help="lm-eval-harness tasks to run instead (needs lm-eval)"
    )
    other.add_argument("--tasks-path", metavar="DIR", help="with --tasks: folder of your own task definitions")
    other.add_argument("--limit", type=_positive, metavar="N", help="with --tasks: use at most N documents per task")
    loading = parser.add_argument_group("loading")
    loading.add_argument(
        "--streamed",
        action=argparse.BooleanOptionalAction,
        help="hold one decoder layer of each model in memory at a time [if the models do not fit]",
    )
    add_recipe_options(loading, LIMITS)
    loading.add_argument("--device-map", default="auto", metavar="MAP", help="as from_pretrained takes it [auto]")
    add_loading_options(loading)


def add_inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, or a name on the Hub")
    parser.add_argument("--headers-only", action="store_true", help="check sizes and shapes only, read no tensors")
    add_source_options(parser)


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="4-bit quantized checkpoint: a folder, or a name on the Hub")
    parser.add_argument("out", metavar="OUT", help="folder for the converted checkpoint; appears once it is complete")
    parser.add_argument("--to", required=True, choices=CONVERSION_TARGETS, help="format to convert to")
    of_scales = "dtype of the scales in compressed-tensors [the model's]"
    parser.add_argument("--scale-dtype", choices=SCALE_DTYPES, help=of_scales)
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    add_source_options(parser)


def add_demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="keep the quantized checkpoint in this folder")
    parser.add_argument("--no-speed", action="store_true", help="skip timing the decoding speed on a larger model")


COMMANDS = {
    "quantize": ("quantize a checkpoint, with one or two decoder layers in memory", add_quantize_options),
    "evaluate": ("measure perplexity, distance to another model, and speed", add_evaluate_options),
    "inspect": ("show what a checkpoint holds, and check it for damage", add_inspect_options),
    "convert": ("convert a quantized checkpoint to another format, exactly", add_convert_options),
    "demo": ("quantize, reload and compare the small model that ships with the package", add_demo_options),
}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 0 or more")
    return int(text)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; separate names with single commas")
    return names
