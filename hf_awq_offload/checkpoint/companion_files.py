"""Decides which files of a checkpoint come along when its weights are rewritten. No file is opened here.

Everything that belongs to a model comes along: tokenizer, processor, chat templates, remote code, sentence-transformers
modules, licences, and small files of any other name. A list of names to copy was rejected, because every new kind of
model brings names that are not in it. So the rule says what stays behind, and why:

    weights in any format and their indexes, adapters       rewritten, or another model
    folders of weights (onnx/, checkpoint-500/)             another model; not code and sentence-transformers modules
    states of a training, data sets, logs, keys             not part of the model, and perhaps private
    hidden files and caches                                 those of git, editors and downloads
    README files and pictures                               the new checkpoint gets a card of its own
    quantization configs of other tools                     they describe the old weights
    large files of an unknown kind                          perhaps weights

Pictures, sounds and tensors are kept all the same if code or a config that comes along names them, and they are small.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from ..json_text import parse_json

MOST_BYTES = 50_000_000
"""Size up to which a file of an unknown kind comes along."""
MOST_TEXT_BYTES = 1_000_000
"""Size up to which code and configs are searched for names of other files."""

MODULES_NAME = "modules.json"
CONFIG_NAME = "config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TOKENIZER_FILES = (
    *("tokenizer*.json", "tokenizer.model", "*.tiktoken", "spiece.model", "sentencepiece*.model", "*.spm", "spm.model"),
    *("vocab.*", "vocab-*", "merges.txt", "bpe.codes", "tekken.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "additional_chat_templates/*"),
)
PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("image_processor_config.json", "audio_tokenizer_config.json", "chat_template.json"),
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ONLY_WEIGHTS = _words(
    "gguf ggml ggjt ggla llamafile onnx onnx_data msgpack h5 hdf5 keras ot tflite task mlmodel mlpackage ckpt "
    "nemo engine pdparams pdmodel pdiparams mindir mar dduf rten nnef litertlm"
)
"""Extensions of files that hold weights and nothing else."""
_TENSORS = _words("safetensors bin pt pth ptl pb npy npz pkl pickle joblib dat data")
"""Extensions of files that hold tensors: mostly weights, sometimes something small that code needs."""
_CLEARLY_WEIGHTS = re.compile(
    r"((tf|flax|rust|pytorch|diffusion_pytorch|decoder|encoder)_)*(model|weights?|consolidated|checkpoint)([-_.].*)?"
    r"|.+[-_.]\d{5}-of-\d{5}|(ggml|openvino_).*"
)
"""Matches the stem of a file that is a checkpoint's weights beyond doubt."""
_INDEX = re.compile(r".+\.(safetensors|bin|pt|pth|h5|msgpack)\.index(\.[\w-]+)?\.json")
_MEDIA = _words("png jpg jpeg gif svg webp bmp ico tif tiff avif heic mp4 mov webm avi mkv wav mp3 flac ogg opus m4a")
_DATA = _words(
    "jsonl ndjson csv tsv parquet arrow feather tfrecord lmdb sqlite db ipynb zip tar gz tgz bz2 xz zst 7z rar"
)
_PRIVATE = _words("pem key p12 pfx crt netrc log out err pid lock bak swp tmp partial incomplete")
_TRAINING = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|pytorch_model_fsdp|fsdp_model)[-_\d]*"
    r"\.(pt|pth|bin|pkl|safetensors)|(trainer_state|(all|train|eval|test|predict)_results)\.json"
    r"|events\.out\.tfevents\..*|zero_to_fp32\.py|latest"
)
_ADAPTER = re.compile(r"adapter_(config\.json|model\b.*)|adapters?\.(safetensors|bin|npz)")
_QUANTIZATION = re.compile(r"(hf_quant_config|quant(ize|ization)?_config|quant_strategy.*)\.json")
_README = re.compile(r"readme.*", re.IGNORECASE)
_LICENCE = re.compile(
    r".*(licen[cs]e|notice|copying|patents|use[-_ ]?policy|terms[-_ ]of|acceptable[-_ ]use).*", re.IGNORECASE
)
_CACHES = frozenset(["__pycache__", "CVS", "Thumbs.db", "desktop.ini", "node_modules"])
_OTHER_FORMATS = _words(
    "onnx openvino openvino_model coreml original gguf ggml mlx tflite tensorrt flax tf tensorflow rust jax exllama"
)
_TRAINING_FOLDERS = re.compile(r"runs|wandb|mlruns|tensorboard|lightning_logs|checkpoint-\d+|global_step\d+|logs?")
_CODE = ".py"
_SEARCHED = (_CODE, ".json", ".jinja", ".yaml", ".yml")


