"""Compares what this checkout writes with what another revision of the repository writes, bit for bit.

    python tests/bench/same_bits.py --against 542c473

A refactor must not change a number. Both revisions quantize the same models on the same machine: the shipped model, a
mixture of experts whose checkpoint is split and one whose checkpoint is fused, an image-text model, a model whose
forward passes are paused at each layer, mixed bits, propagated outputs, every expert on every token, rounding without
data, and runs that are stopped after a layer and resumed. Compared are the SHA-256 of every tensor and file of the
checkpoint, of the journal as the stopped run left it, and of the report. Times and memory are left out.

Each revision runs in a process of its own, the other one from a temporary git worktree.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MEASURED_FIELDS = {"seconds", "phase_seconds", "memory"}
SHORT: dict[str, Any] = {"n_samples": 6, "max_seq_len": 20, "batch_tokens": 40, "group_size": 32, "n_grid": 4}
"""Fields of a recipe that takes a second on a tiny model."""


class Stopped(BaseException):
    """Ends a run after a commit, as a kill would."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="REVISION", help="the revision to compare with")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write this checkout's digests to FILE, as JSON")
    parser.add_argument("--only", nargs="+", metavar="CASE", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    if options.record is not None:
        options.record.write_text(json.dumps({name: digests_of(name) for name in options.only}, indent=1))
        return
    if options.against is None:
        parser.error("pass --against REVISION or --record FILE")
    with tempfile.TemporaryDirectory() as scratch:
        theirs = in_worktree(options.against, Path(scratch), options.only)
        ours = in_process(ROOT, Path(scratch) / "ours.json", options.only)
    different = compare(theirs, ours)
    sys.exit(bool(different))


def compare(theirs: dict[str, dict[str, str]], ours: dict[str, dict[str, str]]) -> list[str]:
    """Prints a line per case; returns the names of what differs."""
    all_different = []
    for case in theirs:
        names = theirs[case].keys() | ours[case].keys()
        different = sorted(name for name in names if theirs[case].get(name) != ours[case].get(name))
        print(f"{case:24} {len(names):4} digests, {len(different)} different", *different[:8], flush=True)
        all_different += different
    return all_different


def in_worktree(revision: str, scratch: Path, cases: list[str]) -> dict[str, dict[str, str]]:
    """The digests of another revision of this repository."""
    tree = scratch / "tree"
    subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", tree, revision], check=True)
    try:
        return in_process(tree, scratch / "theirs.json", cases)
    finally:
        subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)


def in_process(tree: Path, file: Path, cases: list[str]) -> dict[str, dict[str, str]]:
    """The digests of the package in `tree`, by this script in a process of its own."""
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **fixed, "PYTHONPATH": str(tree)}
    command = [sys.executable, str(Path(__file__).resolve()), "--record", str(file), "--only", *cases]
    subprocess.run(command, check=True, env=environment, cwd=file.parent)
    return json.loads(file.read_text())


# -- what is digested ----------------------------------------------------------------------------------------------


def digests_of(case: str) -> dict[str, str]:
    import hf_awq_offload

    print(f"{case}: {Path(hf_awq_offload.__file__).parent}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        return CASES[case](Path(scratch))


def checkpoint_digests(folder: Path, prefix: str = "") -> dict[str, str]:
    """Tensor or file of a checkpoint -> digest. The card carries a date and figures of memory: it is left out."""
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.iterdir()):
        if file.name == "README.md":
            continue
        found[f"{prefix}{file.name}"] = _digest(file.read_bytes())
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no dict)
                    found[f"{prefix}{name}"] = _tensor_digest(opened.get_tensor(name))
    return found


def journal_digests(folder: Path) -> dict[str, str]:
    """File of a journal -> digest; commits without what was measured."""
    found = {}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        if file.name.startswith("layer-") and file.suffix == ".json":
            data = _text(json.loads(json.loads(data)["commit"]))
        found[f"journal/{file.name}"] = _digest(data)
    return found


def report_digest(report: Any) -> dict[str, str]:
    return {"report": _digest(_text(asdict(report)))}


def _text(value: Any) -> bytes:
    return json.dumps(_without_measurements(value), sort_keys=True).encode()


def _without_measurements(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_measurements(item) for key, item in value.items() if key not in MEASURED_FIELDS}
    return [_without_measurements(item) for item in value] if isinstance(value, list | tuple) else value


def _tensor_digest(tensor: Any) -> str:
    import torch

    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return _digest(repr((tensor.dtype, tuple(tensor.shape))).encode() + data)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- cases ---------------------------------------------------------------------------------------------------------


def shipped(scratch: Path) -> dict[str, str]:
    """`from_pretrained` with the default search on the shipped model and its own text, then `save_pretrained`."""
    return from_pretrained(shipped_model(), scratch, n_samples=8, max_seq_len=256, dataset=str(shipped_text()))


def shipped_streamed(scratch: Path) -> dict[str, str]:
    recipe = {"n_samples": 8, "max_seq_len": 256, "dataset": str(shipped_text())}
    return stopped_and_resumed(shipped_model(), scratch, stop_after=2, **recipe)


def mixed_bits(scratch: Path) -> dict[str, str]:
    overrides = {r"down_proj$": {"bits": 8}, r"layers\.1\.": {"bits": 3, "group_size": 64, "zero_point": False}}
    recipe = {"n_samples": 4, "max_seq_len": 128, "dataset": str(shipped_text()), "overrides": overrides}
    return stopped_and_resumed(shipped_model(), scratch, stop_after=1, **recipe)


def propagated(scratch: Path) -> dict[str, str]:
    recipe = {"n_samples": 4, "max_seq_len": 128, "dataset": str(shipped_text()), "propagate": "quantized"}
    return stopped_and_resumed(shipped_model(), scratch, stop_after=2, **recipe)


