"""The demo behind `make demo`: a real algorithm on real files, with the commands anybody would type.

Everything it makes stays below `.demo/`, Prefect's own files included: a Prefect that you use for other things is not touched.
The Prefect server keeps running, so that the run can be looked at; `make demo-down` stops it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEMO = ROOT / ".demo"
BIN = Path(sys.executable).parent
PID_FILE = DEMO / "server.pid"
SERVER_LOG = DEMO / "server.log"
SETTINGS = ROOT / "deployments" / "server.env"
START_SECONDS = 90


def server_settings() -> dict[str, str]:
    """The settings that we recommend for a server, and a database of the demo's own."""
    given = {"PREFECT_HOME": str(DEMO / "prefect"), "PATH": os.environ["PATH"]}
    read = ["sh", "-c", 'set -a; . "$0"; env -0', str(SETTINGS)]
    said = subprocess.run(read, env=given, capture_output=True, text=True, check=True).stdout.split("\0")
    return dict(line.split("=", 1) for line in said if line.startswith(("PREFECT_", "DO_NOT_TRACK=")))


def healthy(port: int) -> bool:
    """Does a Prefect server answer on this port?"""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://127.0.0.1:{port}/api/health", timeout=5) as answer:
            return bool(answer.read() == b"true")
    except OSError:
        return False


def running_server() -> tuple[int, int] | None:
    """Process and port of the server that an earlier demo left, if that process is still a Prefect server."""
    try:
        pid, port = map(int, PID_FILE.read_text().split())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return (pid, port) if b"prefect" in command else None


def free_port() -> int:
    """Prefect's usual port, or any other when somebody has that one."""
    for port in (4200, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    sys.exit("demo: there is no free port on 127.0.0.1")


def start_server(env: dict[str, str]) -> int:
    """The port of the demo's Prefect server, which is started unless it runs."""
    server = running_server()
    if server and healthy(server[1]):
        return server[1]
    stop_server()
    DEMO.mkdir(exist_ok=True)
    port = free_port()
    print(f"starting a Prefect server on port {port}, log in {SERVER_LOG.relative_to(ROOT)}", flush=True)
    with SERVER_LOG.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            env=env,
            cwd=DEMO,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    PID_FILE.write_text(f"{process.pid} {port}\n")
    deadline = time.monotonic() + START_SECONDS
    while not healthy(port):
        if process.poll() is not None or time.monotonic() > deadline:
            stop_server()
            sys.exit(f"demo: the Prefect server did not start; its log ends:\n{SERVER_LOG.read_text()[-2000:]}")
        time.sleep(0.3)
    return port


def stop_server() -> None:
    """End the server and its children, and forget it."""
    if server := running_server():
        os.killpg(server[0], signal.SIGTERM)
        for _ in range(100):
            if running_server() is None:
                break
            time.sleep(0.1)
        else:
            os.killpg(server[0], signal.SIGKILL)
    PID_FILE.unlink(missing_ok=True)


def oasis_flows(*arguments: str, env: dict[str, str]) -> str:
    """Run the command line as a user would; its last line of output. Ends the demo if the command fails."""
    print(f"\n$ oasis-flows {' '.join(arguments)}", flush=True)
    last = ""
    command = [str(BIN / "oasis-flows"), *arguments]
    with subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            last = line
            print(line, end="", flush=True)
    if process.returncode:
        sys.exit(f"demo: oasis-flows {arguments[0]} ended with exit code {process.returncode}")
    return last


def size(count: int) -> str:
    return f"{count} B" if count < 1000 else f"{count / 1000:.1f} kB"


def main() -> None:
    env = os.environ | server_settings() | {"OASIS_FLOWS_HOME": str(DEMO / "home")}
    port = start_server(env)
    env["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"

    oasis_flows("apply", "blocks", env=env)
    oasis_flows("dataset", "add", "co2-weekly", "examples/co2-weekly", env=env)
    run_arguments = ("run", "co2-report", "co2-weekly", "--output-name", "co2-report", "--follow", "--json")
    run: dict[str, Any] = json.loads(oasis_flows(*run_arguments, env=env))
    listing = subprocess.run(
        [str(BIN / "oasis-flows"), "dataset", "ls", run["dataset"], "--json"],
        env=env,
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    files = [json.loads(line) for line in listing.splitlines()]

    print(f"\nWhat came out: {len(files)} files in {run['url']}")
    for file in files:
        print(f"  {size(file['bytes']):>9}  {file['path']}")
    print("\nThe log ends:")
    for line in run["log_tail"]:
        print(f"  {line}")
    print(f"\nThe record of the run:  {run['url']}/task.json")
    print(f"The run in the UI:      {run['ui_url']}")
    print("The server stays up for you to look; `make demo-down` stops it.")


if __name__ == "__main__":
    if sys.argv[1:] == ["--down"]:
        stop_server()
    else:
        main()
