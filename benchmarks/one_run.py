"""One run of a container that does nothing, in a warm process: what it costs beyond the container, and where that goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS, warm
from benchmarks.surroundings import IMAGE, container, make_files, program, run
from benchmarks.table import Row, difference, in_turns, said
from oasis_flows import lifecycle, store, tasks
from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage
from oasis_flows.flows import algorithm_task as module
from oasis_flows.flows.algorithm_task import algorithm_task

# What is timed, and by which name it is called.
STAGES: dict[str, tuple[Any, str]] = {
    "looking for what dead runs left": (lifecycle, "_sweep"),
    "deciding": (module, "plan_run"),
    "tags and labels": (module, "announce"),
    "`prepare_image`": (tasks.prepare_image, "fn"),
    "`stage_input`": (tasks.stage_input, "fn"),
    "`run_container`": (tasks.run_container, "fn"),
    "`publish_output`: the files": (store, "publish"),
    "`publish_output`: the Dataset document": (tasks, "save_document"),
    "the run's page": (module, "succeeded"),
}


def rows(folder: Path, *, quick: bool) -> Iterator[Row]:
    """The row of the mark, the breakdown below it, and peers."""
    algorithm = Algorithm(docker_image=DockerImage(image_id=IMAGE), command="true")
    dataset = Dataset(url=str(make_files(folder / "in", 1, 1)))
    DatasetStore(url=str(folder / "out")).save("benchmark", overwrite=True)
    target = DatasetStore.load("benchmark")

    def ours() -> None:
        algorithm_task(algorithm, dataset, store=target)

    with ExitStack() as around:
        peers = {} if quick else {**dict(_cwltool(folder)), **around.enter_context(warm(folder / "peers"))}
        names = ["`docker run` with the same limits", *peers]
        stages = around.enter_context(_stages())
        found = in_turns(5 if quick else 15, ours, lambda: run(*container("true")), prefects_own(), *peers.values(), warm_up=2)
    whole, bare, prefect, *others = found
    extra = difference(whole, bare)
    yield Row(
        what="one `algorithm_task` on a local dataset, warm process, container `true`",
        ours=str(whole),
        beside=names[0],
        theirs=str(bare),
        figure=f"{said(extra)} more",
        mark="≤ 350 ms more",
        reached=extra <= 0.35,
    )
    for name, seconds in stages.items():
        yield _part(name, statistics.median(seconds[-len(whole.seconds) :]))
    steps = zip(*(seconds[-len(whole.seconds) :] for seconds in stages.values()), strict=True)
    rest = [all - sum(parts) for all, parts in zip(whole.seconds, steps, strict=True)]
    yield _part("all else: Prefect's flow run and task runs, the watchdog, the workspace", statistics.median(rest))
    yield Row(
        what="Prefect's own: a flow with four tasks that do nothing", ours="", beside="Prefect", theirs=str(prefect), figure=""
    )
    for name, series in zip(names[1:], others, strict=True):
        yield Row(
            what=f"peer: {name}, the same container",
            ours="",
            beside=name,
            theirs=str(series),
            figure=f"{said(difference(series, bare))} more than `docker run`",
        )
    for name in sorted({"cwltool", *PEERS} - set(peers)):
        why = "not by `--quick`" if quick else "it is not on the PATH, nor in BENCH_PATH"
        yield Row(what=f"peer: {name}", ours="", figure=f"not measured: {why}")


def prefects_own() -> Callable[[], object]:
    """A flow with as many tasks as ours has, which do nothing, without the heartbeat that a call of ours does not have either."""
    from prefect import task
    from prefect.cache_policies import NO_CACHE

    from oasis_flows.documents import document_flow

    @task(cache_policy=NO_CACHE, persist_result=False)
    def nothing() -> None:
        pass

    @document_flow(name="four-times-nothing")
    def four() -> None:
        for _ in range(4):
            nothing()

    return four


@contextmanager
def _stages() -> Iterator[dict[str, list[float]]]:
    """Take the time of each stage, run by run."""
    found: dict[str, list[float]] = {name: [] for name in STAGES}
    with ExitStack() as patches:
        for name, (owner, attribute) in STAGES.items():
            function = getattr(owner, attribute)
            patches.callback(setattr, owner, attribute, function)
            setattr(owner, attribute, _timed(function, found[name]))
        yield found


def _timed(function: Callable[..., object], seconds: list[float]) -> Callable[..., object]:
    @wraps(function)
    def timed(*args: object, **options: object) -> object:
        began = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            seconds.append(time.perf_counter() - began)

    return timed


def _part(what: str, seconds: float) -> Row:
    return Row(what=f"· of which {what}", ours=said(seconds), figure="")


def _cwltool(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    if cwltool := program("cwltool"):
        tool = folder / "true.cwl"
        lines = [
            "cwlVersion: v1.2",
            "class: CommandLineTool",
            f"requirements: {{DockerRequirement: {{dockerImageId: '{IMAGE}', dockerPull: '{IMAGE}'}}}}",
        ]
        tool.write_text("\n".join([*lines, "baseCommand: 'true'", "inputs: []", "outputs: []", ""]))
        yield "cwltool", partial(run, cwltool, "--disable-pull", "--quiet", "--outdir", folder / "cwl", tool)