def without_data(scratch: Path) -> dict[str, str]:
    return stopped_and_resumed(shipped_model(), scratch, 1, n_grid=0, clip=False, rounding="nearest")


def experts_one_by_one(scratch: Path) -> dict[str, str]:
    return stopped_and_resumed(saved_causal_lm("qwen3_moe", scratch), scratch, 1, **SHORT, dataset=token_ids())


def experts_fused(scratch: Path) -> dict[str, str]:
    source = saved_causal_lm("gpt_oss", scratch)
    return from_pretrained(source, scratch, **SHORT, dataset=token_ids(), all_experts=True)


def paused_forward(scratch: Path) -> dict[str, str]:
    return stopped_and_resumed(saved_causal_lm("gemma3n_text", scratch), scratch, 2, **SHORT, dataset=token_ids())


def parallel_layers(scratch: Path) -> dict[str, str]:
    return stopped_and_resumed(saved_causal_lm("gpt_neox", scratch), scratch, 1, **SHORT, dataset=token_ids())


def image_text(scratch: Path) -> dict[str, str]:
    from transformers import AutoModelForImageTextToText

    recipe = {**SHORT, "dataset": image_samples()}
    return stopped_and_resumed(saved_llava(scratch), scratch, 1, AutoModelForImageTextToText, **recipe)


def in_memory(scratch: Path) -> dict[str, str]:
    """`quantize_model` on a model with biases and tied embeddings, in bf16."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_awq_offload import AwqOffloadConfig, quantize_model

    model = AutoModelForCausalLM.from_pretrained(saved_causal_lm("qwen2", scratch), dtype=torch.bfloat16)
    quantize_model(model, AwqOffloadConfig(**SHORT, dataset=token_ids()))
    model.save_pretrained(scratch / "out")
    return checkpoint_digests(scratch / "out") | report_digest(model.hf_quantizer.report)


CASES: dict[str, Callable[[Path], dict[str, str]]] = {
    case.__name__: case
    for case in (
        *(shipped, shipped_streamed, mixed_bits, propagated, without_data, experts_one_by_one, experts_fused),
        *(paused_forward, parallel_layers, image_text, in_memory),
    )
}


def from_pretrained(source: Path, scratch: Path, **recipe: Any) -> dict[str, str]:
    from transformers import AutoModelForCausalLM

    from hf_awq_offload import AwqOffloadConfig

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", quantization_config=AwqOffloadConfig(**recipe))
    model.save_pretrained(scratch / "out")
    return checkpoint_digests(scratch / "out") | report_digest(model.hf_quantizer.report)


def stopped_and_resumed(
    source: Path, scratch: Path, stop_after: int, model_class: Any = None, **recipe: Any
) -> dict[str, str]:
    """`quantize`, stopped after a commit; its journal; then the same call to the end."""
    from transformers import AutoModelForCausalLM

    from hf_awq_offload import AwqOffloadConfig, quantize

    def run() -> Any:
        return quantize(
            source,
            scratch / "out",
            AwqOffloadConfig(**recipe),
            checkpoint_dir=scratch / "journal",
            model_class=model_class or AutoModelForCausalLM,
            max_shard_size="2MB",
        )

    with contextlib.suppress(Stopped), stopping_after(stop_after):
        run()
    found = journal_digests(scratch / "journal")
    assert any(name.endswith(".json") and "layer-" in name for name in found), "the run was stopped before a commit"
    report = run()
    return found | checkpoint_digests(scratch / "out") | report_digest(report)


@contextlib.contextmanager
def stopping_after(commits: int) -> Iterator[None]:
    """Inside, the commit of this number is the last thing that a run does."""
    rename, seen = os.replace, 0

    def replace(source: Any, target: Any, **kwargs: Any) -> None:
        nonlocal seen
        rename(source, target, **kwargs)
        seen += Path(target).name.startswith("layer-") and Path(target).suffix == ".json"
        if seen == commits:
            raise Stopped

    os.replace = replace
    try:
        yield
    finally:
        os.replace = rename


def shipped_model() -> Path:
    import hf_awq_offload

    return Path(hf_awq_offload.__file__).parent / "assets" / "tiny_llama"


def shipped_text() -> Path:
    return ROOT / "hf_awq_offload" / "assets" / "tiny_llama" / "heldout.txt"  # one path: it is named in the config


def token_ids(sequences: int = 6, tokens: int = 20) -> list[list[int]]:
    import torch

    return torch.randint(3, 60, (sequences, tokens), generator=torch.Generator().manual_seed(0)).tolist()


def saved_causal_lm(model_type: str, scratch: Path) -> Path:
    """A random model of a few layers."""
    sys.path.insert(0, str(ROOT / "tests" / "architectures"))
    from shrink import tiny_causal_lm

    tiny_causal_lm(model_type).save_pretrained(scratch / "source")
    return scratch / "source"


def saved_llava(scratch: Path) -> Path:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "initializer_range": 0.1,
    }
    text = LlamaConfig(**small, num_key_value_heads=2, vocab_size=304)
    vision = CLIPVisionConfig(**small, image_size=32, patch_size=8)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=300))
    model.eval().save_pretrained(scratch / "source")
    return scratch / "source"


def image_samples() -> list[dict[str, Any]]:
    """Samples of 16 image tokens and some text, as a processor returns them."""
    import torch

    random = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.cat([torch.full((16,), 300), torch.randint(3, 299, (tokens,), generator=random)])[None],
            "attention_mask": torch.ones(1, 16 + tokens, dtype=torch.int64),
            "pixel_values": torch.randn(1, 3, 32, 32, generator=random),
        }
        for tokens in (20, 12, 28, 16)
    ]


if __name__ == "__main__":
    main()
