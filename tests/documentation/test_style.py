"""What people read: phrases that never come back, help that fits a terminal, figures that agree between pages."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from test_troubleshooting import PACKAGE, texts_of

from hf_awq_offload.cli.parser import build_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")]
RECORDS = {"log.md", "changelog.md"}
"""Pages of dated entries, which stay as they were written."""
NEVER_AGAIN = {
    r"go(es)? before (it|the (file|recipe))": "command-line options override the file",
    r"go(es)? on with": "resumes, continues",
    r"the same call goes on": "the same call resumes",
    r"can't be had": "could not be downloaded",
    r"near misses:": "did you mean",
    r"the nearest (is|are)[: ]": "did you mean",
    r"keeps? \w+ going": "continues",
    r"weight is touched": "before any weight is loaded, or quantized",
    r"no stored activations": "say which activations are stored, and their bytes",
    r"every causal type": "the number of types, and where the list of exceptions is",
    r"to be had": "available",
    r"is no (JSON|size|regular)": "is not valid JSON, is not a size",
    r"(is|are) no part of a checkpoint": "is not part of a checkpoint",
    r"get (it|them|that file|the checkpoint) again": "download it again",
    r"begins? anew": "start over",
    r"no scale is better than none": "unscaled was best",
    r"`make` and nothing else": "what and how much is downloaded",
    r"pip install [\"'`]*hf_awq_offload": "no index has the package: see messages.how_to_install",
}
"""Regular expression -> what to write instead."""
WIDTH = 80


@cache
def texts() -> dict[str, str]:
    """Everything that users read, by where it is."""
    pages = {page.name: page.read_text(encoding="utf-8") for page in PAGES if page.name not in RECORDS}
    pages["quickstart.ipynb"] = (ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8")
    code = {str(path.relative_to(PACKAGE)): "\n".join(texts_of(path)) for path in PACKAGE.rglob("*.py")}
    return pages | code


@pytest.mark.parametrize("phrase", NEVER_AGAIN)
def test_a_phrase_that_reads_like_a_translation_does_not_come_back(phrase):
    found = {
        place: " ".join(match[0].split())
        for place, text in texts().items()
        if (match := re.search(phrase.replace(" ", r"\s+"), text, flags=re.IGNORECASE))
    }
    assert found == {}, f"write: {NEVER_AGAIN[phrase]}"


@pytest.mark.parametrize("command", [None, *build_parser()[1]])
def test_help_fits_a_terminal(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    parser, commands = build_parser()
    text = (parser if command is None else commands[command]).format_help()
    assert len(text.splitlines()) > 10
    assert [line for line in text.splitlines() if len(line) > WIDTH] == []


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    code = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", code, flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title.encode("ascii", "ignore").decode()).strip().lower() for title in titles]
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_to_a_file_and_a_heading(page):
    text = page.read_text(encoding="utf-8")
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = page.parent / name if name else page
        if not linked.exists() or (anchor and anchor not in anchors(linked.read_text(encoding="utf-8"))):
            dead.append(target)
    assert dead == []


def test_the_pages_count_the_tested_model_types_alike():
    architectures = " ".join((ROOT / "docs" / "architectures.md").read_text(encoding="utf-8").split())
    (causal,) = re.findall(r"(\d+) causal language model types", architectures)
    (image_text,) = re.findall(r"covers the (\d+) types of `AutoModelForImageTextToText`", architectures)
    counts = {
        name: re.findall(r"(\d+) (causal|image-text)(?: language)? model types?", " ".join(text.split()))
        for name, text in texts().items()
    }
    expected = {"causal": causal, "image-text": image_text}
    wrong = {name: found for name, found in counts.items() if any(expected[kind] != number for number, kind in found)}
    assert wrong == {}
    assert f"{causal} causal and {image_text} image-text model types" in " ".join(
        (ROOT / "README.md").read_text(encoding="utf-8").split()
    )


def test_the_glossary_has_every_term_that_messages_and_reports_use():
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^\| ([^|]+) \|", glossary, flags=re.MULTILINE)
    named = {term.strip() for entry in terms for term in re.sub(r"\(.*?\)", "", entry).split(",")}
    wanted = {"group", "group size", "grid", "zero point", "scale", "fold", "clip", "calibration", "gram matrix"}
    wanted |= {"error feedback", "decoder layer", "starved expert", "micro-batch", "journal", "hidden states", "probe"}
    assert wanted - named == set()
