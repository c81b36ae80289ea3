"""A train visits a station: it is checked, runs on the station's data, and travels on as a new image with a signed record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast
from uuid import uuid4

from prefect import runtime
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput

from .. import documents, interruption, lineage, settings, visit_record
from ..asking import Train
from ..blocks import Station
from ..documents import document_flow, patiently
from ..errors import EngineError, OasisError, TrainRefused
from ..fetched import drop
from ..job import Reason
from ..lifecycle import clean_up, mark, owned_workspace
from ..lineage import Content, Envelope
from ..machine import image_engine
from ..protocol import Description
from ..reaper import LABEL_OUTPUT
from ..record import Account
from ..reporting import failed, succeeded
from ..requirement import Result
from ..settings import Settings
from ..station_keys import signing_key, trusted
from ..verdict import Verdict, judge
from ..visit import Visit, plan_visit, successors
from ..visiting import (
    DIFFERENCE,
    Ended,
    check_station,
    check_train,
    describe_train,
    draft_successor,
    prepare_train,
    push_successor,
    run_train,
    seal_successor,
    summarise_model,
)
from ..workspace import Workspace
from .parameters import OR_NAME, visit_name

LABEL_SUCCESSOR, LABEL_RECORD = "oasis.train.successor", LABEL_OUTPUT
APPROVED = "approve_successor"


class Approval(RunInput):
    """What somebody at the station answers before a train may leave."""

    agree: bool = False
    comment: str = ""


@dataclass(frozen=True, slots=True)
class Successor:
    """A train after a visit: its image, by digest where it was pushed, and the folder of the visit's record."""

    image: str
    record: str


@document_flow(name="train", flow_run_name=visit_name, on_cancellation=[clean_up], on_crashed=[clean_up])
def train(
    image: str,
    station: Annotated[Station, OR_NAME],
    *,
    api: Literal["auto", "0.x", "V1", "1.0"] = "auto",
    track_info: str | None = None,
    user_data: str | None = None,
) -> Successor:
    """Let a train visit a station.

    Args:
        image: The train's image.
        station: The station that it visits.
        api: The generation of the Train API that it speaks. auto asks it.
        track_info: Text for the train about its route, where its generation takes one.
        user_data: Text for the train from whoever sends it, where its generation takes one.

    Returns:
        The train as it travels on.

    Raises:
        TrainRefused: the station lacks what it requires, its policy is against it, or somebody there said no.
        TrainFailed, AlgorithmFailed, ProtocolError: it ran and did not succeed, or does not speak the Train API.
        ChainBroken: the record that it came with does not hold.
        DescriptionError: something is wrong as written; nothing was started.
        EngineError: the container engine or a registry failed; what the train would have done is unknown.
    """
    account, results = Account(), dict[str, Sequence[Result]]()
    with interruption.kept_in_mind(), ExitStack() as owned:
        visit, workspace, ended = cast(Visit, None), cast(Workspace, None), None
        try:
            here = settings.current()
            workspace = owned.enter_context(owned_workspace(here, account))
            visit = patiently(
                lambda: plan_visit(
                    image,
                    documents.resolved(Station, station),
                    generation=api,
                    track_info=track_info,
                    user_data=user_data,
                    settings=here,
                    run_id=workspace.run_id,
                    attempt=runtime.flow_run.run_count or 1,
                )
            )
            record = here.trains / "records" / visit.train / visit.run_id
            mark([f"train:{visit.train}", f"station:{visit.station_name}"], {LABEL_OUTPUT: str(record)})
            arrived = prepare_train(visit, workspace, here)
            for name in arrived.fetched:
                owned.callback(_drop, name, workspace, here)
            _believe(visit, arrived, here)
            description = describe_train(visit, arrived, workspace, here)
            results["station"] = check_station(visit, description)
            results["train"] = check_train(visit, arrived, description, workspace, here)
            ended = run_train(visit, arrived, description.generation, workspace, here)
            account.exit = ended.exit
            account.details = visit_record.details(visit, results, ended)
            visit_record.show(visit, ended.difference)
            approval = _approved(visit, ended, workspace)
            sealed = _sealed(visit, arrived, description, results, ended, workspace, here, owned)
            pushed = push_successor(visit, sealed.draft, sealed.names, here)
            verdict = _left(visit, pushed)
            visit_record.keep(
                record,
                visit,
                verdict,
                workspace,
                results=results,
                ended=ended,
                chain=sealed.chain,
                successor=sealed.content,
                summary=sealed.summary,
                pushed=pushed,
                approval=approval,
            )
            mark([], {LABEL_SUCCESSOR: pushed})
        except Exception as error:  # noqa: BLE001 - whatever it was, the run says what became of it
            _keep_failure(error, here, visit, workspace, results, ended)
            return cast(Successor, failed(error, account))
        succeeded(account, verdict)
        return Successor(pushed, str(record))


