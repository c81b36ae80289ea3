"""What a registry has, by the API that every registry speaks (https://github.com/opencontainers/distribution-spec)."""

from __future__ import annotations

import base64
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from typing import cast

from .errors import ImageDenied, RegistryUnavailable
from .job import RegistryLogin

_MANIFESTS = ", ".join(
    (
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)
_SECONDS = 30.0


class RegistryIndex:
    """The repositories and tags below a place such as `registry.example.org/trains`.

    Registries on this machine are spoken to without TLS, as engines do it.

    Raises, from every method:
        RegistryUnavailable: it did not answer.
        ImageDenied: it refuses the login, or any without.
    """

    def __init__(self, place: str, login: RegistryLogin | None) -> None:
        self._host, _, self._folder = place.partition("/")
        self._login = login

    def repositories(self) -> Iterator[str]:
        """Their names, as `docker pull` wants them, without tags."""
        path = "/v2/_catalog?n=200"
        while path:
            answer, path = self._page(path)
            for name in answer.get("repositories") or ():
                if not self._folder or name.startswith(f"{self._folder}/"):
                    yield f"{self._host}/{name}"

    def tags(self, repository: str) -> Iterator[str]:
        """The tags of a repository."""
        path = f"/v2/{repository.partition('/')[2]}/tags/list?n=200"
        while path:
            answer, path = self._page(path)
            yield from answer.get("tags") or ()

    def digest(self, repository: str, tag: str) -> str:
        """The digest that a tag stands for now."""
        path = f"/v2/{repository.partition('/')[2]}/manifests/{tag}"
        with self._ask(path, method="HEAD", accept=_MANIFESTS) as answer:
            return str(answer.headers["Docker-Content-Digest"])

    def _page(self, path: str) -> tuple[dict[str, list[str]], str]:
        with self._ask(path) as answer:
            more = re.search(r"<([^>]+)>;\s*rel=\"?next", answer.headers.get("Link") or "")
            return json.loads(answer.read() or b"{}"), more[1] if more else ""

    def _ask(self, path: str, *, method: str = "GET", accept: str = "application/json") -> HTTPResponse:
        name = self._host.partition(":")[0]
        scheme = "http" if name == "localhost" or name.startswith("127.") else "https"
        headers = {"Accept": accept}
        if self._login is not None:
            pair = f"{self._login.username}:{self._login.password}".encode()
            headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        request = urllib.request.Request(f"{scheme}://{self._host}{path}", headers=headers, method=method)  # noqa: S310  # http(s) only
        try:
            return cast(HTTPResponse, urllib.request.urlopen(request, timeout=_SECONDS))  # noqa: S310
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise ImageDenied(
                    f"The registry {self._host} does not let the station look for trains. Correct `registry_credentials` of the Station "
                    f"document. It said: {error.code} {error.reason}"
                ) from None
            raise self._away(error) from None
        except (OSError, HTTPException) as error:
            raise self._away(error) from None

    def _away(self, error: Exception) -> RegistryUnavailable:
        return RegistryUnavailable(
            f"The registry {self._host} did not say what trains it has. Check its name and the network. The cause: {error}"
        )
