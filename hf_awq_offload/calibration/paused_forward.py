"""Forward passes of the whole model that halt at every decoder layer.

Where decoder layers form no chain (something is computed between them, they share state, they run several times in a
pass), what a layer receives can't be told before the layers ahead of it have run. So the model's own forward runs, once
per batch, each in a thread of its own that halts where a decoder layer would run; the caller runs that layer on
all batches, and hands each forward its layer's true output to go on with. One thread runs at a time.
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
    """Unwinds a forward pass that will not be finished."""


class HaltedForward:
    """One forward pass in a thread of its own.

    Args:
        run: the forward pass.
    """

    def __init__(self, run: Callable[[], Any]):
        self.at: str | None = None
        """The decoder layer that the pass has come to; None when it is over."""
        self.call: LayerCall | None = None
        self._output: Any = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._may_run, self._has_halted = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)

    def start(self) -> None:
        """Run to the first decoder layer."""
        self._thread.start()
        self._wait()

    def go_on(self, output: Any) -> None:
        """Run on to the next decoder layer; `output` is what the one at hand returned."""
        self._output, self.call = output, None
        self._may_run.release()
        self._wait()

    def cancel(self) -> None:
        """Give the pass up."""
        if self._thread.is_alive():
            self._cancelled = True
            self._may_run.release()
            self._thread.join()

    def halt(self, name: str, call: LayerCall) -> Any:
        """In the thread of the pass: wait at a decoder layer, and return that layer's output."""
        self.at, self.call = name, call
        self._has_halted.release()
        self._may_run.acquire()
        if self._cancelled:
            raise _Cancelled
        return self._output

    def _wait(self) -> None:
        self._has_halted.acquire()
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
        self._has_halted.release()


@contextmanager
def halted_forwards(
    model: nn.Module,
    layers: Mapping[str, nn.Module],  # name -> decoder layer
    batches: Sequence[ModelInputs],
    forward: Callable[[ModelInputs], None] | None = None,
) -> Iterator[list[HaltedForward]]:
    """A forward pass for every batch, not started yet; in the caller's thread, layers run as ever.

    The model is left as it was, whatever happens inside.
    """
    forward_pass = forward or ForwardPass(model)
    passes: list[HaltedForward] = []
    running = threading.local()

    def pass_over(index: int, batch: ModelInputs) -> Callable[[], None]:
        def run() -> None:
            running.index = index
            forward_pass(batch)

        return run

    def stub(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def halt(*args: Any, **kwargs: Any) -> Any:
            if not hasattr(running, "index"):  # the caller runs the layer
                return forward(*args, **kwargs)
            return passes[running.index].halt(name, LayerCall(args, kwargs))

        return halt

    passes.extend(HaltedForward(pass_over(index, batch)) for index, batch in enumerate(batches))
    with ExitStack() as stack:
        stack.enter_context(calibration_mode(model))
        for name, layer in layers.items():
            stack.enter_context(shadowed_forward(layer, stub(name, layer.forward)))
        try:
            yield passes
        finally:
            for each in passes:
                each.cancel()


def hand_on(each: HaltedForward, runner: LayerRunner) -> None:
    """Run the layer that a pass has come to, and let the pass go on with tensors of the kind it works with."""
    assert each.call is not None
    each.go_on(runner.hand_on(each.call, like_given(each.call.args, each.call.kwargs)))


def like_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """A tensor of the device and dtype that a layer is given, None if it is given no floating-point tensor."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return next((tensor for tensor in given if tensor.is_floating_point()), None)


def layer_at(passes: Sequence[HaltedForward], model_name: str) -> str | None:
    """The decoder layer that all passes have come to, None when all are over.

    Raises:
        ModelStructureError: they have come to different ones.
    """
    names = {each.at for each in passes}
    if len(names) > 1:
        raise ModelStructureError(
            f"The forward pass of {model_name} ran its layers in another order on another batch: it has come to "
            f"{sorted(map(str, names))}. Layers that are skipped at random must be switched off for calibration."
        )
    return names.pop()
