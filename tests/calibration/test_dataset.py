"""Tests calibration data: every form of `dataset`, every way in which it can be wrong, and that no token is lost."""

import json
import random
import re

import datasets
import huggingface_hub.constants
import numpy as np
import pandas
import pytest
import torch
from tiny_tokenizer import BOS, EOS, TEXTS, VOCAB_SIZE, make_tokenizer

from hf_awq_offload.calibration import dataset as dataset_module
from hf_awq_offload.calibration import tokenizers
from hf_awq_offload.calibration.dataset import CalibrationSet, load_calibration_set, micro_batches
from hf_awq_offload.config import AwqOffloadConfig
from hf_awq_offload.errors import CalibrationDataError

ROWS = [[(7 * row + position) % VOCAB_SIZE for position in range(12 + row)] for row in range(10)]
CHATS = [
    [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"it is {i}"}] for i in range(5)
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def bos_tokenizer():
    return make_tokenizer(adds_bos=True)


@pytest.fixture
def load(tokenizer):
    """Returns load(dataset, **fields), which uses the fixture's tokenizer as the checkpoint's own."""

    def call(dataset, *, load_tokenizer=lambda: tokenizer, vocab_size=VOCAB_SIZE, **fields) -> CalibrationSet:
        fields = {"n_samples": 1000, "max_seq_len": 16} | fields
        config = AwqOffloadConfig(dataset=dataset, **fields)
        calibration = load_calibration_set(config, load_tokenizer=load_tokenizer, vocab_size=vocab_size)
        assert_well_formed(calibration, config, vocab_size)
        return calibration

    return call


@pytest.fixture
def log(monkeypatch):
    """Returns a list that collects the module logger's formatted messages as (level, message)."""
    records = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            dataset_module.logger, level, lambda message, *args, level=level: records.append((level, message % args))
        )
    return records


def no_tokenizer():
    raise AssertionError("the tokenizer is not needed")


def assert_well_formed(calibration, config, vocab_size):
    assert 1 <= len(calibration.sequences) <= config.n_samples
    assert len(calibration.counted) == len(calibration.sequences)
    for sequence, counted in zip(calibration.sequences, calibration.counted, strict=True):
        assert sequence.dtype == torch.int64
        assert sequence.ndim == 1
        assert sequence.device.type == "cpu"
        assert 2 <= len(sequence) <= config.max_seq_len
        assert sequence.min() >= 0
        assert sequence.max() < vocab_size
        if counted is not None:
            assert counted.shape == sequence.shape
            assert counted.dtype == torch.bool
            assert counted.any()
            assert not counted.all()
    assert calibration.tokens == sum(map(len, calibration.sequences))


def as_lists(calibration):
    return [sequence.tolist() for sequence in calibration.sequences]


def flat(calibration):
    return [token for sequence in as_lists(calibration) for token in sequence]


def same(a, b):
    return as_lists(a) == as_lists(b)


def joined_ids(tokenizer, texts):
    """Returns the token ids of the texts before they are cut, with EOS between documents."""
    ids = []
    for text in texts:
        ids += [tokenizer.eos_token_id] if ids else []
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


# ---- texts


def test_texts_are_joined_with_eos_and_cut_without_loss(load, tokenizer):
    ids = joined_ids(tokenizer, TEXTS)
    calibration = load(TEXTS)
    tail_tokens = len(ids) % 16
    assert flat(calibration) == (ids if tail_tokens >= 8 or tail_tokens == 0 else ids[:-tail_tokens])
    assert {len(sequence) for sequence in calibration.sequences[:-1]} == {16}
    assert all(mask is None for mask in calibration.counted)


def test_tuples_generators_arrays_and_dicts_of_texts_are_the_same_data(load):
    expected = load(TEXTS)
    assert re.fullmatch("sha256:[0-9a-f]{16}", expected.name)
    forms = [
        tuple(TEXTS),
        (text for text in TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, dtype=object),
        [{"text": text} for text in TEXTS],
        ({"id": i, "body": text} for i, text in enumerate(TEXTS)),
        datasets.Dataset.from_dict({"text": TEXTS, "other": TEXTS}),
        datasets.Dataset.from_dict({"body": TEXTS, "label": list(range(20))}),
        datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS)),
        datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
    ]
    for form in forms:
        calibration = load(form)
        assert same(calibration, expected)
        assert calibration.name == expected.name


