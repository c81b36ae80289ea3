"""What became of each shard of a batch: a small file for each in the store, written once its outcome is final.

A shard is finished when its record is there, and not before: its output was published, whole, before that. So whatever is
killed whenever, what the ledger says is so, and what it does not say is done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import StoreUnavailable
from .manifest import Summary
from .schedule import Attempt, Ending
from .store import Location, Notes

FOLDER = "batch/ledger"
PATIENCE_SECONDS, POLL_SECONDS = 600.0, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A shard's record. `files`: start and end in the listing; `attempts`: how many it took; `seconds`: those of the last one.

    `output` is what was published at `url`: files, bytes and the digest of its manifest, if it succeeded. `log` is where the
    container's log is, if there was one.
    """

    shard: str
    index: int
    files: tuple[int, int]
    ending: Ending
    attempts: int
    seconds: float
    exit_code: int | None = None
    code: str = "ok"
    sentence: str = ""
    tail: tuple[str, ...] = ()
    url: str | None = None
    output: dict[str, Any] | None = None
    log: str | None = field(default=None)

    @classmethod
    def of(cls, attempt: Attempt, ending: Ending, *, published: Summary | None = None, **facts: Any) -> Row:
        """The row of an attempt that ended."""
        shard = attempt.shard
        output = asdict(published) if published is not None and ending is Ending.DONE else None
        return cls(
            shard=shard.name,
            index=shard.index,
            files=(shard.start, shard.end),
            ending=ending,
            attempts=attempt.number,
            output=output,
            **facts,
        )

    def line(self) -> bytes:
        """The row as a line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Row:
        """The row that `line` wrote.

        Raises:
            ValueError: it is none, or only the beginning of one.
        """
        try:
            values = json.loads(line)
            return cls(
                **{
                    **values,
                    "files": tuple(values["files"]),
                    "tail": tuple(values["tail"]),
                    "ending": Ending(values["ending"]),
                }
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a row of a ledger: {line[:80]!r}") from error


class Ledger:
    """The ledger of the batch that is published at a place. Safe to use from many threads."""

    def __init__(self, output: Location) -> None:
        self._notes = Notes(output.child(FOLDER))

    def write(self, row: Row, go_on: Callable[[], None] = lambda: None) -> None:
        """Write down what became of a shard. A store that is away is waited for, ten minutes long: what is not written is done again.

        Meanwhile `go_on` is called, and may raise.
        """
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                self._notes.write(f"{row.shard}.json", row.line())
                return
            except StoreUnavailable:
                if time.monotonic() > until:
                    raise
            time.sleep(POLL_SECONDS)
            go_on()

    def read(self, shard: str) -> Row | None:
        """What became of a shard; `None` if it is not known."""
        content = self._notes.read(f"{shard}.json")
        return _parsed(content) if content is not None else None

    def rows(self) -> Iterator[Row]:
        """All rows, in no order that means anything. One that a power cut left damaged is as if it were not there."""
        for content in self._notes.all():
            if (row := _parsed(content)) is not None:
                yield row


def _parsed(content: bytes) -> Row | None:
    try:
        return Row.parse(content)
    except ValueError:
        return None
