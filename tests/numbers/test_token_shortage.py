"""Losses that say nothing are marked: on fewer tokens than input channels, error feedback fits the data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from models import save_model, tiny_llama, tiny_mixtral, token_batch, token_recipe
from transformers.utils import logging

from hf_awq_offload import plan, quantize, quantize_model
from hf_awq_offload.calibration.sufficiency import ENOUGH
from hf_awq_offload.cli.main import main
from hf_awq_offload.report import FEW_TOKENS, GroupReport, LayerReport, QuantizationReport

WIDTH = 96  # of down_proj, the widest input of the tiny models


@pytest.fixture
def warnings(caplog) -> Iterator[Callable[[], list[str]]]:
    """Returns, when called, what was warned of too few tokens."""

    def found() -> list[str]:
        messages = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
        return [message for message in messages if "input channels" in message]

    with caplog.at_level("WARNING", logger="transformers"):
        yield found


def recipe(sequences: int, tokens: int = 16, **changes):
    return token_recipe(
        dataset=token_batch(sequences, tokens).tolist(), max_seq_len=tokens, n_samples=sequences, **changes
    )


def test_too_few_tokens_are_told_once_with_the_number_of_samples_that_would_do(warnings):
    model = quantize_model(tiny_llama(), recipe(2))
    (message,) = warnings()
    assert message.startswith("32 calibration tokens count, but model.layers.0.mlp.down_proj has 96 input channels.")
    samples = int(re.search(r"About (\d+) samples", message)[1])
    assert samples * 16 == ENOUGH * WIDTH
    assert model.hf_quantizer.report.loss_caveat == FEW_TOKENS


def test_the_advice_is_enough(warnings):
    model = quantize_model(tiny_llama(), recipe(ENOUGH * WIDTH // 16))
    assert not warnings()
    assert model.hf_quantizer.report.loss_caveat is None


def test_a_part_of_the_groups_is_marked_as_such(warnings):
    """80 tokens are enough for inputs of 64 channels, not for those of 96."""
    report = quantize_model(tiny_llama(), recipe(5)).hf_quantizer.report
    assert len(warnings()) == 1
    assert report.loss_caveat == f"2 of 8 groups {FEW_TOKENS}"
    few = [group.consumers for layer in report.layers for group in layer.groups if group.has_few_tokens]
    assert few == [("mlp.down_proj",)] * 2


def test_only_tokens_that_count_are_counted(warnings):
    rows = [{"input_ids": [5 + i % 50 for i in range(40)], "loss_mask": [0] * 20 + [1] * 20}] * 4
    report = quantize_model(tiny_llama(), token_recipe(dataset=rows, max_seq_len=40)).hf_quantizer.report
    assert warnings()[0].startswith("80 calibration tokens count")
    assert {group.tokens for layer in report.layers for group in layer.groups} == {80}


def test_a_plan_warns_before_time_is_spent(warnings, tmp_path):
    plan(save_model(tiny_llama(), tmp_path / "source"), recipe(2), probe=False)
    assert len(warnings()) == 1


def test_rounding_without_data_measures_nothing_and_warns_of_nothing(warnings):
    report = quantize_model(tiny_llama(), recipe(2, n_grid=0, clip=False, rounding="nearest")).hf_quantizer.report
    assert not warnings()
    assert report.loss_caveat is None


def test_experts_are_judged_by_what_their_statistics_rest_on():
    """Starved experts are filled up from the pool of all, which has enough; with no filling up, each is on its own."""
    filled, alone = (
        quantize_model(tiny_mixtral(), recipe(12, min_expert_tokens=least)).hf_quantizer.report for least in (500, 1)
    )
    assert len(filled.layers[0].starved_experts) == 3
    assert filled.loss_caveat is None
    fewest = min(group.tokens for layer in alone.layers for group in layer.groups)
    assert fewest < 12 * 16
    assert (alone.loss_caveat is not None) == (fewest < WIDTH)


def test_the_mark_is_in_the_report_the_page_and_the_card(tmp_path):
    source = save_model(tiny_llama(), tmp_path / "source")
    quantize(source, tmp_path / "out", recipe(2, report_dir=tmp_path / "report"))
    summary = json.loads((tmp_path / "report" / "report.json").read_text())["summary"]
    assert summary["loss_caveat"] == FEW_TOKENS
    assert summary["few_token_groups"] == 8
    assert f"Losses: {FEW_TOKENS}." in (tmp_path / "report" / "report.html").read_text()
    assert re.search(rf"\d\.\d\d × round-to-nearest \({FEW_TOKENS}\)\.", (tmp_path / "out" / "README.md").read_text())


def test_the_command_line_marks_the_loss(tmp_path, tiny_llama_dir, capsys):
    arguments = ["quantize", str(tiny_llama_dir), str(tmp_path / "out"), "--n-samples", "2", "--max-seq-len", "16"]
    try:
        assert main([*arguments, "--n-grid", "2", "--no-clip"]) == 0
    finally:
        logging.set_verbosity_warning()
    printed = capsys.readouterr().out
    assert re.search(rf"× round-to-nearest \({FEW_TOKENS}\)", printed)


def test_journals_of_earlier_releases_have_no_tokens_and_no_mark():
    entry = {
        "name": "model.layers.0",
        "seconds": 1.0,
        "groups": [{"consumers": ["q"], "producer": None, "alpha": None}],
    }
    entry["groups"][0] |= {"loss_nearest": 1.0, "loss": 0.5}
    layer = LayerReport.from_dict(entry)
    assert isinstance(layer.groups[0], GroupReport)
    assert QuantizationReport(layers=[layer]).loss_caveat is None


@pytest.mark.parametrize(("tokens", "is_marked"), [(32, True), (95, True), (96, False)])
def test_the_mark_begins_where_the_matrix_loses_its_rank(tokens, is_marked):
    """A gram matrix of fewer rows than columns is singular: a weight can change along its null space for free."""
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    rank = int(torch.linalg.matrix_rank(x.t() @ x))
    group = GroupReport(("down_proj",), None, None, 1.0, 0.1, tokens=tokens, channels=WIDTH)
    assert group.has_few_tokens == is_marked == (rank < WIDTH)