def test_text_column_chooses(load):
    rows = [{"text": "wrong " * 20, "body": text} for text in TEXTS]
    assert same(load(rows, text_column="body"), load(TEXTS))


def test_string_column_of_a_dataset_is_known_even_where_a_value_is_missing(load):
    dataset = datasets.Dataset.from_dict({"body": [*TEXTS, None], "n": list(range(21))})
    with pytest.raises(CalibrationDataError, match="column 'body', is None; expected a string"):
        load(dataset)


def test_bos_starts_each_document_and_each_sequence(load, bos_tokenizer):
    calibration = load(TEXTS, tokenizer=bos_tokenizer)
    assert all(sequence[0] == bos_tokenizer.bos_token_id for sequence in as_lists(calibration))
    text = bos_tokenizer.decode(flat(calibration)).replace(BOS, "")
    assert text == EOS.join(TEXTS)[: len(text)]
    assert len(EOS.join(TEXTS)) - len(text) < 8 * 16  # shorter than the shortest tail
    for sequence in as_lists(calibration):
        eos_at = [i for i, token in enumerate(sequence[:-1]) if token == bos_tokenizer.eos_token_id]
        assert all(sequence[i + 1] == bos_tokenizer.bos_token_id for i in eos_at)
    # A sequence that begins with the start of a document has one BOS, not two.
    assert as_lists(calibration)[0][:2].count(bos_tokenizer.bos_token_id) == 1


