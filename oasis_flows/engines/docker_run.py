"""One container from its creation to its removal."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from .. import interruption, lease
from ..errors import ContainerLost, DescriptionError, EngineError, EngineUnavailable, ImageNotFound, NoGpu, UnsupportedByEngine
from ..job import ContainerExit, ContainerJob, LogSink, Reason
from . import docker_spec as spec
from .docker_errors import HOW_TO_GET_A_GPU, start_error, translated, words_of
from .docker_output import Delivery, Pump
from .docker_usage import UsageWatch
from .docker_verdict import Evidence, container_exit, parse_time
from .quota import Passed, Watch
from .shield import shielded
from .usage import Usage

if TYPE_CHECKING:
    from docker.errors import APIError

logger = logging.getLogger(__name__)

# A process in an uninterruptible sleep outlives SIGKILL; somebody has to say so in the end.
_SECONDS_TO_DIE = 60.0


@dataclass(frozen=True, slots=True)
class Container:
    """A container of a run: made and not started yet, or found running or ended."""

    id: str
    state: Mapping[str, Any]
    in_force: Mapping[str, object]

    @property
    def fresh(self) -> bool:
        """Was it made by this call?"""
        return bool(self.state["Status"] == "created")


def find_container(api: Any, job: ContainerJob) -> Container | None:
    """The container that an earlier call for this run left behind and that can still tell its end; others are removed.

    What was ended by the engine's own end, or the machine's, is no answer, whatever its exit code.
    """
    found: Container | None = None
    rows = list_containers(api, job.run_id)
    # Most runs find nothing, and the engine takes its time to tell about itself.
    info: Mapping[str, Any] = api.info() if rows else {}
    for row in rows:
        with contextlib.suppress(_not_found()):
            seen = api.inspect_container(row["Id"])
            state = seen["State"]
            same = seen["Config"]["Labels"].get(spec.JOB) == spec.job_digest(job)
            told = state["Status"] == "exited" and (state.get("OOMKilled") or state["ExitCode"] not in (137, 143, 255))
            told = told and _saw(api, row["Id"], "die", info)
            if found is None and same and (told or state["Status"] == "running"):
                found = Container(row["Id"], state, spec.in_force(seen, info))
                continue
        remove_container(api, row["Id"])
    return found


def _saw(api: Any, container: str, event: str, info: Mapping[str, Any]) -> bool:
    """Was the engine there, and not on its way out, when the container began (`start`) or ended (`die`)? One that was not has no event of it.

    A program may end with 0 on the SIGTERM that the engine sends to all containers when it is stopped, half-way through its work.
    An engine remembers the last 256 events of all containers, none from before it began. Podman's containers outlive its service.

    Raises:
        EngineError: it does not answer.
    """
    with translated("asking for the events of a container"):
        answer = api.get(f"{api.base_url}/_ping", timeout=api.timeout)
        answer.raise_for_status()
        if spec.is_podman(info):
            return True
        # Until a little later than now, by the engine's clock: an event that is there already comes at once, and one of an end
        # comes seconds behind that end where the machine is busy.
        date = answer.headers.get("Date")
        until = int(parsedate_to_datetime(date).timestamp() if date else time.time()) + 4
        events = api.events(since=1, until=until, filters={"container": [container], "event": [event]}, decode=True)
        try:
            return next(iter(events), None) is not None
        finally:
            events.close()


def create_container(api: Any, job: ContainerJob, info: Mapping[str, Any]) -> Container | ContainerExit:
    """Make the container, and look at what the engine made of it.

    Raises:
        UnsupportedByEngine: the engine made it looser than asked. The caller removes it.
    """
    import docker.errors

    name = spec.container_name(job)
    try:
        image = api.inspect_image(job.image)
        if job.wrapper is not None:
            spec.refuse_wrapped(job, image)
        _refuse_missing_volumes(api, job)
        body = spec.create_body(job, info, image)
        answer = shielded(lambda: api.create_container_from_config(body, name))
        seen = api.inspect_container(answer["Id"])
    except docker.errors.ImageNotFound as error:
        raise ImageNotFound(
            f"The image {job.image} is no longer in the engine. Somebody removed it after it was prepared; run it again."
        ) from error
    except docker.errors.APIError as error:
        return not_started(job, start_error(name, words_of(error), status=error.status_code), words_of(error), {})
    spec.refuse_warnings(name, answer.get("Warnings"))
    if job.wrapper is not None and _lacks(api, answer["Id"], job.wrapper.argv[0]):
        raise DescriptionError(
            f"The image of {name} has no {job.wrapper.argv[0]}, and the algorithm's prerequisites are shell commands. Nothing was "
            "started. Take an image with a shell, or put into the image what the prerequisites do."
        )
    force = spec.in_force(seen, info)
    looser = spec.looser_than_asked(job, force, info)
    if looser:
        raise UnsupportedByEngine(
            f"The engine made {name} looser than asked: {', '.join(looser)}. "
            "It was removed before it started; use another engine."
        )
    if job.resources.gpus and not force["gpus"]:
        raise NoGpu(f"The engine ignores the wish for a GPU of {name}. {HOW_TO_GET_A_GPU}")
    return Container(answer["Id"], seen["State"], force)


def _refuse_missing_volumes(api: Any, job: ContainerJob) -> None:
    """Return if the volumes are there: the engine would make an empty one for each that is not."""
    for mount in job.storages:
        if not mount.source.startswith("/"):
            try:
                api.inspect_volume(mount.source)
            except _not_found():
                raise DescriptionError(
                    f"The engine has no volume {mount.source!r}, which is to be mounted at {mount.target}. Make it "
                    f"(docker volume create {mount.source}), or correct the setting OASIS_FLOWS_STORAGES."
                ) from None


def _lacks(api: Any, container: str, path: str) -> bool:
    """Is there certainly no such file in a container that was made?"""
    answer = api.head(
        f"{api.base_url}/v{api.api_version}/containers/{container}/archive", params={"path": path}, timeout=api.timeout
    )
    return bool(answer.status_code == 404)


def not_started(job: ContainerJob, meaning: Exception | Reason, words: str, force: Mapping[str, object]) -> ContainerExit:
    """The result for a command that the engine itself could not start; an error is raised."""
    if isinstance(meaning, Exception):
        raise meaning
    code = 127 if meaning is Reason.COMMAND_NOT_FOUND else 126
    limit = job.resources.memory_bytes
    return ContainerExit(reason=meaning, exit_code=code, detail=words, in_force=force, memory_limit_bytes=limit)


class Supervision:
    """Watches one container: feeds the log, renews the lease, keeps the time, and says how it ended."""

    def __init__(
        self,
        api: Any,
        job: ContainerJob,
        container: Container,
        log: LogSink,
        patience_seconds: float,
        info: Mapping[str, Any],
    ) -> None:
        self._api, self._job, self._container, self._info = api, job, container, info
        self._delivery = Delivery(log, job.resources.log_bytes)
        self._patience = patience_seconds
        self._stopped_at_timeout = False
        self._passed: Passed | None = None

    def run(self) -> ContainerExit:
        """Start the container if it is fresh, and stay with it to its end. Whatever is raised, it is being stopped."""
        import docker.errors

        try:
            attached = self._attach() if self._container.fresh else None
        except docker.errors.APIError as error:
            # Podman looks for the container's user now, and not when it makes or starts it.
            return self._not_started(error)
        pump = Pump(self._api, self._container.id, self._delivery, attached, self._patience)
        quota, watch = Watch(self._job), UsageWatch(self._api, self._container.id)
        try:
            if self._container.fresh:
                try:
                    self._api.start(self._container.id)
                except docker.errors.APIError as error:
                    return self._not_started(error)
            pump.start()
            with quota:
                return self._watch(pump, quota, watch)
        finally:
            if pump.ident is not None and not pump.done.is_set():
                self._stop(pump)
            if attached is not None:
                attached.close()

    def _not_started(self, error: APIError) -> ContainerExit:
        words = words_of(error)
        meaning = start_error(spec.container_name(self._job), words, status=error.status_code)
        return not_started(self._job, meaning, words, self._container.in_force)

    def _attach(self) -> Any:
        wanted = {"stdout": 1, "stderr": 1, "stream": 1}
        answer = self._api.attach_socket(self._container.id, params=wanted)
        # The answer is a SocketIO over the socket of a Unix domain or TCP connection; TLS hands the socket itself.
        attached = getattr(answer, "_sock", answer)
        attached.settimeout(None)
        return attached

    def _watch(self, pump: Pump, quota: Watch, watch: UsageWatch) -> ContainerExit:
        state = self._api.inspect_container(self._container.id)["State"]
        watch.begin(state)
        clock = _Clock(self._job, state)
        pause, renewed = 0.02, 0.0
        while not pump.done.is_set():
            # Its cgroup outlives its output by a few hundredths of a second: that is when most can be read there.
            pause = 0.02 if pump.news.wait(pause) else min(pause * 1.5, 0.2)
            pump.news.clear()
            interruption.check()
            watch.sample()
            if time.monotonic() - renewed >= 1.0:
                renewed = time.monotonic()
                with contextlib.suppress(FileNotFoundError):
                    lease.renew(self._job.lease)
            if self._note_passed(quota.passed):
                clock.stop_now()
            if self._job.wrapper is not None and self._job.wrapper.ended.exists():
                clock.linger(self._job.wrapper.linger_seconds)
            if signal_name := clock.due():
                self._stopped_at_timeout |= self._passed is None and not clock.lingers
                self._kill(signal_name)
        usage = watch.result()
        if pump.failure is None and not self._stopped_at_timeout:
            self._note_passed(quota.at_end())
        return self._verdict(pump, usage, watch.killed_unseen())

    def _note_passed(self, output: Passed | None) -> bool:
        """Was a limit of log or output passed that had not been yet? The first one counts."""
        limit, first = self._job.resources.log_bytes, self._passed is None
        if first and self._delivery.overflowed and limit is not None:
            self._passed = Passed(Reason.LOG_TOO_LARGE, limit)
        self._passed = self._passed or output
        return first and self._passed is not None

    def _verdict(self, pump: Pump, usage: Usage, killed_unseen: bool) -> ContainerExit:
        if pump.failure is not None:
            raise pump.failure
        ours = self._stopped_at_timeout or self._passed is not None
        killed = pump.state["ExitCode"] == 137 and not ours
        usage.killed_for_memory |= killed and killed_unseen
        state = self._with_late_news(pump.state, usage, killed)
        died = state["ExitCode"] in (137, 143, 255) and not state.get("OOMKilled")
        if not ours and ((pump.outages and died) or not self._saw_the_end()):
            raise ContainerLost(
                f"The engine went away while {spec.container_name(self._job)} ran, and stopped it (exit code "
                f"{state['ExitCode']}). Run it again. {state.get('Error', '')}".strip()
            )
        evidence = Evidence(
            state=state,
            in_force=self._container.in_force,
            usage=usage,
            stopped_at_timeout=self._stopped_at_timeout,
            passed=self._passed,
            stdout_bytes=self._delivery.bytes["stdout"],
            stderr_bytes=self._delivery.bytes["stderr"],
            stderr_head=self._delivery.stderr_head,
            log_lost=self._log_lost(pump),
        )
        return container_exit(self._job, evidence)

    def _with_late_news(self, state: Mapping[str, Any], usage: Usage, killed: bool) -> Mapping[str, Any]:
        """The state, waited for a little where memory may have run out and the engine may only learn of a kill now."""
        near = killed or (usage.memory_peak_bytes or 0) >= 0.9 * self._job.resources.memory_bytes
        until = time.monotonic() + 0.5
        while near and not usage.killed_for_memory and not state.get("OOMKilled") and time.monotonic() < until:
            time.sleep(0.05)
            try:
                with translated("asking for the state of a container"):
                    state = self._api.inspect_container(self._container.id)["State"]
            except EngineError:
                break
        return state

    def _saw_the_end(self) -> bool:
        """Did the engine see the container end, and does it take new connections?

        One that is told to stop refuses them first, then stops its containers, and still answers on old connections
        how they ended: an end that is then no word of the algorithm.
        """
        self._api.close()
        try:
            return _saw(self._api, self._container.id, "die", self._info)
        except EngineError:
            return False

    def _log_lost(self, pump: Pump) -> str:
        """An engine that is killed loses what it has read of a container's output and not written down; a way to it that breaks loses nothing."""
        if not pump.read_back:
            return ""
        try:
            if _saw(self._api, self._container.id, "start", self._info):
                return ""
        except EngineError as error:
            logger.debug("Whether it is the same engine could not be asked: %s", error)
        return "the engine may have been started anew while the algorithm ran, and loses what was written just before"

    def _kill(self, signal_name: str) -> None:
        """Send a signal; one that is already gone, or an engine that is away, is for the pump to tell."""
        try:
            with translated("stopping a container"):
                self._api.kill(self._container.id, signal=signal_name)
        except EngineError as error:
            logger.debug("Could not send %s to %s: %s", signal_name, self._container.id[:12], error)

    def _stop(self, pump: Pump) -> None:
        """SIGTERM, and time to react; the end of it is the removal. The log of that time still reaches the sink."""
        try:
            shielded(lambda: self._kill("SIGTERM"))
            pump.done.wait(self._job.stop_grace_seconds)
        finally:
            shielded(lambda: self._kill("SIGKILL"))
            pump.join(2.0)


