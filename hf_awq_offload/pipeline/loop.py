"""The one loop: decoder layer by decoder layer, from calibration data to packed weights.

    for turn in inputs.turns():     the model's order
        adopt                       a layer that the journal has
        onload                      -> offload/onloader.py
        structure                   which linears share an input, what absorbs a scale -> structures.py
        forward                     statistics of the inputs -> calibration/
        search                      scales, clip, round, pack -> layer_quantization.py
        commit                      journal, RAM or disk -> run_storage.py

This file says in which order, on which data and where. A layer is committed before the next one begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from typing import cast

from torch import nn

from ..calibration.batches import batches_of, decoder_and_probes
from ..calibration.dataset import CalibrationSet
from ..calibration.layer_inputs import LayerInputs, LayerTurn
from ..calibration.layer_statistics import LayerStatistics
from ..calibration.opened_inputs import layers_that_run, open_layer_inputs
from ..config import AwqOffloadConfig
from ..errors import MemoryLimitError, ModelStructureError
from ..logs import get_logger
from ..machine_errors import first_line, is_out_of_memory
from ..model.decoder_layers import calibration_mode, runner_on
from ..model.folds import LayerStructure
from ..model.mtp_layer import MtpLayer
from ..offload.devices import CPU, release_cached
from ..offload.hidden_states import HiddenWriter
from ..offload.journal import LayerCommit
from ..offload.memory_limit import at_most, large_blocks_apart, release_freed
from ..precision import ieee_products
from ..report import QuantizationReport
from .budget import Budget, budget_of
from .layer_choices import adoptable_commits, layer_choices
from .layer_context import LayerContext, Undo
from .layer_quantization import quantize_with_statistics, quantize_without_data
from .left_out import layers_left_out, not_reached
from .memory_pressure import MemoryPressure, what_helps
from .run_context import Run
from .run_record import RunRecord
from .run_storage import RunStorage
from .stack_rounding import Rounder, round_and_pack
from .structures import Structures
from .weight_checks import require_sound_weights

logger = get_logger(__name__)

CACHED_SHARE = 1 / 8
"""Share of the planned memory that the allocator may keep of freed memory from one step to the next."""


def quantize_layers(
    model: nn.Module,
    recipe: AwqOffloadConfig,
    storage: RunStorage,
    is_quantizable: Callable[[str], bool],  # full name of a linear -> whether to quantize it
    calibration: CalibrationSet | None,  # None: recipe.needs_calibration is False
    undo: Undo | None = None,
    most_layers: int | None = None,
    rounder: Rounder = round_and_pack,
    mtp: MtpLayer | None = None,
) -> QuantizationReport:
    """Replaces the quantizable linears of the model's decoder layers by packed ones, in place.

    Stops after `most_layers`. A layer for multi-token prediction comes last, and is left out where its inputs can't be
    computed.

    Raises:
        ModelStructureError: the outputs of quantized layers are to be propagated, and the layers form no chain.
        MemoryLimitError: memory ran out, in however small micro-batches; the message names the phase.
        StorageError: the journal cannot be written; what it held before is whole.
    """
    device = storage.onloader.device
    title = "Quantizing" if most_layers is None else "Planning"
    record = RunRecord(title, device, tokens=0 if calibration is None else calibration.tokens)
    budget = None if calibration is None else budget_of(model, recipe, device, calibration)
    pressure = MemoryPressure(
        storage.onloader,
        CPU if budget is None else budget.statistics_device,
        None if budget is None else budget.chunk_elements,
        None if budget is None else int(budget.peak_bytes * CACHED_SHARE),
        budget is not None and budget.grams_in_ram,
    )
    if budget is not None and recipe.prefetch and not budget.prefetch:
        logger.info("%s has no room for the next layer: it is not read ahead.", device)
        storage.onloader.stop_reading_ahead()
    run = Run(model, recipe, storage, record, is_quantizable, undo, most_layers, rounder, pressure, mtp)
    limits = {limited: recipe.memory_limit_bytes(limited) for limited in (device, CPU)}
    bounded = nullcontext() if storage.onloader.weights is None else large_blocks_apart()
    try:
        with ExitStack() as stack:
            for context in (at_most(limits), bounded, ieee_products(), calibration_mode(model)):
                stack.enter_context(context)
            stack.enter_context(storage.onloader.on_demand())
            stack.enter_context(record.progress)
            adopted = _without_data(run) if budget is None else _on_data(run, cast(CalibrationSet, calibration), budget)
            storage.settle()
            storage.install(adopted, run.context)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryLimitError(
            f"{device} ran out of memory in {record.where}: {first_line(error)} {what_helps(record.phase)}"
        ) from error
    record.add_left_out(layers_left_out(record.report, model, is_quantizable))
    return record.report


def _without_data(run: Run) -> list[LayerCommit]:
    """Rounds every layer to nearest; returns those that the journal had already."""
    onloader, record = run.storage.onloader, run.record
    with onloader.non_layer_weights_loaded():
        names = layers_that_run(run.model, onloader.run_layer)
    names = [*names, *([] if run.mtp is None else [run.mtp.name])][: run.most_layers]
    record.progress.expect(len(names))
    choices = layer_choices(run, names)
    commits, adopted = adoptable_commits(run.storage.commits, choices), []
    onloader.expect([name for name in names if name not in commits])
    for index, name in enumerate(names):
        if name in commits:
            adopted.append(commits[name])
            run.adopt(commits[name])
            continue
        start = time.perf_counter()
        with run.onloaded(name):
            require_sound_weights(run.context(name))
            with record.timed("search", name):
                groups = quantize_without_data(run.context(name))
            report = record.layer_report(name, groups, time.perf_counter() - start)
            record.add(report, {})
            with record.timed("commit", name):
                run.storage.store_layer(index, report, {}, choices[name], run.pressure.notes())
        record.progress.finished(report)
    return adopted


def _on_data(run: Run, calibration: CalibrationSet, budget: Budget) -> list[LayerCommit]:
    """Calibrates and quantizes every layer; returns those that the journal had already."""
    onloader = run.storage.onloader
    with onloader.non_layer_weights_loaded():
        decoder, probes = decoder_and_probes(run.model, calibration, onloader.run_layer)
    structures = Structures(run.model, run.device, run.recipe.seed)
    if budget.statistics_device != run.device:
        logger.info("Statistics are kept in RAM: %s has no room for them.", run.device)
    with ExitStack() as stack:
        with run.record.timed("skeleton"):
            inputs = stack.enter_context(
                open_layer_inputs(
                    run.model,
                    partial(batches_of, calibration, probes),
                    budget.batch_tokens,
                    onloader.run_layer,
                    decoder,
                    run.storage.hidden,
                    onloader.non_layer_weights_loaded,
                    run.mtp,
                    run.device,
                )
            )
        longest_tokens = max((len(sequence) for sequence in calibration.sequences), default=None)
        return _CalibratedLayers(run, inputs, structures, longest_tokens).quantized()


class _CalibratedLayers:
    """The loop over decoder layers with calibration data.

    Args:
        run: the run.
        inputs: gives every layer its inputs.
        structures: finds the folds of every layer.
        longest_tokens: tokens of the longest text, which no micro-batch can cut; None if there are samples alone.
    """

    def __init__(self, run: Run, inputs: LayerInputs, structures: Structures, longest_tokens: int | None):
        self.run, self.inputs, self.structures = run, inputs, structures
        self.longest_tokens = longest_tokens
        self.collectors: dict[str, LayerStatistics] = {}
        """Statistics of layers that have turns left."""
        self.choices = layer_choices(run, inputs.layer_names)
        self.changed: str | None = None
        """The layer whose weights were changed last: it cannot run again as it was."""

    def quantized(self) -> list[LayerCommit]:
        """Quantizes the layers that the journal does not have; returns those that it has."""
        names, record, onloader = self.inputs.layer_names, self.run.record, self.run.storage.onloader
        self._check_that_quantized_layers_can_run_again()
        commits = self._adoptable_commits()
        adopted = []
        onloader.expect([name for name in names if name not in commits] if self.inputs.can_run_again else [])
        record.progress.expect(min(len(names), self.run.most_layers or len(names)))
        for turn in self.inputs.turns():
            if record.finished_layers == self.run.most_layers:
                break
            if turn.name not in commits:
                self._take_turn(turn)
                continue
            if not self.inputs.can_run_again:  # its forward passes wait for the layer's outputs
                self._pass_through(turn.name)
            if turn.is_last:
                adopted.append(commits[turn.name])
                self.run.adopt(commits[turn.name])
        return adopted

    def _take_turn(self, turn: LayerTurn) -> None:
        """Takes a turn, with less and less memory if it runs out."""
        while True:
            self._rewind_to(turn.name)
            try:
                self._learn_structure_from_first(turn.name)
                self._quantize(turn)
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._make_room(turn.name, error)

    def _quantize(self, turn: LayerTurn) -> None:
        """Gathers statistics in each turn of a layer; in the last one, quantizes and stores it."""
        name, run, record, start = turn.name, self.run, self.run.record, time.perf_counter()
        context, outputs = run.context(name), None
        with run.onloaded(name) as layer, ExitStack() as closing_outputs:
            with record.timed("structure", name):
                require_sound_weights(context)
                structure = self.structures.of(context, self.inputs.probe_calls(name))
            self.run.pressure.trim_cache()
            with record.timed("forward", name):
                outputs = self.inputs.next_writer()
                closing_outputs.enter_context(nullcontext() if outputs is None else closing(outputs))
                self._collect(context, structure, into=None if self._propagates_quantized else outputs)
            if not turn.is_last:
                return
            with record.timed("search", name):
                statistics = self.collectors.pop(name).gathered(name, run.recipe.min_expert_tokens)
                self.changed = name
                groups = quantize_with_statistics(context, structure, statistics, run.rounder)
            if self._propagates_quantized and outputs is not None:
                with record.timed("forward", name):
                    self.inputs.run(runner_on(layer, run.device), into=outputs)
            report = record.layer_report(name, groups, time.perf_counter() - start, statistics.starved())
            left_out = not_reached(context, structure)
            record.add(report, left_out)
            with record.timed("commit", name):
                index = self.inputs.layer_names.index(name)
                memory, tokens = run.pressure.notes(), self.inputs.batch_tokens
                run.storage.store_layer(index, report, left_out, self.choices[name], memory, tokens, outputs)
        self.inputs.advance(outputs)
        release_freed()
        record.progress.finished(report)

    def _collect(self, context: LayerContext, structure: LayerStructure, into: HiddenWriter | None) -> None:
        """Runs the layer, which is onloaded, on all batches for its statistics and its outputs."""
        if context.name not in self.collectors:
            self.collectors[context.name] = LayerStatistics(
                context.layer,
                structure,
                context.quantizable,
                self.run.pressure.statistics_device,
                self.run.recipe.all_experts,
            )
        self.inputs.run(runner_on(context.layer, self.run.device), self.collectors[context.name], into)

    # -- resuming ----------------------------------------------------------------------------------------------------

    @property
    def _propagates_quantized(self) -> bool:
        """Whether the next layer is calibrated on outputs of quantized layers."""
        return self.run.recipe.propagate == "quantized"

    def _check_that_quantized_layers_can_run_again(self) -> None:
        if self._propagates_quantized and not self.inputs.can_run_again:
            raise ModelStructureError(
                f"The decoder layers of {type(self.run.model).__name__} do not simply pass their hidden states on, so "
                "none of them can run again once it is quantized. Expected propagate='original'."
            )

    def _adoptable_commits(self) -> Mapping[str, LayerCommit]:
        """Returns the layers of the journal that need not be quantized again.

        The original layers cannot bring back what quantized ones put out. A run that propagates it resumes from the
        last hidden states that the journal has.
        """
        commits, names = adoptable_commits(self.run.storage.commits, self.choices), self.inputs.layer_names
        if not self._propagates_quantized:
            return commits
        missing = next((index for index, name in enumerate(names) if name not in commits), len(names))
        resumed = missing if missing == len(names) else self.run.storage.hidden.last_committed(missing)
        return {name: commits[name] for name in names[:resumed]}

    def _rewind_to(self, name: str) -> None:
        """Brings the inputs to a layer.

        Raises:
            MemoryLimitError: memory runs out on the way. Smaller micro-batches cannot help: the layers in the journal
                must run in those that they had, to give the same hidden states.
        """
        try:
            self.run.pressure.attempt_reading_less(partial(self.inputs.rewind_to, name))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryLimitError(
                f"{self.run.device} ran out of memory while finished layers ran again to bring back the inputs of "
                f"{name}: {first_line(error)} They run in the micro-batches of the earlier run. Free memory, "
                "set prefetch=False, or use the execution_device of that run."
            ) from error

    def _learn_structure_from_first(self, name: str) -> None:
        """Probes the layer that the earlier run has probed, so that a resumed run finds the same structure."""
        first = self.structures.first_of_kind(name, self.inputs.layer_names)
        if self.inputs.can_run_again and first != name and not self.structures.knows(name):
            with self.run.storage.onloader.onloaded(first):
                self.structures.of(self.run.context(first), self.inputs.probe_calls(first))

    def _pass_through(self, name: str) -> None:
        """Lets paused forward passes through a layer that an earlier run has quantized."""
        with self.run.storage.onloader.onloaded(name) as layer:
            if not self.structures.knows(name):
                self.structures.of(self.run.context(name), self.inputs.probe_calls(name))
            self.inputs.run(runner_on(layer, self.run.device))

    # -- running out of memory ---------------------------------------------------------------------------------------

    def _make_room(self, name: str, error: Exception) -> None:
        """Gives something up for another attempt at a layer that has run out of memory.

        Search and rounding make room on their own, step by step (`MemoryPressure.attempt`).

        Raises:
            MemoryLimitError: nothing is left that would help.
        """
        record, pressure = self.run.record, self.run.pressure
        is_forward = record.phase == "forward"
        can_repeat = self.changed != name and (self.inputs.can_run_again or record.phase in ("onload", "structure"))
        made_room = can_repeat and (
            (is_forward and self._halve_batches(name, error))
            or pressure.stop_reading_ahead(error)
            or (is_forward and pressure.move_statistics(error))
        )
        if not made_room:
            raise MemoryLimitError(
                f"{self.run.device} ran out of memory on layer {name}, with micro-batches of "
                f"{self.inputs.batch_tokens} tokens, in {record.where}: {first_line(error)} {what_helps(record.phase)}"
            ) from error
        if is_forward:
            self.collectors.pop(name, None)
        self._release_what_holds(error)

    def _halve_batches(self, name: str, error: Exception) -> bool:
        """Cuts smaller micro-batches; returns False if a text fills one already."""
        tokens = self.inputs.batch_tokens
        if self.longest_tokens is None or tokens <= self.longest_tokens:
            return False
        logger.warning(
            "%s ran out of memory on layer %s (%s) Continuing with micro-batches of %d tokens instead of %d.",
            self.run.device, name, first_line(error), tokens // 2, tokens,
        )  # fmt: skip
        self._release_what_holds(error)  # before other micro-batches are allocated
        self.inputs.rebatch(tokens // 2)
        return True

    def _release_what_holds(self, error: Exception) -> None:
        error.__traceback__ = None  # it holds the activations
        release_cached(self.run.device)
