"""What the shipped settings do for a Prefect server on SQLite: no request is refused because another one writes."""

import asyncio
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine

from oasis_flows import Dataset
from tests.servers.prefect import PrefectServer


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
        connection.execute("CREATE TABLE words (word)")
    connection.close()
    return f"sqlite+aiosqlite:///{path}"


def test_a_transaction_waits_for_one_that_may_write(database: str):
    said = asyncio.run(_read_and_write_beside_another(f"{database}?plugin=oasis_flows"))

    assert said == ["first reads", "first has written", "second reads", "second has written"]


def test_without_the_plugin_it_is_refused(database: str):
    with pytest.raises(OperationalError, match="database is locked"):
        asyncio.run(_read_and_write_beside_another(database))


def test_other_statements_stay_as_they_are(database: str):
    engine = create_engine(f"{database.replace('+aiosqlite', '')}?plugin=oasis_flows")
    with engine.connect() as connection:
        assert connection.execute(text("SELECT 'BEGIN DEFERRED'")).scalar() == "BEGIN DEFERRED"
    engine.dispose()


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
