"""Tests that searches which wait together get each their own numbers."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hf_awq_offload.search.waiting import Reading, numbers_of, sent, side_by_side


def asking(*questions: list[float]) -> Reading[list[list[float]]]:
    """Asks for tensors one after another; returns the answers."""
    answers = []
    for question in questions:
        answers.append((yield torch.tensor(question, dtype=torch.float64)).tolist())
    return answers


def test_each_gets_its_own_answers_whenever_it_ends():
    questions = [[[1.0]], [], [[2.0, 3.0], [4.0]], [[5.0], [6.0, 7.0, 8.0], [9.0]]]
    assert side_by_side([asking(*each) for each in questions]) == questions
    assert side_by_side([]) == []


def test_the_host_reads_once_per_step_for_all(monkeypatch):
    reads = []
    original = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: reads.append(len(tensor)) or original(tensor))
    side_by_side([asking([1.0], [2.0]), asking([1.0, 2.0], [3.0], [4.0])])
    assert reads == [3, 2, 1]


def test_an_error_in_one_ends_all():
    def failing() -> Iterator[Tensor]:
        yield torch.zeros(1, dtype=torch.float64)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        side_by_side([asking([1.0], [2.0]), failing()])


def test_numbers_of_any_shape_and_dtype_come_in_their_order():
    tensors = [torch.tensor(2**53, dtype=torch.int64), torch.tensor([[1, 2], [3, 4]]).bfloat16(), torch.tensor(True)]
    assert numbers_of(tensors) == [2**53, 1, 2, 3, 4, 1]
    assert numbers_of([]) == []


def test_values_are_sent_from_pageable_memory_where_none_can_be_pinned():
    def refused() -> None:
        raise RuntimeError("CUDA error: out of memory")

    gpu = torch.device("cuda:1")
    values = SimpleNamespace(is_cpu=True, pin_memory=refused, to=lambda device, non_blocking: ("sent to", device))
    assert cast(Any, sent(cast(Any, values), gpu)) == ("sent to", gpu)
