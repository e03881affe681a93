"""Spellings of URLs: what is one, which are the same, which only mean the same."""

import pytest

from datasets.planning import urls
from tests.datasets.planning.planned import laion_row, made


@pytest.mark.parametrize("host", ["example.%6frg", "a%40example.org", "example.org%2f.invalid", "example.org%3a80"])
def test_an_escape_in_a_host_which_would_be_another_one_when_it_is_asked_makes_no_url(host):
    with pytest.raises(ValueError, match="no http"):
        urls.normalised_url(f"http://{host}/x.jpg")


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        (" HTTP://Example.ORG:80 ", "http://example.org/"),
        ("https://example.org/a b/ü.jpg?q=ü#x", "https://example.org/a%20b/%C3%BC.jpg?q=%C3%BC"),
        ("https://example.org/%C3%BC.jpg", "https://example.org/%C3%BC.jpg"),
        ("https://bücher.example/", "https://xn--bcher-kva.example/"),
        ("http://[2001:DB8::1]:8080/x", "http://[2001:db8::1]:8080/x"),
    ],
)
def test_urls_that_mean_the_same_become_the_same(url, normal):
    assert urls.normalised_url(url) == normal
    assert urls.normalised_url(normal) == normal


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("http://a.org/caf%c3%a9.jpg", "http://a.org/caf%C3%A9.jpg"),
        ("http://a.org/%7Eann/x.jpg", "http://a.org/~ann/x.jpg"),
        ("http://a.org/a/./b/../x.jpg", "http://a.org/a/x.jpg"),
        ("http://a.org./x.jpg", "http://a.org/x.jpg"),
        ("http://a.org.:81/x?q=%2f", "http://a.org:81/x?q=%2F"),
        ("http://a.org/a/b/..", "http://a.org/a/"),
    ],
)
def test_urls_that_mean_the_same_are_equal_though_their_keys_differ(tmp_path, one, other):
    """So a removal list reaches a picture in whatever spelling either has it."""
    assert urls.equal(one) == urls.equal(other)
    assert urls.normalised_url(one) != urls.normalised_url(other)
    (tmp_path / "removed.txt").write_text(one)
    assert (
        made(tmp_path, [{**laion_row(0), "URL": other}, laion_row(1)], removed=str(tmp_path / "removed.txt")).rejected[
            "removed"
        ]
        == 1
    )


@pytest.mark.parametrize(
    "url",
    ["http://a.org//x/y.jpg", "http://a.org/a%2Fb.jpg", "http://a.org/.x.jpg", "http://a.org/x..jpg", "http://a.org/"],
)
def test_other_urls_stay_as_they_are(url):
    assert urls.equal(url) == url
