"""What the Docker engine's and its registries' words mean: pure classification, and the border that applies it.

An HTTP status says little here. A missing GPU driver, a refused password and a registry that is down are all 500, and a
missing program is 400. So the words decide, and what is worth another try is named one by one. Every pattern has the
captured sentence that it was made for in `tests/unit/test_docker_classify.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import (
    DescriptionError,
    EngineError,
    EngineUnavailable,
    ImageDenied,
    ImageNotFound,
    NoGpu,
    OasisError,
    RegistryUnavailable,
    UnsupportedByEngine,
)
from ..job import Reason

if TYPE_CHECKING:
    from docker.errors import APIError

HOW_TO_GET_AN_ENGINE = (
    "Start one (on Debian: apt-get install docker.io, then systemctl start docker), or set DOCKER_HOST to one that runs; "
    "the user needs the right to open its socket (group docker)."
)
HOW_TO_GET_A_GPU = (
    "Install NVIDIA's driver and the NVIDIA Container Toolkit on the engine's machine (nvidia-ctk runtime configure, then "
    "restart the engine), use a work pool whose workers have a GPU, or set `gpu` to false in the Algorithm document."
)
HOW_TO_DELEGATE = (
    "It runs rootless, and its machine hands cgroup controllers to root alone. Write the lines [Service] and "
    "Delegate=cpu cpuset io memory pids into /etc/systemd/system/user@.service.d/delegate.conf, and restart the machine."
)

_WRONG_PLATFORM = re.compile(
    r"no matching manifest for|no match for platform|does not match the (specified|host|detected) platform", re.IGNORECASE
)
_DENIED = re.compile(
    r"pull access denied|no basic auth credentials|unauthorized|authentication required|denied: |incorrect username or password"
    r"|status(?: code)?:? 40[13]\b|403 forbidden",
    re.IGNORECASE,
)
_NOT_FOUND = re.compile(
    r"manifest unknown|name unknown|not found: |no such image|repository .* not found|404 not found", re.IGNORECASE
)
_BAD_NAME = re.compile(
    r"invalid reference format|invalid checksum digest|invalid repository name|must be lowercase", re.IGNORECASE
)
_REGISTRY_AWAY = re.compile(
    r"dial (tcp|udp)|connection (refused|reset|timed out)|no such host|i/o timeout|context deadline exceeded|request canceled"
    r"|unexpected eof|: eof\b|tls handshake|toomanyrequests|too many requests|no route to host|network is unreachable"
    r"|server misbehaving|temporary failure in name resolution|50[0234] [a-z ]*(error|gateway|unavailable|time-?out)"
    r"|received unexpected http status: 5|broken pipe|use of closed network connection"
    r"|server closed idle connection|transport connection broken|connection lost",
    re.IGNORECASE,
)
_DISK_FULL = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)
_NO_GPU = re.compile(
    r"could not select device driver|nvidia-container-cli|unknown or invalid runtime name: nvidia|failed to inject cdi devices"
    r"|unresolvable cdi devices|no (known )?gpu vendor",
    re.IGNORECASE,
)
_EXEC_MISSING = re.compile(
    r"executable file not found|exec[^:]*: .*no such file or directory|stat .*: no such file or directory", re.IGNORECASE
)
_EXEC_DENIED = re.compile(r"exec[^:]*: .*(permission denied|is a directory)", re.IGNORECASE)
_EXEC_FORMAT = re.compile(r"exec format error", re.IGNORECASE)
_BAD_REQUEST = re.compile(
    r"unable to find (user|group)|no matching entries in (passwd|group) file|argument list too long|no command specified"
    r"|working directory .* is invalid|invalid (cpu|memory|cap|environment)|unknown capability|minimum memory limit",
    re.IGNORECASE,
)
_UNSUPPORTED = re.compile(
    r"not supported|range of cpus|no such plugin|unknown log driver|not compiled|seccomp.*not enabled", re.IGNORECASE
)
_NO_CONTROLLER = re.compile(
    r"cgroup controller \W?\w+\W? is not available|opening file \W?(cpu|memory|pids)\.max\W? for writing"
    r"|cannot (set|specify resource) limits without cgroups",
    re.IGNORECASE,
)
# docker-init is tini, Podman's is catatonit: they start the command, so it is they who find out that it is not there.
_INIT_FAILED = re.compile(
    rb"\[FATAL tini \(\d+\)\] exec [^\n]* failed: ([^\n]+)\n|ERROR \(catatonit:\d+\): failed to exec pid1: ([^\n]+)\n",
    re.DOTALL,
)


def pull_error(reference: str, words: str, *, with_login: bool) -> OasisError:
    """The error that an engine's answer to a pull stands for."""
    said = f" The engine said: {words}"
    if _BAD_NAME.search(words):
        return ImageNotFound(f"{reference!r} is not an image's name. Write it as registry/name:tag, in lower case.{said}")
    if _WRONG_PLATFORM.search(words):
        return UnsupportedByEngine(
            f"The image {reference} is not made for this engine's kind of machine. "
            f"Build it for that architecture, or use another worker.{said}"
        )
    if "repository does not exist or may require" in words:
        # The Docker Hub gives one answer for "no such image" and for "not yours".
        return ImageNotFound(f"There is no image {reference}, or it is private. {_advice(with_login)}{said}")
    if _DENIED.search(words):
        what = "these credentials" if with_login else "to hand it out without a login"
        return ImageDenied(f"The registry of {reference} refuses {what}. {login_advice(with_login=with_login)}{said}")
    if _NOT_FOUND.search(words):
        return ImageNotFound(f"There is no image {reference}. {_advice(with_login)}{said}")
    if _DISK_FULL.search(words):
        return EngineError(
            f"The engine's disk is full, and the image {reference} does not fit. Free some (docker system df).{said}"
        )
    if _REGISTRY_AWAY.search(words):
        return RegistryUnavailable(
            f"The registry of {reference} did not answer. Check its name and the network of the engine.{said}"
        )
    return EngineError(f"The engine could not pull the image {reference}. See the engine's own log.{said}")


