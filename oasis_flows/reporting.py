"""How a run tells what became of it: its page, its event, its tag, and the state that it ends in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, FlowRunPolicy, State
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.states import Failed

from .artifacts import first_files, show_files, show_page
from .documents import await_server
from .errors import OasisError
from .job import Reason
from .log import last_lines
from .record import Account, oasis_status, page
from .tasks import stage_seconds
from .verdict import Verdict, judge
from .workspace import Workspace

EVENT = "oasis-flows.run.failed"


@contextmanager
def noted(account: Account, workspace: Workspace) -> Iterator[None]:
    """Take down what the workspace knows, however the block ends: afterwards it is gone."""
    try:
        yield
    finally:
        account.seconds, account.tail = stage_seconds(workspace), last_lines(workspace.log, 30)
        if account.published is not None:
            account.files = first_files(workspace.published_manifest)


def show(account: Account, verdict: Verdict) -> None:
    """Put the run's page and the list of its output files among its artifacts."""
    plan = account.plan
    what = f": {plan.algorithm_name} on {plan.dataset_name}, output {plan.document_name}" if plan else ""
    # The state that follows cannot wait for a server: Prefect gives up after a minute, and the run would stay Running.
    with suppress(OasisError):
        await_server()
    show_page(page(account, verdict), f"{oasis_status(verdict)}{what}")
    if plan is not None and account.published is not None:
        show_files(account.files, account.published, plan.output.url, whole=verdict.code == Reason.OK)


def failed(error: OasisError, account: Account) -> State[Any]:
    """The state of a run that failed: its message is the verdict's sentence, its data the error.

    Raises:
        OasisError: the error itself, where the flow has retries left and another try can help.
    """
    verdict = judge(error)
    get_run_logger().error("%s", error)
    show(account, verdict)
    _tell(verdict)
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        _mind_retries(context.flow_run, error)
    # Other names would hide a failure from everybody who waits for the event prefect.flow-run.Failed.
    return Failed(message=verdict.sentence, data=error, name="TimedOut" if verdict.code == Reason.TIMED_OUT else "Failed")


def _tell(verdict: Verdict) -> None:
    """Let automations know the code: by an event of ours, and by a tag that Prefect's own events of the run carry."""
    run_id = str(runtime.flow_run.id)
    resource = {
        "prefect.resource.id": f"prefect.flow-run.{run_id}",
        "prefect.resource.name": str(runtime.flow_run.name),
        "oasis.code": verdict.code,
        "oasis.stage": verdict.stage,
        "oasis.blame": str(verdict.blame),
        "oasis.transient": str(verdict.transient).lower(),
    }
    try:
        emit_event(EVENT, resource=resource, payload=verdict.to_json())
        with get_client(sync_client=True) as client:
            tags = {*client.read_flow_run(UUID(run_id)).tags, f"failed:{verdict.code}"}
            client.update_flow_run(UUID(run_id), tags=sorted(tags))
    except Exception as error:  # noqa: BLE001  # what became of the run stays the same
        get_run_logger().warning("The failure could not be told to automations: %s", error)


def _mind_retries(flow_run: FlowRun, error: OasisError) -> None:
    """Leave the run to Prefect's retries where they help, else take them away.

    Prefect's engine goes round again for an exception only; a failed state that is returned while retries are left would
    wait for ever.
    """
    if flow_run.run_count > (flow_run.empirical_policy.retries or 0):
        return
    if error.transient:
        raise error
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, empirical_policy=FlowRunPolicy(retries=0))
