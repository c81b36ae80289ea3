"""Looks at the real systems, around the product and around the proxies: what `audit` compares."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import obstore

from oasis_flows import store
from oasis_flows.artifacts import FAILED_TAG
from tests.servers import prefect

from .algorithms import ALGORITHMS, SOURCES
from .audit import Claims, Leftovers, Place, Truth
from .rounds import Played, Player
from .world import RESULTS, World

# What is others' in TMPDIR: Prefect's worker leaves a `tmp…prefect` when it is killed, and an engine that was stalled has its containerd
# write down where it stands before it kills it.
_OTHERS = re.compile(rf"runner_storage|{re.escape(prefect.HOME.name)}|.*prefect|containerd\.\d+\.stacks\.log")


class Witness:
    """What is there after a round, read once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._documents = {row["data"]["url"]: row for row in world.ask("/block_types/slug/dataset/block_documents")}
        self._objects = world.s3.store(RESULTS)
        self._keys = [item["path"] for page in obstore.list(self._objects) for item in page]

    def truth(self, played: Played, player: Player) -> Truth:
        """What is certain about a run."""
        algorithm = ALGORITHMS[player.run.algorithm]
        return Truth(
            token=player.token,
            output=algorithm.writes(player.token, SOURCES[player.run.source].files),
            exit_code=algorithm.exit_code,
            called=player.run.way == "call",
            against=played.round.against(player.run),
            hit=played.struck(player),
            hung=player.hung,
        )

    def claims(self, player: Player, run_id: str) -> Claims:
        """What is said about a run."""
        run = self._world.ask(f"/flow_runs/{run_id}")
        name = f"{player.run.algorithm}-output/{run_id}"
        url = f"s3://{RESULTS}/{name}" if player.run.store == "objects" else f"{self._results}/{name}"
        document = self._documents.get(url)
        return Claims(
            state=run["state_type"],
            message=(run["state"] or {}).get("message") or "",
            code=next((tag.removeprefix(FAILED_TAG) for tag in run["tags"] if tag.startswith(FAILED_TAG)), None),
            place=_place(self._objects_below(name) if player.run.store == "objects" else _files_below(Path(url))),
            document=document and document["data"],
            told=player.told(),
            attempts=run["run_count"],
        )

    @property
    def _results(self) -> Path:
        return self._world.folder / "local" / "results"

    def _objects_below(self, name: str) -> Iterator[tuple[str, bytes]]:
        for key in self._keys:
            if key.startswith(f"{name}/"):
                yield key[len(name) + 1 :], bytes(obstore.get(self._objects, key).bytes())

    def leftovers(self, run_ids: Iterable[str]) -> Leftovers:
        """What is there without an owner, now that nothing waits for a retry any more."""
        world, owners = self._world, set(run_ids)
        # The next run is to take what a store carried out of an earlier one's try behind its deletion.
        store.check_writable(store.Location(f"s3://{RESULTS}", world.s3.options))
        uploads = world.s3.client().list_multipart_uploads(Bucket=RESULTS).get("Uploads", ())
        listed = (item["path"] for page in obstore.list(self._objects) for item in page)
        litter = [key for key in listed if "write-test" in key] + [
            str(path) for path in self._results.rglob("*") if path.name.endswith(".part") or "write-test" in path.name
        ]
        strangers = {key.split("/")[1] for key in self._keys if key.count("/") > 1} | {
            path.name for path in self._results.glob("*/*")
        }
        with contextlib.closing(world.engine.connect()) as client:
            api = client.api
            found = {
                "containers": [row["Names"][0] for row in api.containers(all=True)],
                "volumes": [row["Name"] for row in api.volumes()["Volumes"] or ()],
                "networks": [row["Name"] for row in api.networks() if row["Name"] not in ("bridge", "host", "none")],
            }
        return Leftovers(
            found={
                **{sort: tuple(names) for sort, names in found.items()},
                "workspaces": tuple(path.name for path in (world.home / "workspaces").glob("*")),
                "watchdogs": watchdogs(),
                "temporary files": tuple(p.name for p in (world.folder / "tmp").iterdir() if not _OTHERS.fullmatch(p.name)),
                "broken-off uploads": tuple(upload["Key"] for upload in uploads),
                "files half written": tuple(litter),
                "outputs of unknown runs": tuple(strangers - owners),
            }
        )

    def forget(self) -> None:
        """Remove what the round has published, so that the next finds room."""
        if self._keys:
            obstore.delete(self._objects, self._keys)
        shutil.rmtree(self._results, ignore_errors=True)


def watchdogs() -> tuple[str, ...]:
    """The processes that outlive their runs, to clean up behind them: a name each."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if any(word.endswith(b"watchdog.py") for word in words) or b"oasis_flows" in words:
                found.append(f"{path.parent.name} {b' '.join(words).decode()}")
    return tuple(found)


def _files_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()


def _place(files: Iterable[tuple[str, bytes]]) -> Place:
    data: dict[str, str] = {}
    beside: dict[str, bytes] = {}
    for name, content in files:
        if name.startswith("data/"):
            data[name.removeprefix("data/")] = hashlib.sha256(content).hexdigest()
        else:
            beside[name] = content
    lines = beside.get("manifest.jsonl")
    rows = [json.loads(line) for line in (lines or b"").splitlines()]
    return Place(
        data=data,
        manifest=None if lines is None else {row["path"]: row["sha256"] for row in rows},
        manifest_digest=hashlib.sha256(lines or b"").hexdigest(),
        record=json.loads(beside["task.json"]) if "task.json" in beside else None,
        log=beside.get("log.txt"),
    )
