"""What the containers do, twice: as the shell script that runs, and in Python as what it must have written.

Every byte follows from the run's token and its input, so what is published can be compared with the truth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

TOKEN = "token"
_SEEN = "T=$OASIS_PARAMETER_token; (cd input && find . -type f | sort | xargs sha256sum) > output/seen\n"
_STEPS = 'for i in 1 2 3 4 5 6; do echo "out $T $i"; echo "err $T $i" >&2; echo "$T $i" > output/step-$i; sleep 0.5; done'


@dataclass(frozen=True)
class Output:
    """What a container has written when it ends: its files, and both streams of its log."""

    files: Mapping[str, bytes]
    out: bytes = b""
    err: bytes = b""


def _written(_: str) -> dict[str, bytes]:
    return {}


def _silent(_: str) -> bytes:
    return b""


@dataclass(frozen=True)
class Algorithm:
    """A script, and what it writes. `archived` takes its image from an archive in the object store."""

    script: str
    files: Callable[[str], Mapping[str, bytes]] = _written
    out: Callable[[str], bytes] = _silent
    err: Callable[[str], bytes] = _silent
    exit_code: int = 0
    archived: bool = False

    @property
    def command(self) -> list[str]:
        return ["sh", "-c", _SEEN + self.script]

    def writes(self, token: str, inputs: Mapping[str, bytes]) -> Output:
        """What it has written at its end."""
        seen = "".join(f"{hashlib.sha256(data).hexdigest()}  ./{name}\n" for name, data in sorted(inputs.items()))
        return Output({"seen": seen.encode(), **self.files(token)}, self.out(token), self.err(token))


def _filled(line: str, size: int) -> bytes:
    return (line.encode() * (size // len(line) + 1))[:size]


ALGORITHMS: Mapping[str, Algorithm] = {
    "quick": Algorithm(
        'echo "out $T began"; sleep 0.3; echo "$T" > output/token; echo "out $T ended"',
        lambda token: {"token": f"{token}\n".encode()},
        lambda token: f"out {token} began\nout {token} ended\n".encode(),
    ),
    "archived": Algorithm(
        'echo "$T" > output/token; sleep 1',
        lambda token: {"token": f"{token}\n".encode()},
        archived=True,
    ),
    "steps": Algorithm(
        _STEPS,
        lambda token: {f"step-{i}": f"{token} {i}\n".encode() for i in range(1, 7)},
        lambda token: "".join(f"out {token} {i}\n" for i in range(1, 7)).encode(),
        lambda token: "".join(f"err {token} {i}\n" for i in range(1, 7)).encode(),
    ),
    "stubborn": Algorithm(
        f"trap '' TERM\n{_STEPS}",
        lambda token: {f"step-{i}": f"{token} {i}\n".encode() for i in range(1, 7)},
        lambda token: "".join(f"out {token} {i}\n" for i in range(1, 7)).encode(),
        lambda token: "".join(f"err {token} {i}\n" for i in range(1, 7)).encode(),
    ),
    "failing": Algorithm(
        'echo "$T" > output/half; echo "out $T half"; sleep 1; exit 3',
        lambda token: {"half": f"{token}\n".encode()},
        lambda token: f"out {token} half\n".encode(),
        exit_code=3,
    ),
    "large": Algorithm(
        'for i in 1 2 3; do yes "$T $i" | head -c 9000000 > output/part-$i; echo "out $T $i"; done',
        lambda token: {f"part-{i}": _filled(f"{token} {i}\n", 9_000_000) for i in range(1, 4)},
        lambda token: "".join(f"out {token} {i}\n" for i in range(1, 4)).encode(),
    ),
    "many": Algorithm(
        'mkdir output/0 output/1 output/2; i=0; while [ $i -lt 300 ]; do echo "$T $i" > output/$((i % 3))/$i; i=$((i + 1)); done',
        lambda token: {f"{i % 3}/{i}": f"{token} {i}\n".encode() for i in range(300)},
    ),
    "chatty": Algorithm(
        "for n in 1 2 3 4; do awk -v n=$n -v t=$T 'BEGIN { for (i = 0; i < 10000; i++) print \"out\", t, n, i }'; sleep 0.4; done",
        lambda token: {},
        lambda token: "".join(f"out {token} {n} {i}\n" for n in range(1, 5) for i in range(10_000)).encode(),
    ),
}


def _input(*sizes: int) -> dict[str, bytes]:
    return {f"{chr(97 + n)}/{n}.bin": hashlib.shake_128(f"{n}".encode()).digest(size) for n, size in enumerate(sizes)}


@dataclass(frozen=True)
class Source:
    """A dataset that runs read. `where`: a local folder, plain objects, or as a run publishes it."""

    where: str
    files: Mapping[str, bytes] = field(repr=False)


SOURCES: Mapping[str, Source] = {
    "local": Source("local", _input(10, 20_000, 0)),
    "objects": Source("objects", _input(100, 300_000, 50_000, 2_000_000)),
    "published": Source("published", _input(1, 70_000, 900_000, 3_000_000, 12_000_000)),
}
