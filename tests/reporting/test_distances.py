"""Running sums of distances are those of all rows at once, however the rows are cut into blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from hf_awq_offload.errors import NumericalError
from hf_awq_offload.reporting.distances import BLOCK_BYTES, Distances, rows_at_a_time

ROWS, VOCABULARY = 90, 50


def random_rows(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "logits": 3 * torch.randn(ROWS, VOCABULARY, generator=generator),
        "reference_logits": 3 * torch.randn(ROWS, VOCABULARY, generator=generator),
        "targets": torch.randint(VOCABULARY, (ROWS,), generator=generator),
        "positions": torch.arange(1, ROWS + 1),
    }


def distances_of(rows: dict[str, torch.Tensor], block: int) -> Distances:
    distances = Distances(has_reference=True)
    for start in range(0, ROWS, block):
        distances.add(**{name: values[start : start + block] for name, values in rows.items()})
    return distances


@pytest.mark.parametrize("block", [1, 7, ROWS])
def test_blocks_make_no_difference(block):
    rows = random_rows()
    log_p, log_q = (rows[name].double().log_softmax(-1) for name in ("logits", "reference_logits"))
    found = distances_of(rows, block).total
    assert found.tokens == ROWS
    assert math.log(found.perplexity) == pytest.approx(float(F.nll_loss(log_p, rows["targets"])), rel=1e-5)
    assert math.log(found.reference_perplexity) == pytest.approx(float(F.nll_loss(log_q, rows["targets"])), rel=1e-5)
    assert found.kl_nats == pytest.approx(float((log_q.exp() * (log_q - log_p)).sum(-1).mean()), rel=1e-5)
    assert found.top1_agreement == float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())


def test_buckets_are_parts_of_the_whole():
    rows = random_rows()
    distances = distances_of(rows, 10)
    buckets = distances.buckets
    assert [(each.first, each.last, each.tokens) for each in buckets] == [(1, 15, 15), (16, 63, 48), (64, 255, 27)]
    assert sum(each.kl_nats * each.tokens for each in buckets) == pytest.approx(distances.total.kl_nats * ROWS)
    first = distances_of({name: values[:15] for name, values in rows.items()}, 15).total
    assert buckets[0].kl_nats == pytest.approx(first.kl_nats)


def test_tokens_that_both_rule_out_add_nothing():
    rows = random_rows()
    ruled_out = {name: rows[name].clone() for name in ("logits", "reference_logits")}
    for values in ruled_out.values():
        values[:, -1] = -math.inf
    shorter = {name: rows[name][:, :-1] for name in ruled_out}
    targets = {"targets": rows["targets"] % (VOCABULARY - 1)}
    found = distances_of(rows | ruled_out | targets, 30).total
    assert found.kl_nats == pytest.approx(distances_of(rows | shorter | targets, 30).total.kl_nats)


def test_a_token_that_the_model_alone_rules_out_is_infinitely_far():
    rows = random_rows()
    rows["logits"][5, 3] = -math.inf
    assert distances_of(rows, 30).total.kl_nats == math.inf


def test_logits_that_are_no_number_are_an_error():
    rows = random_rows()
    rows["reference_logits"][2, 2] = math.nan
    with pytest.raises(NumericalError, match="model that it is compared with are not a number"):
        distances_of(rows, 30)


def test_without_another_model_there_is_no_divergence():
    rows = random_rows() | {"reference_logits": None}
    distances = Distances(has_reference=False)
    distances.add(**rows)
    assert distances.total.kl_nats is None
    assert distances.total.perplexity > 1


def test_a_block_of_a_large_vocabulary_keeps_within_its_room():
    assert rows_at_a_time(10**9) == 1
    assert rows_at_a_time(128_000) * 128_000 * 4 < BLOCK_BYTES
