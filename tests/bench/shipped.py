"""Shared by benchmarks on the shipped model: the model, its held-out text, calibration tokens, a timed run."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from hf_awq_offload import AwqOffloadConfig, quantize_model
from hf_awq_offload.calibration.dataset import load_calibration_set
from hf_awq_offload.cli.demo import SHIPPED_MODEL
from hf_awq_offload.reporting.evaluation import token_windows

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/, for `references`
logging.disable_progress_bar()

WINDOW_TOKENS = 512


def load_model() -> PreTrainedModel:
    """Loads the shipped model in fp32."""
    return AutoModelForCausalLM.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)


def heldout_windows(model: Path = SHIPPED_MODEL) -> list[Tensor]:
    """Returns the held-out text beside a model, in windows of (1, 512) token ids."""
    text = (model / "heldout.txt").read_text(encoding="utf-8")
    token_ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt", verbose=False).input_ids[0]
    return token_windows(token_ids, WINDOW_TOKENS)


def builtin_sequences(n_samples: int, model: Path = SHIPPED_MODEL) -> list[Tensor]:
    """Returns calibration sequences from the built-in text, (512,) token ids each."""
    config = AwqOffloadConfig(n_samples=n_samples, max_seq_len=WINDOW_TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(model)
    return load_calibration_set(config, load_tokenizer=lambda: tokenizer, vocab_size=len(tokenizer)).sequences


def quantized(config: AwqOffloadConfig) -> tuple[PreTrainedModel, float]:
    """Quantizes the shipped model with `config`; returns the model and the seconds it took."""
    model = load_model()
    start = time.perf_counter()
    quantize_model(model, config)
    return model, time.perf_counter() - start
