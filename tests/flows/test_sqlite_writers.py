"""What the shipped settings do for a Prefect server on SQLite: no request is refused because another one writes."""

import asyncio
import gc
import os
import sqlite3
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine

from oasis_flows import Dataset
from tests.servers.prefect import PrefectServer, with_shipped_settings


async def _read_and_write_beside_another(url: str) -> list[str]:
    """Two transactions that read before they write, the second begun while the first is at it; what happened, in order."""
    said: list[str] = []
    engine = create_async_engine(url)

    async def transaction(name: str, pause: float) -> None:
        async with engine.connect() as connection:
            # As Prefect does it: Python's sqlite3 is to begin nothing by itself.
            raw = await connection.get_raw_connection()
            raw.driver_connection.isolation_level = None  # type: ignore[union-attr]
            await connection.exec_driver_sql("BEGIN DEFERRED")
            await connection.execute(text("SELECT count(*) FROM words"))
            said.append(f"{name} reads")
            await asyncio.sleep(pause)
            await connection.execute(text("INSERT INTO words VALUES (:word)"), {"word": name})
            await connection.commit()
            said.append(f"{name} has written")

    try:
        first = asyncio.create_task(transaction("first", 0.3))
        await asyncio.sleep(0.1)
        await asyncio.gather(first, transaction("second", 0.5))
    finally:
        await engine.dispose()
    return said


@pytest.fixture
def database(tmp_path: Path) -> str:
    path = tmp_path / "test.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE words (word NOT NULL)")
    connection.close()
    return f"sqlite+aiosqlite:///{path}"


def test_a_transaction_waits_for_one_that_may_write(database: str):
    said = asyncio.run(_read_and_write_beside_another(f"{database}?plugin=oasis_flows"))

    assert said == ["first reads", "first has written", "second reads", "second has written"]


def test_without_the_plugin_it_is_refused(database: str):
    with pytest.raises(OperationalError, match="database is locked"):
        asyncio.run(_read_and_write_beside_another(database))


async def _collect_while_one_waits(url: str) -> float:
    """A statement fails; its connection then waits for a lock that this thread holds, while this thread collects garbage. How long that took."""
    engine = create_async_engine(url, pool_size=2, connect_args={"timeout": 2})
    try:
        async with engine.connect() as holder, engine.connect() as failing:
            with pytest.raises(IntegrityError):
                await failing.execute(text("INSERT INTO words VALUES (NULL)"))
            await failing.rollback()
            await failing.close()
            await holder.exec_driver_sql("BEGIN IMMEDIATE")

            async def wait() -> None:
                async with engine.connect() as connection:
                    await connection.exec_driver_sql("BEGIN IMMEDIATE")
                    await connection.rollback()

            waiting = asyncio.create_task(wait())
            await asyncio.sleep(0.3)
            began = time.monotonic()
            gc.collect()
            took = time.monotonic() - began
            await holder.rollback()
            with suppress(OperationalError):
                await waiting
            return took
    finally:
        await engine.dispose()


@pytest.mark.parametrize("plugin", [True, False])
def test_what_a_failed_statement_left_holds_nobody_up(database: str, plugin: bool):
    """Without the plugin it does. Where that ends, as SQLAlchemy closes its cursors or breaks the circle, the plugin has less to do."""
    took = asyncio.run(_collect_while_one_waits(f"{database}?plugin=oasis_flows" if plugin else database))

    assert (took > 1) is not plugin


def test_other_statements_stay_as_they_are(database: str):
    engine = create_engine(f"{database.replace('+aiosqlite', '')}?plugin=oasis_flows")
    with engine.connect() as connection:
        assert connection.execute(text("SELECT 'BEGIN DEFERRED'")).scalar() == "BEGIN DEFERRED"
    engine.dispose()


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({"HOME": "/home/me"}, "sqlite+aiosqlite:////home/me/.prefect/prefect.db?plugin=oasis_flows"),
        ({"HOME": "/home/me", "PREFECT_HOME": "/a b"}, "sqlite+aiosqlite:////a b/prefect.db?plugin=oasis_flows"),
        ({"PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://me@here/p"}, "postgresql+asyncpg://me@here/p"),
    ],
)
def test_the_shipped_settings_find_the_database_and_leave_one_that_somebody_chose(given: dict[str, str], url: str):
    settings = with_shipped_settings({"PATH": os.environ["PATH"], **given})

    assert settings["PREFECT_SERVER_DATABASE_CONNECTION_URL"] == url


def test_the_shipped_settings_make_no_database_in_the_root_folder():
    with pytest.raises(subprocess.CalledProcessError):
        with_shipped_settings({"PATH": os.environ["PATH"]})


def test_a_server_with_the_shipped_settings_refuses_nobody(prefect_server: PrefectServer):
    """Without them every third of these is answered 503, and the server stands still for a minute at a time."""
    kind = prefect_server.api(f"/block_documents/{Dataset(url='/somewhere').save('of-this-kind', overwrite=True)}")
    wanted = {"data": {"url": "/somewhere"}, "block_type_id": kind["block_type_id"], "block_schema_id": kind["block_schema_id"]}

    def write(_: int) -> list[int]:
        with httpx.Client(base_url=f"{prefect_server.url}/api", timeout=120) as client:
            return [client.post("/block_documents/", json={"name": f"many-{uuid4()}", **wanted}).status_code for _ in range(12)]

    began = time.monotonic()
    with ThreadPoolExecutor(6) as writers:
        codes = [code for each in writers.map(write, range(6)) for code in each]

    assert set(codes) == {201}
    assert time.monotonic() - began < 50
