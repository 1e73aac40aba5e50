"""Lets pytest run on the simulated GPU: a test fails for what streams did wrong meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from . import observed, triton_stand_ins


class SimulatedGpuPlugin:
    def pytest_configure(self, config: pytest.Config) -> None:
        config.addinivalue_line("markers", "expects_findings: the test makes streams do wrong on purpose")

    def pytest_addoption(self, parser: pytest.Parser) -> None:
        parser.addoption("--execution-device", help="the device that the product chooses where a test names none")

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        triton_stand_ins.install()
        chosen = session.config.getoption("--execution-device")
        if chosen is not None:
            _choose(torch.device(chosen))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        observed.clear_findings()
        result = yield
        found = observed.findings()
        if found and item.get_closest_marker("expects_findings") is None:
            pytest.fail("Streams did not wait for each other:\n" + "\n".join(found), pytrace=False)
        return result


def _choose(device: torch.device) -> None:
    """Lets the product run on `device` by default while another device may be the current one."""
    from hf_awq_offload.pipeline import run_storage

    run_storage.default_execution_device = lambda: device
