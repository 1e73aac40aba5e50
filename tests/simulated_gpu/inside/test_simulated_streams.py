"""Streams that do not wait for each other are found; those that do are not."""

from __future__ import annotations

import pytest
import torch
from simulated_gpu import observed


@pytest.fixture
def side() -> torch.cuda.Stream:
    torch.cuda.synchronize()
    return torch.cuda.Stream()


def written_on(stream: torch.cuda.Stream) -> torch.Tensor:
    with torch.cuda.stream(stream):
        return torch.ones(1000, device="cuda")


@pytest.mark.expects_findings
def test_reading_what_another_stream_wrote_is_found(side):
    tensor = written_on(side)
    tensor + 1
    assert observed.findings() == [
        "aten::add on the default stream of cuda:0 reads what stream "
        f"{side.stream_id} of cuda:0 wrote (aten::fill_), without waiting for it"
    ]
    tensor.record_stream(torch.cuda.current_stream())


@pytest.mark.expects_findings
def test_overwriting_what_another_stream_reads_is_found(side):
    tensor = torch.ones(1000, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tensor.sum()
    tensor.zero_()
    assert any("overwrites what stream" in finding and "may still read" in finding for finding in observed.findings())
    tensor.record_stream(side)


@pytest.mark.expects_findings
def test_freeing_what_another_stream_uses_is_found(side):
    tensor = written_on(side)
    torch.cuda.current_stream().wait_stream(side)
    tensor.sum()
    del tensor
    (finding,) = observed.findings()
    assert finding.startswith(
        f"memory of stream {side.stream_id} of cuda:0 is freed while the default stream of cuda:0"
    )


@pytest.mark.expects_findings
def test_memory_of_a_stream_is_not_anothers_before_it_waits(side):
    (torch.ones(1000, device="cuda") + 1).sum()
    tensor = torch.empty(1000, device="cuda")
    with torch.cuda.stream(side):
        tensor.zero_()
    assert any("(its allocation)" in finding for finding in observed.findings())
    tensor.record_stream(side)


@pytest.mark.parametrize("how", ["event", "stream", "host waits for the event", "host waits for the stream", "device"])
def test_waiting_is_enough(side, how):
    tensor = written_on(side)
    event = side.record_event()
    current = torch.cuda.current_stream()
    match how:
        case "event":
            current.wait_event(event)
        case "stream":
            current.wait_stream(side)
        case "host waits for the event":
            event.synchronize()
        case "host waits for the stream":
            side.synchronize()
        case "device":
            torch.cuda.synchronize()
    assert (tensor + 1).sum().item() == 2000
    assert observed.findings() == []


@pytest.mark.expects_findings
def test_an_event_covers_only_what_was_before_it(side):
    event = side.record_event()
    tensor = written_on(side)
    torch.cuda.current_stream().wait_event(event)
    tensor.sum()
    assert observed.findings()
    tensor.record_stream(torch.cuda.current_stream())


def test_a_copy_that_is_not_waited_for_is_no_synchronization(side):
    pinned = torch.ones(1000).pin_memory()
    observed.reset_counters()
    with torch.cuda.stream(side):
        tensor = pinned.to("cuda", non_blocking=True)
        event = side.record_event()
    assert observed.counters()["synchronizations"] == 0
    assert not event.query()
    event.synchronize()
    assert event.query()
    assert observed.counters()["synchronizations"] == 1
    assert tensor.sum().item() == 1000
