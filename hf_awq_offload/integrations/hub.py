"""Adds the card and the files that come along to a quantized model that is saved or pushed.

`accompany` overrides two methods on the model instance: `save_pretrained`, which completes the folder after
transformers has written it, and `_upload_modified_files`, which `push_to_hub` and `save_pretrained(push_to_hub=True)`
both call last, with the folder that is about to be uploaded. If the repository has a README.md, it is in that folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.added_tensors import add_tensors
from ..checkpoint.companion_copies import is_reachable, read_text
from ..checkpoint.config_file import add_older_keys
from ..checkpoint.output_folder import require_no_links
from ..checkpoint.set_aside import set_aside
from ..checkpoint.stored_tensor import CarriedTensor
from ..errors import CheckpointError, StorageError
from ..formats.compressed_tensors_config import META_ATTRIBUTE
from ..nn.quantized_linear import QuantizedLinear
from ..report import QuantizationReport
from ..reporting.evaluation import Evaluation
from .companions import bring_companions
from .model_card import BEGIN, PICTURE, CardFacts, hub_id, proposed_name, write_card
from .origin import Origin

NOT_PUSHED = (
    "The quantized model was not pushed to {repo_id}, and nothing of it is visible there. It is unchanged in memory, "
    "and a folder written by save_pretrained is complete. Call push_to_hub again once the cause is fixed: weights "
    "that have arrived are not sent twice."
)


def accompany(
    model: PreTrainedModel,
    origin: Origin,
    report: QuantizationReport | None = None,
    tokenizer: Any = None,
    carried: Mapping[str, CarriedTensor] | None = None,
) -> None:
    """Makes `model` save and push its card, and all files that belong to it, along with its weights.

    Args:
        model: a quantized model.
        origin: where it was loaded from.
        report: the report of the quantization, if it was just done.
        tokenizer: saved if the model's origin has no tokenizer; a name or path is not.
        carried: tensors of the origin that the model has no place for, saved under their names there.
    """
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = None
    instance = cast(Any, model)
    instance._awq_companions = _Companions(origin, report, tokenizer, carried or {})
    instance.save_pretrained = partial(_save_pretrained, model)
    instance._upload_modified_files = partial(_upload_modified_files, model)


def describe_origin(model: PreTrainedModel, base: str | None, tokenizer: Any) -> None:
    """Sets the real base and tokenizer of a model that was quantized from a temporary folder."""
    known: _Companions = cast(Any, model)._awq_companions
    known.base_model, known.proposed_name, known.tokenizer = hub_id(base), proposed_name(base), tokenizer
    known.commit = known.revision_name = None


def record_evaluation(model: PreTrainedModel, name: str, evaluation: Evaluation) -> None:
    """Adds a result of `evaluate` to the model's card, as a row called `name` ("quantized, wikitext2")."""
    cast(Any, model)._awq_companions.evaluations[name] = evaluation


class _Companions:
    """What goes along with a model when it is saved."""

    def __init__(
        self, origin: Origin, report: QuantizationReport | None, tokenizer: Any, carried: Mapping[str, CarriedTensor]
    ):
        self.origin = origin
        self.base_model = None if report is None else hub_id(origin.source)
        self.commit, self.revision_name = origin.commit, origin.revision_name
        self.proposed_name = proposed_name(origin.source)
        self.report = report
        self.tokenizer = tokenizer
        self.carried = dict(carried)
        self.evaluations: dict[str, Evaluation] = {}


def _save_pretrained(model: PreTrainedModel, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
    """Saves as transformers does, then adds the card and all other files.

    Raises:
        ConfigError: a file that would be overwritten is a link; nothing was changed.
        StorageError: a file can't be written; the message names the folder, which the system's own does not.
    """
    is_main_process = args[0] if args else kwargs.get("is_main_process", True)
    is_pushed = args[2] if len(args) > 2 else kwargs.get("push_to_hub", False)
    if not is_main_process or _saves_adapters_alone(model):
        return type(model).save_pretrained(model, save_directory, *args, **kwargs)
    require_no_links(Path(save_directory))
    known: _Companions = cast(Any, model)._awq_companions
    try:
        with set_aside(known.carried, Path(save_directory), model.dtype):
            result = type(model).save_pretrained(model, save_directory, *args, **kwargs)
            if not is_pushed:
                _complete_any(model, Path(save_directory))
    except (OSError, SafetensorError) as error:
        if isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno is None):
            raise  # said already, or not the system's: the Hub's
        raise StorageError(
            f"The model can't be saved to {save_directory}, where files are missing now: {error}. The model in memory "
            "is unchanged: make room or correct the folder's permissions, and save it once more."
        ) from error
    return result


def _complete_any(model: PreTrainedModel, folder: Path, repo_id: str | None = None) -> None:
    """Completes the folder of a quantized model; one that has been dequantized gets the origin's tensors alone."""
    if _is_quantized(model):
        complete(model, folder, repo_id)
    elif not _saves_adapters_alone(model):
        add_tensors(folder, cast(Any, model)._awq_companions.carried, model.dtype)