def test_tokenizer_without_eos_joins_directly(load, tokenizer):
    plain = make_tokenizer()
    plain.eos_token = None
    ids = [i for text in TEXTS for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    assert flat(load(TEXTS, tokenizer=plain)) == ids[: len(flat(load(TEXTS, tokenizer=plain)))]


def test_one_short_text_is_enough(load):
    calibration = load([TEXTS[0]], max_seq_len=512)
    assert len(calibration.sequences) == 1
    assert 8 <= calibration.tokens < 512


def test_long_documents_are_tokenized_in_blocks(load, monkeypatch):
    lines = ["\n".join(TEXTS)]
    expected = load(lines)
    monkeypatch.setattr(tokenizers, "TEXT_BLOCK_CHARACTERS", 300)
    assert same(load(lines), expected)
    unbroken = load(["abcdefgh" * 1000], n_samples=2)  # no line ends; reading stops after the tokens needed
    assert unbroken.tokens == 32


def test_text_longer_than_the_context_is_no_warning(load, capsys):
    own = make_tokenizer()  # model_max_length=16
    load(TEXTS, tokenizer=own)
    load([{"messages": [{"role": "user", "content": " ".join(TEXTS)}]}], tokenizer=own)
    load(TEXTS, tokenizer=make_tokenizer(adds_bos=True))
    assert "sequence-length-is-longer-than-the-specified-maximum" not in own.deprecation_warnings
    assert "longer than" not in capsys.readouterr().err


# ---- builtin


def test_builtin_is_the_default_and_works_offline(tokenizer, log):
    config = AwqOffloadConfig(n_samples=16, max_seq_len=64)
    calibration = load_calibration_set(config, load_tokenizer=lambda: tokenizer, vocab_size=VOCAB_SIZE)
    assert calibration.name == "builtin"
    assert [len(sequence) for sequence in calibration.sequences] == [64] * 16
    assert any(level == "info" and "is better" in message for level, message in log)
    assert not any(level == "warning" for level, _ in log)


# ---- token ids


@pytest.mark.parametrize(
    "convert",
    [
        lambda rows: rows,
        lambda rows: tuple(tuple(row) for row in rows),
        lambda rows: [torch.tensor(row) for row in rows],
        lambda rows: [torch.tensor([row], dtype=torch.int32) for row in rows],
        lambda rows: [np.array(row, dtype=np.uint16) for row in rows],
        lambda rows: [[torch.tensor(token) for token in row] for row in rows],
        lambda rows: (row for row in rows),
        lambda rows: [{"input_ids": row} for row in rows],
        lambda rows: datasets.Dataset.from_dict({"input_ids": rows}),
        lambda rows: datasets.Dataset.from_dict({"input_ids": rows}).with_format("torch"),
        lambda rows: datasets.Dataset.from_dict({"input_ids": rows, "text": ["x"] * len(rows)}),
    ],
)
def test_token_rows_are_sequences_of_their_own(load, convert):
    calibration = load(convert(ROWS), max_seq_len=64, load_tokenizer=no_tokenizer)
    assert as_lists(calibration) == ROWS
    assert calibration.name == load(ROWS, max_seq_len=64).name


@pytest.mark.parametrize("convert", [lambda t: t, lambda t: t.numpy(), lambda t: t.to(torch.int16), iter])
def test_two_dimensional_arrays_are_sequences(load, convert):
    token_ids = torch.arange(60).reshape(4, 15)
    assert as_lists(load(convert(token_ids), load_tokenizer=no_tokenizer)) == token_ids.tolist()


def test_long_rows_are_cut_and_single_tokens_reported(load, log):
    rows = [list(range(33)), list(range(40)), [5]]
    calibration = load(rows, load_tokenizer=no_tokenizer)
    assert [len(sequence) for sequence in calibration.sequences] == [16, 16, 16, 16, 8]
    assert any(level == "warning" and "2 sequences shorter than 2 tokens (2 tokens)" in text for level, text in log)


def test_padding_is_stripped_wherever_it_is(load, log):
    rows = [
        {"input_ids": [-1, -1, *range(10)], "attention_mask": [0, 0] + [1] * 10},
        {"input_ids": [*range(10), 999, 999], "attention_mask": torch.tensor([True] * 10 + [False] * 2)},
        {"input_ids": [[*range(12)]] * 2, "attention_mask": [[1] * 12, [0] * 12]},
        {"input_ids": [*range(9)], "attention_mask": None},
    ]
    calibration = load(rows, load_tokenizer=no_tokenizer)
    assert as_lists(calibration) == [list(range(n)) for n in (10, 10, 12, 9)]
    assert any("16 padding tokens" in message and "1 empty documents" in message for _, message in log)


def test_padded_batch_of_a_tokenizer(load, tokenizer):
    padded = make_tokenizer()
    padded.pad_token = EOS
    batch = padded(TEXTS, padding=True, verbose=False)
    calibration = load(datasets.Dataset.from_dict(dict(batch)), max_seq_len=512, load_tokenizer=no_tokenizer)
    assert as_lists(calibration) == [tokenizer(text, verbose=False)["input_ids"] for text in TEXTS]


def test_loss_mask_and_labels_become_counted(load, log):
    ids = list(range(10))
    rows = [
        {"input_ids": ids, "loss_mask": [0, 0] + [1] * 8},
        {"input_ids": ids, "loss_mask": [1] * 10},
        {"input_ids": ids, "labels": [-100] * 9 + [9]},
        {"input_ids": ids, "labels": ids},
        {"input_ids": ids, "labels": [-100] * 10},
        {"input_ids": ids, "attention_mask": [0] + [1] * 9, "loss_mask": [0] + [1] * 9},
        {"input_ids": ids, "loss_mask": [1] + [0] * 9, "labels": ids},
    ]
    calibration = load(rows, load_tokenizer=no_tokenizer)
    masks = [None if mask is None else mask.int().tolist() for mask in calibration.counted]
    assert masks == [[0, 0] + [1] * 8, None, [0] * 9 + [1], None, None, [1] + [0] * 9]
    assert any(
        level == "warning" and "1 sequences in which loss_mask or labels exclude every token (10 tokens)" in message
        for level, message in log
    )


def test_a_cut_row_loses_the_piece_where_nothing_counts(load):
    row = {"input_ids": list(range(32)), "loss_mask": [0] * 16 + [1] * 16}
    calibration = load([row, row], load_tokenizer=no_tokenizer)
    assert as_lists(calibration) == [list(range(16, 32))] * 2
    assert calibration.counted == [None, None]


# ---- conversations


def test_messages_go_through_the_chat_template(load, tokenizer):
    expected = [
        tokenizer.apply_chat_template(chat, return_dict=True, tokenizer_kwargs={"verbose": False})["input_ids"]
        for chat in CHATS
    ]
    for form in (
        [{"messages": chat} for chat in CHATS],
        datasets.Dataset.from_list([{"messages": chat, "text": "x"} for chat in CHATS]),
        ({"messages": tuple(chat)} for chat in CHATS),
    ):
        assert as_lists(load(form, max_seq_len=512)) == expected


SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system"}


@pytest.mark.parametrize("column", ["conversations", "conversation", "messages"])
def test_sharegpt_conversations_are_the_same_conversations(load, column):
    turns = [[{"from": SHAREGPT[turn["role"]], "value": turn["content"]} for turn in chat] for chat in CHATS]
    expected = load([{"messages": chat} for chat in CHATS], max_seq_len=512)
    # A column of strings beside it, such as the id of ShareGPT's rows, is not the text.
    rows = [{"id": f"row-{index}", column: chat} for index, chat in enumerate(turns)]
    assert same(load(rows, max_seq_len=512), expected)
    assert same(load(datasets.Dataset.from_list(rows), max_seq_len=512), expected)


def test_a_column_of_conversations_may_be_named(load):
    rows = [{"text": "x", "dialogue": chat} for chat in CHATS]
    expected = load([{"messages": chat} for chat in CHATS], max_seq_len=512)
    assert same(load(rows, text_column="dialogue", max_seq_len=512), expected)


def test_text_beside_conversations_is_read_as_before(load):
    assert same(load([{"text": text, "conversations": CHATS[0]} for text in TEXTS]), load(TEXTS))


# ---- files


@pytest.fixture
def file_of(tmp_path):
    """Returns file_of(name, content), which writes a file into a folder whose name looks like a glob pattern."""
    folder = tmp_path / "a [b]"
    folder.mkdir()

    def write(name, content):
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_text_file_is_one_document(load, tokenizer, file_of):
    path = file_of("notes.txt", "\n\n".join(TEXTS))
    calibration = load(path)
    assert calibration.name == "notes.txt"
    assert tokenizer.eos_token_id not in flat(calibration)
    assert same(calibration, load(["\n\n".join(TEXTS)]))
    assert same(calibration, load(str(path)))


def test_json_files(load, file_of):
    expected = load(TEXTS)
    rows = [{"text": text} for text in TEXTS]
    lines = "\n".join(map(json.dumps, rows))
    for path in (
        file_of("rows.jsonl", lines + "\n\n"),
        file_of("bom.jsonl", b"\xef\xbb\xbf" + lines.encode()),
        file_of("rows.json", json.dumps(rows, indent=1)),
        file_of("lines.json", lines),
        file_of("texts.json", json.dumps(TEXTS)),
        file_of("UPPER.JSONL", "\n".join(map(json.dumps, TEXTS))),
    ):
        calibration = load(path)
        assert same(calibration, expected)
        assert calibration.name == path.name
    assert as_lists(load(file_of("ids.json", json.dumps(ROWS)), max_seq_len=64)) == ROWS
    assert as_lists(load(file_of("one.json", json.dumps({"input_ids": ROWS[0]})), max_seq_len=64)) == ROWS[:1]


def test_csv_and_parquet_files(load, file_of):
    frame = pandas.DataFrame({"id": range(20), "text": TEXTS})
    csv, parquet = file_of("rows.csv", frame.to_csv(index=False)), file_of("rows.parquet", b"")
    frame.rename(columns={"text": "body"}).to_parquet(parquet)
    for path in (csv, parquet):
        calibration = load(path)
        assert same(calibration, load(TEXTS))
        assert calibration.name == path.name


def test_csv_keeps_words_that_mean_missing_and_very_long_fields(load, tokenizer, file_of):
    texts = ["NA", "", "null", "the fox " * 20_000]
    path = file_of("rows.csv", pandas.DataFrame({"text": texts}).to_csv(index=False))
    calibration = load(path, max_seq_len=4096)
    kept = [text for text in texts if text]
    assert flat(calibration) == joined_ids(tokenizer, kept)[: calibration.tokens]


def test_folder_is_read_by_datasets(load, tmp_path):
    (tmp_path / "my_corpus").mkdir()
    (tmp_path / "my_corpus" / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    calibration = load(tmp_path / "my_corpus")
    assert calibration.name == "my_corpus"
    assert same(calibration, load(TEXTS))


# ---- data set names


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ["nobody/no-such-data-set", "no-such-data-set", "wikitext2", "c4", "c4-new"])
def test_names_that_need_the_network_say_what_to_do_without(load, offline, name):
    with pytest.raises(CalibrationDataError, match=rf"'{name}' could not be read \(\w+: .*builtin.*list of texts"):
        load(name)


def test_hub_name_streams_the_train_split_or_the_first(load, monkeypatch):
    split = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    other = datasets.Dataset.from_dict({"text": ["x"]}).to_iterable_dataset()
    for splits in ({"test": other, "train": split}, {"validation": split, "test": other}):
        asked = []
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *args, splits=splits, asked=asked, **kw: asked.append((args, kw)) or splits
        )
        calibration = load("someone/some-data")
        assert asked == [(("someone/some-data",), {"streaming": True})]
        assert calibration.name == "someone/some-data"
        assert same(calibration, load(TEXTS))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("pileval", ("mit-han-lab/pile-val-backup", "validation")),
        ("wikitext2:test", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("c4:validation", ("allenai/c4", "en", "validation")),
        ("someone/texts:test.1", ("someone/texts", "test.1")),
        ("someone/texts/german:validation", ("someone/texts", "german", "validation")),
    ],
)
def test_configuration_and_split_follow_the_name(load, monkeypatch, written, expected):
    rows = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *names, split, streaming: asked.append((*names, split)) or rows
    )
    calibration = load(written)
    assert asked == [expected]
    assert calibration.name == written
    assert same(calibration, load(TEXTS))


