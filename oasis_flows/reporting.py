"""How a run tells what became of it: its page, its event, its tag, and the state that it ends in."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, FlowRunPolicy, State
from prefect.context import FlowRunContext
from prefect.flow_engine import FlowRunTimeoutError
from prefect.logging import get_run_logger
from prefect.states import Failed

from . import interruption
from .artifacts import harmless, show_files, show_page, tell_failure
from .documents import patiently, unanswered
from .errors import InternalError, OasisError
from .job import Reason
from .record import Account, oasis_status, page
from .verdict import Verdict, judge


def succeeded(account: Account, verdict: Verdict) -> None:
    """Tell of a run that succeeded."""
    account.settle(None)
    _show(account, verdict)


def failed(error: Exception, account: Account) -> State[Any]:
    """The state of a run that failed: its message is the verdict's sentence, its data the error.

    Raises:
        OasisError: the error itself, where the flow has retries left and another try can help.
        FlowRunTimeoutError: the error itself: Prefect's engine has an answer to it.
        TerminationSignal, KeyboardInterrupt: as for that.
    """
    if isinstance(error, FlowRunTimeoutError):
        raise error
    # Of what a signal raises Prefect's engine, and pydantic, may have made this error.
    interruption.check()
    if not isinstance(error, OasisError):
        error = unanswered(error) or _unforeseen(error)
    verdict = judge(error)
    get_run_logger().error("%s", error)
    account.settle(error)
    _show(account, verdict)
    with harmless("The failure"), get_client(sync_client=True) as client:
        tell_failure(client, UUID(str(runtime.flow_run.id)), str(runtime.flow_run.name), verdict)
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        _mind_retries(context.flow_run, error)
    # Other names would hide a failure from everybody who waits for the event prefect.flow-run.Failed.
    return Failed(message=verdict.sentence, data=error, name="TimedOut" if verdict.code == Reason.TIMED_OUT else "Failed")


def _unforeseen(cause: Exception) -> InternalError:
    get_run_logger().error("This was not foreseen:", exc_info=cause)
    error = InternalError(
        "Something failed that oasis-flows did not foresee. The run's log has the traceback: please report it. "
        f"The cause: {type(cause).__name__}: {cause}"
    )
    error.__cause__ = cause
    return error


def _show(account: Account, verdict: Verdict) -> None:
    """Put the run's page and the list of its output files among its artifacts."""
    plan = account.plan
    what = f": {plan.algorithm_name} on {plan.dataset_name}, output {plan.document_name}" if plan else ""
    # It waits for a server that is away, as the state that follows cannot: Prefect gives up after a minute, and the run would stay Running.
    show_page(page(account, verdict), f"{oasis_status(verdict)}{what}")
    if plan is not None and account.published is not None:
        show_files(account.files, account.published, plan.output.url, whole=verdict.code == Reason.OK)


def _mind_retries(flow_run: FlowRun, error: OasisError) -> None:
    """Leave the run to Prefect's retries where they help, else take them away.

    Prefect's engine goes round again for an exception only; a failed state that is returned while retries are left would
    wait for ever.
    """
    if flow_run.run_count > (flow_run.empirical_policy.retries or 0):
        return
    if error.transient:
        raise error

    def give_up() -> None:
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, empirical_policy=FlowRunPolicy(retries=0))

    patiently(give_up)
