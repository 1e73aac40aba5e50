"""Adds the card and the tokenizer or processor to a quantized model that is saved or pushed.

`accompany` overrides two methods on the model instance: `save_pretrained`, which completes the folder after
transformers has written it, and `_upload_modified_files`, which `push_to_hub` and `save_pretrained(push_to_hub=True)`
both call last, with the folder that is about to be uploaded. If the repository has a README.md, it is in that folder.
"""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.added_tensors import add_tensors
from ..formats.compressed_tensors_config import META_ATTRIBUTE
from ..logs import get_logger
from ..nn.quantized_linear import QuantizedLinear
from ..report import QuantizationReport
from ..reporting.evaluation import Evaluation
from .model_card import BEGIN, PICTURE, CardFacts, hub_id, proposed_name, write_card

logger = get_logger(__name__)

TOKENIZER_FILES = (
    *("tokenizer*.json", "tokenizer.model", "*.tiktoken", "spiece.model", "sentencepiece*.model", "tekken.json"),
    *("vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    "additional_chat_templates/*",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
PROCESSING_FILES = (*TOKENIZER_FILES, *PROCESSOR_FILES, "LICENSE*")
"""Files of a checkpoint that turn text, images and sound into its input, and its licence."""

NOT_PUSHED = (
    "The quantized model was not pushed to {repo_id}, and nothing of it is visible there. It is unchanged in memory, "
    "and a folder written by save_pretrained is complete. Call push_to_hub again once the cause is fixed: weights "
    "that have arrived are not sent twice."
)


def accompany(model: PreTrainedModel, report: QuantizationReport | None = None, tokenizer: Any = None) -> None:
    """Makes `model` save and push its card and its tokenizer or processor along with its weights.

    Args:
        model: a quantized model; its origin is the current `config.name_or_path`.
        report: the report of the quantization, if it was just done.
        tokenizer: saved if the model's origin has no tokenizer.
    """
    instance = cast(Any, model)
    instance._awq_companions = _Companions(str(model.config.name_or_path or ""), report, tokenizer)
    instance.save_pretrained = partial(_save_pretrained, model)
    instance._upload_modified_files = partial(_upload_modified_files, model)


def describe_origin(model: PreTrainedModel, base: str | None, tokenizer: Any) -> None:
    """Sets the real base and tokenizer of a model that was quantized from a temporary folder."""
    known: _Companions = cast(Any, model)._awq_companions
    known.base_model, known.proposed_name, known.tokenizer = hub_id(base), proposed_name(base), tokenizer


def record_evaluation(model: PreTrainedModel, name: str, evaluation: Evaluation) -> None:
    """Adds a result of `evaluate` to the model's card, as a row called `name` ("quantized, wikitext2")."""
    cast(Any, model)._awq_companions.evaluations[name] = evaluation


class _Companions:
    """What goes along with a model when it is saved."""

    def __init__(self, source: str, report: QuantizationReport | None, tokenizer: Any):
        self.source = source
        self.base_model = None if report is None else hub_id(source)
        self.proposed_name = proposed_name(source)
        self.report = report
        self.tokenizer = tokenizer
        self.evaluations: dict[str, Evaluation] = {}


def _save_pretrained(model: PreTrainedModel, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
    """Saves as transformers does, then adds the card and the tokenizer or processor."""
    result = type(model).save_pretrained(model, save_directory, *args, **kwargs)
    is_main_process = args[0] if args else kwargs.get("is_main_process", True)
    is_pushed = args[2] if len(args) > 2 else kwargs.get("push_to_hub", False)
    if is_main_process and not is_pushed and _is_quantized(model):
        complete(model, Path(save_directory))
    return result


def _upload_modified_files(
    model: PreTrainedModel, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any
) -> Any:
    """Completes the folder, then uploads it as transformers does.

    Raises:
        HfHubHTTPError, RuntimeError: the hub refused some or all of the files; the message says what to do.
    """
    if _is_quantized(model):
        complete(model, Path(working_dir), repo_id)
    try:
        return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)
    except HfHubHTTPError as error:
        error.append_to_message("\n" + NOT_PUSHED.format(repo_id=repo_id))
        raise
    except RuntimeError as error:  # from huggingface_hub's threads; it names the file but not the reason
        if not isinstance(error.__cause__, HfHubHTTPError):
            raise
        raise RuntimeError(f"{error} {error.__cause__}\n{NOT_PUSHED.format(repo_id=repo_id)}") from error


def complete(model: PreTrainedModel, folder: Path, repo_id: str | None = None) -> None:
    """Adds the card, and the tokenizer or processor files that are missing, to the folder of a saved model.

    Args:
        model: a model that was passed to `accompany`.
        folder: where it has been saved.
        repo_id: the repository it will be in, for the snippets in the card.
    """
    known: _Companions = cast(Any, model)._awq_companions
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.source.carried:
        add_tensors(folder, quantizer.source.carried, model.dtype)
    copy_processing(known.source, folder, getattr(model.config, "_commit_hash", None))
    if known.tokenizer is not None and not (folder / "tokenizer_config.json").exists():
        known.tokenizer.save_pretrained(folder)
    own_card = _own_card(known.source)
    if known.report is None and own_card is not None and not (folder / "README.md").exists():
        shutil.copyfile(own_card, folder / "README.md")  # this checkpoint's own, with its measurements
        if (own_card.parent / PICTURE).exists():
            shutil.copyfile(own_card.parent / PICTURE, folder / PICTURE)
        return
    config = model.config.quantization_config
    fields = config if isinstance(config, dict) else config.to_dict()
    facts = CardFacts(
        quantization_config={"meta": getattr(model.config, META_ATTRIBUTE, {})} | fields,
        base_model=known.base_model,
        report=known.report,
        evaluations=known.evaluations,
        quantized_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        full_precision_bytes=full_precision_bytes(model),
        repo_id=repo_id or f"your-name/{known.proposed_name}",
    )
    write_card(folder, facts)


def copy_processing(source: str, folder: Path, revision: str | None = None) -> None:
    """Copies tokenizer and processor files from `source`, a folder or a name on the hub; existing files stay."""
    wanted = ["LICENSE*"]
    if not (folder / "tokenizer_config.json").exists():  # if it exists, the tokenizer is complete: don't mix two
        wanted += TOKENIZER_FILES
    if not any((folder / name).exists() for name in PROCESSOR_FILES):
        wanted += PROCESSOR_FILES
    origin = _origin(source, revision)
    if origin is None:
        return
    for file in sorted(origin.rglob("*")):
        name = file.relative_to(origin).as_posix()
        target = folder / name
        if file.is_file() and not target.exists() and any(fnmatch(name, pattern) for pattern in wanted):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


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


def _origin(source: str, revision: str | None) -> Path | None:
    """Returns the folder that holds the tokenizer and processor files of `source`, or None."""
    if not source or Path(source).is_dir():
        return Path(source) if source else None
    if hub_id(source) is None:
        return None
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(PROCESSING_FILES)))
    except Exception as error:  # of any kind: network, authorization, no such repository
        logger.info(f"The tokenizer of {source} could not be downloaded ({type(error).__name__}); saving without it.")
        return None


def _own_card(source: str) -> Path | None:
    """Returns the card in the folder that a quantized model was loaded from, if this package wrote it."""
    path = Path(source) / "README.md"
    return path if source and path.is_file() and BEGIN in path.read_text(encoding="utf-8") else None


def _is_quantized(model: PreTrainedModel) -> bool:
    """Returns whether what is saved is the quantized model: not dequantized, and not its adapters alone."""
    has_config = getattr(model.config, "quantization_config", None) is not None
    return has_config and not getattr(model, "_hf_peft_config_loaded", False)
