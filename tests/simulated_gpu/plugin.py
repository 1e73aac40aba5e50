"""Lets pytest run on the simulated GPU: a test fails for what streams did wrong meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