class Reason(Enum):
    """Why a file stays behind. Those whose name is worth telling are in `TOLD`."""

    WEIGHTS = "weights"
    PERHAPS_WEIGHTS = "perhaps weights"
    OTHER_FORMAT = "of another format"
    OTHER_MODEL = "in a folder of weights"
    ADAPTER = "an adapter"
    TRAINING = "the state of a training"
    HIDDEN = "hidden, or a cache"
    CARD = "the card's"
    MEDIA = "a picture or sound"
    QUANTIZATION = "describes the old weights"
    DATA = "data"
    PRIVATE = "perhaps private"
    LARGE = "large"


TOLD = frozenset(
    [Reason.PERHAPS_WEIGHTS, Reason.OTHER_MODEL, Reason.ADAPTER, Reason.DATA, Reason.PRIVATE, Reason.LARGE]
)
_IF_NAMED = frozenset([Reason.PERHAPS_WEIGHTS, Reason.MEDIA])
"""Reasons that don't count for a small file that code or a config names."""
_OF_THE_SAME_MODEL = frozenset([Reason.CARD, Reason.MEDIA, Reason.QUANTIZATION])
"""Reasons that don't count if the checkpoint only changes its format."""

OTHER_WEIGHTS = [
    *(f"*.{extension}" for extension in sorted(_ONLY_WEIGHTS | {"bin", "pt", "pth", "ptl"})),
    *(f"{folder}/*" for folder in sorted(_OTHER_FORMATS)),
    "*/*.safetensors",
]
"""Patterns of what need not be downloaded to read the safetensors files in a repository's root."""


@dataclass(frozen=True)
class Companions:
    """The files of a checkpoint, divided into those that come along and those that stay behind."""

    kept: list[str]
    left_out: dict[str, Reason] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, Reason]:
        """Those left out whose names a user should be told: they are not clearly weights, pictures and the like."""
        return {path: reason for path, reason in self.left_out.items() if reason in TOLD}


def why_left_out(
    path: str,  # relative to the checkpoint, with "/"
    size_bytes: int | None,  # None: unknown
    modules: Collection[str] = (),
) -> Reason | None:
    """Returns why a file stays behind if nothing is known but its name and size; None if it comes along.

    Args:
        path: the file.
        size_bytes: its size.
        modules: folders of sentence-transformers modules, see `module_folders`; what is in them belongs to the model.
    """
    *folders, name = PurePosixPath(path).parts
    extension = name.rpartition(".")[2].lower() if "." in name else ""
    if any(part.startswith((".", "/")) or part in _CACHES for part in (*folders, name)):  # ".." leads out, too
        return Reason.HIDDEN
    if any(_TRAINING_FOLDERS.fullmatch(folder) for folder in folders) or _TRAINING.fullmatch(name):
        return Reason.TRAINING
    if extension in _PRIVATE:
        return Reason.PRIVATE
    if _README.fullmatch(name):
        return Reason.CARD
    if is_in(path, modules):
        return None
    if folders and folders[0].lower() in _OTHER_FORMATS and not name.endswith(_CODE):
        return Reason.OTHER_FORMAT
    if _ADAPTER.fullmatch(name):
        return Reason.ADAPTER
    if _INDEX.fullmatch(name) or extension in _ONLY_WEIGHTS or any(part.endswith(".mlpackage") for part in folders):
        return Reason.WEIGHTS
    is_named_so = _CLEARLY_WEIGHTS.fullmatch(name.rpartition(".")[0].lower()) is not None
    if extension in _TENSORS:
        return Reason.WEIGHTS if is_named_so else Reason.PERHAPS_WEIGHTS
    if extension == "xml" and is_named_so:  # openvino_model.xml
        return Reason.WEIGHTS
    if _LICENCE.fullmatch(name) or name.endswith(_CODE) or is_of_tokenizer(path) or is_of_processor(path):
        return None
    if _QUANTIZATION.fullmatch(name):
        return Reason.QUANTIZATION
    if extension in _MEDIA:
        return Reason.MEDIA
    if extension in _DATA:
        return Reason.DATA
    return Reason.LARGE if size_bytes is not None and size_bytes > MOST_BYTES else None


