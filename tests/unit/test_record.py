"""How a record is written."""

from __future__ import annotations

import json

from oasis_flows.record import written


def test_a_list_of_numbers_is_one_line_and_texts_stay_as_they_are() -> None:
    record = {"samples": [[0.2, -1.5, 1e-9], [1, 2, 3]], "words": ["[ 1 ]", "[\n  1,\n  2\n]"], "none": [], "null": [None]}
    text = written(record).decode()
    assert json.loads(text) == record
    assert "\n    [0.2, -1.5, 1e-09],\n    [1, 2, 3]\n" in text
