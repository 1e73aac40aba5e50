"""Forward passes of the whole model that pause at every decoder layer.

Where decoder layers form no chain (something is computed between them, they share state, they run several times in a
pass), nobody knows what a layer receives before the layers ahead of it have run. So the model's own forward runs once
for each batch, in a thread of its own that pauses where a decoder layer would run. The caller runs that layer on all
batches and resumes each forward with its layer's true output. One thread runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelStructureError
from ..model.decoder_layers import LayerCall, LayerRunner, calibration_mode, shadowed_forward
from .forward_pass import ForwardPass, ModelInputs


class _Cancelled(BaseException):
    """Unwinds a forward pass that nobody will resume."""


class PausedForward:
    """Runs one forward pass in a thread of its own, from decoder layer to decoder layer.

    Args:
        run: the forward pass.
    """

    def __init__(self, run: Callable[[], Any]):
        self.at: str | None = None
        """The decoder layer that the pass waits at; None once it is over."""
        self.call: LayerCall | None = None
        self._output: Any = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._may_run, self._has_paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)

    def start(self) -> None:
        """Runs to the first decoder layer."""
        self._thread.start()
        self._wait()

    def resume(self, output: Any) -> None:
        """Runs to the next decoder layer; `output` is what the layer at hand returned."""
        self._output, self.call = output, None
        self._may_run.release()
        self._wait()

    def cancel(self) -> None:
        """Ends the pass where it is."""
        if self._thread.is_alive():
            self._cancelled = True
            self._may_run.release()
            self._thread.join()

    def pause(self, name: str, call: LayerCall) -> Any:
        """Waits at a decoder layer, in the thread of the pass, and returns the output that it is resumed with."""
        self.at, self.call = name, call
        self._has_paused.release()
        self._may_run.acquire()
        if self._cancelled:
            raise _Cancelled
        return self._output

    def _wait(self) -> None:
        self._has_paused.acquire()
        if self._error is not None:
            raise self._error

    def _work(self, run: Callable[[], Any]) -> None:
        try:
            with torch.no_grad():  # grad mode belongs to a thread
                run()
        except _Cancelled:
            pass
        except BaseException as error:  # handed to the caller's thread, see _wait
            self._error = error
        self.at = self.call = None
        self._has_paused.release()


@contextmanager
def paused_forwards(
    model: nn.Module,
    layers: Mapping[str, nn.Module],  # name -> decoder layer
    batches: Sequence[ModelInputs],
    forward: Callable[[ModelInputs], None] | None = None,
) -> Iterator[list[PausedForward]]:
    """Yields a forward pass for every batch, not started yet. In the caller's thread layers run as usual.

    On exit the passes end and the model is as it was, after an error as well.
    """
    forward_pass = forward or ForwardPass(model)
    passes: list[PausedForward] = []
    running = threading.local()

    def pass_over(index: int, batch: ModelInputs) -> Callable[[], None]:
        def run() -> None:
            running.index = index
            forward_pass(batch)

        return run

    def stub(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def pause(*args: Any, **kwargs: Any) -> Any:
            if not hasattr(running, "index"):  # the caller runs the layer
                return forward(*args, **kwargs)
            return passes[running.index].pause(name, LayerCall(args, kwargs))

        return pause

    passes.extend(PausedForward(pass_over(index, batch)) for index, batch in enumerate(batches))
    with ExitStack() as stack:
        stack.enter_context(calibration_mode(model))
        for name, layer in layers.items():
            stack.enter_context(shadowed_forward(layer, stub(name, layer.forward)))
        try:
            yield passes
        finally:
            for paused in passes:
                paused.cancel()


def run_and_resume(paused: PausedForward, runner: LayerRunner) -> None:
    """Runs the layer that a pass waits at, and resumes the pass with its output, on the pass's own device and dtype."""
    assert paused.call is not None
    paused.resume(runner.run_for_caller(paused.call, like_given(paused.call.args, paused.call.kwargs)))


def like_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Returns the first floating-point tensor among a layer's arguments, for its device and dtype; None without one."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return next((tensor for tensor in given if tensor.is_floating_point()), None)


def layer_at(passes: Sequence[PausedForward], model_name: str) -> str | None:
    """Returns the decoder layer that all passes wait at; None when all are over.

    Raises:
        ModelStructureError: they wait at different ones.
    """
    names = {paused.at for paused in passes}
    if len(names) > 1:
        raise ModelStructureError(
            f"The forward pass of {model_name} ran its layers in another order on another batch: it has come to "
            f"{sorted(map(str, names))}. Layers that are skipped at random must be switched off for calibration."
        )
    return names.pop()
