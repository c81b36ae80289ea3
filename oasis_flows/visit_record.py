"""What is written down about a visit: the link that travels with the train, the folder that stays, and the page for people."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import lineage, log
from .artifacts import MOST_FILES, show_difference
from .asking import Train
from .difference import Difference, Kind
from .errors import ChainBroken
from .job import counted, human_bytes
from .lineage import Content, Envelope, Finding
from .protocol import Description
from .requirement import Result
from .verdict import Verdict
from .visit import Visit
from .visiting import DIFFERENCE, Ended, results_json
from .workspace import Workspace, room_for

_SHOWN = 50
CHAIN, IMAGE, SUMMARY, CHANGES, RECORD, LOG = "chain.json", "image.json", "summary.txt", DIFFERENCE, "record.json", "log.txt"
# Of the sandbox as the engine had it in force, what other stations may know: nothing of the machine's own paths and names.
_TOLD = (
    "network", "read_only_root", "user", "privileged", "capabilities_dropped", "capabilities_added", "security_options", "pids",
    "memory_bytes", "memory_and_swap_bytes", "cpus", "gpus",
)  # fmt: skip


def link(
    visit: Visit,
    train: Train,
    description: Description,
    results: Mapping[str, Sequence[Result]],
    ended: Ended,
    *,
    successor: Content,
    names: Sequence[str],
    base: str,
    summary: str | None,
) -> dict[str, Any]:
    """The link of this visit. It travels: of the environment it has names only, of the machine nothing."""
    force, before = ended.exit.in_force, train.chain[-1].digest if train.chain else None
    mounts = [{"target": mount["target"], "read_only": mount["read_only"]} for mount in _mounts(force)]
    rebase = ended.answer.rebase
    return {
        "version": lineage.LINK_VERSION,
        "train": visit.train,
        "visit": len(train.chain) + 1,
        "station": {"id": visit.station.station_id, "name": visit.station_name},
        "started_at": str(ended.exit.started_at),
        "finished_at": str(ended.exit.finished_at),
        "predecessor": {"image": train.image, "content": train.content.digest},
        "previous_link": before,
        "api": str(description.generation),
        "argv": list(ended.argv),
        "requirements": {who: results_json(found, reasons=False) for who, found in results.items()},
        "sandbox": {name: force[name] for name in _TOLD if name in force} | {"mounts": mounts},
        "exit_code": ended.exit.exit_code,
        "state": str(ended.answer.state),
        "difference": totals(ended.difference),
        "successor": {
            "content": successor.digest,
            "layers": list(successor.layers),
            "tags": [name.rpartition(":")[2] for name in names],
            "made_by": "rebase" if rebase else "commit",
            "base": base if rebase else None,
        },
        "summary_sha256": None if summary is None else hashlib.sha256(summary.encode()).hexdigest(),
    }


def _mounts(force: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(force.get("mounts") or ())


def _plain(path: str) -> str:
    """A train's words as they are: none of them can end a table's cell, or look like one more row."""
    text = path if path.isprintable() else repr(path)[1:-1]
    return f"`{text.replace('`', chr(39)).replace('|', '¦')}`"


def totals(difference: Difference) -> dict[str, Any]:
    """A difference in numbers, and the digest of its lines."""
    counts = {str(kind): difference.count(kind) for kind in Kind}
    return {"sha256": hashlib.sha256(difference.lines()).hexdigest(), "bytes": difference.size, **counts}


def show(visit: Visit, difference: Difference) -> None:
    """Show in Prefect what would leave the station."""
    rows = [
        {"file": _plain(f"/{change.path}").strip("`"), "change": str(change.kind), "size": human_bytes(change.bytes)}
        for change in difference.changes[:MOST_FILES]
    ]
    show_difference(rows, f"What the train {visit.train} carries away from {visit.station_name}: {in_words(difference)}.")


def in_words(difference: Difference) -> str:
    """A difference in one line."""
    counts = [f"{number} {kind}" for kind in Kind if (number := difference.count(kind))]
    return f"{', '.join(counts) or 'nothing'}; {human_bytes(difference.size)}"


def details(visit: Visit, results: Mapping[str, Sequence[Result]], ended: Ended) -> str:
    """The part of the run's page about the visit, in Markdown."""
    difference, rebase = ended.difference, ended.answer.rebase
    way = f"the files below, on the base {_plain(rebase.base)}" if rebase else "all that it changed in its own files"
    facts = (
        ("Train", f"`{visit.image}`"),
        ("Station", f"`{visit.station_name}` ({visit.station.station_id})"),
        ("What travels", way),
    )
    parts = ["| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts)]
    rows = [
        f"| `{result.name}` | {who} | {'met' if result.met else 'not met'} |"
        for who, found in results.items()
        for result in found
    ]
    if rows:
        parts += ["### Requirements", "| requirement | checked by | |\n|---|---|---|\n" + "\n".join(rows)]
    changes = "\n".join(
        f"| {_plain(f'/{change.path}')} | {change.kind} | {human_bytes(change.bytes)} |"
        for change in difference.changes[:_SHOWN]
    )
    parts += [f"### What leaves: {in_words(difference)}", f"| file | change | size |\n|---|---|---|\n{changes}"]
    if len(difference.changes) > _SHOWN:
        parts += [f"{counted(len(difference.changes) - _SHOWN, 'change')} more."]
    return "\n\n".join(parts)


def keep(
    folder: Path,
    visit: Visit,
    verdict: Verdict,
    workspace: Workspace,
    *,
    results: Mapping[str, Sequence[Result]],
    ended: Ended | None = None,
    chain: Sequence[Envelope] = (),
    successor: Content | None = None,
    summary: str | None = None,
    pushed: str | None = None,
    approval: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder of a visit, its record last. What secrets there may be in it are masked.

    Raises:
        StoreFull: it cannot be written.
    """
    record = {
        "oasis_flows": 1,
        "package_version": version("oasis-flows"),
        "flow_run": visit.run_id,
        "train": visit.image,
        "station": {"id": visit.station.station_id, "name": visit.station_name},
        "environment": sorted(visit.station.environment),
        "secret_environment": dict(visit.station.secret_environment),
        "verdict": verdict.to_json(),
        "requirements": {who: results_json(found, reasons=True) for who, found in results.items()},
        "argv": list(ended.argv) if ended else None,
        "exit": ended.exit.to_json() if ended else None,
        "message": ended.answer.message if ended else None,
        "unknown": dict(ended.answer.unknown) if ended else None,
        "approval": dict(approval) if approval else None,
        "pushed": pushed,
    }
    texts = {RECORD: json.dumps(record, indent=2, default=str)}
    if successor is not None:
        texts = {
            CHAIN: lineage.written(chain),
            IMAGE: json.dumps(asdict(successor), indent=2),
            **({SUMMARY: summary} if summary is not None else {}),
            **texts,
        }
    with room_for(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for source, name in ((workspace.log, LOG), (workspace.path / DIFFERENCE, CHANGES)):
            if source.exists():
                shutil.copyfile(source, folder / name)
        for name, text in texts.items():
            (folder / name).write_text(log.redact(text, visit.secrets.values()), newline="")


def verify_folder(folder: Path, trusted: Mapping[str, Sequence[str]]) -> tuple[Finding, ...]:
    """Check a visit's folder: the chain, and that image, difference and summary are those of the last link.

    Raises:
        ChainBroken: with the first thing that does not hold.
    """
    try:
        texts = {name: (folder / name).read_bytes() for name in (CHAIN, IMAGE, CHANGES)}
        summary = (folder / SUMMARY).read_bytes() if (folder / SUMMARY).exists() else None
        image = json.loads(texts[IMAGE])
        history = tuple((command, comment) for command, comment in image["history"])
        content = Content(image["config"], tuple(image["layers"]), image["platform"], history)
        text = texts[CHAIN].decode()
    except FileNotFoundError as error:
        raise ChainBroken(
            f"The folder {folder} has no {Path(str(error.filename)).name}. It is no record of a visit from which a train travelled on, or a file "
            "was taken away."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ChainBroken(
            f"A file in {folder} cannot be read: somebody changed it. The cause: {type(error).__name__}: {error}"
        ) from None
    findings = lineage.verify(lineage.read(text), trusted)
    if not findings:
        raise ChainBroken(f"The chain in {folder} has no link. Somebody took them out.")
    last = findings[-1].link
    lineage.check_content(content, last)
    if hashlib.sha256(texts[CHANGES]).hexdigest() != last["difference"]["sha256"]:
        raise ChainBroken(f"The file {CHANGES} is not the difference that the last link signs. Somebody changed it.")
    found = None if summary is None else hashlib.sha256(summary).hexdigest()
    if found != last["summary_sha256"]:
        raise ChainBroken(f"The file {SUMMARY} is not the model's summary that the last link signs. Somebody changed it.")
    return findings


def verify_image(content: Content, trusted: Mapping[str, Sequence[str]]) -> tuple[Finding, ...]:
    """Check the chain that an image carries, and that the image is what the last link says.

    Raises:
        ChainBroken: with the first thing that does not hold; also where there is no chain.
    """
    if not content.chain:
        raise ChainBroken("The image carries no record. It has visited no station, or somebody took the record out.")
    findings = lineage.verify(lineage.read(content.chain), trusted)
    lineage.check_content(content, findings[-1].link)
    return findings


def envelope_rows(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings as JSON."""
    return [asdict(finding) | {"link": dict(finding.link)} for finding in findings]
