"""Which names a pattern means."""

import pytest
from hypothesis import example, given, strategies as st

from oasis_flows.include import exactly, included, name_pattern
from oasis_flows.manifest import Entry


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*.jpg", "a.jpg", True),
        ("*.jpg", "deep/er/a.jpg", True),
        ("*.jpg", "a.JPG", False),
        ("*.jpg", "a.jpg.txt", False),
        ("in/*.jpg", "in/a.jpg", True),
        ("in/*.jpg", "in/deep/a.jpg", False),
        ("in/*.jpg", "also/in/a.jpg", False),
        ("in/**/*.jpg", "in/a.jpg", True),
        ("in/**/*.jpg", "in/deep/er/a.jpg", True),
        ("in/**", "in/deep/a", True),
        ("/a.jpg", "a.jpg", True),
        ("/a.jpg", "deep/a.jpg", False),
        ("a?.txt", "ab.txt", True),
        ("a?b", "a/b", False),
        ("[ab]*", "bc", True),
        ("[!ab]*", "bc", False),
        ("[!ab]*", "cb", True),
        ("a[0-9]", "a5", True),
        ("a[^]", "a^", True),
        ("a[]b", "a[]b", True),
        ("[]a]", "]", True),
        ("[!]a]", "]", False),
        ("[a-c]", "b", True),
        ("[a-]", "-", True),
        ("[c-a]", "b", False),
        ("[c-a]", "c", False),
        ("[!c-a]", "b", True),
        ("[--0]", ".", True),
        ("a[+-9]b", "a/b", False),
        ("a[!x]b", "a/b", False),
        ("[A-Z]", "a", False),
        ("a**/b", "ab", False),
        ("a**/b", "ax/y/b", True),
        ("**", "a/b", True),
        ("a.b", "axb", False),
        ("(x)+", "(x)+", True),
        ("*", ".hidden", True),
        ("*\n*", "a\nb", True),
    ],
)
def test_a_pattern_means_what_shells_and_git_mean_by_it(pattern, name, matches):
    assert bool(name_pattern(pattern).fullmatch(name)) is matches


@given(st.text(min_size=1).filter(lambda name: not name.startswith("/")), st.text(min_size=1))
@example("-d/x", "d/x")
def test_a_name_can_be_written_so_that_nothing_else_matches(name, other):
    pattern = name_pattern(exactly(name))

    assert not exactly(name).startswith("-")
    assert pattern.fullmatch(name)
    assert bool(pattern.fullmatch(other)) is (name == other)


@given(st.one_of(st.text(), st.text("[]!-^a9/*\\&|~", max_size=12)))
def test_any_text_is_a_pattern(text):
    name_pattern(text)


def test_without_a_pattern_every_file_is_meant():
    entries = [Entry("a", 1), Entry("b/c", 2)]

    assert list(included(entries, None)) == entries
    assert list(included(entries, "c")) == entries[1:]
