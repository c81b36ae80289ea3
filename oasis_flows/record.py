"""What is written down about a run: the record beside its output, and the page that people read in Prefect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from .job import ContainerExit, Reason, explain, human_bytes
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
) -> dict[str, Any]:
    """The record of a run. Of the environment it has names only, of secrets the names of their blocks."""
    sentence, advice = explain(exit)
    return {
        "oasis_flows": RECORD_VERSION,
        "package_version": version("oasis-flows"),
        "status": oasis_status(exit),
        "verdict": {"code": exit.reason.value, "sentence": f"{plan.algorithm_name} {sentence}.", "advice": advice},
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
        "seconds": dict(seconds),
    }


def oasis_status(exit: ContainerExit) -> str:
    """The word RD-OASIS had for it."""
    return "Succeeded" if exit.reason is Reason.OK else "Failed"


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
    published: Summary,
    seconds: Mapping[str, float],
    tail: Sequence[str],
) -> str:
    """The page about a run, in Markdown: what became of it, and where everything is."""
    sentence, advice = explain(exit)
    state = "Completed" if exit.reason is Reason.OK else "Failed"
    stages = ", ".join(f"{name.replace('_', ' ')} {value:.1f} s" for name, value in seconds.items())
    rows = [
        ("Algorithm", f"`{plan.algorithm_name}`"),
        ("Image", f"`{image}`"),
        ("Input", f"`{plan.dataset_name}`: {staged.file_count} files, {human_bytes(staged.size_bytes)}"),
        ("Output", f"`{plan.output.url}`: {published.file_count} files, {human_bytes(published.size_bytes)}"),
        ("Log and record", f"`{plan.output.url}/log.txt`, `{plan.output.url}/task.json`"),
        ("Time", stages),
        ("Peak memory", f"{human_bytes(exit.memory_peak_bytes)} of {human_bytes(exit.memory_limit_bytes)}"),
        ("Sandbox", f"loosened: {', '.join(loosened(plan))}" if loosened(plan) else "closed"),
    ]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    fence = "~" * (max((len(line) - len(line.lstrip("~")) for line in tail), default=0) + 4)
    log = "\n".join([fence, *tail, fence]) if tail else "The algorithm wrote nothing to its log."
    return f"## {oasis_status(exit)} ({state}): {plan.algorithm_name} {sentence}\n\n{advice}\n\n| | |\n|---|---|\n{table}\n\n### The log's last lines\n\n{log}\n"


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
