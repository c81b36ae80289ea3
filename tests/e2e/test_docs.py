"""The commands of the documentation, typed as it says.

What a fenced block is depends on its language:

- `console`: after `$ ` a command, which must succeed; the lines after it must be in what it prints (`…` stands for any text)
- `python`: a program, which must succeed
- any block whose first line is a comment with a file's name: that file, without that line
- `text`, `sh`, `py` and the rest: for readers only

A page runs from top to bottom, in a clone of its own, as a user of the server that the sample catalogue was applied to.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.servers.prefect import BIN, PrefectServer
from tests.servers.s3 import S3Server

ROOT = Path(__file__).parents[2]
PAGES = [
    path
    for pattern in ("*.md", "docs/**/*.md", "blocks/*.md", "deployments/*.md", "examples/*.md")
    for path in sorted(ROOT.glob(pattern))
]
_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w-]+(?:[./][\w-]+)+)\n")


def blocks_of(page: Path) -> Iterator[tuple[str, str]]:
    """Language and content of the fenced blocks of a page."""
    for block in _BLOCK.finditer(page.read_text()):
        yield block["language"], textwrap.dedent(block["body"])


def files_of(page: Path) -> Iterator[tuple[str, str]]:
    """Name and content of the files that a page shows."""
    for _, body in blocks_of(page):
        if named := _FILE.match(body):
            yield named[1], body[named.end() :]


def commands_in(body: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of a console block, each with the lines that it is said to print."""
    for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
        command, *said = part.rstrip("\n").split("\n")
        while command.endswith("\\"):
            command += "\n" + said.pop(0)
        yield command, said


EXECUTED = [page for page in PAGES if any(language in ("console", "python") for language, _ in blocks_of(page))]


class Reader:
    """Somebody who does what a page says, in a folder of their own; `words` are filled in where the page leaves it to them."""

    def __init__(self, folder: Path, env: dict[str, str], words: dict[str, str]) -> None:
        self._folder, self._words = folder, words
        self._env = env | {"PATH": f"{BIN}{os.pathsep}{env['PATH']}"}

    def follow(self, page: Path) -> None:
        for language, body in blocks_of(page):
            body = self._filled_in(body)
            if named := _FILE.match(body):
                file = self._folder / named[1]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(body[named.end() :])
            if language == "python":
                self._type(["python", "-c", body], body)
            elif language == "console":
                for command, said in commands_in(body):
                    self._expect(said, self._type(["bash", "-c", command], command))

    def _filled_in(self, text: str) -> str:
        for word, value in self._words.items():
            text = re.sub(rf"\b{word}\b", value, text)
        return text

    def _type(self, arguments: list[str], shown: str) -> str:
        done = subprocess.run(
            arguments,
            env=self._env,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{shown}\nended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def _expect(self, said: list[str], printed: str) -> None:
        lines = [line.rstrip() for line in printed.splitlines()]
        for wanted in said:
            pattern = ".*".join(re.escape(piece) for piece in wanted.split("…"))

            assert any(re.fullmatch(pattern, line) for line in lines), f"{wanted!r} is not in:\n{printed}"


def _clone(folder: Path) -> Path:
    """What a clone of the repository has for its reader."""
    for name in ("blocks", "deployments", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "prefect.yaml", folder)
    return folder


@pytest.fixture(scope="module")
def readers(
    deployed: PrefectServer, worker: object, s3: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Path, Future[None]]]:
    """What becomes of each page; two are read at a time, for most of a command's time is Python's start."""
    env = deployed.env | {"AWS_SECRET_ACCESS_KEY": s3.secret_key}
    words = {"ENDPOINT": s3.endpoint, "BUCKET": s3.new_bucket(), "ACCESS_KEY": s3.access_key}
    with ThreadPoolExecutor(2) as pool:
        yield {
            page: pool.submit(Reader(_clone(tmp_path_factory.mktemp("clone")), env, words).follow, page) for page in EXECUTED
        }


@pytest.mark.parametrize("page", EXECUTED, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_says_works(page: Path, readers: dict[Path, Future[None]]) -> None:
    readers[page].result()
