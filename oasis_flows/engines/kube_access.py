"""Where a cluster's API server is, and what opens it: from inside a pod, a kubeconfig file, or the content of one."""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from ..errors import DescriptionError, EngineError, EngineUnavailable

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
HOW_TO_GET_ACCESS = (
    "Run it in a pod, set KUBECONFIG, or name a `kubernetes-credentials` document in OASIS_FLOWS_KUBERNETES_CREDENTIALS."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """An API server. `headers` gives what each request bears: a token may be renewed meanwhile."""

    server: str
    tls: ssl.SSLContext | None
    headers: Callable[[], Mapping[str, str]]
    namespace: str = "default"
    proxy: str | None = None


def find_access() -> Access:
    """The cluster that `KUBECONFIG` names; else the one that this process runs in; else that of `~/.kube/config`.

    Raises:
        EngineUnavailable: there is none.
        DescriptionError: the file cannot be read.
    """
    if os.environ.get("KUBECONFIG"):
        return from_files([Path(part) for part in os.environ["KUBECONFIG"].split(os.pathsep) if part])
    if os.environ.get("KUBERNETES_SERVICE_HOST") and (SERVICE_ACCOUNT / "token").exists():
        return in_cluster()
    usual = Path("~/.kube/config").expanduser()
    if usual.exists():
        return from_files([usual])
    raise EngineUnavailable(f"No Kubernetes cluster is known here. {HOW_TO_GET_ACCESS}")


def in_cluster() -> Access:
    """The cluster of the pod that this process runs in, as its service account."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ.get("KUBERNETES_SERVICE_PORT", "443")

    def headers() -> Mapping[str, str]:
        # The kubelet renews the token within the hour.
        return {"Authorization": f"Bearer {(SERVICE_ACCOUNT / 'token').read_text().strip()}"}

    namespace = SERVICE_ACCOUNT / "namespace"
    return Access(
        server=f"https://{f'[{host}]' if ':' in host else host}:{port}",
        tls=_trusting(cafile=str(SERVICE_ACCOUNT / "ca.crt")),
        headers=headers,
        namespace=namespace.read_text().strip() if namespace.exists() else "default",
    )


def from_files(paths: list[Path]) -> Access:
    """The current context of kubeconfig files; of a name that is in several the first counts, as with kubectl.

    Raises:
        DescriptionError: one cannot be read, or they have no usable context.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        if not path.exists():
            continue
        try:
            content = yaml.safe_load(path.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise DescriptionError(
                f"The kubeconfig {path} cannot be read. Correct it, or KUBECONFIG. The cause: {error}"
            ) from error
        merged.setdefault("current-context", content.get("current-context") or None)
        merged["current-context"] = merged["current-context"] or content.get("current-context")
        for kind in ("clusters", "users", "contexts"):
            known = {row["name"] for row in merged.setdefault(kind, [])}
            merged[kind] += [_located(row, path.parent) for row in content.get(kind) or () if row["name"] not in known]
    if not merged:
        raise DescriptionError(f"There is no kubeconfig at {os.pathsep.join(map(str, paths))}. Correct KUBECONFIG.")
    return from_content(merged)


def _located(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A row whose files have whole paths: they are relative to their kubeconfig."""
    found = dict(row)
    for kind, keys in (
        ("cluster", ("certificate-authority",)),
        ("user", ("client-certificate", "client-key", "tokenFile")),
    ):
        if kind in found and isinstance(found[kind], dict):
            found[kind] = {key: str(folder / value) if key in keys and value else value for key, value in found[kind].items()}
    return found


def from_content(config: Mapping[str, Any], context: str | None = None) -> Access:
    """A context of a kubeconfig's content, such as a `kubernetes-cluster-config` document holds; else its current one.

    Raises:
        DescriptionError: it has no such context, or one that cannot be used.
    """
    name = context or config.get("current-context")
    try:
        chosen = _named(config, "contexts", str(name))["context"]
        cluster = _named(config, "clusters", chosen["cluster"])["cluster"]
        user = _named(config, "users", chosen["user"])["user"] if chosen.get("user") else {}
        server = str(cluster["server"])
    except (KeyError, TypeError) as error:
        raise DescriptionError(
            f"The kubeconfig has no whole context {name!r}: {error} is missing. Choose one (kubectl config use-context NAME)."
        ) from error
    login = _Login(user or {})
    return Access(
        server=server.rstrip("/"),
        tls=_tls(cluster, login) if server.startswith("https") else None,
        headers=login.headers,
        namespace=chosen.get("namespace") or "default",
        proxy=cluster.get("proxy-url"),
    )


def _named(config: Mapping[str, Any], kind: str, name: str) -> Mapping[str, Any]:
    for row in config.get(kind) or ():
        if row["name"] == name:
            return row  # type: ignore[no-any-return]
    raise KeyError(f"{kind}: {name}")


class _Login:
    """What a kubeconfig's user shows: a token, a certificate, or what a program of the cloud's says."""

    def __init__(self, user: Mapping[str, Any]) -> None:
        self._user = user
        self._lock = threading.Lock()
        self._told: Mapping[str, Any] = {}
        self._until = datetime.min.replace(tzinfo=UTC)

    def headers(self) -> Mapping[str, str]:
        """What each request bears."""
        user = self._user
        token = user.get("token")
        if user.get("tokenFile"):
            token = Path(user["tokenFile"]).read_text().strip()
        if "exec" in user:
            token = self.told().get("token")
        if token:
            return {"Authorization": f"Bearer {token}"}
        if user.get("username"):
            both = f"{user['username']}:{user.get('password', '')}".encode()
            return {"Authorization": f"Basic {base64.b64encode(both).decode()}"}
        return {}

    def certificate(self) -> tuple[bytes, bytes] | None:
        """Certificate and key, where it has any."""
        user = self._user
        if "exec" in user and self.told().get("clientCertificateData"):
            told = self.told()
            return told["clientCertificateData"].encode(), told["clientKeyData"].encode()
        cert, key = _content(user, "client-certificate"), _content(user, "client-key")
        return (cert, key) if cert and key else None

    def told(self) -> Mapping[str, Any]:
        """What the program that the kubeconfig names says, asked anew when it runs out.

        https://kubernetes.io/docs/reference/access-authn-authz/authentication/#client-go-credential-plugins
        """
        with self._lock:
            if datetime.now(UTC) < self._until:
                return self._told
            program = self._user["exec"]
            argv = [program["command"], *(program.get("args") or ())]
            question = {"apiVersion": program.get("apiVersion"), "kind": "ExecCredential", "spec": {"interactive": False}}
            extra = {row["name"]: row["value"] for row in program.get("env") or ()}
            environment = {**os.environ, **extra, "KUBERNETES_EXEC_INFO": json.dumps(question)}
            try:
                done = subprocess.run(argv, env=environment, check=True, capture_output=True, timeout=60)
                self._told = json.loads(done.stdout)["status"]
            except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
                words = getattr(error, "stderr", b"") or b""
                raise EngineError(
                    f"The program {argv[0]!r}, which the kubeconfig names for logging in, failed. Log in by hand and look. "
                    f"The cause: {error} {words.decode(errors='replace')[-500:]}"
                ) from error
            ends = self._told.get("expirationTimestamp")
            soon = datetime.now(UTC) + timedelta(minutes=10)
            self._until = datetime.fromisoformat(ends) - timedelta(seconds=30) if ends else soon
            return self._told


def _content(row: Mapping[str, Any], key: str) -> bytes | None:
    if row.get(f"{key}-data"):
        return base64.b64decode(row[f"{key}-data"])
    return Path(row[key]).read_bytes() if row.get(key) else None


def _trusting(**authority: str | None) -> ssl.SSLContext:
    """What trusts these certificates, or those that the machine trusts; see `ssl.create_default_context`.

    Python 3.13 and later refuse, as RFC 5280 says, an authority without extensions that those of older clusters lack (Amazon's from before
    Kubernetes 1.17). kubectl takes them, and checks chain, name and time as this does.
    """
    context = ssl.create_default_context(**authority)  # type: ignore[arg-type]
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _tls(cluster: Mapping[str, Any], login: _Login) -> ssl.SSLContext:
    try:
        authority = _content(cluster, "certificate-authority")
        context = _trusting(cadata=authority.decode() if authority else None)
        if cluster.get("insecure-skip-tls-verify"):
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if pair := login.certificate():
            with _file(b"\n".join(pair)) as path:
                context.load_cert_chain(path)
    except (OSError, ValueError, TypeError) as error:
        raise DescriptionError(
            f"The certificates of the kubeconfig cannot be used. Correct it. The cause: {type(error).__name__}: {error}"
        ) from error
    return context


@contextmanager
def _file(content: bytes) -> Iterator[str]:
    """A file with this content, for this user alone: OpenSSL takes keys from files only."""
    with tempfile.NamedTemporaryFile(prefix="oasis-flows-") as file:
        file.write(content)
        file.flush()
        yield file.name
