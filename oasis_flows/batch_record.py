"""What is written down about a batch: its record, its lists of shards and of failed files, its log, and its page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .batching import Batch
from .command import as_text
from .include import exactly
from .job import counted, human_bytes
from .ledger import Row
from .manifest import Summary
from .plan import SHARDS, Plan
from .record import RECORD_VERSION, document, loosened, oasis_status, package_version
from .schedule import Ending
from .store import Published
from .verdict import Verdict

SHARD_LIST, FAILED_LIST = "shards.jsonl", "failed.jsonl"


def batch_json(
    batch: Batch,
    rows: Sequence[Row],
    *,
    verdict: Verdict,
    published: Summary | None,
    seconds: Mapping[str, float],
    flow_run: Mapping[str, str],
) -> dict[str, Any]:
    """The record of a batch: `task.json`, as that of a run where they have the same to tell."""
    plan = batch.plan
    done, failed = done_rows(rows), failed_rows(rows)
    return {
        "oasis_flows": RECORD_VERSION,
        "package_version": package_version(),
        "status": oasis_status(verdict),
        "verdict": verdict.to_json(),
        "flow_run": {**flow_run, "attempt": plan.attempt},
        "algorithm": {"name": plan.algorithm_name, "document": document(plan)},
        "image": batch.image,
        "argv": {"entrypoint": plan.entrypoint, "command": plan.command},
        "parameters": dict(plan.parameters),
        "environment": sorted(plan.environment),
        "secret_environment": dict(plan.algorithm.secret_environment),
        "input": {
            "name": plan.dataset_name,
            "url": plan.dataset.url,
            "file_count": batch.layout.file_count,
            "size_bytes": batch.size_bytes,
            "listing_digest": batch.listing_digest,
        },
        "output": {"name": plan.document_name, "url": plan.output.url, **_counts(published)},
        "sandbox": {"loosened": loosened(plan)},
        "batch": {
            "shards_planned": len(batch.layout),
            "shards_published": len(done),
            "files_failed": len(failed),
            "include": batch.options.include,
            "container_seconds": round(sum(row.seconds for row in rows), 3),
        },
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def failed_files(record: Published) -> int:
    """How many files the record of a published batch says failed."""
    found = record.record.get("batch")
    return int(found.get("files_failed", 0)) if isinstance(found, dict) else 0


def done_rows(rows: Sequence[Row]) -> list[Row]:
    """The shards, and halves of them, that are published."""
    return [row for row in rows if row.ending is Ending.DONE]


def failed_rows(rows: Sequence[Row]) -> list[Row]:
    """The files that failed alone."""
    return [row for row in rows if row.ending is not Ending.DONE and row.files[1] - row.files[0] == 1]


def write_lists(batch: Batch, rows: Sequence[Row], folder: Path) -> dict[str, Path]:
    """Write the list of shards and that of failed files into a folder; return them by name."""
    shards, failed = folder / SHARD_LIST, folder / FAILED_LIST
    with shards.open("wb") as file:
        file.writelines(row.line() for row in rows)
    with failed.open("w") as text:
        text.writelines(json.dumps(_failed(batch, row), ensure_ascii=False) + "\n" for row in failed_rows(rows))
    return {SHARD_LIST: shards, FAILED_LIST: failed}


def _failed(batch: Batch, row: Row) -> dict[str, Any]:
    name = batch.file_at(row.files[0])
    return {
        "file": name,
        "verdict": {"code": row.code, "sentence": row.sentence},
        "last_lines": list(row.tail),
        "log": row.log,
        "command": _command(batch, name),
    }


def _command(batch: Batch, name: str) -> str | None:
    """What runs the algorithm on one file alone; `None` where it takes what no command line can name."""
    plan, options = batch.plan, batch.options
    words = [*(_called.get() or _names(plan))]
    if not words:
        return None
    words = ["oasis-flows", "batch", *words, "--include", exactly(name)]
    words += [word for key, value in plan.parameters.items() for word in ("--parameter", f"{key}={as_text(value)}")]
    words += ["--store", plan.store._block_document_name] if plan.store and plan.store._block_document_name else []
    words += ["--oscar-compat", "--oscar-index", options.oscar_index] if options.oscar_compat else []
    return shlex.join(words)


def _names(plan: Plan) -> Sequence[str]:
    names = (plan.algorithm._block_document_name, plan.dataset._block_document_name)
    return [name for name in names if name] if all(names) else ()


_called: ContextVar[Sequence[str]] = ContextVar("called", default=())


@contextmanager
def called_by(words: Sequence[str]) -> Iterator[None]:
    """Have the commands that batches write down until the block ends begin with these words: they say on what, and what runs."""
    token = _called.set(words)
    try:
        yield
    finally:
        _called.reset(token)


def log_line(row: Row) -> str:
    """What the batch's log says of a shard."""
    first, last = row.files[0], row.files[1] - 1
    files = f"file {first}" if first == last else f"files {first} to {last}"
    how = "succeeded" if row.ending is Ending.DONE else row.sentence
    return f"shard {row.shard}, {files}, attempt {row.attempts}, {row.seconds:.1f} s: {how}\n"


def table(rows: Sequence[Row], most: int) -> list[dict[str, Any]]:
    """The first shards as rows of a table; those that failed come first."""
    ordered = sorted(rows, key=lambda row: (row.ending is Ending.DONE, row.files))[:most]
    return [
        {
            "shard": row.shard,
            "files": f"{row.files[0]}-{row.files[1] - 1}",
            "status": "published" if row.ending is Ending.DONE else row.code,
            "attempts": row.attempts,
            "seconds": row.seconds,
            "exit": row.exit_code,
            "log": row.log,
        }
        for row in ordered
    ]


def details(batch: Batch, rows: Sequence[Row], published: Summary | None, document_url: str | None) -> str:
    """What the page of a batch says beside its verdict, in Markdown."""
    plan, done, failed = batch.plan, done_rows(rows), failed_rows(rows)
    name = f"[{plan.document_name}]({document_url})" if document_url else f"`{plan.document_name}`"
    output = f"dataset {name}: {_words(published)}" if published else "no dataset"
    lines = [
        ("Output", output),
        ("Files, log, record", f"`{plan.output.url}`/`{SHARDS}`, `log.txt`, `task.json`, `{SHARD_LIST}`, `{FAILED_LIST}`"),
        ("Input", f"{counted(batch.layout.file_count, 'file')}, {human_bytes(batch.size_bytes)}"),
        ("Shards", f"{len(batch.layout)} planned, {len(done)} published, halves of split ones counted"),
        ("Failed files", str(len(failed))),
    ]
    text = "### The batch\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in lines)
    if failed:
        sentences = "\n".join(f"{batch.file_at(row.files[0])}: {row.sentence}" for row in failed[:20])
        text += f"\n\n### Files that failed, the first {min(20, len(failed))}\n\n~~~~\n{sentences}\n~~~~"
    return text


def _words(summary: Summary) -> str:
    return f"{counted(summary.file_count, 'file')}, {human_bytes(summary.size_bytes)}"


def _counts(summary: Summary | None) -> dict[str, Any]:
    if summary is None:
        return {"file_count": None, "size_bytes": None, "manifest_digest": None}
    return {"file_count": summary.file_count, "size_bytes": summary.size_bytes, "manifest_digest": summary.digest}
