"""Argument vectors and parameters: what people write is what the program gets."""

import os
import subprocess

import pytest
from hypothesis import given, settings, strategies as st

from oasis_flows import command
from oasis_flows.errors import DescriptionError

NASTY = "a; touch pwned $(id) `id` \"x\" 'y'  * \\ \n {n} é"

text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def test_a_string_is_split_as_a_shell_does():
    assert command.as_argv("""/bin/sh -c "echo 'a b' > out" x\\ y""", "command") == ("/bin/sh", "-c", "echo 'a b' > out", "x y")


def test_a_list_is_taken_as_it_is():
    assert command.as_argv(["a b", "", "{x}"], "command") == ("a b", "", "{x}")


@pytest.mark.parametrize("nothing", [None, "", []])
def test_nothing_written_leaves_the_images_own(nothing):
    assert command.as_argv(nothing, "command") is None


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ("echo 'half", "Close the quote"),
        ("x" * 100_001, "Put long scripts into the image"),
        (["x" * 60_000, "x" * 60_000], "100000 are the limit"),
        (["a\0b"], "NUL"),
    ],
)
def test_what_cannot_be_a_command_is_refused_with_advice(written, advice):
    with pytest.raises(DescriptionError, match=advice):
        command.as_argv(written, "command")


@given(st.lists(text, min_size=1))
def test_words_without_parameters_pass_untouched(words):
    assert command.render(words, {}) == tuple(words)


@given(st.lists(text, min_size=1), text)
def test_a_value_stays_within_its_word(words, value):
    rendered = command.render([*words, "--x={x}"], {"x": value})

    assert len(rendered) == len(words) + 1
    assert rendered[-1] == f"--x={value}"


def test_braces_around_anything_else_are_left_alone():
    argv = ["awk", "{print $1}", "{y}", "${x}", "{{x}}", '{"x": 1}', "{x}"]

    assert command.render(argv, {"x": 1}) == ("awk", "{print $1}", "{y}", "${x}", "{x}", '{"x": 1}', "1")


SCRIPTS = [
    "printf '<%s>' {v}",
    'printf "<%s>" "{v}"',
    "printf '<%s>' '{v}'",
    'printf \'<%s>\' "$(printf %s "{v}")"',
    "# don't\nprintf '<%s>' {v}",
    "(printf '<%s>' {v})",
    "case a in (a) printf '<%s>' {v};; esac",
    "x={v}; printf '<%s>' \"$x\"",
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "shell",
    [
        ["/bin/sh", "-c"],
        ["sh", "-e", "-c"],
        ["env", "bash", "-o", "pipefail", "-euc"],
        ["bash", "--norc", "-c"],
        ["sh", "-c", "--"],
    ],
)
def test_a_value_is_one_word_for_a_shell_too(script, shell, tmp_path):
    values = {"v": NASTY}
    argv = command.render([*shell, script], values)

    done = subprocess.run(
        argv, env={"PATH": os.environ["PATH"], **command.variables(values)}, cwd=tmp_path, capture_output=True, check=True
    )

    assert done.stdout.decode() == f"<{NASTY}>"
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60)
@given(text, st.sampled_from(SCRIPTS[:3]))
def test_no_value_becomes_shell_words(value, script):
    values = {"v": value}
    argv = command.render(["sh", "-c", script], values)
    env = {"PATH": os.environ["PATH"], **command.variables(values)}

    assert subprocess.run(argv, env=env, capture_output=True, check=True).stdout == f"<{value}>".encode()


@pytest.mark.parametrize(
    "script",
    [
        "cat <<END\n{v}\nEND",
        "echo $'a\\'' {v}",
        "sh -c 'echo {v}'",
        "exec /bin/bash -e -c 'echo {v}'",
        'eval "echo {v}"',
        'trap "echo {v}" EXIT',
    ],
)
def test_a_script_where_quoting_cannot_be_told_is_refused(script):
    with pytest.raises(DescriptionError, match="OASIS_PARAMETER_"):
        command.render(["sh", "-c", script], {"v": 1})


@pytest.mark.parametrize("shell", ["rbash", "mksh", "fish", "/bin/bash-5.1", "su", "busybox.sh"])
def test_other_shells_get_references_too(shell):
    rendered = command.render([shell, "-c", "echo {v}"], {"v": "x; y"})

    assert ("x; y" in rendered[2]) == (shell == "busybox.sh")


def test_defaults_fill_in_what_is_not_given():
    assert command.bind({"a": 1, "b": 0.5, "c": "x"}, {"b": 2}) == {"a": 1, "b": 2, "c": "x"}


@pytest.mark.parametrize(
    ("declared", "given_", "problem"),
    [
        ({"a": None}, {}, "`a` is missing"),
        ({"a": 1}, {"b": 1}, "`b` is unknown"),
        ({"a": 1}, {"a": "1"}, "a whole number"),
        ({"a": 1}, {"a": 1.5}, "a whole number"),
        ({"a": 1}, {"a": True}, "a whole number"),
        ({"a": 0.5}, {"a": "x"}, "a number"),
        ({"a": True}, {"a": 1}, "true or false"),
        ({"a": "x"}, {"a": 1}, "text"),
        ({"a": None}, {"a": [1]}, "text, a number, true or false"),
        ({"a": "x"}, {"a": "\0"}, "NUL"),
        ({"a": 0.5}, {"a": float("nan")}, "a number"),
        ({"a": 0.5}, {"a": float("inf")}, "a number"),
    ],
)
def test_parameters_that_do_not_fit_are_named(declared, given_, problem):
    with pytest.raises(DescriptionError, match=problem):
        command.bind(declared, given_)


def test_text_from_a_command_line_takes_the_type_of_the_default():
    declared = {"n": 1, "f": 0.5, "b": False, "s": "x", "free": None}
    written = {"n": "3", "f": "2", "b": "TRUE", "s": "4", "free": "5", "unknown": "6"}

    assert command.from_text(declared, written) == {"n": 3, "f": 2.0, "b": True, "s": "4", "free": "5", "unknown": "6"}


def test_text_that_is_no_number_is_left_for_bind_to_refuse():
    with pytest.raises(DescriptionError, match="whole number"):
        command.bind({"n": 1}, command.from_text({"n": 1}, {"n": "three"}))
