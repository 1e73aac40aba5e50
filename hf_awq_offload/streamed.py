"""`quantize` turns a checkpoint on disk into a quantized one, with at most a few layers in memory.

The model stays on the meta device. Each decoder layer is read, quantized, committed to the journal and released. At the
end, the journal's files are assembled into the checkpoint, which appears under its name in one step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import AutoModelForCausalLM

from .checkpoint.companion_copies import companion_states
from .checkpoint.file_states import blaming_changes
from .checkpoint.output_folder import output_folder
from .checkpoint.path_names import require_utf8
from .checkpoint.source import Source
from .checkpoint.source_folders import places_of_files
from .checkpoint.work_folder import move_into_place, work_folder
from .config import AwqOffloadConfig
from .errors import ConfigError
from .integrations.assembly import assemble
from .integrations.lazy_loading import detach_stored_weights, load_on_meta, to_checkpoint_names
from .integrations.one_at_a_time import one_at_a_time
from .integrations.quantizer import AwqOffloadQuantizer
from .integrations.registration import register
from .logs import get_logger
from .pipeline.fingerprint import require_same_source
from .planning import estimate, plan, require_fit, streamed_recipe
from .report import QuantizationReport
from .reporting.progress import announce

logger = get_logger(__name__)

MAX_SHARD_SIZE = "50GB"
"""The default of `save_pretrained`."""


@one_at_a_time()
def quantize(
    src: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    config: AwqOffloadConfig,
    *,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    max_memory: Mapping[str, int | str] | None = None,
    prefetch: bool | None = None,
    probe: bool = False,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    repo_id: str | None = None,
    model_class: Any = AutoModelForCausalLM,
    dtype: Any = "auto",
    **kwargs: Any,
) -> QuantizationReport:
    """Quantizes the checkpoint `src` decoder layer by decoder layer and writes the result to `out_dir`.

    Memory holds the embeddings while the first layer's inputs are computed; then one decoder layer, the next one if it
    is prefetched, the statistics and one micro-batch. Hidden states between two layers are on disk. The output is what
    `from_pretrained` and `save_pretrained` would write, including all files that belong to the model, and its card.

    Args:
        src: name or folder of a full-precision checkpoint in safetensors files.
        out_dir: folder for the quantized checkpoint; appears once it is complete.
        config: the recipe. Its `offload` has no effect: weights are always read from disk.
        checkpoint_dir: folder for a journal; after a crash, repeat the call to resume from the last finished layer,
            with bit-identical output. The journal is removed at the end. By default `config.checkpoint_dir`.
        max_memory: device -> bytes or "8GiB"; by default `config.max_memory`.
        prefetch: read the next layer while one is processed; by default `config.prefetch`. Does not change the output.
        probe: quantize two layers beforehand to predict the time as well, and measured memory, see `plan`.
        overwrite: replace an `out_dir` that exists and is not empty, which otherwise raises an error.
        max_shard_size: largest size of a safetensors file, in bytes or as text.
        repo_id: the checkpoint's future name on the Hub, for the snippets in its card.
        model_class: the Auto class that loads the model.
        dtype: the model's dtype; "auto" is the checkpoint's.
        kwargs: passed to `from_pretrained` (revision, subfolder, token, trust_remote_code, …). Tokenizer, processor
            and all other files come from the same revision. They are looked for in the subfolder, then in the root.

    Returns:
        The report of what was done, layer by layer.

    Raises:
        ConfigError: `out_dir` may not be replaced (see `output_folder`), or a value is not allowed.
        MemoryLimitError: the run does not fit into memory or on the disk.
        JournalError: `checkpoint_dir` is the journal of another run.
        CheckpointError: the source is damaged, or was changed while the run went on.
        StorageError: a file can't be written; the journal stays usable.
        AwqOffloadError: the model can't be quantized, or the data can't be used.
    """
    register()
    recipe = streamed_recipe(config, checkpoint_dir=checkpoint_dir, max_memory=max_memory, prefetch=prefetch)
    _require_size(max_shard_size)
    places = {name: getattr(recipe, name) for name in ("checkpoint_dir", "report_dir", "dataset", "tokenizer")}
    require_utf8({"src": src, "out_dir": out_dir, **places})
    kept = {
        "the source itself": src if Path(src).exists() else None,
        "checkpoint_dir": recipe.checkpoint_dir,
        "report_dir": recipe.report_dir,
        "the data set": recipe.dataset if _is_path(recipe.dataset) else None,
    }
    sources = places_of_files(src, **{name: kwargs.get(name) for name in ("revision", "cache_dir", "subfolder")})
    target = output_folder(out_dir, overwrite, kept=kept, sources=sources)
    own = [target, recipe.checkpoint_dir, recipe.report_dir]
    companions = companion_states(sources if os.path.isdir(src) else (), apart_from=own)
    with work_folder(target) as work:
        output_folder(target, overwrite, kept=kept, sources=sources)  # a killed run's predecessor may be back
        keeps_journal = recipe.checkpoint_dir is not None
        recipe.checkpoint_dir = recipe.checkpoint_dir or work / "journal"
        with blaming_changes(companions):
            model = load_on_meta(src, recipe, model_class, dtype, work / "converted", kwargs)
        quantizer = cast(AwqOffloadQuantizer, cast(Any, model).hf_quantizer)
        planned = estimate(model, keeps_journal)
        require_fit(planned, recipe, work)
        if probe and not (Path(recipe.checkpoint_dir) / "journal.json").exists():
            asked = streamed_recipe(config, checkpoint_dir=checkpoint_dir, max_memory=max_memory, prefetch=prefetch)
            planned = plan(src, asked, model_class=model_class, dtype=dtype, **kwargs)
        announce(f"Planned: {planned}.")
        source = cast(Source, quantizer.source.opened)  # only safetensors files can stay on the disk
        weights = detach_stored_weights(model, source)
        to_checkpoint = to_checkpoint_names(model)
        with (
            blaming_changes(companions, source.states),
            closing(quantizer.prepare(model, weights, to_checkpoint, is_kept=keeps_journal)) as storage,
        ):
            assert storage.journal is not None
            try:
                report = quantizer.quantize(model, storage, planned=planned)
                assembled, carried = work / "checkpoint", quantizer.source.carried
                assemble(assembled, model, storage.journal, weights, to_checkpoint, carried, max_shard_size, repo_id)
                for states in (companions, source.states):
                    states.require_unchanged()
                require_same_source(storage.journal.header, source.files)
                move_into_place(assembled, target, work, sources)
            except KeyboardInterrupt as interrupt:
                if not keeps_journal:
                    raise
                raise KeyboardInterrupt(
                    f"Interrupted with {len(storage.commits)} layers finished. They are kept in "
                    f"{storage.journal.directory}: repeat the call to resume."
                ) from interrupt
            storage.journal.remove()
        return report


def _is_path(dataset: Any) -> bool:
    """Whether a data set is a file or folder on this machine."""
    return isinstance(dataset, str | os.PathLike) and bool(os.fspath(dataset)) and Path(dataset).exists()


def _require_size(max_shard_size: int | str) -> None:
    """Checks the size now, because a bad one would otherwise fail only after all layers are quantized.

    Raises:
        ConfigError: `max_shard_size` is neither a number of bytes nor a size as text.
    """
    tensors = {"weight": torch.empty(1, device="meta")}
    try:
        split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    except (ValueError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise ConfigError(
            f"max_shard_size is {max_shard_size!r}; pass a number of bytes, or a text such as '5GB'."
        ) from error
