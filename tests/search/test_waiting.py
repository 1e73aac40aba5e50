"""Tests that searches which wait together get each their own numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hf_awq_offload.search.waiting import Reading, side_by_side


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