def test_two_names_are_owner_and_data_set_or_else_data_set_and_configuration(load, monkeypatch):
    rows = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    asked, known = [], {("texts", "german")}

    def load_dataset(*names, split, streaming):
        asked.append(names)
        if names not in known:
            raise datasets.exceptions.DatasetNotFoundError(f"{names} not found")
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert same(load("texts/german:train"), load(TEXTS))
    assert asked == [("texts/german",), ("texts", "german")]
    with pytest.raises(CalibrationDataError, match=r"'texts/dutch:train' could not be read .*\('texts/dutch',\) not"):
        load("texts/dutch:train")


def test_configurations_and_splits_of_a_folder(load, tmp_path, monkeypatch):
    card = ["---", "configs:"]
    for name in ("german", "dutch"):
        card += [f"- config_name: {name}", "  data_files:", f"  - {{split: validation, path: {name}.jsonl}}"]
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name} {text}"}) + "\n" for text in TEXTS)
        )
    (tmp_path / "README.md").write_text("\n".join([*card, "---", ""]))
    for written in (f"{tmp_path}/dutch:validation", f"{tmp_path}/dutch"):
        assert same(load(written), load([f"dutch {text}" for text in TEXTS]))
    with pytest.raises(CalibrationDataError, match="looks like a path"):
        load(f"{tmp_path}/french")
    with pytest.raises(CalibrationDataError, match=r"could not be read \(ValueError: .*train"):
        load(f"{tmp_path}/dutch:train")
    (tmp_path / "README.md").unlink()
    with pytest.raises(CalibrationDataError, match="looks like a path"):
        load(f"{tmp_path}/dutch")


