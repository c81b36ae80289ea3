"""The command line: `oasis-flows`. This module knows words and exit codes; `console` does the work.

Hardly more than the standard library is imported before a command is chosen, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import interruption

SUCCESS, ALGORITHM_FAILED, WRONG_DESCRIPTION, INFRASTRUCTURE_FAILED, INTERRUPTED = 0, 1, 2, 3, 130

_EPILOG = """\
exit codes:
  0  success
  1  the algorithm itself failed: read its log
  2  something is wrong as written: correct it
  3  the machine, the store, the engine or Prefect failed: mend it, or try again

A first run:
  oasis-flows doctor                                 what is missing on this machine, and how to get it
  oasis-flows apply blocks                           save the documents of the catalogue
  oasis-flows dataset add photos /data/photos        describe a folder of files
  oasis-flows run detect-ships photos --follow       run an algorithm on it
  oasis-flows dataset ls detect-ships-output-1a2b3c4d
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    try:
        with interruption.kept_in_mind():
            return _command(arguments)
    except KeyboardInterrupt:
        print("oasis-flows: interrupted", file=sys.stderr)
        return INTERRUPTED


def _command(arguments: Sequence[str] | None) -> int:
    options = _options(arguments)
    if getattr(options, "follow", False) is False:
        # Without --follow a terminal shows results; what goes wrong is said once, below.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    # Without a server Prefect starts a temporary one, which makes its database first: that can take longer than its 20 s.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    from . import console
    from .errors import OasisError

    interruption.check()
    try:
        return int(getattr(console, options.action)(options))
    except OasisError as error:
        print(f"oasis-flows: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has gone, as with `| head`: nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS
    except Exception as error:  # the border: whatever it was, people get a sentence and a code
        interruption.check()
        if os.environ.get("OASIS_FLOWS_TRACEBACK"):
            raise
        message, code = console.translated(error)
        print(f"oasis-flows: {message}", file=sys.stderr)
        return code


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was written. A DATASET that may be left out is found behind options, too, where argparse does not look for it."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and getattr(options, "dataset", "") is None and not rest[0].startswith("-"):
        options.dataset, *rest = rest
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


class _Version(argparse.Action):
    """Unlike argparse's own, it looks the versions up when it is asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"oasis-flows {version('oasis-flows')}, Prefect {version('prefect')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oasis-flows",
        description="Run container images on datasets, with Prefect.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="say which version this is, and which of Prefect it uses")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    apply = commands.add_parser("apply", help="save the documents of a catalogue on the Prefect server")
    apply.add_argument("folder", nargs="?", default="blocks", metavar="DIR", help="the catalogue (default: blocks)")
    apply.set_defaults(action="apply")

    check = commands.add_parser("check", help="check a catalogue without any server")
    check.add_argument("folder", nargs="?", default="blocks", metavar="DIR", help="the catalogue (default: blocks)")
    check.set_defaults(action="check")

    run = commands.add_parser("run", help="run an algorithm on a dataset, here and now")
    _run_arguments(run)
    run.add_argument("--follow", action="store_true", help="show the log while it happens")
    run.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    run.set_defaults(action="run")

    batch = commands.add_parser("batch", help="run an algorithm on a large dataset in shards, as many at once as fit")
    _run_arguments(batch, optional=True)
    _batch_arguments(batch)
    _oscar_arguments(batch)
    batch.add_argument("--resume", metavar="RUN", help="id or name of an earlier run of this batch, to go on with what is left")
    batch.add_argument("--follow", action="store_true", help="show the log while it happens")
    batch.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    batch.set_defaults(action="batch")

    plans = commands.add_parser("plan", help="say what a batch would do, and start nothing")
    plan = plans.add_subparsers(dest="verb", required=True, metavar="VERB").add_parser("batch", help="plan a batch")
    _run_arguments(plan, optional=True)
    _batch_arguments(plan)
    _oscar_arguments(plan)
    plan.add_argument("--resume", metavar="RUN", help="id or name of an earlier run of this batch: say what it has finished")
    plan.add_argument("--capacity", metavar="FILE", help="a snapshot of the machines, in place of this one's engine")
    plan.add_argument("--json", action="store_true", help="print the plan as one line of JSON")
    plan.set_defaults(action="plan_batch")

    _dataset_parser(commands.add_parser("dataset", help="describe, list and copy datasets"))

    _train_parser(commands.add_parser("train", help="let trains of the Personal Health Train visit stations"))

    _prerequisites_parser(commands)
    _import_parser(commands.add_parser("import", help="write the documents of a catalogue that something else means"))

    log = commands.add_parser("log", help="show the log of a run")
    log.add_argument("run", metavar="RUN", help="id or name of the flow run")
    part = log.add_mutually_exclusive_group()
    part.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    part.add_argument("--head", type=_count, metavar="N", help="the first N lines only")
    part.add_argument("--tail", type=_count, metavar="N", help="the last N lines only")
    log.set_defaults(action="log")

    reap = commands.add_parser("reap", help="remove containers and workspaces that dead runs left on this machine")
    when = reap.add_mutually_exclusive_group()
    when.add_argument("--now", action="store_true", help="do not wait for a retry to come back for a container (60 s)")
    when.add_argument("--wait", action="store_true", help="stay until those are removed, too, that died just now (a minute)")
    reap.add_argument("--json", action="store_true", help="print what was removed as one line of JSON")
    reap.set_defaults(action="reap")

    doctor = commands.add_parser("doctor", help="say what is missing on this machine, and how to get it")
    doctor.add_argument("--json", action="store_true", help="print one line of JSON for each check")
    doctor.set_defaults(action="doctor")
    return parser


def _run_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument("algorithm", metavar="ALGORITHM", help="name of an Algorithm document")
    parser.add_argument("dataset", metavar="DATASET", nargs="?" if optional else None, help="name of a Dataset document")
    parser.add_argument(
        "-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the algorithm; repeatable"
    )
    parser.add_argument("--output-name", metavar="NAME", help="name of the output's Dataset document (default: a new one)")
    parser.add_argument(
        "--store", metavar="NAME", help="DatasetStore document to publish to (default: the one named default, or this machine)"
    )


def _batch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--include", metavar="PATTERN", help="which files, such as *.jpg or 2026/** (default: all)")
    parser.add_argument("--files-per-shard", type=int, metavar="N", help="how many files one container gets")
    parser.add_argument("--shards", type=int, metavar="N", help="how many shards, of about equally many bytes")
    parser.add_argument("--max-parallel", type=int, metavar="N", help="at most so many at once (default: as many as fit)")
    parser.add_argument(
        "--on-failed-files",
        choices=["fail", "accept"],
        metavar="HOW",
        help="fail or accept: what the batch ends as when files fail alone (default: fail)",
    )
    parser.add_argument(
        "--max-failed-files", type=int, metavar="N", help="give up when more files than this fail alone (default: 100)"
    )
    parser.add_argument(
        "--algorithm-retries",
        type=int,
        metavar="N",
        help="how often a shard that its algorithm failed is tried again (default: 0)",
    )
    parser.add_argument(
        "--fan-out",
        choices=["in-process", "work-pool"],
        metavar="WHERE",
        help="in-process (default), or work-pool: on its workers",
    )


def _oscar_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--oscar-compat", action="store_true", default=None, help="run the algorithm as OSCAR-Batch would run its service"
    )
    parser.add_argument("--oscar-index", metavar="NAME", help="name of the index in the dataset's folder (default: index.txt)")
    parser.add_argument(
        "--oscar-config", metavar="FILE", help="a config.json of OSCAR-Batch: where the files are, in place of DATASET"
    )
    parser.add_argument("--service-cpus", metavar="N", help="processors of the service, in place of asking the OSCAR cluster")
    parser.add_argument("--service-memory", metavar="SIZE", help="memory of the service, such as 3Gi, in place of asking")


def _dataset_parser(dataset: argparse.ArgumentParser) -> None:
    verbs = dataset.add_subparsers(dest="verb", required=True, metavar="VERB")
    add = verbs.add_parser("add", help="describe a folder as a dataset")
    add.add_argument("name", metavar="NAME", help="name of the Dataset document")
    add.add_argument("url", metavar="PATH_OR_URL", help="the folder: a path, or a URL such as s3://bucket/folder")
    add.add_argument("--store", metavar="NAME", help="DatasetStore document whose credentials open it")
    add.add_argument("--json", action="store_true", help="print the document as one line of JSON")
    add.set_defaults(action="dataset_add")
    ls = verbs.add_parser("ls", help="list a dataset's files")
    ls.add_argument("name", metavar="NAME", help="name of the Dataset document")
    ls.add_argument("--json", action="store_true", help="print one line of JSON for each file, as in its manifest")
    ls.set_defaults(action="dataset_ls")
    get = verbs.add_parser("get", help="copy a dataset into a folder, checked")
    get.add_argument("name", metavar="NAME", help="name of the Dataset document")
    get.add_argument("folder", metavar="DIR", help="a new or empty folder")
    get.set_defaults(action="dataset_get")


def _train_parser(train: argparse.ArgumentParser) -> None:
    verbs = train.add_subparsers(dest="verb", required=True, metavar="VERB")
    describe = verbs.add_parser("describe", help="say what a train requires, and what its model is")
    describe.set_defaults(action="train_describe")
    check = verbs.add_parser("check", help="say what of a train's requirements a station meets; nothing runs on its data")
    check.add_argument("--station", required=True, metavar="NAME", help="name of a Station document")
    check.set_defaults(action="train_check")
    run = verbs.add_parser("run", help="let a train visit a station, here and now")
    run.add_argument("--station", required=True, metavar="NAME", help="name of a Station document")
    run.add_argument("--follow", action="store_true", help="show the log while it happens")
    run.set_defaults(action="train_run")
    route = verbs.add_parser("route", help="let a train visit stations one after another, each on its own work pool")
    route.add_argument("image", metavar="IMAGE", help="the train's image")
    route.add_argument("stations", nargs="+", metavar="STATION", help="names of Station documents, in order")
    route.add_argument("--resume", metavar="RUN", help="id or name of an earlier run of this route, to go on where it stopped")
    route.add_argument("--follow", action="store_true", help="show the log while it happens")
    route.set_defaults(action="train_route")
    for parser in (describe, check, run):
        parser.add_argument("image", metavar="IMAGE", help="the train's image")
    for parser in (describe, check, run, route):
        parser.add_argument(
            "--api",
            choices=["auto", "0.x", "V1", "1.0"],
            default="auto",
            metavar="GENERATION",
            help="0.x, V1 or 1.0 (default: auto, the train is asked)",
        )
    for parser in (run, route):
        parser.add_argument("--track-info", metavar="TEXT", help="text for the train about its route")
        parser.add_argument("--user-data", metavar="TEXT", help="text for the train from whoever sends it")
    verify = verbs.add_parser("verify", help="check the record of a train's visits, offline")
    verify.add_argument(
        "what", metavar="IMAGE_OR_DIR", help="an image of this engine, an archive of `docker save`, or a visit's folder"
    )
    verify.set_defaults(action="train_verify")
    key = verbs.add_parser("key", help="show a station's public key, for others to trust; made on first use")
    key.add_argument("station", metavar="STATION", help="name of a Station document")
    key.set_defaults(action="train_key")
    for parser in (describe, check, run, route, verify):
        parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")


def _prerequisites_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = commands.add_parser("prerequisites", help="look at what has to be in place before an algorithm runs")
    verbs = about.add_subparsers(dest="verb", required=True, metavar="VERB")
    show = verbs.add_parser("show", help="show an algorithm's prerequisites, in order, with their commands and storages")
    show.add_argument("algorithm", metavar="ALGORITHM", help="name of an Algorithm document")
    show.add_argument("--json", action="store_true", help="print them as one line of JSON")
    show.set_defaults(action="prerequisites_show")
    marketplace = commands.add_parser("marketplace", help="look at prerequisites that can be had")
    verbs = marketplace.add_subparsers(dest="verb", required=True, metavar="VERB")
    ls = verbs.add_parser("ls", help="list the prerequisites of this machine's marketplaces")
    ls.add_argument("--json", action="store_true", help="print one line of JSON for each")
    ls.set_defaults(action="marketplace_ls")
    show = verbs.add_parser("show", help="show one, and how to pin it")
    show.add_argument("name", metavar="NAME", help="name in a marketplace, or any address of a prerequisite")
    show.set_defaults(action="marketplace_show")


def _import_parser(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="KIND")
    openpai = verbs.add_parser("openpai", help="a job of OpenPAI, protocol version 2")
    openpai.add_argument("job", metavar="JOB", help="the job's YAML file")
    openpai.add_argument("folder", nargs="?", default="blocks", metavar="DIR", help="the catalogue (default: blocks)")
    openpai.set_defaults(action="import_openpai")


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
