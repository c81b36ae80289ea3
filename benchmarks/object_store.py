"""Datasets in an S3 bucket, beside the fastest plain clients at hand, which hash nothing, on the same real server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import obstore

from benchmarks.surroundings import make_files, program, run
from benchmarks.table import Row, faster, in_turns
from oasis_flows import store
from oasis_flows.store import Location
from tests.servers import s3

Copy = Callable[[str, str], None]


def rows(folder: Path, *, quick: bool) -> Iterator[Row]:
    """Publishing and fetching, of few large files and of many small ones; and which clients were not there."""
    (folder / "server").mkdir()
    with s3.serve(folder / "server") as server:
        # The server speaks plain HTTP, and rclone cannot do with somebody's certificates.
        environment = {name: value for name, value in os.environ.items() if name != "AWS_CA_BUNDLE"}
        environment |= server.environment | {"AWS_DEFAULT_REGION": "us-east-1"}
        clients = dict(_clients(server, folder, environment, everyone=not quick))
        for count, size in ((2, 64 << 20), (500, 4 << 10)) if quick else ((4, 256 << 20), (2000, 4 << 10)):
            files = make_files(folder / "files", count, size)
            yield from _both(server, clients, files, folder, 2 if quick else 5)
            shutil.rmtree(files)
        for name in sorted({"awscli", "rclone", "s5cmd"} - set(clients)):
            why = "not by `--quick`" if quick else "it is not on the PATH, nor in BENCH_PATH"
            yield Row(what=f"S3 client {name}", ours="", figure=f"not measured: {why}")


def _both(server: s3.S3Server, clients: dict[str, Copy], files: Path, folder: Path, times: int) -> Iterator[Row]:
    bucket, log, there = server.new_bucket(), folder / "log.txt", folder / "fetched"
    log.touch()
    target, what = Location(f"s3://{bucket}/ours", server.options), _described(files)

    def publish() -> None:
        store.publish(files, target, log=log, record=lambda _: b'{"oasis_flows": 1}', workspace=folder, commit=True)

    def clear() -> None:
        keys = [each["path"] for batch in obstore.list(server.store(bucket)) for each in batch]
        obstore.delete(server.store(bucket), keys)

    def clear_here() -> None:
        shutil.rmtree(there, ignore_errors=True)
        there.mkdir()

    uploads = [partial(copy, str(files), f"{bucket}/theirs") for copy in clients.values()]
    mine, *others = in_turns(times, publish, *uploads, before=clear)
    yield faster(f"publish {what} to S3", mine, list(zip(clients, others, strict=True)), 0.9)

    clear()
    publish()
    uploads[0]()
    downloads = [partial(copy, f"{bucket}/theirs", str(there)) for copy in clients.values()]
    mine, *others = in_turns(times, lambda: store.stage(target, there), *downloads, before=clear_here)
    yield faster(f"fetch {what} from S3", mine, list(zip(clients, others, strict=True)), 0.9)
    clear()
    shutil.rmtree(there)


def _described(files: Path) -> str:
    found = [path.stat().st_size for path in files.rglob("*") if path.is_file()]
    return f"{len(found)} × {found[0] >> 20} MiB" if found[0] >= 1 << 20 else f"{len(found)} × {found[0] >> 10} KiB"


def _clients(server: s3.S3Server, folder: Path, environment: dict[str, str], *, everyone: bool) -> Iterator[tuple[str, Copy]]:
    """What copies a folder to `bucket/prefix`, or the other way round: the one of both that has a slash at its beginning is here."""
    yield "obstore", partial(_obstore, server)
    if everyone and (aws := program("aws")):
        settings = folder / "aws"
        settings.write_text("[default]\ns3 =\n  max_concurrent_requests = 16\n")
        yield (
            "awscli",
            _program(
                environment | {"AWS_CONFIG_FILE": str(settings)}, "s3://", aws, "s3", "cp", "--recursive", "--only-show-errors"
            ),
        )
    if everyone and (rclone := program("rclone")):
        remote = {
            "RCLONE_CONFIG_B_TYPE": "s3",
            "RCLONE_CONFIG_B_PROVIDER": "Ceph",
            "RCLONE_CONFIG_B_ENDPOINT": server.endpoint,
            "RCLONE_CONFIG_B_ACCESS_KEY_ID": server.access_key,
            "RCLONE_CONFIG_B_SECRET_ACCESS_KEY": server.secret_key,
            "RCLONE_CONFIG": "/dev/null",
        }
        yield "rclone", _program(environment | remote, "b:", rclone, "copy", "--transfers=16", "--no-traverse")
    if everyone and (s5cmd := program("s5cmd")):
        yield "s5cmd", _s5cmd(environment, s5cmd)


def _program(environment: dict[str, str], scheme: str, *command: str) -> Copy:
    def copy(source: str, target: str) -> None:
        run(*command, *(place if place[0] == "/" else f"{scheme}{place}" for place in (source, target)), env=environment)

    return copy


def _s5cmd(environment: dict[str, str], program: str) -> Copy:
    def copy(source: str, target: str) -> None:
        there = [
            f"{source}/" if source[0] == "/" else f"s3://{source}/*",
            f"{target}/" if target[0] == "/" else f"s3://{target}/",
        ]
        run(program, "cp", *there, env=environment | {"S3_ENDPOINT_URL": environment["AWS_ENDPOINT_URL"]})

    return copy


def _obstore(server: s3.S3Server, source: str, target: str) -> None:
    """The library that ours is made with, used as its documentation shows, by sixteen threads."""
    bucket, _, prefix = (target if source[0] == "/" else source).partition("/")
    there: Any = server.store(bucket)
    with ThreadPoolExecutor(16) as threads:
        if source[0] == "/":
            files = [path for path in Path(source).rglob("*") if path.is_file()]
            list(threads.map(lambda path: obstore.put(there, f"{prefix}/{path.relative_to(source)}", path), files))
        else:
            found = [each["path"] for batch in obstore.list(there, prefix) for each in batch]
            list(threads.map(lambda key: _get(there, key, Path(target) / key.removeprefix(f"{prefix}/")), found))


def _get(there: Any, key: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for chunk in obstore.get(there, key).stream():
            file.write(chunk)