def companions(
    sizes: Mapping[str, int | None],
    read_text: Callable[[str], str],
    *,
    same_model: bool = False,
) -> Companions:
    """Divides a checkpoint's files into those that come along and those that stay behind.

    Args:
        sizes: size in bytes of every file, None if unknown, by path relative to the checkpoint, with "/".
        read_text: returns the content of one of the files; called for small configs and code.
        same_model: the checkpoint only changes its format, so that its card, pictures and other tools' quantization
            configs stay valid.
    """
    is_read = MODULES_NAME in sizes and (sizes[MODULES_NAME] or 0) <= MOST_TEXT_BYTES
    modules = module_folders(read_text(MODULES_NAME)) if is_read else frozenset()
    reasons = {path: why_left_out(path, size_bytes, modules) for path, size_bytes in sizes.items()}
    if same_model:
        reasons = {path: None if reason in _OF_THE_SAME_MODEL else reason for path, reason in reasons.items()}
    for path in _named_in_texts(sizes, reasons, read_text):
        reasons[path] = None
    beside_weights = {
        str(PurePosixPath(path).parent) for path, reason in reasons.items() if "/" in path and reason is Reason.WEIGHTS
    }
    for path, reason in reasons.items():
        if reason is None and not path.endswith(_CODE) and is_in(path, beside_weights) and not is_in(path, modules):
            reasons[path] = Reason.OTHER_MODEL
    left_out = {path: reason for path, reason in sorted(reasons.items()) if reason is not None}
    return Companions(sorted(reasons.keys() - left_out.keys()), left_out)


def module_folders(modules_json: str) -> frozenset[str]:
    """Returns the folders that sentence-transformers' modules.json names, but for that of the transformer itself.

    Their weights, such as those of a Dense module, are part of the model. An unreadable file names none.
    """
    try:
        entries = [(str(entry["path"]).strip("/"), str(entry["type"])) for entry in parse_json(modules_json)]
    except (ValueError, TypeError, KeyError):
        return frozenset()
    return frozenset(path for path, kind in entries if path and kind.rpartition(".")[2] != "Transformer")


def is_of_tokenizer(path: str) -> bool:
    """Whether a file is part of a tokenizer, whose files must all come from one place."""
    return not is_of_processor(path) and any(fnmatchcase(path, pattern) for pattern in TOKENIZER_FILES)


def is_of_processor(path: str) -> bool:
    """Whether a file is part of a processor, whose files must all come from one place."""
    return path in PROCESSOR_FILES


def is_in(path: str, folders: Collection[str]) -> bool:
    """Whether a file is in one of the folders, at any depth."""
    return any(str(parent) in folders for parent in PurePosixPath(path).parents)


def _named_in_texts(
    sizes: Mapping[str, int | None], reasons: Mapping[str, Reason | None], read_text: Callable[[str], str]
) -> list[str]:
    """Returns the small files that would stay behind, but are named in code or a config that comes along."""
    candidates = [path for path, reason in reasons.items() if reason in _IF_NAMED and (sizes[path] or 0) <= MOST_BYTES]
    if not candidates:
        return []
    searched = [
        path
        for path, size_bytes in sizes.items()
        if path.endswith(_SEARCHED)
        and (reasons[path] is None or path == CONFIG_NAME)
        and (size_bytes or 0) <= MOST_TEXT_BYTES
    ]
    text = "\n".join(map(read_text, searched))
    return [path for path in candidates if re.search(rf"(?<![\w.-]){re.escape(PurePosixPath(path).name)}(?!\w)", text)]
