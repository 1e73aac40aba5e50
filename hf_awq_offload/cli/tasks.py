"""`hf-awq-offload evaluate --tasks`: runs lm-eval-harness tasks on a model that this package loads."""

from __future__ import annotations

import argparse
from typing import Any

from .models import load, load_tokenizer
from .outcome import CommandError, Outcome

INSTALL = "lm-eval-harness is not installed. Run `pip install lm-eval`."


def run_tasks(options: argparse.Namespace) -> Outcome:
    """Runs the tasks on MODEL and, with --against, then on BASE.

    Raises:
        CommandError: lm-eval-harness is not installed, or has no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CommandError(INSTALL) from error

    manager = TaskManager(include_path=options.tasks_path)
    unknown = [name for name in options.tasks if name not in manager.all_tasks]
    if unknown:
        raise CommandError(f"lm-eval-harness has no task {', '.join(unknown)}; `lm-eval ls tasks` lists its tasks.")

    def results_of(source: str, revision: str | None = None, is_base: bool = False) -> dict[str, Any]:
        own = () if options.tokenizer else (revision, is_base)
        tokenizer = load_tokenizer(options.tokenizer or source, options, *own)
        model = HFLM(pretrained=load(source, options, revision, is_base), tokenizer=tokenizer)
        evaluated = simple_evaluate(
            model=model, tasks=options.tasks, limit=options.limit, task_manager=manager, log_samples=False
        )
        if evaluated is None:
            raise CommandError("lm-eval-harness gives results to rank 0 of a distributed run only; run one process.")
        return {name: _numbers(result) for name, result in evaluated["results"].items()}

    results = results_of(options.model)
    against = results_of(options.against, options.against_revision, is_base=True) if options.against else None
    document = {"model": options.model, "against": options.against, "tasks": results, "tasks_against": against}
    return Outcome(document, _table(results, against))


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    """Returns the values by metric; a metric is called "acc,none", its standard error "acc_stderr,none"."""
    return {name: float(value) for name, value in result.items() if "," in name and isinstance(value, int | float)}


def _table(results: dict[str, dict[str, float]], against: dict[str, dict[str, float]] | None) -> str:
    lines = [f"{'task':24}{'metric':24}{'value':>10}" + (f"{'base':>10}" if against else "")]
    for task, metrics in results.items():
        for metric, value in metrics.items():
            base = f"{against[task][metric]:>10.4f}" if against else ""
            lines.append(f"{task:24}{metric:24}{value:>10.4f}{base}")
    return "\n".join(lines)