def test_stream_that_breaks_midway_is_an_error_of_the_data(load, monkeypatch):
    def rows():
        yield {"text": TEXTS[0]}
        raise ConnectionError("connection lost")

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: {"train": datasets.IterableDataset.from_generator(rows)}
    )
    with pytest.raises(CalibrationDataError, match=r"'someone/some-data' could not be read \(ConnectionError"):
        load("someone/some-data")


def draw_from_global_generators(reset: bool = False) -> tuple[float, float, float]:
    if reset:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_optimum_names_go_through_optimum_and_leave_random_states_alone(load, monkeypatch):
    wikitext = datasets.Dataset.from_dict({"text": TEXTS})
    monkeypatch.setattr("optimum.gptq.data.load_dataset", lambda *_, **__: wikitext)
    own = make_tokenizer()
    draw_from_global_generators(reset=True)
    expected = draw_from_global_generators()
    draw_from_global_generators(reset=True)
    calibration = load("wikitext2", n_samples=5, load_tokenizer=lambda: own)
    assert draw_from_global_generators() == expected
    assert calibration.name == "wikitext2"
    assert [len(sequence) for sequence in calibration.sequences] == [16] * 5
    assert same(calibration, load("wikitext2", n_samples=5))
    assert not same(calibration, load("wikitext2", n_samples=5, seed=1))
    assert not own.deprecation_warnings


def test_name_of_a_loaded_dataset_is_kept(load):
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    dataset.info.dataset_name, dataset.info.builder_name = "corpus", "parquet"
    assert load(dataset).name == "corpus"
    dataset.info.dataset_name = "parquet"
    assert load(dataset).name.startswith("sha256:")


# ---- how much is read and chosen


@pytest.mark.parametrize("endless", ["text", "token ids"])
def test_generators_are_read_only_as_far_as_needed(load, endless):
    read = []

    def rows():
        while True:
            read.append(1)
            yield TEXTS[0] if endless == "text" else list(range(16))

    generator = rows()
    calibration = load(generator, n_samples=8)
    assert [len(sequence) for sequence in calibration.sequences] == [16] * 8
    assert len(read) <= dataset_module.READ_FACTOR * 8
    next(generator)  # the rest is still there


