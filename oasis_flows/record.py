"""What is written down about a run: the record beside its output, and the page that people read in Prefect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from .errors import DatasetError, UnsafeName
from .job import ContainerExit, Reason, counted, explain, human_bytes
from .manifest import Summary
from .plan import Plan

RECORD_VERSION = 1


def task_json(
    plan: Plan,
    *,
    image: str,
    staged: Summary,
    exit: ContainerExit,
    published: Summary,
    seconds: Mapping[str, float],
    flow_run: Mapping[str, str],
    refused: UnsafeName | None = None,
) -> dict[str, Any]:
    """The record of a run. Of the environment it has names only, of secrets the names of their blocks.

    `refused` says why what a successful container wrote cannot be a dataset.
    """
    return {
        "oasis_flows": RECORD_VERSION,
        "package_version": version("oasis-flows"),
        "status": oasis_status(exit, refused),
        "verdict": _verdict(plan, exit, refused),
        "flow_run": {**flow_run, "attempt": plan.attempt},
        "algorithm": {"name": plan.algorithm_name, "document": _document(plan)},
        "image": image,
        "argv": {"entrypoint": plan.entrypoint, "command": plan.command},
        "parameters": dict(plan.parameters),
        "environment": sorted(plan.environment),
        "secret_environment": dict(plan.algorithm.secret_environment),
        "input": {"name": plan.dataset_name, "url": plan.dataset.url, **_summary(staged)},
        "output": {"name": plan.document_name, "url": plan.output.url, **_summary(published)},
        "sandbox": {"loosened": loosened(plan), "in_force": exit.in_force},
        "exit": {name: value for name, value in exit.to_json().items() if name != "in_force"},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def oasis_status(exit: ContainerExit, problem: DatasetError | None = None) -> str:
    """The word RD-OASIS had for it; `problem` is what kept the output from becoming a dataset."""
    return "Succeeded" if exit.reason is Reason.OK and problem is None else "Failed"


def _verdict(plan: Plan, exit: ContainerExit, refused: UnsafeName | None) -> dict[str, str]:
    if refused:
        return {
            "code": refused.code,
            "sentence": f"{plan.algorithm_name} wrote what cannot be a dataset.",
            "advice": str(refused),
        }
    sentence, advice = explain(exit)
    return {"code": exit.reason.value, "sentence": f"{plan.algorithm_name} {sentence}.", "advice": advice}


def loosened(plan: Plan) -> list[str]:
    """What the algorithm's document opened in the sandbox."""
    a = plan.algorithm
    flags = (
        ("network", a.network),
        ("writable_root", a.writable_root),
        ("new_privileges", a.new_privileges),
        (f"user {a.user}", bool(a.user)),
    )
    return [name for name, on in flags if on] + [f"capability {name}" for name in a.capabilities]


def page(
    plan: Plan,
    *,
    image: str,
    staged: Summary,
    exit: ContainerExit,
    published: Summary | None,
    seconds: Mapping[str, float],
    tail: Sequence[str],
    refused: UnsafeName | None = None,
) -> str:
    """The page about a run, in Markdown: what became of it, and where everything is.

    `published` is `None` when nothing could be kept. `tail` holds the last lines of the log.
    """
    verdict, status = _verdict(plan, exit, refused), oasis_status(exit, refused)
    state = "Completed" if status == "Succeeded" else "Failed"
    stages = ", ".join(f"{name.replace('_', ' ')} {value:.2f} s" for name, value in seconds.items())
    source = plan.image.image_id or plan.image.image_file or ""
    rows = [
        ("Status", f"{status} (Prefect says {state})"),
        ("Algorithm", f"`{plan.algorithm_name}`" + "".join(f", {name} = `{value}`" for name, value in plan.parameters.items())),
        ("Image", f"`{source}`, `{_short(image)}`"),
        ("Input", f"`{plan.dataset_name}`: {_counted(staged)}"),
        *_output_rows(plan, exit, status, published),
        ("Time", stages),
        ("Peak memory", f"{human_bytes(exit.memory_peak_bytes)} of {human_bytes(exit.memory_limit_bytes)}"),
        ("Sandbox", f"loosened: {', '.join(loosened(plan))}" if loosened(plan) else "closed"),
    ]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    fence = "~" * (max((len(line) - len(line.lstrip("~")) for line in tail), default=0) + 4)
    log = "\n".join([fence, *tail, fence]) if tail else "The algorithm wrote nothing to its log."
    what = f"## {verdict['sentence'].rstrip('.')}\n\n{verdict['advice']}\n\n| | |\n|---|---|\n{table}\n"
    return f"{what}\n### The log's last lines\n\n{log}\n"


def _output_rows(plan: Plan, exit: ContainerExit, status: str, published: Summary | None) -> list[tuple[str, str]]:
    if published is None:
        return [("Output", "not published; the run's log says why")]
    if not exit.reason.keeps_output:
        return [
            ("Output", "no dataset; its files were not kept"),
            ("Log, record", f"`{plan.output.url}`/`log.txt`, `task.json`"),
        ]
    named = f"dataset `{plan.document_name}`" if status == "Succeeded" else "no dataset; what there was is kept to be looked at"
    return [
        ("Output", f"{named}: {_counted(published)}"),
        ("Files, log, record", f"`{plan.output.url}`/`data`, `log.txt`, `task.json`"),
    ]


def _counted(summary: Summary) -> str:
    return f"{counted(summary.file_count, 'file')}, {human_bytes(summary.size_bytes)}"


def _short(image: str) -> str:
    """The reference with as much of its digest as tells it apart; the record has all of it."""
    name, found, digest = image.partition("sha256:")
    return f"{name}{found}{digest[:12]}" if found else image


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _summary(summary: Summary) -> dict[str, Any]:
    return {"file_count": summary.file_count, "size_bytes": summary.size_bytes, "manifest_digest": summary.digest}


def _document(plan: Plan) -> dict[str, Any]:
    """The algorithm's document without values of its environment and without logins."""
    names = plan.algorithm.__class__.model_fields
    document = {name: getattr(plan.algorithm, name) for name in names if name not in ("environment", "docker_image")}
    image = plan.algorithm.docker_image
    return {
        **document,
        "docker_image": {"name": image._block_document_name, "image_id": image.image_id, "image_file": image.image_file},
    }
