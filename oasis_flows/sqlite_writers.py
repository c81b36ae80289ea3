"""For a Prefect server on SQLite: transactions that wait for each other, where they would fail.

Prefect's server begins most of its transactions as SQLite's DEFERRED. One that has read, and then writes, is refused at once where
another wrote in between: the server answers 503, and the client sleeps for seconds. A transaction that is IMMEDIATE waits at its beginning, a minute
at most, and is not refused then.

What a failed statement leaves on a connection, whatever it failed of, is cleared away by Python's garbage collector, which may run in the event loop's
thread, and has to wait while that connection waits for a lock. Where the lock is held by a transaction that the event loop has to go on with, the whole server
stands still until the minute is over. So such a connection is not used again.

SQLAlchemy loads this plugin where a database's URL ends with `?plugin=oasis_flows`, as in deployments/server.env.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, Engine, event
from sqlalchemy.engine import CreateEnginePlugin, ExceptionContext
from sqlalchemy.pool import ConnectionPoolEntry

_FAILED = "oasis_flows_failed"


class Waiting(CreateEnginePlugin):
    """Begins each transaction by waiting for those that write, on SQLite; elsewhere nothing changes."""

    def update_url(self, url: URL) -> URL:
        """The URL as it is; SQLAlchemy takes the plugin's name out of it."""
        return url

    def engine_created(self, engine: Engine) -> None:
        """Have this engine do so."""
        if engine.dialect.name == "sqlite":
            event.listen(engine, "before_cursor_execute", _immediate, retval=True)
            event.listen(engine, "handle_error", _mark)
            event.listen(engine, "checkin", _close_marked)


def _immediate(_connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool) -> tuple[str, Any]:
    # Prefect 3.8 asks for it in these words; a Prefect that uses others is as slow as it is without this.
    return ("BEGIN IMMEDIATE" if statement == "BEGIN DEFERRED" else statement), parameters


def _mark(context: ExceptionContext) -> None:
    if context.connection is not None and not context.connection.invalidated:
        context.connection.info[_FAILED] = True


def _close_marked(_connection: Any, entry: ConnectionPoolEntry) -> None:
    # Not before: the transaction may go on behind a savepoint.
    if entry.info.pop(_FAILED, False):
        entry.invalidate()
