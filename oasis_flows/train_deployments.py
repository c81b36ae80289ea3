"""Visits on the work pools of their stations: which deployment a station's visits are runs of, and how one is asked for.

A flow run cannot choose its work pool, so each pool has a deployment of its own, `train/<pool>`, made of `train/train` when
a station of that pool gets its first train: a new station is a new document, and never a new deployment by hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound

from . import interruption
from .blocks import Station
from .documents import patiently
from .errors import DescriptionError

FLOW = "train"
POLL_SECONDS = 1.0


def deployment_for(client: SyncPrefectClient, station: Station) -> UUID:
    """The deployment whose runs are visits to this station.

    Raises:
        DescriptionError: there is no `train/train` to make it of, or no such work pool.
    """
    name = station.work_pool or FLOW
    try:
        return client.read_deployment_by_name(f"{FLOW}/{name}").id
    except ObjectNotFound:
        pass
    try:
        pattern = client.read_deployment_by_name(f"{FLOW}/{FLOW}")
        client.read_work_pool(name)
    except ObjectNotFound as error:
        raise DescriptionError(
            f"No visit can run on the work pool {name!r}: there is no such pool, or no deployment {FLOW}/{FLOW}. Make them with `prefect "
            "work-pool create` and `prefect deploy --all`."
        ) from error
    return client.create_deployment(
        flow_id=pattern.flow_id,
        name=name,
        description=f"Lets a train visit a station of the work pool {name}. Made by oasis-flows of {FLOW}/{FLOW}.",
        tags=pattern.tags,
        work_pool_name=name,
        entrypoint=pattern.entrypoint,
        path=pattern.path,
        pull_steps=pattern.pull_steps,
        parameter_openapi_schema=pattern.parameter_openapi_schema,
        enforce_parameter_schema=pattern.enforce_parameter_schema,
        parameters=pattern.parameters,
    )


def ask_visit(station: Station, parameters: Mapping[str, Any], *, key: str, tags: list[str]) -> FlowRun:
    """Ask for a visit, and return its run. The same `key` never makes a second one: then it is the run of the first.

    Raises:
        DescriptionError: the station is no saved document, or cannot have a deployment.
    """
    name = station._block_document_name
    if name is None:
        raise DescriptionError(
            "The station is no saved document, and its workers could not load it. Save it, and pass its name."
        )
    reference = {"$ref": {"block_document_slug": f"{station.get_block_type_slug()}/{name}"}}

    def ask() -> FlowRun:
        with get_client(sync_client=True) as client:
            return client.create_flow_run_from_deployment(
                deployment_for(client, station),
                parameters={**parameters, "station": reference},
                idempotency_key=key,
                tags=tags,
            )

    return patiently(ask)


def await_end(run_id: UUID, go_on: Callable[[FlowRun], None] = lambda _: None) -> FlowRun:
    """The run once it has ended. `go_on` is called each second with how it stands, and may raise."""
    while True:
        run = patiently(lambda: _read(run_id))
        if run.state is not None and run.state.is_final():
            return run
        go_on(run)
        interruption.check()
        time.sleep(POLL_SECONDS)


def _read(run_id: UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id)
