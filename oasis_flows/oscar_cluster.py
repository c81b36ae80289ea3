"""Asks an OSCAR cluster about a service, by its REST API."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import quote

from .errors import DescriptionError, OasisError
from .oscar import Config

PATIENCE_SECONDS = 30.0


def ask_service(config: Config) -> dict[str, Any]:
    """What the cluster says of the configuration's service: `cpu` and `memory` among the rest. Certificates are verified.

    Raises:
        DescriptionError: no cluster is named, it has no such service, or it refuses the login.
        OasisError: it does not answer, or not in JSON.
    """
    if not config.cluster_url:
        raise DescriptionError(
            "The OSCAR-Batch configuration names no cluster that could be asked about the service. Give --service-cpus and --service-memory."
        )
    where = f"{config.cluster_url}/system/services/{quote(config.service, safe='')}"
    # OSCAR-Batch takes the basic login if it is there, and else the token.
    login = base64.b64encode(f"{config.username}:{config.password}".encode()).decode()
    authorization = f"Basic {login}" if config.username and config.password else f"Bearer {config.token}"
    request = urllib.request.Request(where, headers={"Authorization": authorization})  # noqa: S310 - the user's own address
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:  # noqa: S310
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise DescriptionError(
            f"OSCAR does not tell about the service {config.service!r}. Check service.name and the login in the configuration, or give "
            f"--service-cpus and --service-memory. It said: {error.code} {error.reason}"
        ) from None
    except (OSError, ValueError) as error:
        raise OasisError(
            f"The OSCAR cluster {config.cluster_url} does not answer. Check its address, or give --service-cpus and --service-memory. "
            f"The cause: {error}"
        ) from error
    if not isinstance(found, dict):
        raise OasisError(f"The OSCAR cluster {config.cluster_url} answered something else than a service. Check its address.")
    return found
