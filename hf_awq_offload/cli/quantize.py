"""`hf-awq-offload quantize`: runs the package's `quantize`, always with a journal."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging

from ..checkpoint.work_folder import InterruptedAfterwards
from ..config import AwqOffloadConfig
from ..errors import AwqOffloadError, ConfigError, JournalError, MemoryLimitError, StorageError
from ..messages import size_text
from ..offload.journal import committed_layers, discard_if_empty, require_unused
from ..planning import Plan, plan
from ..report import QuantizationReport
from ..streamed import quantize
from .checkpoint_folder import named
from .models import from_hub
from .outcome import CommandError, Interrupted, Outcome
from .recipe_options import with_options

JOURNAL_SUFFIX = ".journal"
"""Finished layers are kept in OUT plus this suffix, a folder beside OUT."""


def run(options: argparse.Namespace) -> Outcome:
    """Runs the command; `options.fields` is the recipe from config file and command line together.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; the message has the command that resumes the run.
        CommandError: the run failed after layers were finished, or the result could not be pushed.
    """
    recipe = AwqOffloadConfig(**options.fields)
    if options.plan:
        return _planned(options, recipe)
    journal = Path(recipe.checkpoint_dir or f"{Path(options.out).absolute()}{JOURNAL_SUFFIX}")
    recipe.checkpoint_dir = journal
    _refuse_journal(journal, options)
    if options.push_to_hub:
        _require_login()  # now, not after hours
    try:
        with named(options.source):
            report = quantize(
                options.source,
                options.out,
                recipe,
                overwrite=options.overwrite,
                max_shard_size=options.max_shard_size,
                repo_id=options.push_to_hub,
                **loading(options),
            )
    except InterruptedAfterwards as interrupt:
        raise Interrupted(str(interrupt)) from interrupt
    except KeyboardInterrupt as interrupt:
        raise Interrupted(f"interrupted: {_what_is_left(journal, options)}") from interrupt
    except Exception as error:
        discard_if_empty(journal)
        layers = committed_layers(journal)
        if isinstance(error, JournalError) or not layers:
            raise
        left = _what_stays(journal, layers) if _would_come_again(error) else _what_is_left(journal, options)
        if isinstance(error, ConfigError):
            raise ConfigError(f"{error} {left}") from error
        raise CommandError(f"{error} {left[0].upper()}{left[1:]}") from error
    url = _push(options) if options.push_to_hub else None
    return Outcome(_document(options, report, url), _text(options, report, url))


def loading(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments for `from_pretrained`."""
    arguments: dict[str, Any] = {
        "model_class": AutoModelForImageTextToText if options.image_text else AutoModelForCausalLM,
        "dtype": options.dtype,
    }
    return arguments | from_hub(options)


# -- the journal -------------------------------------------------------------------------------------------------------


def _refuse_journal(journal: Path, options: argparse.Namespace) -> None:
    """Refuses to reuse a journal without --resume: it may be another run's, and hold a night of work.

    Raises:
        JournalError: another process is using the journal.
        CommandError: the journal has finished layers and --resume was not given.
    """
    require_unused(journal)
    layers = committed_layers(journal)
    if layers and not options.resume:
        raise CommandError(
            f"{journal} is the journal of an earlier run, with {_layers(layers)} finished. Continue that run with "
            "--resume, or delete the folder to start over."
        )
    if not layers and options.resume:
        logging.get_logger("transformers").warning(f"{journal} holds no finished layer: the run starts from scratch.")


def _what_is_left(journal: Path, options: argparse.Namespace) -> str:
    layers = committed_layers(journal)
    if not layers:
        discard_if_empty(journal)
        return "no layer was finished, and nothing is left behind."
    command = list(options.command_line)
    if "--resume" not in command:
        command.append("--resume")
    return f"{_layers(layers)} finished, kept in {journal}; resume with: {shlex.join(command)}"


def _would_come_again(error: Exception) -> bool:
    """Whether the same command would fail again, with as much memory and disk space as anyone may free."""
    return isinstance(error, AwqOffloadError) and not isinstance(error, MemoryLimitError | StorageError)


