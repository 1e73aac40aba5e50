"""Says how large a checkpoint is before it is loaded, and whether it is an adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from ..checkpoint.source_folders import places_of_files
from .source_look import files_in

HUB_PLACE = ("revision", "cache_dir", "subfolder")


def checkpoint_bytes(model: str | os.PathLike[str] | PreTrainedModel, arguments: Mapping[str, Any]) -> int:
    """Returns the bytes of a checkpoint's weights, here or on the Hub; 0 if it is in memory or can't be found."""
    if isinstance(model, PreTrainedModel):
        return 0
    places = places_of_files(model, **{name: arguments.get(name) for name in HUB_PLACE})
    if not places:
        return 0 if arguments.get("local_files_only") else _hub_bytes(os.fspath(model), arguments)
    files, _ = files_in(places[0], arguments.get("variant"), arguments.get("use_safetensors"))
    return sum(file.stat().st_size for file in files)


def adapter_base(model: str | os.PathLike[str] | PreTrainedModel, arguments: Mapping[str, Any]) -> str | None:
    """Returns the name of the model that an adapter is for; None if `model` is no adapter."""
    if isinstance(model, PreTrainedModel):
        return None
    places = places_of_files(model, **{name: arguments.get(name) for name in HUB_PLACE})
    if places and (places[0] / "config.json").is_file():
        return None
    known = {name: arguments[name] for name in (*HUB_PLACE, "token", "local_files_only") if arguments.get(name)}
    try:
        file = find_adapter_config_file(os.fspath(model), **known)
        if file is None:
            return None
        with open(file, encoding="utf-8") as opened:
            return str(json.load(opened)["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # whatever it is, loading will say it


def _hub_bytes(name: str, arguments: Mapping[str, Any]) -> int:
    """Returns the bytes of the safetensors files of a repository, or else of its .bin files."""
    try:
        found = HfApi(token=arguments.get("token")).model_info(
            name, revision=arguments.get("revision"), files_metadata=True
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return 0  # loading will say why
    folder = f"{arguments['subfolder']}/" if arguments.get("subfolder") else ""
    inside = {
        file.rfilename.removeprefix(folder): file.size or 0
        for file in found.siblings or ()
        if file.rfilename.startswith(folder)
    }
    for suffix in (".safetensors", ".bin"):
        sizes = [size for path, size in inside.items() if path.endswith(suffix) and "/" not in path]
        if sizes:
            return sum(sizes)
    return 0