@dataclass(frozen=True, slots=True)
class _Sealed:
    """A successor with its record in it, in the engine."""

    draft: str
    content: Content
    chain: tuple[Envelope, ...]
    names: tuple[str, ...]
    summary: str | None


def _sealed(
    visit: Visit,
    arrived: Train,
    description: Description,
    results: Mapping[str, Sequence[Result]],
    ended: Ended,
    workspace: Workspace,
    here: Settings,
    owned: ExitStack,
) -> _Sealed:
    """Make the successor: first without its record, which has to say what its model is and what it consists of."""
    draft = draft_successor(visit, arrived, ended, workspace, here)
    for name in (draft.name, draft.fetched):
        owned.callback(_drop, name, workspace, here)
    summary = summarise_model(visit, description.generation, draft.name, workspace, here)
    names = successors(visit, ended.answer.tags, len(arrived.chain) + 1)
    content = _content(draft.name, here)
    link = visit_record.link(
        visit, arrived, description, results, ended, successor=content, names=names, base=draft.base, summary=summary
    )
    key = patiently(lambda: signing_key(visit.station_name, visit.station.signing_key, here))
    chain = (*arrived.chain, lineage.sign(link, key))
    final = seal_successor(visit, arrived, draft.base, chain, workspace, here)
    sealed = _content(final, here)
    if sealed.digest != content.digest:
        raise EngineError("The engine made another image than it was asked for. Nothing was pushed; see its own log.")
    return _Sealed(final, sealed, chain, names, summary)


def _content(image: str, here: Settings) -> Content:
    found = image_engine(here).content(image)
    if found is None:
        raise EngineError(f"The engine lost the image {image} that it had just made. Run it again; see its own log.")
    return found


def _believe(visit: Visit, arrived: Train, here: Settings) -> None:
    """Return if the record that came with the train holds; whose keys count, the policy says."""
    if not arrived.chain:
        return
    # Where nobody has to be trusted, a record that was tampered with is not carried on either.
    keys = trusted(here) if visit.station.policy.require_signature else lineage.own_keys(arrived.chain)
    visit_record.verify_image(arrived.content, keys)


def _approved(visit: Visit, ended: Ended, workspace: Workspace) -> Mapping[str, Any] | None:
    """Return once somebody agreed that the successor leaves, where the policy wants to be asked.

    Raises:
        TrainRefused: somebody said no, or nobody said anything in time.
    """
    if not visit.station.policy.hold_for_approval:
        return None
    if done := workspace.done(APPROVED):
        return done
    text = visit_record.details(visit, {}, ended)
    whole = f"All of it, one line of JSON each, at the station: `{workspace.path / DIFFERENCE}`"
    form = Approval.with_initial_data(
        description=f"The train waits for your answer. Agree, and this leaves:\n\n{text}\n\n{whole}"
    )
    try:
        # By a key that is only this question's. A retry leaves the server with those of before, and with their answers; where a
        # run has died while it was paused, not even the attempts are counted.
        answer = pause_flow_run(
            wait_for_input=form,
            timeout=visit.station.policy.approval_seconds,
            poll_interval=2,
            key=uuid4().hex,
        )
    except FlowPauseTimeout:
        raise TrainRefused(
            f"Nobody at station {visit.station_name} agreed in time that the train {visit.train} leaves. Nothing left. Run it again, or raise "
            "`policy.approval_seconds`."
        ) from None
    if not answer.agree:
        raise TrainRefused(
            f"Somebody at station {visit.station_name} did not agree that the train {visit.train} leaves. Nothing left. Ask them why. "
            f"They said: {answer.comment or 'nothing'}"
        )
    workspace.mark_done(APPROVED, {"agree": True, "comment": answer.comment})
    return workspace.done(APPROVED)


def _left(visit: Visit, pushed: str) -> Verdict:
    return Verdict(
        code=Reason.OK,
        stage="push_successor",
        blame=None,
        transient=False,
        sentence=f"The train {visit.train} left station {visit.station_name} as {pushed}.",
        advice="",
    )


def _keep_failure(
    error: Exception,
    here: Settings,
    visit: Visit | None,
    workspace: Workspace | None,
    results: Mapping[str, Sequence[Result]],
    ended: Ended | None,
) -> None:
    """Keep record and log of a train that ran and did not travel on; of one that was refused before, nothing is kept."""
    if visit is None or workspace is None or not isinstance(error, OasisError) or not workspace.log.exists():
        return
    folder: Path = here.trains / "records" / visit.train / visit.run_id
    with suppress(OasisError):
        visit_record.keep(folder, visit, judge(error), workspace, results=results, ended=ended)


def _drop(image: str | None, workspace: Workspace, here: Settings) -> None:
    """Take out of the engine what the visit made or fetched there."""
    if image is not None:
        with suppress(OasisError):
            drop(image_engine(here), image, workspace)
