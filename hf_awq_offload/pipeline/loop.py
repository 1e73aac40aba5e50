"""The one loop: decoder layer by decoder layer, from calibration data to packed weights.

    skeleton pass (what each layer is given) -> for each layer: onload, statistics, scales, clip, round, pack, offload

What happens on one layer is in `layer_quantization.py`; this file says in which order, on which data, and where. A
layer is committed to the journal, if there is one, before the next begins; layers that are there already are not
quantized again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..calibration.batches import batches_of, decoder_and_probes
from ..calibration.dataset import CalibrationSet
from ..calibration.forward_pass import token_ids_of
from ..calibration.layer_inputs import PROBES, Feed, SkeletonFeed, Visit, layers_that_run, open_feed
from ..calibration.layer_statistics import LayerStatistics
from ..config import AwqOffloadConfig
from ..errors import MemoryLimitError, ModelStructureError
from ..logs import get_logger
from ..model.decoder_layers import LayerRunner, ProbeCalls, calibration_mode, candidate_layers, shared_parameters
from ..model.fold_probing import discover_structure, without_refuted_folds
from ..model.folds import LayerStructure, structure_key, without_folds_of
from ..model.linears import linears_in
from ..nn.quantized_linear import packed_tensors
from ..offload.hidden_states import HiddenStates, HiddenWriter
from ..offload.journal import LayerCommit
from ..offload.memory import MemoryWatch, at_most, is_out_of_memory, large_blocks_apart, release_cached, release_freed
from ..ops.blocks import matmul_dtype
from ..report import GroupReport, LayerReport, QuantizationReport
from ..reporting.progress import Progress
from .budget import CPU, budget_of
from .layer_quantization import LayerContext, Undo, quantize_with_statistics, quantize_without_data
from .left_out import add_layers_left_out, not_reached, reached
from .run_storage import Workplace

logger = get_logger(__name__)


def quantize_layers(
    model: nn.Module,
    recipe: AwqOffloadConfig,
    place: Workplace,
    is_quantizable: Callable[[str], bool],  # full name of a linear -> whether to quantize it
    calibration: CalibrationSet | None,  # None: recipe.needs_calibration is False
    undo: Undo | None = None,
    most_layers: int | None = None,
) -> QuantizationReport:
    """Replace the quantizable linears of `model`'s decoder layers by packed ones, in place.

    After `most_layers` it stops.

    Raises:
        ModelStructureError: outputs of quantized layers are to be passed on, and the layers do not form a chain.
    """
    job = _Job(model, recipe, place, is_quantizable, undo, most_layers)
    limits = {device: recipe.memory_limit_bytes(device) for device in (job.device, CPU)}
    bounded = nullcontext() if place.onloader.weights is None else large_blocks_apart()
    with at_most(limits), bounded, calibration_mode(model), place.onloader.on_demand(), job.progress:
        if calibration is None:
            job.without_data()
        else:
            _Calibrated(job, calibration).run()
        place.install(job.adopted, job.context)
    return add_layers_left_out(job.report, model, is_quantizable)


class _Job:
    """What runs with and without data have in common."""

    def __init__(
        self,
        model: nn.Module,
        recipe: AwqOffloadConfig,
        place: Workplace,
        is_quantizable: Callable[[str], bool],
        undo: Undo | None,
        most_layers: int | None,
    ):
        self.model, self.recipe, self.place, self.undo = model, recipe, place, undo
        self.most_layers = most_layers
        self.is_quantizable = is_quantizable
        self.device = place.onloader.device
        self.report = QuantizationReport()
        self.progress = Progress("Quantizing" if most_layers is None else "Planning")
        self.memory = MemoryWatch(self.device)
        self.layer_seconds: dict[str, dict[str, float]] = defaultdict(dict)
        """Layer -> phase -> seconds."""
        self.adopted: list[LayerCommit] = []
        """Layers that an earlier run has quantized."""

    def context(self, name: str) -> LayerContext:
        layer = self.model.get_submodule(name)
        quantizable = frozenset(part for part in linears_in(layer) if self.is_quantizable(f"{name}.{part}"))
        return LayerContext(name, layer, quantizable, self.recipe, self.undo)

    def run_layer(self, name: str, use: Callable[[LayerRunner], Any]) -> Any:
        with self.place.onloader.onloaded(name) as layer:
            return use(_runner(layer, self.device))

    def adopt(self, commit: LayerCommit) -> None:
        """Take a layer from the journal."""
        self.adopted.append(commit)
        self.report.layers.append(LayerReport.from_dict(commit.report["layer"]))
        self.report.left_out |= commit.report["left_out"]
        self.progress.adopted(commit.name)

    def layer_report(
        self, name: str, groups: Sequence[GroupReport], seconds: float, starved: dict[str, int] | None = None
    ) -> LayerReport:
        phases = dict(self.layer_seconds[name])
        return LayerReport(name, tuple(groups), seconds, starved or {}, phases, self.memory.now())

    def finish_layer(
        self, index: int, report: LayerReport, left_out: dict[str, str], batch_tokens: int, hidden: HiddenWriter | None
    ) -> None:
        """The layer, which is onloaded, is quantized: make it last."""
        self.report.layers.append(report)
        self.report.left_out |= left_out
        self.place.take_over(index, report, left_out, batch_tokens, hidden)

    @contextmanager
    def timed(self, phase: str, layer: str | None = None) -> Iterator[None]:
        self.progress.phase(phase, layer)
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        for sums in (self.report.phase_seconds, self.layer_seconds[layer] if layer is not None else {}):
            sums[phase] = sums.get(phase, 0.0) + seconds

    def without_data(self) -> None:
        with self.place.onloader.rest():
            names = layers_that_run(self.model, self.run_layer)[: self.most_layers]
        self.progress.expect(len(names))
        commits = self.place.commits
        self.place.onloader.expect([name for name in names if name not in commits])
        for index, name in enumerate(names):
            if name in commits:
                self.adopt(commits[name])
                continue
            start = time.perf_counter()
            with ExitStack() as onloaded:
                with self.timed("onload", name):
                    onloaded.enter_context(self.place.onloader.onloaded(name))
                with self.timed("search", name):
                    groups = tuple(quantize_without_data(self.context(name)))
                report = self.layer_report(name, groups, time.perf_counter() - start)
                with self.timed("commit", name):
                    self.finish_layer(index, report, {}, 0, None)
            self.progress.finished(report)


class _Calibrated:
    """A run over calibration data."""

    def __init__(self, job: _Job, calibration: CalibrationSet):
        self.job, self.calibration = job, calibration
        self.model, self.device, self.place = job.model, job.device, job.place
        self.recipe = job.recipe
        job.report.tokens = calibration.tokens
        with self.place.onloader.rest():
            self.decoder, self.probe_batches = decoder_and_probes(self.model, calibration, job.run_layer)
        self.shared = shared_parameters(self.model)
        self.keys = {name: structure_key(layer) for name, layer in candidate_layers(self.model).items()}
        """Of the layers as they were."""
        self.structures: dict[object, tuple[LayerStructure, int]] = {}
        """With each, which of the probes it was found on."""
        self.found: dict[str, LayerStructure] = {}
        self.collectors: dict[str, LayerStatistics] = {}
        self.position = 0
        """Index of the layer that the feed's hidden states enter."""
        self.budget = budget_of(self.model, job.recipe, self.device, calibration)
        if self.budget.statistics_device != self.device:
            logger.info("Statistics are kept in RAM: %s has no room for them.", self.device)
        self._set_batch_tokens(self.budget.batch_tokens)

    def run(self) -> None:
        with ExitStack() as rest, ExitStack() as stack:
            rest.enter_context(self.place.onloader.rest())
            with self.job.timed("skeleton"):
                self.feed: Feed = stack.enter_context(
                    open_feed(self.model, self.batches, self.job.run_layer, self.decoder)
                )
            self.names = self.feed.layer_names
            self.index = {name: index for index, name in enumerate(self.names)}
            self._check_that_quantized_layers_can_run_again()
            commits = self._adoptable_commits()
            if isinstance(self.feed, SkeletonFeed):
                rest.close()  # until the skeleton pass is repeated
                self.feed.hidden = self.place.settled(self.feed.hidden)
                self.place.onloader.expect([name for name in self.names if name not in commits])
            else:
                self.place.onloader.expect([])
            self.job.progress.expect(min(len(self.names), self.job.most_layers or len(self.names)))
            for visit in self.feed.visits():
                if len(self.job.report.layers) == self.job.most_layers:
                    break
                self._visit(visit, commits.get(visit.name))

    @property
    def passes_quantized(self) -> bool:
        """Whether the next layer is calibrated on outputs of quantized layers."""
        return self.recipe.propagate == "quantized"

    def _check_that_quantized_layers_can_run_again(self) -> None:
        if self.passes_quantized and not isinstance(self.feed, SkeletonFeed):
            raise ModelStructureError(
                f"The decoder layers of {type(self.model).__name__} do not simply hand their hidden states on, so none "
                "of them can run again once it is quantized. Expected propagate='original'."
            )

    def _adoptable_commits(self) -> Mapping[str, LayerCommit]:
        """Layers of the journal that need not be quantized again.

        What quantized layers put out can't be brought back by the original ones: a run that passes it on goes back to
        the last hidden states that the journal has.
        """
        commits = self.place.commits
        if not self.passes_quantized:
            return commits
        missing = next((index for index, name in enumerate(self.names) if name not in commits), len(self.names))
        known = [index for index in range(1, missing + 1) if self.place.has_hidden(index)]
        reached = missing if missing == len(self.names) else max([*known, 0])
        return {name: commits[name] for name in self.names[:reached]}

    def _visit(self, visit: Visit, commit: LayerCommit | None) -> None:
        name = visit.name
        if commit is not None:
            if not isinstance(self.feed, SkeletonFeed):
                self._pass_through(visit)
            if visit.is_last:
                self.job.adopt(commit)
            return
        while True:
            try:
                if isinstance(self.feed, SkeletonFeed):
                    self._bring_hidden_to(self.index[name])
                    self._learn_structure_from_first(name)
                self._quantize(visit)
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._halve_batches(name, error)

    def _quantize(self, visit: Visit) -> None:
        """Statistics of a layer, and at its last visit all the rest."""
        name, index, start = visit.name, self.index[visit.name], time.perf_counter()
        context = self.job.context(name)
        with self.job.timed("onload", name), ExitStack() as onloading:
            layer = onloading.enter_context(self.place.onloader.onloaded(name))
            onloaded = onloading.pop_all()
        with onloaded, ExitStack() as closing:
            with self.job.timed("structure", name):
                self._find_structure(name, layer)
            if name not in self.collectors:
                self.collectors[name] = LayerStatistics(
                    layer, self.found[name], context.quantizable, self.budget.statistics_device, self.recipe.all_experts
                )
            outputs = None
            with self.job.timed("forward", name):
                if isinstance(self.feed, SkeletonFeed):
                    outputs = self.place.hidden_writer(index + 1) if index + 1 < len(self.names) else None
                    self.feed.outputs = None if self.passes_quantized else outputs
                if outputs is not None:
                    closing.callback(outputs.close)
                self._advance(name, layer, self.collectors[name])
            if not visit.is_last:
                return
            with self.job.timed("search", name):
                statistics = self.collectors.pop(name).gathered(name, self.recipe.min_expert_tokens)
                self.began = name
                groups = quantize_with_statistics(context, self.found[name], statistics)
            if self.passes_quantized and outputs is not None:
                assert isinstance(self.feed, SkeletonFeed)
                self.feed.outputs = outputs
                with self.job.timed("forward", name):
                    self._advance(name, layer, None)
            report = self.job.layer_report(name, groups, time.perf_counter() - start, statistics.starved())
            with self.job.timed("commit", name):
                left_out = not_reached(context, self.found[name])
                self.job.finish_layer(index, report, left_out, self.batch_tokens, outputs)
        if outputs is not None:
            self._take_hidden(index, self.place.written(index + 1, outputs))
        release_freed()
        self.job.progress.finished(report)

    def _advance(self, name: str, layer: nn.Module, collector: LayerStatistics | None) -> None:
        """Run the layer over all batches: statistics from those that are data, and its outputs handed on."""
        run = _runner(layer, self.device)
        self.feed.run_probes(run)
        with ExitStack() as stack:
            if collector is not None:
                stack.enter_context(collector.collecting())
            for index in range(PROBES, len(self.counted)):
                if collector is not None:
                    collector.set_counted_tokens(self.counted[index])
                self.feed.run(run, name, index)

    # -- structures ------------------------------------------------------------------------------------------------

    def _find_structure(self, name: str, layer: nn.Module) -> None:
        """Probed once per structure, and proven on every layer before it is used."""
        if name in self.found:
            return
        key, probes, seed = self.keys[name], self.feed.probes(name), self.recipe.seed
        known = key in self.structures
        structure, which = self.structures[key] if known else self._discover(self.job.context(name), key, probes)
        for calls in probes[which + (not known) :]:  # on samples as well: a layer may treat images in another way
            structure = without_refuted_folds(layer, structure, calls, self.device, seed)
        self.found[name] = without_folds_of(structure, self.shared[name])

    def _discover(self, context: LayerContext, key: object, probes: list[ProbeCalls]) -> tuple[LayerStructure, int]:
        """Probed on text, and once more on a sample where text does not reach every linear; and which it was."""
        for which, calls in enumerate(probes):
            structure = discover_structure(context.layer, calls, self.device, self.recipe.seed)
            if key not in self.structures or len(reached(structure)) > len(reached(self.structures[key][0])):
                self.structures[key] = structure, which
            if context.quantizable <= reached(structure):
                break
        return self.structures[key]

    def _learn_structure_from_first(self, name: str) -> None:
        """Where a run goes on: probe the layer that the run before probed, so that both find the same."""
        first = next(other for other in self.names if self.keys[other] == self.keys[name])
        if first != name and self.keys[name] not in self.structures:
            with self.place.onloader.onloaded(first) as layer:
                self._find_structure(first, layer)

    # -- hidden states: going on, and running again ------------------------------------------------------------------

    def _take_hidden(self, index: int, states: HiddenStates) -> None:
        """What the layer made of the hidden states is what the next one is given."""
        assert isinstance(self.feed, SkeletonFeed)
        self.feed.outputs = None
        self.feed.hidden = states
        self.position = index + 1

    def _bring_hidden_to(self, index: int) -> None:
        """Have the feed at a layer: from the journal, or by forward passes of the layers before it."""
        assert isinstance(self.feed, SkeletonFeed)
        if self.position == index:
            return
        known = [each for each in range(1, index + 1) if self.place.has_hidden(each)]
        start = max([*known, self.position if self.position <= index else 0, 0])
        commits = self.place.commits
        if start != self.position:
            before = commits.get(self.names[start - 1]) if start else None
            batch_tokens = self.batch_tokens if before is None else before.batch_tokens
            if not start or batch_tokens != self.batch_tokens:
                self._rebatch(batch_tokens)
            if start:
                states = self.place.hidden(start)
                self.feed.hidden = states.regrouped([len(token_ids_of(batch)) for batch in self.batches[PROBES:]])
            self.position = start
        for each in range(start, index):
            logger.info("Forward pass through %s, whose outputs the journal has no more.", self.names[each])
            name = self.names[each]
            if name in commits and commits[name].batch_tokens != self.batch_tokens:
                self._change_batch_tokens(commits[name].batch_tokens)
            outputs = self.feed.outputs = self.place.scratch_writer(each + 1)
            with self.place.onloader.onloaded(name) as layer:
                self._advance(name, layer, None)
            self._take_hidden(each, outputs.finish())

    def _pass_through(self, visit: Visit) -> None:
        """Let halted forward passes go past a layer that an earlier run has quantized."""
        with self.place.onloader.onloaded(visit.name) as layer:
            if self.keys[visit.name] not in self.structures:
                self._find_structure(visit.name, layer)
            self._advance(visit.name, layer, None)

    # -- micro-batches -----------------------------------------------------------------------------------------------

    def _set_batch_tokens(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        data, counted = batches_of(self.calibration, batch_tokens)
        self.batches = [*self.probe_batches, *data]
        self.counted = [*[None] * PROBES, *counted]

    def _rebatch(self, batch_tokens: int) -> None:
        """Go on with micro-batches of this size; the feed is then at the first layer."""
        assert isinstance(self.feed, SkeletonFeed)
        self._set_batch_tokens(batch_tokens)
        with self.place.onloader.rest():
            self.feed.rebatch(self.batches)
        self.feed.hidden = self.place.settled(self.feed.hidden)
        self.position = 0

    def _change_batch_tokens(self, batch_tokens: int) -> None:
        """The same at the layer where the feed is."""
        assert isinstance(self.feed, SkeletonFeed)
        states, position = self.feed.hidden, self.position
        self._rebatch(batch_tokens)
        if position:
            self.feed.hidden = states.regrouped([len(token_ids_of(batch)) for batch in self.batches[PROBES:]])
        self.position = position

    def _halve_batches(self, name: str, error: Exception) -> None:
        """After running out of memory on a layer: smaller micro-batches, and the layer once more.

        Raises:
            MemoryLimitError: that can't help.
        """
        longest = max((len(sequence) for sequence in self.calibration.sequences), default=self.batch_tokens)
        halved = self.batch_tokens // 2
        helps = isinstance(self.feed, SkeletonFeed) and self.batch_tokens > longest and self.began != name
        if not helps:
            raise MemoryLimitError(
                f"{self.device} ran out of memory on layer {name}, with micro-batches of {self.batch_tokens} tokens: "
                f"{str(error).splitlines()[0]} Set batch_tokens or max_seq_len to less, prefetch=False, or another "
                "execution_device."
            ) from error
        logger.warning(
            "%s ran out of memory on layer %s; going on with micro-batches of %d tokens instead of %d.",
            self.device, name, halved, self.batch_tokens,
        )  # fmt: skip
        self.collectors.pop(name, None)
        error.__traceback__ = None  # it holds the activations
        release_cached(self.device)
        self._change_batch_tokens(halved)

    began: str | None = None
    """The layer whose weights have been changed last."""


def _runner(layer: nn.Module, device: torch.device) -> LayerRunner:
    """Runs an onloaded layer in the dtype that its device is fast in."""
    packed = packed_tensors(layer)
    dtypes = (parameter.dtype for name, parameter in layer.named_parameters() if name not in packed)
    dtype = next(dtypes, torch.float32)
    computed = matmul_dtype(device.type, dtype)
    return LayerRunner(layer, device, None if computed == dtype else computed)
