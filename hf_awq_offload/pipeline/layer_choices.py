"""Notes in the journal what was chosen for each layer: a later run adopts the layers that it would make alike.

modules_to_not_convert and overrides choose linears and grids, layer by layer. With propagate="original", a layer's
result depends on its own choices alone; with "quantized", on those of the layers before it as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from ..logs import get_logger
from ..messages import shortened
from ..offload.journal import LayerCommit
from .run_context import Run

logger = get_logger(__name__)

MOST_NAMED = 4


def layer_choices(
    run: Run,
    names: Sequence[str],  # of the decoder layers, in the order in which they run
) -> dict[str, str]:
    """Returns a digest for each layer: which of its linears are quantized, on which grid; before any is replaced."""
    digests: dict[str, str] = {}
    before = ""
    for name in names:
        quantizable = sorted(run.context(name).quantizable)
        chosen = {linear: run.recipe.choice(f"{name}.{linear}") for linear in quantizable}
        digests[name] = hashlib.sha256(json.dumps([before, chosen]).encode()).hexdigest()
        if run.recipe.propagate == "quantized":
            before = digests[name]
    return digests


def adoptable_commits(
    commits: Mapping[str, LayerCommit],  # of the journal
    choices: Mapping[str, str],  # of this run
) -> dict[str, LayerCommit]:
    """Returns the layers that were quantized as this run would; says which others the journal has."""
    known = {name: commit.report.get("choices") for name, commit in commits.items()}
    others = [name for name, choice in choices.items() if name in known and known[name] != choice]
    if others:
        logger.warning(
            f"modules_to_not_convert or overrides are not what they were for {len(others)} of {len(commits)} layers in "
            f"the journal, which are quantized again: {shortened(others, MOST_NAMED)}."
        )
    return {name: commits[name] for name in choices if name in commits and name not in others}