def test_a_used_up_generator_says_so(load):
    generator = (text for text in TEXTS)
    load(generator)
    with pytest.raises(CalibrationDataError, match="A generator can be read only once"):
        load(generator)


def test_large_lists_are_sampled_from_everywhere(load):
    rows = [[row % VOCAB_SIZE, row // VOCAB_SIZE, *range(6)] for row in range(10_000)]
    numbers = [a + VOCAB_SIZE * b for a, b, *_ in as_lists(load(rows, n_samples=50, load_tokenizer=no_tokenizer))]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == 50
    assert numbers[0] < 2_000
    assert numbers[-1] > 8_000


@pytest.mark.parametrize("dataset", [TEXTS, [[i, *range(10)] for i in range(100)], "builtin"])
def test_the_choice_depends_on_the_seed_alone(load, dataset):
    first = load(dataset, n_samples=6)
    random.seed(0)
    torch.manual_seed(0)
    assert same(first, load(dataset, n_samples=6))
    assert first.name == load(dataset, n_samples=6).name
    others = [load(dataset, n_samples=6, seed=seed) for seed in range(1, 4)]
    assert not all(same(first, other) for other in others)


def test_chosen_sequences_are_distinct_parts_of_the_text(load):
    everything = as_lists(load(TEXTS))
    chosen = as_lists(load(TEXTS, n_samples=30))  # 4 x 30 x 16 tokens are more than there are: all is read
    positions = [everything.index(sequence) for sequence in chosen]
    assert positions == sorted(set(positions))


def test_fewer_sequences_than_asked_are_used_with_a_warning(load, log):
    calibration = load(ROWS, max_seq_len=64, n_samples=128, load_tokenizer=no_tokenizer)
    assert len(calibration.sequences) == len(ROWS)
    (warning,) = [message for level, message in log if level == "warning"]
    assert "n_samples is 128" in warning
    assert "only 10 sequences" in warning


@pytest.mark.parametrize("n_samples", [1, 5, 60, 1000])
@pytest.mark.parametrize(
    "dataset", [TEXTS, [*ROWS, [1], []], [{"input_ids": [1] * 40, "loss_mask": [1] + [0] * 39}] * 9]
)
def test_the_log_accounts_for_every_token(load, log, dataset, n_samples):
    calibration = load(dataset, n_samples=n_samples)
    message = next(message for level, message in log if level == "info")
    read_tokens = int(re.search(r"documents, (\d+) tokens", message)[1])
    assert f"using {len(calibration.sequences)} sequences" in message
    left_over = message.split("Left over: ")[1]
    left_tokens = sum(map(int, re.findall(r"(\d+) tokens\)", left_over)))
    left_tokens += sum(map(int, re.findall(r"the last (\d+) tokens", left_over)))
    assert read_tokens == calibration.tokens + left_tokens


def test_text_stays_out_of_names_logs_and_representation(load, log, tmp_path):
    secret = "the secret of the lazy wizards " * 30
    (tmp_path / "secret.txt").write_text(secret)
    for form in ([secret], tmp_path / "secret.txt"):
        calibration = load(form)
        assert "lazy" not in repr(calibration) + repr(log)
        assert "tensor" not in repr(calibration)


# ---- the tokenizer


def test_tokenizer_by_path_object_or_the_checkpoints_own(load, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    expected = load(TEXTS)
    assert same(load(TEXTS, tokenizer=str(tmp_path), load_tokenizer=no_tokenizer), expected)
    assert same(load(TEXTS, tokenizer=tmp_path, load_tokenizer=no_tokenizer), expected)
    assert same(load(TEXTS, tokenizer=tokenizer, load_tokenizer=no_tokenizer), expected)


def test_the_checkpoints_tokenizer_is_loaded_once(load, tokenizer):
    calls = []
    load(TEXTS, load_tokenizer=lambda: calls.append(1) or tokenizer)
    assert calls == [1]


def test_missing_tokenizers(load, tmp_path):
    def fails():
        raise OSError("no tokenizer.json")

    for call in (
        lambda: load(TEXTS, load_tokenizer=fails),
        lambda: load(TEXTS, load_tokenizer=lambda: None),
        lambda: load(TEXTS, tokenizer=str(tmp_path / "nothing")),
        lambda: load([{"messages": CHATS[0]}], load_tokenizer=fails),
        lambda: load("wikitext2", load_tokenizer=fails),
    ):
        with pytest.raises(CalibrationDataError, match=r"Set `tokenizer` to a tokenizer, .*or pass token ids"):
            call()


def test_tokenizer_that_fails(load):
    def broken(text, **_):
        raise KeyError("unk")

    with pytest.raises(CalibrationDataError, match=r"tokenizer \(a function\) failed on row 0 .*KeyError"):
        load([TEXTS[0]], tokenizer=broken)


def test_messages_without_a_template(load):
    chats = [{"messages": chat} for chat in CHATS]
    with pytest.raises(CalibrationDataError, match=r"conversation in row \d.*set tokenizer.chat_template"):
        load(chats, tokenizer=make_tokenizer(chat_template=None))
    refuses = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationDataError, match="roles must alternate"):
        load(chats, tokenizer=make_tokenizer(chat_template=refuses))


def test_tokenizer_of_another_model(load):
    with pytest.raises(CalibrationDataError, match=r"vocabulary has ids from 0 to 49 \(size 50\).*own tokenizer"):
        load(TEXTS, vocab_size=50)


# ---- wrong data


IDS = list(range(10))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "empty: it has no rows"),
        ((), "empty: it has no rows"),
        (iter([]), "empty: it has no rows"),
        (torch.zeros(0, 5, dtype=torch.int64), "empty: it has no rows"),
        (datasets.Dataset.from_dict({"text": []}), "empty: it has no rows"),
        ([""], "0 usable tokens in 1 documents; expected at least 8.*1 empty documents"),
        (["a b"], r"0 usable tokens .*the last \d tokens of the text"),
        ([[1, 2, 3]], "3 usable tokens"),
        ([[]], "0 usable tokens"),
        ([{"input_ids": IDS, "loss_mask": [0] * 10}], "exclude every token"),
        ([IDS, [1, 2, VOCAB_SIZE]], r"Row 1 .*token id 300 at position 2; .*from 0 to 299 \(size 300\)"),
        ([[1, -100, 2]], "token id -100 at position 1"),
        ([{"input_ids": [1, 2, 5000]}], "token id 5000 at position 2"),
        ([[0.5] * 10], "Row 0 holds values of type float64; expected token ids"),
        (torch.zeros(2, 10), "values of type float32"),
        (torch.zeros(2, 10, dtype=torch.bfloat16), r"Row \d .*as token ids .*BFloat16"),
        (np.zeros((2, 10), dtype=bool), "values of type bool"),
        ([["a", "b"]], "values of type <U1"),
        ([[1, None]], "Row 0 holds None; expected token ids"),
        ([CHATS[0]], r"Row 0 holds a dict; .*Wrap conversations: \{'messages'"),
        ([[[1, 2], [3]]], "Row 0 could not be read as token ids"),
        ([*TEXTS, IDS], "Row 0 of the dataset is a text, row 20 is token ids"),
        ([IDS, {"input_ids": IDS}], "row 1 is a dict; all rows must have the same form"),
        (iter(["a", {"text": "b"}]), "row 1 is a dict"),
        (["a", b"b"], "Row 1 of the dataset is a bytes; decode it"),
        ([b"a"], "decode it to a string first"),
        (["a", None], "Row 1 of the dataset is None; remove it"),
        ([1, 2, 3], r"Row 0 of the dataset is an int; .*wrapped in a list: dataset=\[token_ids\]"),
        ([object()], "Row 0 of the dataset is an object; expected a text"),
        (torch.arange(10), r"shape \(10,\).*expected token ids of shape \(sequences, tokens\)"),
        (np.zeros((2, 3, 4), dtype=np.int64), r"shape \(2, 3, 4\)"),
        ([np.zeros((2, 3, 4), dtype=np.int64)], r"Row 0 .*shape \(2, 3, 4\); expected a sequence"),
        ([torch.tensor(5)], r"Row 0 .*shape \(\)"),
        ([{"a": "x", "b": "y"}], "columns 'a', 'b', of which 2 hold strings; expected .*Set text_column"),
        ([{"a": 1}], "columns 'a', of which 0 hold strings"),
        ([{}], r"columns \(none\)"),
        (iter([{"text": "a"}, {"body": "b"}]), "Row 1 .*'body', but the rows before it have 'text'"),
        ([{"text": None}], "column 'text', is None; expected a string"),
        ([{"text": 5}], "column 'text', is an int"),
        ([{"input_ids": None}], "Row 0 holds None; expected token ids"),
        ([{"input_ids": IDS, "attention_mask": [1]}], r"attention_mask has the shape \(1,\), input_ids \(10,\)"),
        ([{"input_ids": IDS, "labels": 1}], r"labels has the shape \(\)"),
        ([{"input_ids": IDS, "loss_mask": ["a"] * 10}], "column 'loss_mask', holds values of type <U1"),
        ([{"messages": []}], "expected a non-empty list of dicts with 'role'"),
        ([{"messages": "hello"}], "column 'messages', is a str"),
        ([{"messages": [{"content": "hello"}]}], "with 'role' and 'content'"),
        ([{"conversations": [{"from": "human"}]}], "with 'from' and 'value'"),
        (
            [{"conversations": [{"from": "narrator", "value": "x"}]}],
            "a turn is from 'narrator'; expected system, human",
        ),
        ({"input_ids": [IDS]}, "is a dict with the keys 'input_ids'; expected rows.*from_dict"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}), r"dataset\['train'\]"),
        (pandas.DataFrame({"text": TEXTS}), "from_pandas"),
        (object(), "The dataset is an object; expected 'builtin', a list of texts"),
        ("no/such/file", "looks like a path, but there is no such file"),
        ("no/such/file/at/all:train", "looks like a path, but there is no such file"),
        (f"{__file__}:train", r"is a file, which has no split 'train': leave out ':train'"),
        ("missing.jsonl", "looks like a path, but there is no such file"),
        ("owner/missing.csv", "no such file"),
        ("./missing", "no such file"),
        ("~/missing", "no such file"),
        ("A text by itself, not in a list.", r"neither a file nor a data set name.*dataset=\[text\]"),
    ],
)
def test_wrong_data(load, dataset, message):
    with pytest.raises(CalibrationDataError, match=message):
        load(dataset)


