"""Memory that is limited, and memory that runs out: what is in the way of a run is answered, or named.

Decoder layers of hidden size 2048. Limits are those of `max_memory`, which torch's allocator enforces.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_awq_offload import AwqOffloadConfig, MemoryLimitError, plan, quantize, quantize_model

from .device import GIB, Peak
from .made_models import SHAPE_MEMORY, SHAPE_SMALL, random_llama, recipe, write_llama
from .recorder import NotRunError, Recorder

DEVICE = "cuda:0"
PLANS = (1.0, 1.15, 1.3, 1.6, 2.0, 3.0)
"""Limits that are tried, in terms of the plan: it leaves out what the allocator and CUDA's libraries hold beside."""
TOO_LITTLE = 2**20
"""Bytes that no run can do with: a decoder layer of these shapes does not fit."""
ROOM = (1.25, 1.6, 2.2)
"""Limits for a run whose micro-batches are far too large, in terms of what one with small ones has reserved."""

logging.disable_progress_bar()


def run(recorder: Recorder) -> None:
    case = _Case(recorder, SHAPE_SMALL, 1, 256, 64) if recorder.is_small else _Case(recorder, SHAPE_MEMORY, 1, 64, 512)
    planned_bytes = plan(case.source, case.recipe(batch_tokens=case.few), probe=False).accelerator_peak_bytes
    reserved_bytes = case.reserved_bytes(batch_tokens=case.few)
    recorder.details("without a limit", planned_gib=planned_bytes / GIB, reserved_gib=reserved_bytes / GIB)
    with recorder.attempt("the least limit that a run keeps to"):
        case.least_limit(planned_bytes)
    with recorder.attempt("a run that meets its limit goes on"):
        case.goes_on(reserved_bytes)
    with recorder.attempt("a run that can't go on names the phase"):
        case.names_the_phase(TOO_LITTLE)
    with recorder.attempt("a limit below the plan is refused before the run"):
        case.is_refused(planned_bytes // 2)
    with recorder.attempt("the limits are gone"):
        torch.empty(4 * reserved_bytes, dtype=torch.uint8, device=DEVICE)


@dataclass
class _Case:
    """A model of `layers` decoder layers, `samples` sequences of `length` tokens, and what is tried with them."""

    recorder: Recorder
    shape: dict[str, int]
    layers: int
    samples: int
    length: int

    def __post_init__(self) -> None:
        self.source = write_llama(self.recorder.folder / "source", self.layers, self.shape)
        self.out = self.recorder.folder / "out"
        self.few = self.length * (8 if self.recorder.is_small else 1)  # tokens of a small micro-batch

    def recipe(self, **changes: Any) -> AwqOffloadConfig:
        return recipe(self.shape["vocab_size"], self.samples, self.length, **changes)

    def reserved_bytes(self, **changes: Any) -> int:
        """Returns what a run has reserved at most."""
        with Peak() as peak:
            quantize(self.source, self.out, self.recipe(**changes), overwrite=True)
        return peak.reserved_bytes

    def least_limit(self, planned_bytes: int) -> None:
        """Finds the first of PLANS with which a run ends; it chooses its micro-batches by itself."""
        for share in PLANS[:1] if self.recorder.is_small else PLANS:
            self.recorder.require_seconds(10)
            limit_bytes = int(planned_bytes * share)
            try:
                reserved_bytes = self.reserved_bytes(max_memory={DEVICE: limit_bytes})
            except MemoryLimitError as error:
                self._must_name_the_phase(f"a limit of {share} plans", error)
                continue
            what = f"{reserved_bytes} bytes were reserved, the limit is {limit_bytes}"
            self.recorder.check(f"a limit of {share} plans", reserved_bytes <= limit_bytes, what)
            self.recorder.figure("memory.least_limit", share)
            return
        if self.recorder.is_small:
            raise NotRunError("layers as small as these need more than is planned")
        raise MemoryLimitError(f"no run ended within {PLANS[-1]} times its plan of {planned_bytes / GIB:.2f} GiB")

    def goes_on(self, reserved_bytes: int) -> None:
        """Micro-batches that are far too large are halved until they fit."""
        for share in ROOM:
            self.recorder.require_seconds(10)
            model = random_llama(self.layers, self.shape)
            before = torch.cuda.memory_stats().get("num_ooms", 0)
            limit = {"max_memory": {DEVICE: int(reserved_bytes * share)}}
            try:
                quantize_model(model, self.recipe(batch_tokens=self.samples * self.length, **limit))
            except MemoryLimitError as error:
                self._must_name_the_phase(f"room of {share}", error)
                continue
            met = torch.cuda.memory_stats().get("num_ooms", 0) - before
            finite = _is_finite(model)
            self.recorder.check("a run that meets its limit", met > 0, "the limit was never met")
            self.recorder.check("a run that meets its limit", finite, "the logits of the result are not finite")
            self.recorder.figure("memory.goes_on", met > 0 and finite)
            self.recorder.details("went on", room=share, ran_out_times=met)
            return
        self.recorder.figure("memory.goes_on", False)
        self.recorder.failure("a run that meets its limit", f"none went on, with up to {ROOM[-1]} times what is needed")

    def names_the_phase(self, limit_bytes: int) -> None:
        """Where halving does not help, the error names phase and layer, and the model is what it was."""
        model = random_llama(self.layers, self.shape)
        before = _digest(model)
        try:
            quantize_model(model, self.recipe(batch_tokens=self.few, max_memory={DEVICE: limit_bytes}))
        except MemoryLimitError as error:
            self.recorder.figure("memory.names_phase", self._must_name_the_phase("a run that can't go on", error))
        else:
            self.recorder.failure("a run that can't go on", f"it ended within {limit_bytes / GIB:.2f} GiB")
        self.recorder.check("a run that can't go on", _digest(model) == before, "the model is not what it was")

    def is_refused(self, limit_bytes: int) -> None:
        out = self.recorder.folder / "refused"
        config = self.recipe(batch_tokens=self.few, max_memory={DEVICE: limit_bytes})
        try:
            quantize(self.source, out, config)
        except MemoryLimitError as error:
            self.recorder.details("refused", error=str(error)[:400])
            self.recorder.check("a limit below the plan", not out.exists(), f"{out} was written")
        else:
            self.recorder.failure("a limit below the plan", "the run was not refused")

    def _must_name_the_phase(self, what: str, error: MemoryLimitError) -> bool:
        """Reports what an error says; returns whether it names the phase, and lets go of what it holds."""
        named = "phase '" in str(error) or "allowed by max_memory" in str(error)
        self.recorder.check(what, named, f"the error names no phase: {error}")
        self.recorder.details("ran out", of=what, error=str(error)[:400])
        seen: BaseException | None = error
        while seen is not None:
            seen.__traceback__ = None
            seen = seen.__cause__ or seen.__context__
        torch.cuda.empty_cache()
        return named


@torch.no_grad()
def _is_finite(model: PreTrainedModel) -> bool:
    on_device = model.to(DEVICE)
    return bool(torch.isfinite(on_device(torch.arange(3, 35, device=DEVICE)[None]).logits).all())


def _digest(model: PreTrainedModel) -> str:
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