def _what_stays(journal: Path, layers: int) -> str:
    return (
        f"The same command would fail again. {_layers(layers)} finished, kept in {journal}: once the cause is "
        "fixed, --resume reuses every layer whose result is unchanged. Source, data and dtype must stay the same, and "
        "so must the recipe, except for --modules-to-not-convert and --overrides."
    )


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count > 1 else ''}"


# -- the result --------------------------------------------------------------------------------------------------------


def _push(options: argparse.Namespace) -> str:
    """Pushes the result; returns the commit's URL.

    Raises:
        CommandError: pushing failed; the message has the command that pushes again.
        Interrupted: by Ctrl-C or SIGTERM; so does this one.
    """
    api = HfApi()
    again = shlex.join(["hf", "upload", options.push_to_hub, options.out])
    try:
        repository = api.create_repo(options.push_to_hub, private=options.private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository.repo_id, folder_path=options.out, commit_message="Upload quantized model"
        )
    except KeyboardInterrupt as interrupt:
        raise Interrupted(
            f"interrupted: {options.out} is complete, but was not pushed to {options.push_to_hub}. Push it "
            f"with: {again}"
        ) from interrupt
    except Exception as error:  # hub and network raise many kinds
        raise CommandError(
            f"{options.out} is complete, but could not be pushed to {options.push_to_hub}: {error} "
            f"Push it with: {again}"
        ) from error
    return str(commit)


def _document(options: argparse.Namespace, report: QuantizationReport, url: str | None) -> dict[str, Any]:
    layers = [{"loss": layer.loss, "loss_nearest": layer.loss_nearest, **asdict(layer)} for layer in report.layers]
    return {
        "source": options.source,
        "out": options.out,
        "size_bytes": _size_bytes(options.out),
        "calibration_tokens": report.tokens,
        "loss_caveat": report.loss_caveat,
        "layers": layers,
        "left_out": report.left_out,
        "tensor_parallel": report.tensor_parallel,
        "phase_seconds": report.phase_seconds,
        "pushed_to": url,
    }


def _text(options: argparse.Namespace, report: QuantizationReport, url: str | None) -> str:
    loss, nearest = sum(layer.loss for layer in report.layers), sum(layer.loss_nearest for layer in report.layers)
    lines = [f"{options.out}: {_layers(len(report.layers))} quantized, {_size_bytes(options.out) / 1e6:.1f} MB"]
    if nearest:
        caveat = f" ({report.loss_caveat})" if report.loss_caveat else ""
        lines.append(f"calibration loss: {loss / nearest:.3f} × round-to-nearest{caveat}")
    if report.tensor_parallel is not None:
        lines.append(with_options(report.tensor_parallel))
    if url:
        lines.append(f"pushed: {url}")
    return "\n".join(lines)


def _size_bytes(folder: str) -> int:
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _require_login() -> None:
    """Checks the token that pushing needs.

    Raises:
        CommandError: there is none, or the Hub does not accept it.
    """
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise CommandError("--push-to-hub needs a login: run `hf auth login`, or set HF_TOKEN.") from error
    except OSError as error:  # the base class of all hub errors
        raise CommandError(
            f"--push-to-hub needs a login, which the Hub did not confirm: {error} Run `hf auth login`, or correct "
            "HF_TOKEN."
        ) from error


# -- the plan ----------------------------------------------------------------------------------------------------------


def _planned(options: argparse.Namespace, recipe: AwqOffloadConfig) -> Outcome:
    with named(options.source):
        planned = plan(options.source, recipe, **loading(options))
    return Outcome({"source": options.source, "plan": asdict(planned)}, plan_table(planned))


def plan_table(planned: Plan) -> str:
    """Returns a line per field of the plan, with sizes in GiB or MiB and times in seconds or minutes."""
    lines = []
    for name, value in asdict(planned).items():
        if name == "accelerator_peak_bytes" and not value:
            continue
        label, shown = name.replace("_", " ").replace("ram", "RAM"), str(value)
        if value is None:
            shown = "not known"
        elif name.endswith("_bytes"):
            label, shown = label.removesuffix(" bytes"), size_text(value)
        elif name == "seconds":
            label, shown = "time", f"{value:.0f} s" if value < 100 else f"{value / 60:.1f} minutes"
        lines.append(f"{label:24}{shown}")
    return "\n".join(lines)
