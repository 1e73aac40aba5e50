"""Tests of copies between the host and a device that show on any machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hf_awq_offload import transfers
from hf_awq_offload.transfers import numbers_of, pinned, sent


def test_numbers_of_any_shape_and_dtype_come_in_their_order():
    tensors = [torch.tensor(2**53, dtype=torch.int64), torch.tensor([[1, 2], [3, 4]]).bfloat16(), torch.tensor(True)]
    assert numbers_of(tensors) == [2**53, 1, 2, 3, 4, 1]
    assert numbers_of([]) == []


def test_values_are_sent_from_pageable_memory_where_none_can_be_pinned(monkeypatch):
    def refused(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(transfers, "_can_pin", True)
    monkeypatch.setattr(torch, "empty_like", refused)
    gpu = torch.device("cuda:1")
    arrived = SimpleNamespace(to=lambda dtype: ("sent to", gpu, dtype))
    values = SimpleNamespace(device=torch.device("cpu"), nbytes=8, to=lambda device, non_blocking: arrived)
    assert cast(Any, sent(cast(Any, values), gpu)) == ("sent to", gpu, None)


@pytest.mark.parametrize("message", ["out of memory", "operation not supported"])
def test_unpinned_memory_does_where_none_can_be_pinned(message, monkeypatch):
    def refused(*args: object, **kwargs: object) -> None:
        raise RuntimeError(f"CUDA error: {message}")

    monkeypatch.setattr(transfers, "_can_pin", True)
    monkeypatch.setattr(torch, "empty_like", refused)
    values = torch.ones(3)
    assert pinned(values) is values


def test_much_that_cannot_be_pinned_says_nothing_about_less(monkeypatch):
    refused = [torch.OutOfMemoryError("CUDA error: out of memory")]
    real = torch.empty_like

    def pin(tensor: torch.Tensor, **kwargs: object) -> torch.Tensor:
        if refused:
            raise refused.pop()
        return real(tensor)

    monkeypatch.setattr(transfers, "_can_pin", True)
    monkeypatch.setattr(torch, "empty_like", pin)
    much, little = torch.ones(transfers.LITTLE_BYTES), torch.ones(3)
    assert pinned(much) is much
    assert pinned(little) is not little
