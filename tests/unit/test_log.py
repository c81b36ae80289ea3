"""The log of a container: exact in the file, readable in the view, silent about secrets."""

import io
import json
import subprocess
import sys
import time
import tracemalloc

import pytest
from hypothesis import given, strategies as st

from oasis_flows import log
from oasis_flows.errors import StoreFull

# Python ignores SIGXFSZ, so that writing past the limit takes a part first and fails then, as a full disk does.
SMALL_DISK = """
import resource, sys
from pathlib import Path
from oasis_flows import log
from oasis_flows.errors import StoreFull
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    with log.record(Path(sys.argv[1]), lambda block: None) as sink:
        sink("stdout", b"x" * 150)
except StoreFull as error:
    print(error)
"""


def written(tmp_path, chunks, secrets=()):
    """What the file and the view hold after these (stream, bytes) chunks."""
    blocks = []
    with log.record(tmp_path / "log.txt", blocks.append, secrets) as sink:
        for stream, data in chunks:
            sink(stream, data)
    return (tmp_path / "log.txt").read_bytes(), blocks


@pytest.mark.parametrize("data", [b"HI\n", b"no end", b"\xff\xfe\0\n", "é".encode()[:1], b"", b"\n\n", b"x" * 5_000_000])
def test_the_file_has_every_byte(tmp_path, data):
    assert written(tmp_path, [("stdout", data)])[0] == data


def test_a_full_disk_says_where_and_what_to_do(tmp_path):
    path = tmp_path / "log.txt"
    said = subprocess.run([sys.executable, "-c", SMALL_DISK, path], capture_output=True, text=True, check=True).stdout

    assert said.startswith(f"The log {path} cannot be written: File too large. Free space there, or set OASIS_FLOWS_HOME")
    assert path.read_bytes() == b"x" * 100


def test_a_log_that_cannot_be_made_says_so(tmp_path):
    with pytest.raises(StoreFull, match=r"none/log.txt cannot be written"), log.record(tmp_path / "none" / "log.txt", print):
        pass


def test_a_file_that_takes_only_a_part_gets_the_rest():
    class Slow(io.BytesIO):
        name = "slow"

        def write(self, data):
            return super().write(bytes(data)[:7])

    file = Slow()
    log.RunLog(file, lambda block: None, ())("stdout", b"0123456789" * 3)

    assert file.getvalue() == b"0123456789" * 3


def test_a_character_cut_by_chunks_is_whole_in_the_view(tmp_path):
    first, second = "é\n".encode()[:1], "é\n".encode()[1:]

    assert written(tmp_path, [("stdout", first), ("stdout", second)])[1] == ["é"]


def test_the_view_tells_stderr_apart_and_keeps_the_order(tmp_path):
    _, blocks = written(tmp_path, [("stdout", b"one\n"), ("stderr", b"two\n"), ("stdout", b"three\n")])

    assert "\n".join(blocks) == "one\nstderr | two\nthree"


def test_the_view_has_at_most_about_one_block_a_second(tmp_path):
    blocks = []
    with log.record(tmp_path / "log.txt", blocks.append) as sink:
        began = time.monotonic()
        while time.monotonic() - began < 2.5:
            sink("stdout", b"line\n" * 100)
            time.sleep(0.001)

    assert 2 <= len(blocks) <= 5


def test_a_flood_is_cut_in_the_view_and_says_so(tmp_path):
    data = b"".join(b"line %d\n" % n for n in range(200_000))
    content, blocks = written(tmp_path, [("stdout", data[at : at + 65536]) for at in range(0, len(data), 65536)])

    assert content == data
    assert all(len(block) <= log.BLOCK_CHARACTERS + 200 for block in blocks)
    assert "left out here; log.txt has every byte" in "\n".join(blocks)
    assert blocks[-1].endswith("line 199999")


def test_a_quiet_container_s_last_line_is_shown_while_it_still_runs(tmp_path):
    blocks = []
    with log.record(tmp_path / "log.txt", blocks.append) as sink:
        sink("stdout", b"first\n")
        sink("stdout", b"second\n")
        time.sleep(2.3)

        assert "\n".join(blocks) == "first\nsecond"


def test_memory_does_not_grow_with_the_log(tmp_path):
    tracemalloc.start()
    with log.record(tmp_path / "log.txt", lambda block: None) as sink:
        for _ in range(50_000):
            sink("stdout", b"x" * 1000 + b"\n")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 16 << 20


def test_secrets_reach_neither_file_nor_view(tmp_path):
    content, blocks = written(
        tmp_path, [("stdout", b"token=hun"), ("stdout", b"ter2 and hun"), ("stderr", b"hunter2\n")], ["hunter2"]
    )

    assert content == b"token=*** and ***\nhun"
    assert "hunter2" not in "".join(blocks)


@given(st.binary(), st.lists(st.integers(0, 50)), st.sampled_from(["aXb", "aa", "aab", "é!"]))
def test_redaction_does_not_depend_on_how_the_stream_is_cut(data, cuts, secret):
    data = data + secret.encode() + data
    redactor = log.Redactor([secret])
    out, at = b"", 0
    for cut in cuts:
        out += redactor.feed(data[at : at + cut])
        at += cut
    out += redactor.feed(data[at:]) + redactor.close()

    assert secret.encode() not in out
    whole = log.Redactor([secret])
    assert out == whole.feed(data) + whole.close()


@given(
    st.binary(max_size=20),
    st.lists(st.integers(0, 6)),
    st.lists(st.sampled_from(["ab", "abc", "abcdef", "bX", "cab"]), min_size=1),
)
def test_secrets_that_overlap_leave_nothing_whole(noise, cuts, secrets):
    data = noise + "".join(secrets).encode() + noise + b"abX"
    redactor, whole = log.Redactor(secrets), log.Redactor(secrets)
    out, at = b"", 0
    for cut in cuts:
        out += redactor.feed(data[at : at + cut])
        at += cut
    out += redactor.feed(data[at:]) + redactor.close()

    assert out == whole.feed(data) + whole.close()


def test_the_rest_of_a_longer_secret_is_not_shown():
    redactor = log.Redactor(["abc", "abcdef"])

    assert redactor.feed(b"xabc") + redactor.feed(b"defy") + redactor.close() == b"x***y"


@pytest.mark.parametrize("secret", ['tr"ub', "back\\slash", "new\nline", "é"])
def test_a_secret_is_found_in_quotes_with_escapes(secret):
    for said in (repr(secret), json.dumps(secret), secret):
        assert log.redact(f"the engine said {said}", [secret]).count("***") == 1


def test_the_last_lines_skip_blanks(tmp_path):
    (tmp_path / "log.txt").write_bytes(b"one\n\n  \ntwo\nthree \n")

    assert log.last_lines(tmp_path / "log.txt", 2) == ["two", "three"]
    assert log.last_lines(tmp_path / "none.txt", 2) == []


@pytest.mark.parametrize(
    ("end", "shown"), [(b"hunter", b"***"), (b"hunt", b"***"), (b"hun", b"hun"), (b"hunter2 h", b"*** h"), (b"ahun", b"ahun")]
)
def test_a_secret_that_the_end_of_the_log_cuts_does_not_come_out(tmp_path, end, shown):
    assert written(tmp_path, [("stdout", b"it is " + end)], ["hunter2", "x"])[0] == b"it is " + shown