def _upload_modified_files(
    model: PreTrainedModel, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any
) -> Any:
    """Completes the folder, then uploads it as transformers does.

    Raises:
        HfHubHTTPError, RuntimeError: the Hub refused some or all of the files; the message says what to do.
    """
    _complete_any(model, Path(working_dir), repo_id)
    try:
        if _has_deep_folders(Path(working_dir)):
            return _upload_all_depths(model, Path(working_dir), repo_id, *args, **kwargs)
        return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)
    except HfHubHTTPError as error:
        error.append_to_message("\n" + NOT_PUSHED.format(repo_id=repo_id))
        raise
    except RuntimeError as error:  # from huggingface_hub's threads; it names the file but not the reason
        if not isinstance(error.__cause__, HfHubHTTPError):
            raise
        raise RuntimeError(f"{error} {error.__cause__}\n{NOT_PUSHED.format(repo_id=repo_id)}") from error


def _has_deep_folders(folder: Path) -> bool:
    """Whether there are folders in folders, which transformers does not upload."""
    return any(path.is_dir() for path in folder.glob("*/*"))


def _upload_all_depths(
    model: PreTrainedModel,
    working_dir: Path,
    repo_id: str,
    files_timestamps: dict[str, float],
    commit_message: str | None = None,
    token: bool | str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    commit_description: str | None = None,
) -> Any:
    """Uploads what transformers' method of the same arguments does, and what is deeper, in one commit."""
    api = HfApi(token=token)
    changed = [
        path
        for path in sorted(working_dir.iterdir())
        if path.name not in files_timestamps or path.stat().st_mtime > files_timestamps[path.name]
    ]
    files = [file for path in changed for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    operations = [
        CommitOperationAdd(path_or_fileobj=str(file), path_in_repo=file.relative_to(working_dir).as_posix())
        for file in files
        if file.is_file()
    ]
    if revision is not None and not revision.startswith("refs/pr"):
        try:
            api.create_branch(repo_id=repo_id, branch=revision, exist_ok=True)
        except HfHubHTTPError as error:
            if not create_pr or error.response.status_code != 403:  # else there is no access, and a PR needs none
                raise
    return api.create_commit(
        repo_id=repo_id,
        operations=operations,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        create_pr=create_pr,
        revision=revision,
    )


def complete(model: PreTrainedModel, folder: Path, repo_id: str | None = None) -> None:
    """Adds to the folder of a saved model what transformers leaves out.

    That is tensors of its origin without a place in the model, older keys of config.json, missing files, and the card.

    Args:
        model: a model that was passed to `accompany`.
        folder: where it has been saved.
        repo_id: the repository it will be in, for the snippets in the card.

    Raises:
        CheckpointError: the origin's tensors can't be read any more; everything else has been saved.
    """
    known: _Companions = cast(Any, model)._awq_companions
    try:
        if not _saves_adapters_alone(model):
            add_tensors(folder, known.carried, model.dtype)
    except CheckpointError as error:
        _complete_files(model, known, folder, repo_id)
        raise CheckpointError(
            f"{error} What {type(model).__name__} itself has is saved in {folder}; tensors that it has no place for, "
            "such as those for multi-token prediction, are not."
        ) from error
    _complete_files(model, known, folder, repo_id)


def _complete_files(model: PreTrainedModel, known: _Companions, folder: Path, repo_id: str | None) -> None:
    add_older_keys(folder, type(model.config))
    bring_companions(known.origin, folder)
    if known.tokenizer is not None and not (folder / "tokenizer_config.json").exists():
        known.tokenizer.save_pretrained(folder)
    own_card = _own_card(known.origin)
    if known.report is None and own_card is not None and not (folder / "README.md").exists():
        shutil.copyfile(own_card, folder / "README.md")  # this checkpoint's own, with its measurements
        if is_reachable(own_card.parent / PICTURE, own_card.parent):
            shutil.copyfile(own_card.parent / PICTURE, folder / PICTURE)
        return
    config = model.config.quantization_config
    fields = config if isinstance(config, dict) else config.to_dict()
    facts = CardFacts(
        quantization_config={"meta": getattr(model.config, META_ATTRIBUTE, {})} | fields,
        base_model=known.base_model,
        commit=known.commit if known.base_model else None,
        revision_name=known.revision_name if known.base_model else None,
        report=known.report,
        evaluations=known.evaluations,
        quantized_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        full_precision_bytes=full_precision_bytes(model),
        repo_id=repo_id or f"your-name/{known.proposed_name}",
    )
    write_card(folder, facts)


def full_precision_bytes(model: nn.Module) -> int:
    """Returns the bytes that the weights would take without quantization, every parameter counted once."""
    total_bytes, seen = 0, set()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            columns = module.in_features + (module.bias is not None)
            total_bytes += columns * module.out_features * module.dtype.itemsize
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                total_bytes += parameter.numel() * parameter.element_size()
    return total_bytes


def _own_card(origin: Origin) -> Path | None:
    """Returns the card in the folder that a quantized model was loaded from, if this package wrote it."""
    folder = Path(origin.source, origin.subfolder)
    path = folder / "README.md"
    return path if origin.source and is_reachable(path, folder) and BEGIN in read_text(path) else None


def _is_quantized(model: PreTrainedModel) -> bool:
    """Returns whether what is saved is the quantized model: not dequantized, and not its adapters alone."""
    has_config = getattr(model.config, "quantization_config", None) is not None
    return has_config and not _saves_adapters_alone(model)


def _saves_adapters_alone(model: PreTrainedModel) -> bool:
    return getattr(model, "_hf_peft_config_loaded", False)
