"""Tokens per second of a model with the decoder layers of a 7B, four of them, in bf16 and quantized, for one sequence.

`generate`: greedy, 64 tokens after a prompt of 16, by the host's clock, for the host is what it waits for. `compiled`:
the same with a static cache, for which transformers calls torch.compile(mode="reduce-overhead") and so CUDA graphs;
compiling is left out.
`graph`: steps of one token with a static cache in a CUDA graph, by the card's clock, without choosing a token.
A model of 32 layers is slower by their number; its head and embeddings are those of this one.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.utils import logging

from hf_awq_offload import AwqOffloadConfig, quantize_model
from hf_awq_offload.nn.awq_linear import choose_backend

from .device import GIB, graph_of, host_milliseconds, milliseconds, rate
from .made_models import SHAPE_7B, SHAPE_SMALL, random_llama
from .recorder import NotRunError, Recorder

PROMPT_TOKENS = 16
QUICK = {"n_grid": 0, "clip": False, "rounding": "nearest"}
"""Quantizes without data: speed does not depend on the codes."""

logging.disable_progress_bar()


def run(recorder: Recorder) -> None:
    shape = SHAPE_SMALL if recorder.is_small else SHAPE_7B
    model = random_llama(2 if recorder.is_small else 4, shape).to("cuda")
    model.generation_config.pad_token_id = 0
    measured = _Measured(recorder, new_tokens=4 if recorder.is_small else 64)
    measured.of("dense", model)
    with recorder.attempt("dense, compiled"):
        measured.compiled("dense", model)
    quantize_model(model, AwqOffloadConfig(**QUICK))
    torch.cuda.empty_cache()
    for backend in ("triton", "tinygemm", "torch"):
        with recorder.attempt(backend):
            choose_backend(model, backend)
            measured.of(backend, model)
    for backend in ("triton", "tinygemm"):
        with recorder.attempt(f"{backend}, compiled"):
            choose_backend(model, backend)
            measured.compiled(backend, model)


class _Measured:
    """Measures one model after the other in the same way."""

    def __init__(self, recorder: Recorder, new_tokens: int):
        self.recorder, self.new_tokens = recorder, new_tokens
        self.prompt = torch.arange(1, PROMPT_TOKENS + 1, device="cuda")[None]

    def of(self, way: str, model: PreTrainedModel) -> None:
        """Reports generate without compiling, and a step in a CUDA graph."""
        tokens = self.new_tokens // 8 + 1 if way == "torch" else self.new_tokens
        took = host_milliseconds(lambda: self._generate(model, tokens), 1 if self.recorder.is_small else 3)
        self.recorder.figure(f"decoding.{way}_generate", rate(tokens, took))
        self.recorder.details("weights", way=way, gib=torch.cuda.memory_allocated() / GIB)
        if way == "torch":
            return
        with self.recorder.attempt(f"{way}, a step in a CUDA graph"):
            self.recorder.figure(f"decoding.{way}_graph", rate(1, self._step_ms(model)))

    def compiled(self, way: str, model: PreTrainedModel) -> None:
        """Reports generate with a static cache, which transformers compiles."""
        static = {"cache_implementation": "static"}
        self._generate(model, 2, **static, disable_compile=True)  # a linear settles on its backend's layout
        self.recorder.require_a_card("torch.compile")
        self.recorder.require_seconds(35)
        torch.compiler.reset()
        model.__dict__.pop("_compiled_call", None)  # of another backend
        took = host_milliseconds(lambda: self._generate(model, self.new_tokens, **static), 3, warm_up=2)
        if "_compiled_call" not in model.__dict__:
            raise NotRunError("transformers has not compiled it")
        self.recorder.figure(f"decoding.{way}_compiled", rate(self.new_tokens, took))

    def _generate(self, model: PreTrainedModel, tokens: int, **changes: Any) -> None:
        fields = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False} | changes
        result = cast(Any, model).generate(self.prompt, **fields)
        if result.shape[1] != PROMPT_TOKENS + tokens:
            raise RuntimeError(f"{result.shape[1] - PROMPT_TOKENS} tokens were generated, not {tokens}")

    @torch.inference_mode()
    def _step_ms(self, model: PreTrainedModel) -> float:
        """Returns the ms of a token in a CUDA graph of eight steps."""
        steps = 8
        cache = StaticCache(config=model.config, max_cache_len=512)
        forward = cast(Any, model)
        positions = torch.arange(PROMPT_TOKENS, device="cuda")[None]
        forward(self.prompt, position_ids=positions, past_key_values=cache, use_cache=True)
        token, position = self.prompt[:, :1].clone(), torch.full((1, 1), PROMPT_TOKENS, device="cuda")

        def step() -> Any:
            return forward(token, position_ids=position, past_key_values=cache, use_cache=True).logits

        step()
        self.recorder.require_a_card("a CUDA graph")
        try:
            graph = graph_of([step] * steps)
        except RuntimeError as error:
            if _is_quantized(model) and self.dense_was_captured:
                raise
            raise NotRunError(f"transformers' step can't be captured: {str(error)[:200]}") from error
        self.dense_was_captured = True
        return milliseconds([graph.replay], 9) / steps

    dense_was_captured = False


def _is_quantized(model: PreTrainedModel) -> bool:
    return getattr(model, "hf_quantizer", None) is not None