def push_error(reference: str, words: str, *, with_login: bool) -> OasisError:
    """The error that an engine's answer to a push stands for."""
    said = f" The engine said: {words}"
    if _DENIED.search(words):
        what = "these credentials" if with_login else "to take it without a login"
        advice = (
            "Correct the user name, the password or the rights behind registry_credentials"
            if with_login
            else "Give registry_credentials"
        )
        return ImageDenied(f"The registry of {reference} refuses {what}. {advice} in the Station document.{said}")
    if _BAD_NAME.search(words):
        return ImageNotFound(
            f"{reference!r} is not a name that an image can have. Correct `registry` in the Station document.{said}"
        )
    if _REGISTRY_AWAY.search(words):
        return RegistryUnavailable(
            f"The registry of {reference} did not answer. Check its name and the network of the engine.{said}"
        )
    return EngineError(f"The engine could not push the image {reference}. See the engine's own log.{said}")


def _advice(with_login: bool) -> str:
    local = "Check its spelling; an image built on another machine must be pushed to a registry or given as image_file."
    return local if with_login else f"{local} A private one needs registry_credentials."


def login_advice(*, with_login: bool) -> str:
    """What to do about a registry that refuses to hand out an image."""
    if with_login:
        return "Correct the user name, the password or the rights behind registry_credentials."
    return "Give registry_credentials in the DockerImage document."


