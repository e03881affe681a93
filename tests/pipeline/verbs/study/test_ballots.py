"""Which answers count: each row does, or is counted under one cause; of a pair answered twice the last does."""

import pytest

from pipeline.errors import UsageError
from pipeline.verbs.study import ballots
from pipeline.verbs.study.pairs import CONTROL, Key, Pair

KEY = Key(
    "s", {"p": Pair("mine", "x", "0", "a"), "q": Pair("mine", "x", "1", "b"), "c": Pair("mine", CONTROL, "2", CONTROL)}
)
HEADER = ",".join(ballots.COLUMNS)


def sifted(*lines: str):
    content = "\r\n".join([HEADER, *lines, ""]).encode()
    return ballots.sifted(ballots.rows(content, "f.csv"), KEY)


def test_rows_that_do_not_count_are_counted_by_cause():
    found, dropped = sifted(
        "s,r,p,a,b,2026-01-01T00:00:00Z",
        "s,r,p,a,b,2026-01-01T00:00:00Z",  # the same file sent twice
        "s,r,q,a,neither,2026-01-01T00:00:01Z",
        "other,r,p,a,b,2026-01-01T00:00:00Z",
        "s,r,z,a,b,2026-01-01T00:00:00Z",
        "s,r,p,a,left,2026-01-01T00:00:00Z",
        "s,r,p,c,a,2026-01-01T00:00:00Z",
        "s,,p,a,a,2026-01-01T00:00:00Z",
        "s,r,p",
    )
    assert [(one.pair, one.chosen) for one in found] == [("p", "b"), ("q", "neither")]
    assert dropped == {
        "answered again": 1, "of another study": 1, "of no pair of the study": 1, "no answer that the page gives": 2,
        "incomplete": 2,
    }  # fmt: skip


@pytest.mark.parametrize("turned", [False, True])
def test_the_last_answer_counts_in_whatever_order_files_are_given(turned):
    lines = ["s,r,p,a,b,2026-01-01T00:00:00Z", "s,r,p,a,a,2026-01-01T00:00:09Z"]
    found, dropped = sifted(*(reversed(lines) if turned else lines))
    assert [one.chosen for one in found] == ["a"]
    assert dropped == {"answered again": 1}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "f.csv lacks the columns study, rater"),
        (b"study,rater,pair\nx,y,z\n", "f.csv lacks the columns left, chosen, answered"),
        (b"\x89PNG\r\n\x1a\n\x00", "f.csv is no CSV in UTF-8"),
        (b'study,rater,pair,left,chosen,answered\ns,"r,p,a,b,2026\ns,r,p,a,b,2026\n', "f.csv is no CSV in UTF-8"),
    ],
)
def test_a_file_that_no_page_made_is_refused_by_name(content, told):
    with pytest.raises(UsageError, match=told):
        ballots.rows(content, "f.csv")


def test_a_spreadsheet_may_have_saved_the_file_again():
    content = b"\xef\xbb\xbf" + HEADER.encode() + b"\n s , r ,p,a,a,2026\n"
    assert [one.chosen for one in ballots.sifted(ballots.rows(content, "f.csv"), KEY)[0]] == ["a"]
