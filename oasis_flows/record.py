"""What is written down about a run: the record beside its output, and the page that people read in Prefect."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Any

from . import picture
from .callbacks import Notes
from .errors import OasisError, UnsafeName
from .job import ContainerExit, Reason, counted, human_bytes
from .manifest import Entry, Summary
from .plan import Plan
from .verdict import SILENT, Verdict

RECORD_VERSION = 1


@cache
def package_version() -> str:
    """This package's version; it is read from a file, once."""
    return version("oasis-flows")


def task_json(
    plan: Plan,
    *,
    image: str,
    staged: Summary,
    exit: ContainerExit,
    first_try: ContainerExit | None,
    notes: Notes,
    verdict: Verdict,
    published: Summary,
    seconds: Mapping[str, float],
    flow_run: Mapping[str, str],
) -> dict[str, Any]:
    """The record of a run. Of the environment it has names only, of secrets the names of their blocks."""
    return {
        "oasis_flows": RECORD_VERSION,
        "package_version": package_version(),
        "status": oasis_status(verdict),
        "verdict": verdict.to_json(),
        "flow_run": {**flow_run, "attempt": plan.attempt},
        "shard": asdict(plan.part.shard) if plan.part else None,
        "image": image,
        **_described(plan),
        "prerequisites": _prerequisites(plan, notes),
        "input": {"name": plan.dataset_name, "url": plan.dataset.url, **_summary(staged)},
        "output": {"name": plan.document_name, "url": plan.output.url, **_summary(published)},
        "sandbox": {"loosened": loosened(plan), "in_force": exit.in_force},
        "first_try": _exit(first_try) if first_try else None,
        "exit": _exit(exit),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "usage": {
            "cpu_seconds": exit.cpu_seconds,
            "memory_peak_bytes": exit.memory_peak_bytes,
            "forks_refused": exit.forks_refused,
            "samples": [astuple(sample) for sample in exit.usage],
        },
    }


def _described(plan: Plan) -> dict[str, Any]:
    """What of the record follows from documents and parameters alone."""
    return {
        "algorithm": {"name": plan.algorithm_name, "document": document(plan)},
        "argv": {"entrypoint": plan.entrypoint, "command": plan.command},
        "parameters": dict(plan.parameters),
        "environment": sorted(plan.environment),
        "secret_environment": dict(plan.algorithm.secret_environment),
    }