def start_error(container: str, words: str, *, status: int | None = None) -> OasisError | Reason:
    """What a refusal to create or start a container means: the way its command failed, or an error.

    A `Reason` is a result: the description names a program that this image cannot run.
    """
    said = f" The engine said: {words}"
    if _NO_GPU.search(words):
        return NoGpu(f"The engine has no GPU to give to {container}. {HOW_TO_GET_A_GPU}{said}")
    if "bind source path does not exist" in words:
        return EngineError(
            f"A folder to mount into {container} does not exist on the engine's machine. The worker and the engine must share "
            f"the folder of the workspaces; an engine elsewhere cannot see this machine's files.{said}"
        )
    if _NO_CONTROLLER.search(words):
        return UnsupportedByEngine(
            f"The engine cannot hold {container} to its limits, so it did not start. {HOW_TO_DELEGATE}{said}"
        )
    if _BAD_REQUEST.search(words):
        return DescriptionError(f"The engine refuses the description of {container}. Correct the Algorithm document.{said}")
    for pattern, reason in (
        (_EXEC_FORMAT, Reason.EXEC_FORMAT),
        (_EXEC_DENIED, Reason.NOT_EXECUTABLE),
        (_EXEC_MISSING, Reason.COMMAND_NOT_FOUND),
    ):
        if pattern.search(words):
            return reason
    if _DISK_FULL.search(words):
        return EngineError(f"The engine's disk is full, and {container} cannot be made. Free some (docker system df).{said}")
    if _UNSUPPORTED.search(words):
        return UnsupportedByEngine(f"The engine cannot do what {container} asks for. Loosen it, or use another engine.{said}")
    return EngineError(f"The engine could not start {container} (HTTP {status}). See the engine's own log.{said}")


def init_failure(exit_code: int, stdout_bytes: int, stderr_head: bytes, stderr_bytes: int) -> tuple[Reason, str] | None:
    """How the command failed to start, if all that the container wrote is its init process saying so.

    An algorithm that starts a missing program itself, and ends with 127, writes other words and is not meant.
    """
    if stdout_bytes == 0 and exit_code in (2, 126, 127) and b"\x7fELF" in stderr_head[:256]:
        # tini's execvp hands a file of an unknown format to /bin/sh, which reads the program as a script.
        return Reason.EXEC_FORMAT, "the shell was given a program of another architecture to read"
    found = _INIT_FAILED.fullmatch(stderr_head)
    # catatonit ends with 1, whatever it was.
    if stdout_bytes or stderr_bytes != len(stderr_head) or not found or exit_code not in ((126, 127) if found[1] else (1,)):
        return None
    words = (found[1] or found[2]).decode("utf-8", "replace")
    detail = stderr_head.decode("utf-8", "replace").strip()
    if "Exec format" in words or "exec format" in words:
        return Reason.EXEC_FORMAT, detail
    return (Reason.NOT_EXECUTABLE if "ermission denied" in words else Reason.COMMAND_NOT_FOUND), detail


def is_gone(error: APIError) -> bool:
    """Does the refusal say that the container is not there? Podman answers 500 about one that is just being removed."""
    return error.status_code == 404 or "no such container" in words_of(error)


def words_of(error: BaseException) -> str:
    """The engine's own words in an exception of the SDK: its explanation where there is one."""
    return str(getattr(error, "explanation", None) or error).strip()


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Let no exception of the SDK, of requests or of urllib3 out: each becomes one of `oasis_flows.errors`.

    `doing` completes the sentence "The engine failed while …".
    """
    import docker.errors
    import requests
    import urllib3

    try:
        yield
    except OasisError:
        raise
    except docker.errors.APIError as error:
        raise EngineError(f"The engine failed while {doing}. See the engine's own log. It said: {words_of(error)}") from error
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
        raise unavailable(doing, error) from error
    except (docker.errors.DockerException, docker.errors.StreamParseError) as error:
        if "Error while fetching server API version" in str(error):
            raise unavailable(doing, error) from error
        raise EngineError(f"The engine's answer while {doing} makes no sense. It said: {words_of(error)}") from error


def unavailable(doing: str, error: BaseException) -> EngineUnavailable:
    """The error for an engine that did not answer."""
    return EngineUnavailable(
        f"The container engine did not answer while {doing}. {HOW_TO_GET_AN_ENGINE} The cause: {words_of(error)}"
    )
