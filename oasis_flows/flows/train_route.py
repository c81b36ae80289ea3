"""A train goes from station to station, each visit on its station's own work pool."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any, Literal, cast
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State
from prefect.logging import get_run_logger
from prefect.states import Cancelling, Failed
from pydantic import Field

from .. import documents
from ..blocks import Station
from ..documents import document_flow, patiently
from ..errors import DescriptionError, OasisError, first_sentence
from ..train_deployments import ask_visit, await_end
from .parameters import OR_NAME
from .train import LABEL_SUCCESSOR

_Stations = Annotated[list[Annotated[Station, OR_NAME]], Field(min_length=1)]


@document_flow(name="train-route")
def train_route(
    image: str,
    stations: _Stations,
    *,
    api: Literal["auto", "0.x", "V1", "1.0"] = "auto",
    track_info: str | None = None,
    user_data: str | None = None,
) -> str:
    """Let a train visit stations one after another; the successor of one visit is the train of the next.

    It stops at the first station that refuses the train or where it fails, and says where it stands. A retry of the run goes
    on from there.

    Args:
        image: The train's image.
        stations: The stations that it visits, in order.
        api: The generation of the Train API that it speaks. auto asks it.
        track_info: Text for the train about its route, where its generation takes one.
        user_data: Text for the train from whoever sends it, where its generation takes one.

    Returns:
        The image of the train after its last visit.

    Raises:
        DescriptionError: something is wrong as written: a station, a work pool.
    """
    try:
        route = patiently(lambda: [documents.resolved(Station, given) for given in stations])
        for station in route[:-1]:
            if station.registry is None:
                raise DescriptionError(
                    f"The station {station._block_document_name} has no `registry`, so no train travels on from it. Write one into its "
                    "document, or let it be the last."
                )
        return _travel(image, route, {"api": api, "track_info": track_info, "user_data": user_data})
    except OasisError as error:
        get_run_logger().error("%s", error)
        return cast(str, Failed(message=first_sentence(error), data=error))


def _travel(image: str, route: list[Station], options: dict[str, Any]) -> str:
    whole = " ".join([image, *(str(station._block_document_name) for station in route)])
    this, attempt = str(runtime.flow_run.id), runtime.flow_run.run_count or 1
    for number, station in enumerate(route, 1):
        name = station._block_document_name
        tags = [f"route:{this}", f"leg:{number}"]
        visit = _visited(tags)
        if visit is None:
            parameters = {"image": image, **options}
            visit = ask_visit(station, parameters, key=f"{this}-{number}-{attempt}", tags=tags)
            get_run_logger().info("Visit %d of %d, at %s: %s.", number, len(route), name, visit.name)
            visit = _ended(visit)
        successor = visit.labels.get(LABEL_SUCCESSOR)
        if visit.state is None or not visit.state.is_completed() or successor is None:
            again = (
                f"prefect flow-run retry {this}"
                if runtime.deployment.id
                else f"oasis-flows train route {whole} --resume {this}"
            )
            return cast(str, _stopped(image, visit, number, route, again))
        image = str(successor)
    return image


def _visited(tags: list[str]) -> FlowRun | None:
    """The visit of this leg that an earlier attempt of the route finished."""

    def ask() -> list[FlowRun]:
        with get_client(sync_client=True) as client:
            return client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=tags)))

    done = [
        run for run in patiently(ask) if run.state is not None and run.state.is_completed() and LABEL_SUCCESSOR in run.labels
    ]
    return done[0] if done else None


def _ended(visit: FlowRun) -> FlowRun:
    """The visit once it has ended; whatever ends the route before that cancels it."""
    try:
        return await_end(visit.id)
    except BaseException:
        with suppress(Exception), get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(str(visit.id)), Cancelling())
        raise


def _stopped(image: str, visit: FlowRun, number: int, route: list[Station], again: str) -> State[Any]:
    names = [str(station._block_document_name) for station in route]
    said = visit.state.message if visit.state and visit.state.message else "no reason is known"
    told = (
        f"The train stopped at station {names[number - 1]}, visit {number} of {len(route)}, and stands as {image}. {said} See the flow run "
        f"{visit.name}, {visit.id}. Once that is mended, the route goes on there: {again}"
    )
    get_run_logger().error("%s", told)
    return Failed(message=told)
