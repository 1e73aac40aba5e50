"""Lets pytest run on the simulated GPU: a test fails for what streams did wrong meanwhile, and a summary tells counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from . import observed, triton_stand_ins


class SimulatedGpuPlugin:
    def pytest_configure(self, config: pytest.Config) -> None:
        config.addinivalue_line("markers", "expects_findings: the test makes streams do wrong on purpose")

    def pytest_sessionstart(self) -> None:
        triton_stand_ins.install()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        observed.clear_findings()
        result = yield
        found = observed.findings()
        if found and item.get_closest_marker("expects_findings") is None:
            pytest.fail("Streams did not wait for each other:\n" + "\n".join(found), pytrace=False)
        return result

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        totals = observed.counters()
        if not terminalreporter.config.option.collectonly:
            terminalreporter.write_line(
                f"simulated GPUs: {torch.cuda.device_count()}, kernels: {totals['launches']}, "
                f"waits: {totals['synchronizations']}, bytes to the device: {totals['host_to_device_bytes']}"
            )
