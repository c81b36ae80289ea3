"""Requirements: what meets them, and formulas over them."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, strategies as st

from oasis_flows.requirement import Demand, Literal, Requirement, Result, Target, all_of, any_of, evaluate, unmet


def met(target: Target, value: str | None, choices: tuple[str, ...] = ()) -> bool:
    places = {"/data": "folder", "/data/x.csv": "file", "/volume/y": "?"}
    requirement = Requirement(id=0, name="FOO", target=target, choices=choices, said="thing")
    result = evaluate(requirement, {} if value is None else {"FOO": value}, places.get)

    assert bool(result.reason) is not result.met
    assert value is None or len(value) < 4 or value not in result.reason
    return result.met


@pytest.mark.parametrize(
    ("value", "good"),
    [
        ("https://data.example.org:8080/fhir?x=1", True),
        ("postgresql://user@host/db", True),
        ("http://[::1]:80/", True),
        ("data.example.org", False),
        ("http://", False),
        ("http://host:port/", False),
        ("http://host/a b", False),
        ("http://[::1/", False),
        ("  ", False),
        (None, False),
    ],
)
def test_urls(value, good):
    assert met(Target.URL, value) is good


@pytest.mark.parametrize(
    ("target", "value", "good"),
    [
        (Target.TOKEN, "anything", True),
        (Target.TOKEN, "\t", False),
        (Target.ENUM, "FHIR", True),
        (Target.ENUM, "fhir", False),
        (Target.DIRECTORY, "/data", True),
        (Target.DIRECTORY, "/data/x.csv", False),
        (Target.FILE, "/data/x.csv", True),
        (Target.FILE, "/data", False),
        (Target.FILE, "/volume/y", True),
        (Target.FILE, "/etc/passwd", False),
        (Target.FILE, "data/x.csv", False),
        (Target.VALUE, "x", True),
        (Target.UNKNOWN, "anything", False),
    ],
)
def test_others(target, value, good):
    assert met(target, value, ("FHIR", "SPARQL")) is good


def demand(*formula: tuple[Literal, ...]) -> Demand:
    return Demand(tuple(Requirement(id=n, name=name, target=Target.VALUE) for n, name in enumerate("ABC")), formula)


def test_what_is_missing_is_said_in_words():
    wanted = demand(*all_of([0]), *any_of([1, 2]), (Literal(1, forbidden=True),))
    results = [Result("A", False, "A is not set"), Result("B", True), Result("C", False, "C is not set")]

    assert unmet(wanted, results) == ("A is not set", "B is set, and must not be")
    assert unmet(wanted, [results[0], Result("B", False, "B is not set"), results[2]]) == (
        "A is not set",
        "one of B or C (B is not set; C is not set)",
    )


@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=3), max_size=4))
def test_a_formula_holds_as_the_rows_of_its_table_say(rows):
    wanted = demand(*(tuple(Literal(id, forbidden) for id, forbidden in row) for row in rows))
    for values in product([True, False], repeat=3):
        holds = all(any(values[id] is not forbidden for id, forbidden in row) for row in rows)

        assert (not wanted.violated(dict(enumerate(values)))) is holds