class _Clock:
    """Says which signal is due: SIGTERM at the time limit, SIGKILL a grace later; SIGKILL at once after `stop_now`."""

    def __init__(self, job: ContainerJob, state: Mapping[str, Any]) -> None:
        started = parse_time(state.get("StartedAt", ""))
        passed = (datetime.now(UTC) - started).total_seconds() if started else 0.0
        self._grace = job.stop_grace_seconds
        self._name = job.run_id
        self.lingers, self._stopping = False, False
        self._next: list[tuple[float, str]] = []
        if job.timeout_seconds is not None:
            end = time.monotonic() + job.timeout_seconds - max(passed, 0.0)
            self._next = [(end, "SIGTERM"), (end + self._grace, "SIGKILL"), (end + self._grace + _SECONDS_TO_DIE, "")]

    def linger(self, seconds: float) -> None:
        """The time limit was kept; from now on there are so many seconds left. Of no effect once a signal was sent."""
        if self.lingers or self._stopping:
            return
        self.lingers = True
        end = time.monotonic() + seconds
        self._next = [(end, "SIGTERM"), (end + self._grace, "SIGKILL"), (end + self._grace + _SECONDS_TO_DIE, "")]

    def stop_now(self) -> None:
        """From now on it has to die: what passed a limit would go on passing it in its grace."""
        now, self._stopping = time.monotonic(), True
        # Again and again, for the engine may be away for a moment.
        self._next = [*((now + after, "SIGKILL") for after in (0, 1, 5, 20)), (now + _SECONDS_TO_DIE, "")]

    def due(self) -> str:
        """The signal to send now, or nothing."""
        if not self._next or time.monotonic() < self._next[0][0]:
            return ""
        _, name = self._next.pop(0)
        self._stopping = True
        if not name:
            raise EngineError(
                f"The container of run {self._name} does not die. A process in it hangs in the kernel (a network file "
                "system, a GPU driver); look at the engine's machine."
            )
        return name


