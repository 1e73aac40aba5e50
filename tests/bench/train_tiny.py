"""Trains the tiny language model that ships with the package as data.

    python tests/bench/train_tiny.py --architecture llama --out hf_awq_offload/assets/tiny_llama

The corpus is what every CPython carries: the ``pydoc`` topics and the docstrings of the standard library.
The held-out part is docstrings only, because the ``pydoc`` topics are the package's default calibration text.
The run is deterministic in ``--steps`` for one version of Python and torch; the default takes about
15 minutes on two idle CPU cores.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import platform
import sysconfig
import time
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
VOCAB_SIZE = 2048
SEQUENCE = 512
BATCH = 2
WINDOW = 512
HELDOUT_CHARS = 150_000
HELDOUT_LONGEST_DOCUMENT = 20_000
LLAMA_BYTES = 6_000_000
SEPARATOR = "\n\n\n"
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages"}

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "pad_token_id": None,
}
GROUPED: dict[str, Any] = {
    **COMMON,
    "intermediate_size": 512,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.05,
}
UNGATED: dict[str, Any] = {
    **COMMON,
    "ffn_dim": 1024,
    "word_embed_proj_dim": 256,
    "dropout": 0.0,
    "init_std": 0.05,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED),
    "gemma2": ("Gemma2Config", {**GROUPED, "query_pre_attn_scalar": 64, "sliding_window": 1024}),
    "opt": ("OPTConfig", UNGATED),
}

# What `inject_outliers` rescales in a decoder layer: norm -> the linears that read it, and linear -> the
# linear that reads its output through something linear (attention, a product with the gate) or a ReLU.
GATED_LINEARS = {"self_attn.v_proj": "self_attn.o_proj", "mlp.up_proj": "mlp.down_proj"}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
OUTLIER_PATHS: dict[str, tuple[dict[str, tuple[str, ...]], dict[str, str]]] = {
    "llama": ({"input_layernorm": QKV, "post_attention_layernorm": GATE_UP}, GATED_LINEARS),
    "qwen3": ({"input_layernorm": QKV, "post_attention_layernorm": GATE_UP}, GATED_LINEARS),
    "gemma2": ({"input_layernorm": QKV, "pre_feedforward_layernorm": GATE_UP}, GATED_LINEARS),
    "opt": (
        {"self_attn_layer_norm": QKV, "final_layer_norm": ("fc1",)},
        {"self_attn.v_proj": "self_attn.out_proj", "fc1": "fc2"},
    ),
}


def sha256(text: str) -> str:
    """The hexadecimal SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def stdlib_documents() -> dict[str, str]:
    """Module path -> its docstrings in source order, joined by blank lines; no docstring comes twice."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    documents: dict[str, str] = {}
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(name.split("/")):
            continue
        try:
            with warnings.catch_warnings(), tokenize.open(root / name) as file:
                warnings.simplefilter("ignore")
                tree = ast.parse(file.read())
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        nodes.sort(key=lambda node: getattr(node, "lineno", 0))
        texts: list[str] = []
        for node in nodes:
            text = (ast.get_docstring(node, clean=True) or "").strip()  # clean=True is inspect.cleandoc
            if text and text not in seen:
                seen.add(text)
                texts.append(text)
        if texts:
            documents[name] = "\n\n".join(texts)
    return documents


def corpus() -> tuple[list[str], list[str]]:
    """The documents to train on and those held out: modules in the order of their names' hashes."""
    modules = stdlib_documents()
    heldout: list[str] = []
    total = 0
    for name in sorted(modules, key=sha256):
        if total >= HELDOUT_CHARS:
            break
        if len(modules[name]) <= HELDOUT_LONGEST_DOCUMENT:
            heldout.append(name)
            total += len(modules[name])
    train = [topics[name].strip() for name in sorted(topics)]
    train += [text for name, text in modules.items() if name not in set(heldout)]
    return train, [modules[name] for name in sorted(heldout)]


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose end-of-text token is also its BOS and padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=COMMON["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save with the class name that transformers before version 5 knows too."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def build_model(architecture: str, eos_id: int) -> PreTrainedModel:
    """A randomly initialised model of one of `ARCHITECTURES`, in fp32."""
    config_class, arguments = ARCHITECTURES[architecture]
    config = getattr(transformers, config_class)(**arguments, bos_token_id=eos_id, eos_token_id=eos_id)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ids = {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}
    model.generation_config = transformers.GenerationConfig(**ids)
    return model


def batches(tokens: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of windows; each epoch cuts the stream at another offset and shuffles the windows."""
    generator = torch.Generator().manual_seed(seed)
    pending = torch.empty(0, SEQUENCE, dtype=tokens.dtype)
    while True:
        offset = int(torch.randint(SEQUENCE, (1,), generator=generator))
        count = (len(tokens) - offset) // SEQUENCE
        windows = tokens[offset : offset + count * SEQUENCE].view(count, SEQUENCE)
        pending = torch.cat([pending, windows[torch.randperm(count, generator=generator)]])
        while len(pending) >= BATCH:
            yield pending[:BATCH]
            pending = pending[BATCH:]


def train(
    model: PreTrainedModel, tokens: torch.Tensor, steps: int, minutes: float | None, peak: float, seed: int
) -> int:
    """AdamW with warm-up and a cosine schedule; returns the steps taken, which `minutes` may set."""
    model.train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    source = batches(tokens, seed)
    start, step, total = time.perf_counter(), 0, 0.0
    while step < steps:
        warm_up = max(1, min(100, steps // 10))
        progress = max(0.0, (step - warm_up) / max(1, steps - warm_up))
        rate = peak * min((step + 1) / warm_up, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(source)
        logits = model(input_ids=batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        total += loss.item()
        seconds = time.perf_counter() - start
        if step == 20 and minutes is not None:
            steps = max(step, int(minutes * 60 / seconds * step))
        if step % 50 == 0:
            print(f"step {step}/{steps} loss {total / 50:.3f} rate {rate:.1e} {seconds:.0f} s", flush=True)
            total = 0.0
    return steps


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Perplexity in non-overlapping windows of `WINDOW` tokens; first tokens and the tail do not count."""
    model.eval()
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    total = 0.0
    for batch in windows.split(8):
        logits = model(input_ids=batch, use_cache=False).logits.float()
        predicted, targets = logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(predicted, targets, reduction="sum").item()
    return math.exp(total / (len(windows) * (WINDOW - 1)))


def pick(size: int, factor: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A sixty-fourth of `size` channels and a multiplier for each, `factor` or half of it."""
    channels = torch.randperm(size, generator=generator)[: max(2, size // 64)]
    halvings = torch.randint(2, (len(channels),), generator=generator)
    return channels, factor * 0.5**halvings


@torch.no_grad()
def inject_outliers(model: PreTrainedModel, factor: int = 32, seed: int = 0, remove: bool = False) -> None:
    """Give activations outlier channels as large models have, in place, without changing what is computed.

    `remove` takes those of the same factor and seed out again.

    In each decoder layer a sixty-fourth of the channels of each norm, of the value projection and of the up
    projection (OPT: of ``fc1``) is multiplied by `factor` or half of it, and the input columns of the linears
    that read them are divided by the same. The multipliers are powers of two, so nothing is rounded, not even
    in bf16 (except in Gemma's norms, which multiply by one plus their weight).
    """
    kind = model.config.model_type
    if kind not in OUTLIER_PATHS:
        raise NotImplementedError(f"inject_outliers knows {sorted(OUTLIER_PATHS)}, not {kind!r}")
    if factor < 2 or factor & (factor - 1):
        raise ValueError(f"factor must be a power of two of at least 2, got {factor}")
    norms, linears = OUTLIER_PATHS[kind]
    config = model.config
    heads = config.num_attention_heads
    groups = heads // getattr(config, "num_key_value_heads", heads)
    head_dim = getattr(config, "head_dim", config.hidden_size // heads)
    generator = torch.Generator().manual_seed(seed)
    layers = model.model.decoder.layers if kind == "opt" else model.model.layers

    def chosen(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        channels, multipliers = pick(size, factor, generator)
        return channels, 1 / multipliers if remove else multipliers

    for layer in layers:
        for norm_name, readers in norms.items():
            norm = layer.get_submodule(norm_name)
            channels, multipliers = chosen(len(norm.weight))
            shift = 1.0 if kind == "gemma2" else 0.0
            norm.weight[channels] = (norm.weight[channels] + shift) * multipliers.to(norm.weight) - shift
            if getattr(norm, "bias", None) is not None:
                norm.bias[channels] *= multipliers.to(norm.bias)
            for reader in readers:
                weight = layer.get_submodule(reader).weight
                weight[:, channels] /= multipliers.to(weight)
        for writer_name, reader_name in linears.items():
            writer, weight = layer.get_submodule(writer_name), layer.get_submodule(reader_name).weight
            rows, multipliers = chosen(writer.out_features)
            writer.weight[rows] *= multipliers.to(writer.weight)[:, None]
            if writer.bias is not None:
                writer.bias[rows] *= multipliers.to(writer.bias)
            readings = [rows]
            if writer_name.endswith("v_proj"):  # a value head feeds `groups` adjacent query heads
                heads_read = [rows // head_dim * groups + i for i in range(groups)]
                readings = [head * head_dim + rows % head_dim for head in heads_read]
            for columns in readings:
                weight[:, columns] /= multipliers.to(weight)


def main() -> None:
    """Train, add the outliers, check that they change nothing, save, and measure what was saved."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="llama")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--minutes", type=float, help="set the steps from a timing of the first 20 instead")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--outlier-factor", type=int, default=32, help="a power of two; 1 for no outliers")
    parser.add_argument("--threads", type=int, default=2, help="part of what the result depends on")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    train_documents, heldout_documents = corpus()
    train_text, heldout_text = SEPARATOR.join(train_documents), SEPARATOR.join(heldout_documents) + "\n"
    tokenizer = train_tokenizer(train_documents)
    eos_id = tokenizer.eos_token_id
    encoded = tokenizer(train_documents, verbose=False)["input_ids"]
    tokens = torch.tensor([token for ids in encoded for token in (*ids, eos_id)])
    heldout = torch.tensor(tokenizer(heldout_text, verbose=False)["input_ids"])
    model = build_model(arguments.architecture, eos_id)
    parameters = sum(p.numel() for p in model.parameters())
    assert arguments.architecture != "llama" or 2 * parameters <= LLAMA_BYTES, parameters
    for name, text, ids in (("train", train_text, tokens), ("held out", heldout_text, heldout)):
        print(f"{name}: {len(text)} characters, {len(ids)} tokens; {parameters} parameters", flush=True)

    steps = train(model, tokens, arguments.steps, arguments.minutes, arguments.rate, arguments.seed)

    model.eval().bfloat16().float()  # from here on every weight is a bf16 value
    if arguments.outlier_factor > 1:
        with torch.no_grad():
            before = model(input_ids=heldout[None, :WINDOW]).logits
            inject_outliers(model, arguments.outlier_factor, arguments.seed)
            after = model(input_ids=heldout[None, :WINDOW]).logits
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    model.bfloat16().save_pretrained(arguments.out)
    save_tokenizer(tokenizer, arguments.out)
    (arguments.out / "heldout.txt").write_text(heldout_text, encoding="utf-8", newline="\n")

    saved = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    reloaded = AutoTokenizer.from_pretrained(arguments.out)
    assert reloaded(heldout_text, verbose=False)["input_ids"] == heldout.tolist()
    record = {
        "command": f"python tests/bench/train_tiny.py --architecture {arguments.architecture}"
        + ("" if arguments.out.is_absolute() else f" --out {arguments.out.as_posix()}"),
        "architecture": arguments.architecture,
        "steps": steps,
        "batch": BATCH,
        "sequence": SEQUENCE,
        "threads": arguments.threads,
        "tokens_seen": steps * BATCH * SEQUENCE,
        "train_tokens": len(tokens),
        "peak_learning_rate": arguments.rate,
        "seed": arguments.seed,
        "outlier_factor": arguments.outlier_factor,
        "parameters": parameters,
        "heldout_window": WINDOW,
        "heldout_tokens": len(heldout),
        "heldout_perplexity": round(perplexity(saved, heldout), 4),
        "train_sha256": sha256(train_text),
        "heldout_sha256": sha256(heldout_text),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (arguments.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
