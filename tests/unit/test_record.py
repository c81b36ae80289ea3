"""How a record is written."""

from __future__ import annotations

import json

import pytest

from oasis_flows.record import recalled, written


def test_a_list_of_numbers_is_one_line_and_texts_stay_as_they_are() -> None:
    record = {"samples": [[0.2, -1.5, 1e-9], [1, 2, 3]], "words": ["[ 1 ]", "[\n  1,\n  2\n]"], "none": [], "null": [None]}
    text = written(record).decode()
    assert json.loads(text) == record
    assert "\n    [0.2, -1.5, 1e-09],\n    [1, 2, 3]\n" in text


@pytest.mark.parametrize(
    "record", [{}, {"verdict": {"code": "exit_nonzero"}}, {"verdict": {"code": "ok"}, "first_try": None}, {"verdict": []}]
)
def test_of_a_failure_or_of_what_another_version_wrote_nothing_is_recalled(record) -> None:
    assert recalled(record, None) is None