def written(record: Mapping[str, Any]) -> bytes:
    """The record as the content of `task.json`: indented, a list of numbers on one line."""
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    # A text in JSON holds no line breaks, so none is changed.
    text = re.sub(r"\[\n[-+.\deE,\s]+\]", lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    return text.encode() + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalled:
    """What the steps of a run that succeeded found out, as its record tells."""

    image: str
    staged: Summary
    exit: ContainerExit
    first_try: ContainerExit | None
    notes: Notes
    published: Summary
    seconds: Mapping[str, float]


def recalled(record: Mapping[str, Any], plan: Plan) -> Recalled | None:
    """What `task_json` was given for this run.

    `None` where it did not succeed, where its documents say something else by now, or another version of this package wrote it.
    """
    try:
        if record["verdict"]["code"] != Reason.OK or record["oasis_flows"] != RECORD_VERSION:
            return None
        if record["flow_run"]["id"] != plan.run_id or record["input"]["url"] != plan.dataset.url:
            return None
        wanted = json.loads(json.dumps(_described(plan)))
        if {name: record[name] for name in wanted} != wanted:
            return None
        first, usage = record["first_try"], record["usage"]
        seen = {
            "in_force": record["sandbox"]["in_force"],
            "usage": usage["samples"],
            "cpu_seconds": usage["cpu_seconds"],
            "forks_refused": usage["forks_refused"],
        }
        return Recalled(
            image=record["image"],
            staged=_counts(record["input"]),
            exit=ContainerExit.from_json({**record["exit"], **seen, "last_words": ()}),
            first_try=ContainerExit.from_json({**first, "usage": (), "last_words": ()}) if first else None,
            notes=Notes.from_json({"ran": record["prerequisites"]["callbacks"], "algorithm": None, "refused": None}),
            published=_counts(record["output"]),
            seconds=dict(record["seconds"]),
        )
    except (KeyError, TypeError, ValueError):
        return None


def oasis_status(verdict: Verdict) -> str:
    """The word RD-OASIS had for it."""
    return "Succeeded" if verdict.code == Reason.OK else "Failed"


def _exit(exit: ContainerExit) -> dict[str, Any]:
    left_out = ("in_force", "usage", "cpu_seconds", "forks_refused", "last_words")
    return {name: value for name, value in exit.to_json().items() if name not in left_out}


def _prerequisites(plan: Plan, notes: Notes) -> dict[str, Any]:
    """What was in place, where it came from, and what became of its commands. Of secrets it has references only."""
    items = [
        {
            "name": step.item.name,
            "uri": step.uri,
            "source": step.source,
            "sha256": step.sha256,
            "required_by": list(step.chain[:-1]),
            "template_variables": dict(step.variables),
            "secrets": list(step.secrets),
            "cache_path": step.cache_path or None,
        }
        for step in plan.prerequisites.steps
    ]
    storages = [
        {"name": storage.name, "mountPath": storage.path, "readOnly": storage.read_only, "source": mount.source}
        for storage, mount in zip(plan.prerequisites.storages, plan.storages, strict=True)
    ]
    return {"items": items, "storages": storages, "callbacks": notes.to_json()["ran"]}


def loosened(plan: Plan) -> list[str]:
    """What the algorithm's document opened in the sandbox."""
    a = plan.algorithm
    flags = (
        ("network", a.network),
        ("writable_root", a.writable_root),
        ("new_privileges", a.new_privileges),
        (f"user {a.user}", bool(a.user)),
    )
    return [
        *(name for name, on in flags if on),
        *(f"capability {name}" for name in a.capabilities),
        *(f"storage {s.name} at {s.path}{'' if s.read_only else ', writable'}" for s in plan.prerequisites.storages),
    ]


@dataclass(slots=True, kw_only=True)
class Account:
    """What is known about a run so far; the flow fills it in as it goes. `settle` is called once the steps are over, with
    the error that ended them.

    `tail` holds the last lines of the log, `details` what else the page is to say (Markdown), `files` the first of those that were published, `document_url` where the output's
    Dataset document is in Prefect's UI, if that has an address.
    """

    plan: Plan | None = None
    image: str | None = None
    staged: Summary | None = None
    exit: ContainerExit | None = None
    published: Summary | None = None
    document_url: str | None = None
    files: Sequence[Entry] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    tail: Sequence[str] = ()
    details: str = ""
    settle: Callable[[OasisError | None], None] = lambda _: None


def page(account: Account, verdict: Verdict) -> str:
    """The page about a run, in Markdown: what became of it, what to do, and where everything is."""
    rows = [("Status", _status(verdict)), *_plan_rows(account), *_exit_rows(account, verdict)]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows if value)
    parts = [f"## {_plain(verdict.sentence.rstrip('.'))}", verdict.advice, verdict.action, f"| | |\n|---|---|\n{table}"]
    if account.details:
        parts += [account.details]
        return "\n\n".join(part for part in parts if part) + "\n"
    if account.exit is not None and account.plan is not None:
        parts += [*_usage(account.exit, account.plan.algorithm.cpus)]
        parts += ["### The log's last lines", _fenced(account.tail) or SILENT]
    if seen := [line for line in verdict.evidence if line not in account.tail and (account.tail or line != SILENT)]:
        parts += ["### What was seen", _fenced(seen)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _status(verdict: Verdict) -> str:
    if verdict.code == Reason.OK:
        return f"{oasis_status(verdict)} (Prefect says Completed)"
    whose = f"{verdict.blame.value}, in {verdict.stage}" if verdict.blame else verdict.stage
    state = "TimedOut" if verdict.code == Reason.TIMED_OUT else "Failed"
    return f"{oasis_status(verdict)} (Prefect says {state}): `{verdict.code}`, {whose}"


def _plan_rows(account: Account) -> list[tuple[str, str]]:
    plan = account.plan
    if plan is None:
        return []
    source = plan.image.image_id or plan.image.image_file or ""
    digest = f", `{_short(account.image)}`" if account.image else ""
    return [
        ("Algorithm", f"`{plan.algorithm_name}`" + "".join(f", {name} = `{value}`" for name, value in plan.parameters.items())),
        ("Prerequisites", ", ".join(f"`{step.item.name}`" for step in plan.prerequisites.steps)),
        ("Image", f"`{source}`{digest}"),
        ("Input", f"`{plan.dataset_name}`{_counted(account.staged)}"),
    ]


def _exit_rows(account: Account, verdict: Verdict) -> list[tuple[str, str]]:
    plan, exit = account.plan, account.exit
    stages = ("Time", ", ".join(f"{name.replace('_', ' ')} {value:.2f} s" for name, value in account.seconds.items()))
    if plan is None or exit is None:
        return [stages]
    return [
        *_output_rows(plan, account, verdict),
        stages,
        ("Processors", _processors(exit, plan.algorithm.cpus)),
        ("Peak memory", _peak_memory(exit)),
        ("Refused processes", f"{exit.forks_refused}, by `pids_limit`" if exit.forks_refused else ""),
        ("Sandbox", _sandbox(plan, exit)),
        ("Log", f"a part may be missing: {exit.log_lost}" if exit.log_lost else ""),
    ]


def _sandbox(plan: Plan, exit: ContainerExit) -> str:
    opened = loosened(plan)
    said = f"loosened: {', '.join(opened)}" if opened else "closed"
    filtered = exit.in_force.get("system_calls_filtered", True)
    return said if filtered else f"{said}; the engine filters no system calls (its seccomp is off)"


def _processors(exit: ContainerExit, cpus: float) -> str:
    """Time and average; those of a container that ended before the second look at it are not worth a word."""
    if exit.cpu_seconds is None or len(exit.usage) < 2:
        return ""
    average = exit.cpu_seconds / exit.usage[-1].seconds
    return f"{exit.cpu_seconds:.1f} s of processor time, {average:.2f} of {cpus:g} on average"


def _peak_memory(exit: ContainerExit) -> str:
    peak = f"{human_bytes(exit.memory_peak_bytes)} of {human_bytes(exit.memory_limit_bytes)}"
    if exit.memory_peak_bytes is None or not exit.usage:
        return peak
    most = max(sample.memory_bytes for sample in exit.usage)
    return f"{peak}; {human_bytes(min(most, exit.memory_peak_bytes))} without what the kernel kept of files"


def _usage(exit: ContainerExit, cpus: float) -> list[str]:
    if len(exit.usage) < 2 or exit.memory_limit_bytes is None:
        return []
    drawn = picture.svg(exit.usage, cpus=cpus, memory_bytes=exit.memory_limit_bytes)
    return ["### Processors and memory", f"![Processors and memory over time]({picture.url(drawn)})"]


def _output_rows(plan: Plan, account: Account, verdict: Verdict) -> list[tuple[str, str]]:
    published = account.published
    if published is None and verdict.code != UnsafeName.code:
        return [("Output", "not published; the run's log says why")]
    if account.exit is not None and not account.exit.reason.keeps_output:
        return [
            ("Output", "no dataset; its files were not kept"),
            ("Log, record", f"`{plan.output.url}`/`log.txt`, `task.json`"),
        ]
    good = verdict.code == Reason.OK
    name = f"[{plan.document_name}]({account.document_url})" if account.document_url else f"`{plan.document_name}`"
    named = f"dataset {name}" if good else "no dataset; what there was is kept to be looked at"
    return [
        ("Output", f"{named}{_counted(published)}"),
        ("Files, log, record", f"`{plan.output.url}`/`data`, `log.txt`, `task.json`"),
    ]


def _plain(text: str) -> str:
    """The text as it is, where Markdown would take an algorithm's words for its own."""
    return re.sub(r"([\\`*_\[\]<>!#|~])", r"\\\1", text)


def _fenced(lines: Sequence[str]) -> str:
    """The lines as they are, in a fence that none of them can close."""
    fence = "~" * (max((len(run) for line in lines for run in re.findall("~+", line)), default=0) + 4)
    return "\n".join([fence, *lines, fence]) if lines else ""


def _counted(summary: Summary | None) -> str:
    return f": {counted(summary.file_count, 'file')}, {human_bytes(summary.size_bytes)}" if summary else ""


def _short(image: str) -> str:
    """The reference with as much of its digest as tells it apart; the record has all of it."""
    name, found, digest = image.partition("sha256:")
    return f"{name}{found}{digest[:12]}" if found else image


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _summary(summary: Summary) -> dict[str, Any]:
    return {"file_count": summary.file_count, "size_bytes": summary.size_bytes, "manifest_digest": summary.digest}


def _counts(told: Mapping[str, Any]) -> Summary:
    return Summary(file_count=told["file_count"], size_bytes=told["size_bytes"], digest=told["manifest_digest"])


def document(plan: Plan) -> dict[str, Any]:
    """The algorithm's document without values of its environment and without logins."""
    names = plan.algorithm.__class__.model_fields
    document = {name: getattr(plan.algorithm, name) for name in names if name not in ("environment", "docker_image")}
    image = plan.algorithm.docker_image
    return {
        **document,
        "docker_image": {"name": image._block_document_name, "image_id": image.image_id, "image_file": image.image_file},
    }
