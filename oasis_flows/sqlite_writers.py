"""For a Prefect server on SQLite: transactions that wait for each other, where they would fail.

Prefect's server begins most of its transactions as SQLite's DEFERRED. One that has read, and then writes, is refused at once where
another wrote in between: the server answers 503, and the client sleeps for seconds. What the refused statement leaves in the server is
finished by Python's garbage collector, which may have to wait for another connection to do so; where that one waits for a lock
which the collector's own thread has to release, the whole server stands still for the minute that Prefect has SQLite wait for locks. A
transaction that is IMMEDIATE waits for its turn at its beginning, and is not refused.

SQLAlchemy loads this plugin where a database's URL ends with `?plugin=oasis_flows`, as in deployments/server.env.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, Engine, event
from sqlalchemy.engine import CreateEnginePlugin


class Waiting(CreateEnginePlugin):
    """Begins each transaction by waiting for those that write, on SQLite; elsewhere nothing changes."""

    def update_url(self, url: URL) -> URL:
        """The URL as it is; SQLAlchemy takes the plugin's name out of it."""
        return url

    def engine_created(self, engine: Engine) -> None:
        """Have this engine do so."""
        if engine.dialect.name == "sqlite":
            event.listen(engine, "before_cursor_execute", _immediate, retval=True)


def _immediate(_connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool) -> tuple[str, Any]:
    # Prefect 3.8 asks for it in these words; a Prefect that uses others is as slow as it is without this.
    return ("BEGIN IMMEDIATE" if statement == "BEGIN DEFERRED" else statement), parameters
