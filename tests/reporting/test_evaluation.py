"""Sliding windows score every token once, and measurements on them agree with a plain computation."""

from __future__ import annotations

import math

import pytest
import torch
from models import tiny_llama, token_batch
from torch.nn import functional as F

from hf_awq_offload.errors import CalibrationDataError
from hf_awq_offload.reporting.evaluation import Window, evaluate, sliding_windows, token_windows
from hf_awq_offload.reporting.evaluation_text import evaluation_tokens

TEXT = torch.arange(23)


@pytest.mark.parametrize(
    ("window", "stride"),
    [(window, stride) for window in (2, 3, 7, 8, 22, 23, 24, 100) for stride in (1, 2, 5, 7, 8, 23) if stride < window],
)
def test_every_token_but_the_first_is_predicted_once_from_enough_context(window, stride):
    seen = []
    for each in sliding_windows(TEXT, window, stride):
        tokens = each.token_ids[0].tolist()
        assert tokens == list(range(tokens[0], tokens[-1] + 1))
        assert len(tokens) <= window
        for place in range(len(tokens) - each.predicted, len(tokens)):
            seen.append(tokens[place])
            assert place >= min(tokens[place], window - stride)
    assert seen == list(range(1, 23))


def test_windows_side_by_side_leave_out_their_first_tokens():
    windows = sliding_windows(TEXT[:20], 5, 5)
    assert [each.token_ids[0].tolist() for each in windows] == [
        each[0].tolist() for each in token_windows(TEXT[:20], 5)
    ]
    assert [each.predicted for each in windows] == [4] * 4


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 0), (8, 9), (0, 0)])
def test_impossible_windows_are_refused(window, stride):
    with pytest.raises(ValueError, match=f"The stride is {stride} and the window {window}"):
        sliding_windows(TEXT, window, stride)


def test_a_text_without_a_prediction_is_refused():
    with pytest.raises(ValueError, match="The text has 1 tokens"):
        sliding_windows(TEXT[:1], 8, 4)


@torch.no_grad()
def test_the_perplexity_is_that_of_the_tokens_each_from_its_own_context():
    model, ids = tiny_llama(), token_batch(1, 19)[0]
    window, stride = 8, 3
    nll = []
    for target in range(1, 19):
        end = next(e for e in (*range(window, 19, stride), 19) if e > target)
        start = max(0, (end - window + stride - 1) // stride * stride)
        logits = model(ids[start:target].unsqueeze(0)).logits[0, -1]
        nll.append(float(F.cross_entropy(logits, ids[target])))
    found = evaluate(model, sliding_windows(ids, window, stride))
    assert found.tokens == 18
    assert math.log(found.perplexity) == pytest.approx(sum(nll) / 18, rel=1e-5)


@torch.no_grad()
def test_kl_agreement_and_both_perplexities_in_one_pass():
    model, base, ids = tiny_llama(), tiny_llama(seed=1), token_batch(1, 16)[0]
    windows = sliding_windows(ids, 16, 8)
    found = evaluate(model, windows, base)
    log_p, log_q = (m(ids[None]).logits[0, :-1].log_softmax(-1) for m in (model, base))
    assert found.kl_nats == pytest.approx(float((log_q.exp() * (log_q - log_p)).sum(-1).mean()), rel=1e-4)
    assert found.top1_agreement == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean()))
    assert found.reference_perplexity == pytest.approx(evaluate(base, windows).perplexity, rel=1e-5)
    assert evaluate(model, windows).reference_perplexity is None


def test_whole_windows_are_evaluated_as_before():
    model, ids = tiny_llama(), token_batch(2, 12)
    found = evaluate(model, [ids])
    assert found.tokens == 22
    assert found == evaluate(model, [Window(ids, 11)])


def test_a_hopeless_model_has_an_infinite_perplexity():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert evaluate(model, [token_batch(1, 12)]).perplexity == math.inf


# -- the text ----------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer that maps every word to its length."""

    def __call__(self, text, **kwargs):
        return {"input_ids": [len(word) for word in text.split()]}


def test_a_text_file_is_one_text(tmp_path):
    (tmp_path / "a.txt").write_text("one three\n\nfive seven")
    assert evaluation_tokens(tmp_path / "a.txt", Words(), 100).tolist() == [3, 5, 4, 5]
    assert evaluation_tokens(tmp_path / "a.txt", Words(), 3).tolist() == [3, 5, 4]


def test_documents_keep_their_order_and_reading_stops(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{"x" * i}", "other": "y"}}\n' for i in range(1, 9)))
    assert evaluation_tokens(tmp_path / "a.jsonl", Words(), 3, "text").tolist() == [1, 2, 3]
    (tmp_path / "b.json").write_text('["a", "bb", "ccc"]')
    assert evaluation_tokens(tmp_path / "b.json", Words(), 100).tolist() == [1, 2, 3]


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[[1, 2, 3]]")
    with pytest.raises(CalibrationDataError, match=r"Row 0 of .* is a TokenRow"):
        evaluation_tokens(tmp_path / "a.json", Words(), 100)


def test_published_perplexities_are_of_wikitexts_test_split(monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return {"text": ["", " = Title = ", "words and more"]}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert evaluation_tokens("wikitext2", Words(), 100).tolist() == [1, 5, 1, 5, 3, 4]
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]


def test_without_a_network_a_file_is_suggested(monkeypatch):
    def load_dataset(*names, split):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(CalibrationDataError, match=r"no route.*--dataset FILE"):
        evaluation_tokens("wikitext2", Words(), 100)


def test_another_split_of_wikitext(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *names, split: {"text": [split]})
    assert evaluation_tokens("wikitext2:validation", Words(), 100).tolist() == [len("validation")]


def test_the_rows_of_token_ids_that_optimum_makes_are_refused_before_they_are_downloaded(monkeypatch):
    monkeypatch.setattr("optimum.gptq.data.get_dataset", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(CalibrationDataError, match="such as c4:validation"):
        evaluation_tokens("c4", Words(), 100)


@pytest.mark.parametrize("name", ["README.md", "run.log", "script.py", "LICENSE"])
def test_any_text_file_is_one_text(name, tmp_path):
    (tmp_path / name).write_text("one three\n\nfive seven")
    assert evaluation_tokens(str(tmp_path / name), Words(), 100).tolist() == [3, 5, 4, 5]


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe a", "UnicodeDecodeError"), (b"words\0\0", "has zero bytes: it is not text")]
)
def test_a_file_that_holds_no_text_is_refused(content, message, tmp_path):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(CalibrationDataError, match=rf"model.bin .*{message}.*Name a file of UTF-8 text"):
        evaluation_tokens(tmp_path / "model.bin", Words(), 100)