def list_containers(api: Any, run_id: str | None = None, *, with_parts: bool = False) -> list[dict[str, Any]]:
    """This package's containers, newest first; one run's, perhaps with those of its parts, or all."""
    exactly = [] if run_id is None or with_parts else [f"{spec.RUN_ID}={run_id}"]
    rows: list[dict[str, Any]] = api.containers(all=True, filters={"label": [f"{spec.PACKAGE}={spec.PACKAGE_NAME}", *exactly]})
    return [row for row in rows if run_id is None or _is_of(row, run_id, with_parts)]


def _is_of(row: Mapping[str, Any], run_id: str, with_parts: bool) -> bool:
    found = str(row["Labels"].get(spec.RUN_ID))
    return found == run_id or (with_parts and found.startswith(f"{run_id}."))


def inspect_running(api: Any, without: Collection[str]) -> Iterator[dict[str, Any]]:
    """All containers that run on the engine, whoever started them, but those of the runs `without` and of their parts."""
    for row in api.containers():
        if not any(_is_of(row, run_id, with_parts=True) for run_id in without):
            # It may have ended since.
            with contextlib.suppress(_not_found()):
                yield api.inspect_container(row["Id"])


def stop_run(api: Any, run_id: str, seconds: float) -> None:
    """Send SIGTERM to the containers of a run and of its parts, and return when all have ended, or after so many seconds."""
    import docker.errors

    def running() -> list[str]:
        return [row["Id"] for row in list_containers(api, run_id, with_parts=True) if row["State"] == "running"]

    until = time.monotonic() + seconds
    for container in running():
        with contextlib.suppress(docker.errors.APIError):  # it has ended by itself
            api.kill(container, signal="SIGTERM")
    while running() and time.monotonic() < until:
        time.sleep(0.1)


def remove_container(api: Any, container: str) -> None:
    """Remove a container, running or not, with its anonymous volumes; return when it is gone."""
    import docker.errors

    for pause in (0.1, 0.2, 0.4, 0.8, 1.6, None):
        try:
            api.remove_container(container, force=True, v=True)
        except docker.errors.NotFound:
            return
        except docker.errors.APIError:
            # 409: somebody else removes it already; 500: a mount is still busy.
            if pause is None:
                raise
            time.sleep(pause)
        else:
            return


def remove_run(api: Any, job: ContainerJob) -> None:
    """Remove what is left of a run; when the engine is away, its lease says later that nobody owns it."""

    def remove() -> None:
        for row in list_containers(api, job.run_id):
            remove_container(api, row["Id"])

    try:
        with translated("removing a container"):
            shielded(remove)
    except EngineUnavailable as error:
        logger.warning("The container of run %s may be left behind, for the reaper to remove: %s", job.run_id, error)


def _not_found() -> type[Exception]:
    import docker.errors

    return docker.errors.NotFound  # type: ignore[no-any-return]
