"""What the program answers to mistakes: one line with the right cause, the documented exit code, and no file lost."""

from __future__ import annotations

import pytest
from mistakes import BEGIN, END, MISTAKES, PAGE, Answer, answers, shown, table


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[tuple[Answer, str]]:
    return [(answer, shown(answer.last_line, folder)) for _, answer, folder in answers(MISTAKES)]


def test_each_mistake_is_answered_with_its_cause_and_exit_code(made):
    wrong = {
        mistake.command: (answer.code, line)
        for mistake, (answer, line) in zip(MISTAKES, made, strict=True)
        if answer.code != mistake.code or mistake.cause not in line
    }
    assert not wrong


def test_no_mistake_shows_a_traceback(made):
    assert [answer.stderr for answer, _ in made if "Traceback" in answer.stderr + answer.stdout] == []


def test_no_mistake_harms_a_file(made):
    assert [answer.harmed for answer, _ in made if answer.harmed] == []


def test_a_mistake_leaves_nothing_but_a_journal_that_the_answer_names(made):
    for mistake, (answer, line) in zip(MISTAKES, made, strict=True):
        for name in answer.new:
            folder = name.partition("/")[0]
            assert folder.endswith(".journal"), mistake
            assert folder in line, mistake


def test_the_page_holds_the_answers(made):
    rows = [(mistake, line) for mistake, (_, line) in zip(MISTAKES, made, strict=True)]
    page = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert page.strip() == table(rows).strip(), "run tests/cli/mistakes.py --write"