def test_text_column_that_is_not_there(load):
    for dataset in ([{"text": "a", "n": 1}], datasets.Dataset.from_dict({"text": ["a"], "n": [1]})):
        with pytest.raises(CalibrationDataError, match=r"text_column is 'body', but .*columns 'text', 'n'"):
            load(dataset, text_column="body")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a.jsonl, line 2: not valid JSON"),
        ("a.json", '[\n{"text": "a"},\n{"text" "b"}\n]', r"a.json, line 3: not valid JSON"),
        ("a.json", '{"text": "a"}\n{"text": \n', r"a.json, line 2: not valid JSON"),
        ("a.json", "", r"a.json, line 1: not valid JSON"),
        ("a.json", '["a", {"text": "b"}]', "row 1 is a dict"),
        ("a.jsonl", "", "empty: it has no rows"),
        ("a.txt", "", "0 usable tokens in 1 documents"),
        ("a.txt", b"\xff\xfe\xff" * 9, r"a.txt could not be read \(UnicodeDecodeError"),
        ("a.jsonl", b"\xff\xfe\xff" * 9, r"a.jsonl could not be read \(UnicodeDecodeError"),
        ("a.parquet", b"nonsense", r"a.parquet could not be read \(Arrow"),
        ("a.csv", "", r"a.csv could not be read \(EmptyDataError"),
        ("a.csv", 'text\n"a\n', r"a.csv could not be read \(ParserError"),
        ("a.pdf", "x", r"ends in '.pdf'; expected .txt, .jsonl, .json, .parquet, .csv"),
    ],
)
def test_wrong_files(load, file_of, name, content, message):
    with pytest.raises(CalibrationDataError, match=message):
        load(file_of(name, content))


def test_missing_path_object(load, tmp_path):
    with pytest.raises(CalibrationDataError, match="no such file"):
        load(tmp_path / "missing")


# ---- micro-batches


def test_micro_batches_hold_equal_lengths_and_every_index_once():
    lengths = [5, 16, 16, 5, 3, 16, 40, 16]
    sequences = [torch.zeros(length, dtype=torch.int64) for length in lengths]
    calibration = CalibrationSet(sequences, [None] * len(sequences), "test")
    assert micro_batches(calibration, 32) == [[6], [1, 2], [5, 7], [0, 3], [4]]
    assert micro_batches(calibration, 1) == [[6], [1], [2], [5], [7], [0], [3], [4]]
    assert micro_batches(calibration, 10**9) == [[6], [1, 2, 5, 7], [0, 3], [4]]
    assert micro_batches(CalibrationSet([], [], "test"), 32) == []
