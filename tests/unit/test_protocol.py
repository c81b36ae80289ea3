"""The Train API: goldens of all generations, the traps of its framing, and what holds for any log and any response."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from oasis_flows.answer import MAX_RESPONSE_BYTES, Question, _suffix, response, response_in_file
from oasis_flows.errors import ProtocolError
from oasis_flows.protocol import (
    Generation,
    Rebase,
    TrainState,
    argv,
    checked_tag,
    generation_of,
    read_check,
    read_description,
    read_run,
    read_summary,
)
from oasis_flows.requirement import Target

GOLDEN = Path(__file__).parents[1] / "trains_golden"
RUN = Question.RUN


def golden(name: str, question: Question = Question.LIST) -> dict[str, object]:
    return response((GOLDEN / f"{name}.stdout").read_bytes(), question)


class TestGoldens:
    def test_describe_of_1_0(self):
        answer = golden("1.0-describe")
        assert generation_of(answer, "describe") is Generation.ONE
        found = read_description(Generation.ONE, answer)
        assert (found.name, found.summary) == ("train_iris", "Not executed yet")
        assert [requirement.target for requirement in found.demand.requirements] == [
            Target.URL, Target.TOKEN, Target.ENUM, Target.DIRECTORY, Target.FILE,
        ]  # fmt: skip
        assert found.demand.requirements[2].choices == ("FHIR", "SPARQL")
        assert [found.demand.in_words(clause) for clause in found.demand.formula] == [
            "not MODEL_FILE or IMAGES",
            "not ENDPOINT_TYPE or not FHIR_URL or ENDPOINT_TOKEN",
        ]
        assert [state.met for state in found.states] == [True, False, False, False, False]
        assert found.states[1].reason == "Environment variable 'ENDPOINT_TOKEN' not set"

    def test_run_of_1_0(self):
        found = read_run(golden("1.0-run", RUN))
        assert found.state is TrainState.SUCCESS
        assert found.message == 'two  blanks, {braces} and \\"quotes\\"'
        assert found.tags == ("next-tag", "2.7.15-slim-jessie")
        assert found.rebase == Rebase("registry.example.org/base:1", ("/opt/pht_train/model/key",))
        assert found.unknown == {"extra": {"kept": 1}}

    @pytest.mark.parametrize(
        ("name", "state", "reason"),
        [
            ("1.0-run-failure", TrainState.FAILURE, "Fail: Hello World"),
            ("1.0-run-application", TrainState.APPLICATION, "not converged"),
        ],
    )
    def test_other_ends_of_1_0(self, name: str, state: TrainState, reason: str):
        found = read_run(golden(name, RUN))
        assert (found.state, found.reason) == (state, reason)

    def test_v1(self):
        answer = golden("V1-list_requirements")
        assert generation_of(answer, "list_requirements") is Generation.V1
        demand = read_description(Generation.V1, answer).demand
        assert [(each.id, each.name, each.target) for each in demand.requirements] == [(0, "FOO", Target.URL)]
        assert [demand.in_words(clause) for clause in demand.formula] == ["FOO"]
        (unmet,) = read_check(Generation.V1, golden("V1-check_requirements", Question.CHECK), demand)
        assert (unmet.name, unmet.met, unmet.reason) == ("FOO", False, "FOO is not there")
        assert read_summary(Generation.V1, golden("V1-print_model_summary", Question.SUMMARY)) == "Hello  World"
        run = read_run(golden("V1-run_algorithm", RUN))
        assert (run.state, run.tags, run.rebase) == (TrainState.SUCCESS, ("station-2",), Rebase("base:1", ("/model/weights",)))

    def test_clauses_is_relations(self):
        demand = read_description(Generation.V1, golden("V1-list_requirements-clauses")).demand
        assert [demand.in_words(clause) for clause in demand.formula] == ["FOO", "BAR", "BAZ"]

    def test_0_x(self):
        answer = golden("0.x-list_requirements")
        assert generation_of(answer, "list_requirements") is Generation.ZERO
        demand = read_description(Generation.ZERO, answer).demand
        assert [demand.in_words(clause) for clause in demand.formula] == ["DATA_SOURCE", "TOKEN"]
        results = read_check(Generation.ZERO, golden("0.x-check_requirements", Question.CHECK), demand)
        assert [(result.name, result.met) for result in results] == [("DATA_SOURCE", True), ("TOKEN", False)]
        run = read_run(golden("0.x-run_algorithm", RUN))
        assert (run.state, run.message, run.rebase) == (TrainState.FAILURE, "no data", None)

    def test_a_jvm_station_s_spelling(self):
        rebase = {"from": "base", "next_train_tag": "a", "export_files": ["/x"], "type": "docker"}
        found = read_run({"state": "success", "free_text_message": "hi", "rebase": rebase})
        assert (found.message, found.tags, found.rebase) == ("hi", ("a",), Rebase("base", ("/x",)))


def test_command_lines():
    def words(generation: Generation, question: Question, **more: str) -> str:
        return " ".join(argv(generation, question, station_id=7, **more))

    assert words(Generation.V1, Question.SUMMARY) == "print_model_summary"
    assert words(Generation.ZERO, RUN) == "run_algorithm --stationid 7 --mode immediate"
    assert words(Generation.ONE, Question.CHECK) == "describe --station-id 7"
    assert words(Generation.ONE, RUN, track_info="t", user_data="") == "run --station-id 7 --track-info t --user-data "


class TestSuffix:
    @pytest.mark.parametrize(
        "log",
        ["", "{sfsf}\n", '{"a": 1}\n', "}{", '{"', 'a "quoted \\', "{" * 500, '{"content": "', "ä€\0", '{"a": ['],
    )
    def test_any_log_may_come_before(self, log: str):
        answer = {"content": 'Hello  World {} "q" \\', "n": [1, {"x": "}"}]}
        assert response((log + json.dumps(answer) + " \r\n\n").encode(), Question.SUMMARY) == answer

    @pytest.mark.parametrize(
        ("stdout", "why"),
        [
            (b"", "is no JSON object at the end"),
            (b"no JSON", "is no JSON object at the end"),
            (b'{"success": true}\nbye', "Nothing may be printed behind it"),
            (b'{"success": true}}', "Nothing may be printed behind it"),
            (b"[1, 2]", "is no JSON object"),
            (b'"text"', "is no JSON object"),
            (b'{"success": NaN}', "is no JSON object"),
            (b'{"success": true}\n{"success": false}', "comes twice"),
            (b'{"success": "\xff"}', "is not UTF-8"),
            (b'{"a":' * 5000 + b"1" + b"}" * 5000, "is no JSON object"),
            (b'{"a":' * 501 + b"1" + b"}" * 501, "is no JSON object"),
        ],
    )
    def test_what_is_none(self, stdout: bytes, why: str):
        with pytest.raises(ProtocolError) as caught:
            response(stdout, RUN)
        assert why in str(caught.value)
        assert len(str(caught.value)) < 900

    def test_a_log_line_that_is_json_but_no_response_is_log(self):
        assert response(b'{"level": "info"}\n{"success": true}', RUN) == {"success": True}

    def test_too_large(self):
        with pytest.raises(ProtocolError, match="more than 4 MiB"):
            response(b'{"success": true, "x": "' + b"y" * MAX_RESPONSE_BYTES + b'"}', RUN)

    def test_cut(self):
        with pytest.raises(ProtocolError, match="no beginning within its last 4 MiB"):
            response(b'yyy"}', RUN, cut=True)

    def test_bytes_before_it_need_not_be_text(self):
        assert response(b'\xff\xfe{\n{"success": true}', RUN) == {"success": True}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(
    st.text(st.sampled_from('{}[]":,\\ \nab')),
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), JSON, max_size=4),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_the_suffix_is_the_response_whatever_the_log_is(log, answer, indent, ascii):
    text = log + "\n" + json.dumps(answer, indent=indent, ensure_ascii=ascii)

    assert response(text.encode() + b"\n", Question.LIST) == answer


@given(st.text(st.sampled_from('{}[]":,\\ 1a')))
def test_at_most_one_brace_begins_a_suffix(text):
    decoder, found = json.JSONDecoder(), []
    for at in (at for at, letter in enumerate(text) if letter == "{"):
        try:
            found += [at] if decoder.raw_decode(text, at)[1] == len(text) else []
        except ValueError:
            continue

    assert len(found) <= 1


@given(st.text(st.sampled_from('{}[]":,\\ 1a')))
def test_read_from_the_right_is_read_from_the_left(text):
    decoder, found = json.JSONDecoder(), None
    for at in (at for at, letter in enumerate(text.rstrip()) if letter == "{"):
        try:
            found = at if decoder.raw_decode(text, at)[1] == len(text.rstrip()) else found
        except ValueError:
            continue

    assert (_suffix(text.rstrip()) or (None,))[0] == found


@pytest.mark.parametrize("printed", ['{"', '{"}', '{"a":', "{ }", '"\\\\', "{" * 99 + "\n", "[}"])
def test_nothing_that_a_train_prints_takes_long_to_read(printed: str):
    began = time.process_time()
    with pytest.raises(ProtocolError):
        response((printed * (1_000_000 // len(printed)) + " }}").encode(), RUN)

    assert time.process_time() - began < 10


class TestResponseFile:
    def test_exactly_one_object(self):
        assert response_in_file(b' {"success": true}\n', RUN) == {"success": True}

    @pytest.mark.parametrize("content", [b"{}{}", b"log {}", b"[]", b"\xff", b'{"a": Infinity}', b"{" * 5000])
    def test_nothing_else(self, content: bytes):
        with pytest.raises(ProtocolError, match="OASIS_RESPONSE_FILE"):
            response_in_file(content, RUN)


def listed(name: str) -> dict[str, object]:
    return {"requirements": [{"id": 0, "requirement": {"type": "environmentVariable", "target": "URL", "name": name}}]}


class TestNames:
    @pytest.mark.parametrize("name", ["MY_URL", "A", "FOO", "TEST_THIS_URL"])
    def test_valid(self, name: str):
        assert read_description(Generation.V1, listed(name)).demand.warnings == ()

    @pytest.mark.parametrize("name", ["PHT_REQ1", "PHT_RESOURCE_FHIR_DSTU3"])
    def test_digits_are_taken_with_a_warning(self, name: str):
        (warning,) = read_description(Generation.V1, listed(name)).demand.warnings
        assert name in warning

    @pytest.mark.parametrize("name", ["", "_", " ", "AR_", "sadsf", "_HSGJD", "HSG__JD", "1A"])
    def test_invalid(self, name: str):
        with pytest.raises(ProtocolError, match="which is no name"):
            read_description(Generation.V1, listed(name))


@pytest.mark.parametrize(
    ("tag", "good"), [("2.7.15-slim-jessie", True), ("a", True), ("A", False), ("a_b", False), ("-a", False), ("", False), ("a" * 129, False), (3, False)]
)  # fmt: skip
def test_tags(tag: object, good: bool):
    assert checked_tag(tag) is good


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ({}, "does not say how it ended"),
        ({"exit": {"state": "ok"}}, "does not say how it ended"),
        ({"success": "yes"}, "neither true nor false"),
        ({"success": True, "rebase": []}, "no object"),
        ({"success": True, "rebase": {"type": "rkt"}}, "type 'rkt'"),
        ({"success": True, "nextTrainTag": "Bad Tag"}, "which is no tag"),
        ({"success": True, "exportFiles": ["relative"]}, "not the whole path"),
        ({"success": True, "exportFiles": ["/a/../etc/passwd"]}, "not the whole path"),
        ({"success": True, "message": 3}, "no text"),
    ],
)
def test_a_run_s_response_that_makes_no_sense(answer, why):
    with pytest.raises(ProtocolError, match=why):
        read_run(answer)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"formula": [{"id": 1, "data": {"value": [[0]]}}]}, "literal 0"),
        ({"formula": [{"id": 1, "data": {"value": [[9]]}}]}, "literal 9"),
        ({"formula": [{"id": 2, "data": {"value": [[1]]}}]}, "requires the formula 1"),
        ({"properties": [{"id": 0, "data": {"environmentVariableName": "A"}}]}, "an id 0"),
        ({"properties": None}, "no list of `properties`"),
    ],
)
def test_a_description_that_makes_no_sense(change, why):
    answer = {**golden("1.0-describe"), **change}
    with pytest.raises(ProtocolError, match=why):
        read_description(Generation.ONE, answer)


def test_an_unknown_relation_and_an_unknown_id_are_refused():
    for relation in ({"type": "none", "requirements": [0]}, {"type": "all", "requirements": [1]}):
        with pytest.raises(ProtocolError):
            read_description(Generation.V1, {**listed("A"), "relations": [relation]})
