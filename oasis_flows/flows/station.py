"""A station's loop: whatever train has arrived for it in its registry is let in, once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated

from prefect.logging import get_run_logger

from .. import documents
from ..blocks import Station
from ..documents import document_flow, patiently
from ..errors import DescriptionError
from ..plan import login_of
from ..registry_index import RegistryIndex
from ..train_deployments import ask_visit
from .parameters import OR_NAME


@document_flow(name="train-station")
def train_station(station: Annotated[Station, OR_NAME]) -> list[str]:
    """Look once for trains that were sent to a station, and ask for a visit of each that was not asked for before.

    A train is sent to a station by a tag that ends with station.<id>. Its visit is a run of the station's deployment; that
    run is the claim, and its state is what became of the visit. A schedule makes the loop.

    Args:
        station: The station.

    Returns:
        The trains that were found, each with its digest.

    Raises:
        DescriptionError: the station has no registry.
        RegistryUnavailable, ImageDenied: the registry does not answer, or not to this station.
    """
    here = patiently(lambda: documents.resolved(Station, station))
    if here.registry is None:
        raise DescriptionError(
            f"The station {here._block_document_name} has no `registry`, where trains would arrive. Write one into its document."
        )
    found = list(_arrived(here))
    for image in found:
        # The server makes one run of a key, whoever asks, and how often: so each train is claimed once.
        visit = ask_visit(
            here, {"image": image}, key=f"station-{here.station_id}:{image}", tags=[f"station-loop:{here.station_id}"]
        )
        get_run_logger().info("The train %s is let in by %s.", image, visit.name)
    return found


def _arrived(station: Station) -> Iterator[str]:
    """The trains for this station, by digest: the same bytes under two tags are one train."""
    index = RegistryIndex(str(station.registry), login_of(station.registry_credentials))
    wanted = re.compile(rf"(.*[-.])?station\.{station.station_id}")
    seen = set()
    for repository in index.repositories():
        if not repository.rpartition("/")[2].startswith("train_"):
            continue
        for tag in index.tags(repository):
            if wanted.fullmatch(tag):
                image = f"{repository}@{index.digest(repository, tag)}"
                if image not in seen:
                    seen.add(image)
                    yield image
