"""The main job by the fourth way: a person with a browser, in the Prefect UI that opens by default."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Error, Locator, Page, Route, expect, sync_playwright

from oasis_flows import Algorithm, Dataset, DockerImage, algorithm_task
from tests.e2e.test_cancel import GRACE, assert_no_dataset
from tests.servers.engine import containers_of, eventually
from tests.servers.prefect import PrefectServer, begin

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Whatever the page's routes do not see (prefetches, say) does not find its host.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
# A busy machine with two processors takes its time.
expect.set_options(timeout=90_000)
PICTURES = Path(__file__).parents[2] / "test-results"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Debian's browser, with a profile of its own that goes with it."""
    if not (Path(CHROMIUM).exists() and shutil.which(CHROMIUM)):
        pytest.fail(f"There is no {CHROMIUM}, which this test drives. Install it: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=60_000)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser, deployed: PrefectServer, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A new visitor's window onto the server's UI; nothing else can be reached. What it saw last is kept."""
    name = request.node.name.removeprefix("test_")
    PICTURES.mkdir(exist_ok=True)
    context: BrowserContext = chromium.new_context(base_url=deployed.url, viewport={"width": 1280, "height": 1200})
    context.set_default_timeout(90_000)

    def only_the_server(route: Route) -> None:
        # Block logos and the UI's statistics live elsewhere: a machine without internet has to do without, and so have we.
        if route.request.url.startswith(("data:", "blob:")):
            route.continue_()
        elif route.request.url.startswith(f"{deployed.url}/"):
            # Asked by the driver: Chromium breaks off what it loads when a network of the machine comes or goes, as an engine's do.
            # It keeps its connections, which the server closes after five seconds without a request: one may cross that.
            # Retried is a reset connection, nothing else; what fails is told at once, for the page would wait for ever.
            try:
                route.fulfill(response=route.fetch(timeout=90_000, max_retries=3))
            except Error as error:
                print(f"{route.request.method} {route.request.url} was not answered: {error}")
                route.abort()
        else:
            route.abort()

    context.route("**/*", only_the_server)
    page = context.new_page()
    try:
        yield page
    finally:
        page.screenshot(path=PICTURES / f"ui-{name}-last.png")
        context.unroute_all(behavior="ignoreErrors")
        context.close()


def picture(page: Page, name: str, *, whole: bool = False) -> None:
    """Keep what is in sight, or the whole page. A whole one shifts the page, and can make it miss the next click."""
    page.screenshot(path=PICTURES / f"ui-{name}.png", full_page=whole)


def visit(page: Page, address: str, seen: Locator) -> Locator:
    """Open a page and wait for something on it."""
    page.goto(address)
    expect(seen).to_be_visible()
    return seen


def pick(page: Page, block_type: str, document: str) -> None:
    """Choose a saved document in the picker of its type, by its search: the list itself shows only so many."""
    picker = page.get_by_role("group").filter(has=page.get_by_role("img", name=block_type, exact=True))
    option = page.get_by_role("option", name=document, exact=True)
    picker.get_by_role("button", name="Select a block").click()
    page.get_by_placeholder("Search for a block").fill(document)
    expect(option).to_be_visible()
    # A click on the list while it is still being narrowed closes it, and chooses nothing.
    page.wait_for_timeout(500)
    option.click()
    # The button shows the name only where it is among the first of all documents.
    expect(option).to_have_count(0)


def help_below(page: Page, label: str) -> Locator:
    """The help text below a label of a form."""
    return page.get_by_role("main").get_by_text(label, exact=True).locator("xpath=following::p[1]")


def read_log_until(page: Page, text: str) -> None:
    """Look for a line as a person does: scroll to the end, reload where the page asks no more though lines are still coming in."""
    log = page.get_by_role("main").get_by_role("log")
    deadline = time.monotonic() + 30
    while not log.get_by_text(text).count():
        assert time.monotonic() < deadline, f"{text!r} is not in the run's log as the UI shows it"
        page.reload()
        expect(log.get_by_text("Beginning flow run")).to_be_visible()
        # Only the rows in sight are in the page, and a row's height is known when it is there.
        for _ in range(8):
            log.evaluate("list => { for (let e = list; e; e = e.parentElement) e.scrollTop = e.scrollHeight }")
            page.wait_for_timeout(100)
    expect(log.get_by_text(text)).to_be_visible()
    log.get_by_text(text).evaluate("record => record.scrollIntoView({block: 'end'})")


def test_a_person_runs_an_algorithm_in_the_browser(deployed: PrefectServer, worker: object, page: Page) -> None:
    main = page.get_by_role("main")

    # The form.
    visit(page, "/", page.get_by_role("link", name="Deployments", exact=True)).click()
    row = page.get_by_role("row").filter(has_text="algorithm-task")
    row.locator("a[href*='/deployments/deployment/']").filter(has_text=re.compile(r"^algorithm-task$")).click()
    main.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    expect(main.get_by_role("heading", name="Parameters")).to_be_visible()
    expect(help_below(page, "algorithm")).to_have_text("The algorithm to run.")
    expect(help_below(page, "input_dataset")).to_have_text("The dataset it reads.")
    expect(help_below(page, "parameters (Optional)")).to_contain_text("Values for the algorithm's parameters")
    pick(page, "Algorithm", "co2-report")
    pick(page, "Dataset", "co2-weekly")
    main.locator(".cm-content").last.fill('{"threshold": 2.0}')
    picture(page, "form")
    main.get_by_role("button", name="Submit").click()

    # The run, while it happens and when it is done.
    page.get_by_role("link", name="View run").click()
    page.wait_for_url("**/runs/flow-run/**")
    run_id = page.url.partition("/flow-run/")[2].partition("?")[0]
    main.get_by_role("tab", name="Logs").click()
    expect(main.get_by_text("Completed", exact=True).first).to_be_visible(timeout=75_000)
    expect(main.get_by_role("navigation", name="breadcrumb")).to_contain_text("co2-report on co2-weekly")
    read_log_until(page, "44 files, 2284 weeks")
    picture(page, "run")

    # What it says about itself.
    main.get_by_role("tab", name="Artifacts").click()
    card = main.get_by_role("link").filter(has=page.get_by_role("heading", name="oasis-run", exact=True))
    expect(card).to_have_count(1)
    card.click()
    # The page of the key has the artifacts of all runs; ours is the one beside the link to our run.
    entry = (
        main.locator("div").filter(has=page.locator(f"a[href$='{run_id}']")).filter(has=page.locator("a[href*='/artifact/']"))
    )
    entry.last.locator("a[href*='/artifact/']").click()
    expect(main.get_by_role("heading", name=re.compile("co2-report succeeded after"))).to_be_visible()
    expect(main.get_by_role("row").filter(has_text="Status")).to_contain_text("Succeeded")
    expect(main.get_by_role("row").filter(has_text="Algorithm").get_by_text("co2-report", exact=True)).to_be_visible()
    expect(main.get_by_role("row").filter(has_text="Algorithm")).to_contain_text("threshold = 2.0")
    expect(main.get_by_text("wrote summary.csv, flagged.csv")).to_be_visible()
    picture(page, "artifact", whole=True)

    run = deployed.api(f"/flow_runs/{run_id}")
    assert run["state_type"] == "COMPLETED"
    assert run["parameters"]["parameters"] == {"threshold": 2.0}


def test_a_person_cancels_a_run_in_the_browser(
    deployed: PrefectServer, worker: object, page: Page, docker_api: Any, busybox: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a")
    # The browser's driver keeps an event loop in this thread, in which `save` would be a coroutine.
    Dataset(url=str(tmp_path)).save("letters", overwrite=True, _sync=True)
    script = "trap '' TERM; while :; do sleep 1; done"
    Algorithm(docker_image=DockerImage(image_id=busybox), command=["sh", "-c", script]).save(
        "stubborn", overwrite=True, _sync=True
    )
    run_id = begin(deployed, "stubborn", "letters")
    eventually(lambda: [row for row in containers_of(docker_api, run_id) if row["State"] == "running"], 90)
    visit(page, f"/v2/runs/flow-run/{run_id}", page.get_by_text("Running", exact=True).first)
    page.get_by_role("main").get_by_role("button").filter(has=page.locator("svg.lucide-ellipsis-vertical")).click()
    page.get_by_role("menuitem", name="Cancel").click()
    page.get_by_role("button", name="Cancel Flow Run").click()

    eventually(lambda: not containers_of(docker_api, run_id), GRACE + 2)
    assert deployed.wait_for(run_id, "CANCELLED", "CRASHED", "FAILED", seconds=40)["state_type"] == "CANCELLED"
    expect(page.get_by_text("Cancelled", exact=True).first).to_be_visible(timeout=30_000)
    eventually(lambda: not (deployed.home / "workspaces" / run_id).exists(), 20)
    assert_no_dataset(deployed, run_id)


@pytest.mark.parametrize("ui", [pytest.param("", id="v1"), pytest.param("/v2", id="v2")])
def test_a_person_sees_what_a_run_used_and_wrote(deployed: PrefectServer, page: Page, here: Path, ui: str) -> None:
    script = "co2-report --threshold 1; head -c 30000000 /dev/zero > /tmp/x; sleep 1; rm /tmp/x; sleep 1"
    state = algorithm_task(
        Algorithm(docker_image=DockerImage(image_id="oasis-flows/co2-report:1"), command=["sh", "-c", script]),
        "co2-weekly",
        return_state=True,
    )
    wanted = {"artifacts": {"flow_run_id": {"any_": [str(state.state_details.flow_run_id)]}}}
    artifacts = {found["key"]: found["id"] for found in deployed.api("/artifacts/filter", wanted)}

    # Version 1 of the UI knows no "main".
    drawn = page.locator("img[src^='data:image/svg+xml']")
    visit(page, f"{ui}/artifacts/artifact/{artifacts['oasis-run']}", drawn)
    assert drawn.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    expect(page.get_by_role("row").filter(has_text="Processors")).to_contain_text("of 1 on average")
    picture(page, f"usage-{ui.strip('/') or 'v1'}", whole=True)
    # Version 1 opens links in windows of their own.
    document = str(page.get_by_role("link", name=re.compile("^algorithm-output-")).get_attribute("href"))
    visit(page, document, page.get_by_text("File Count"))
    expect(page.get_by_text(re.compile("algorithm-output-")).first).to_be_visible()

    visit(page, f"{ui}/artifacts/artifact/{artifacts['oasis-output']}", page.get_by_text("summary.csv", exact=True).first)
    expect(page.get_by_text(re.compile("^47 files, ")).first).to_be_visible()
    picture(page, f"files-{ui.strip('/') or 'v1'}", whole=True)


def test_a_person_describes_an_algorithm_in_the_browser(page: Page) -> None:
    main = page.get_by_role("main")

    visit(page, "/", page.get_by_role("link", name="Blocks", exact=True)).click()
    main.locator("a[href$='/blocks/catalog']").first.click()
    main.locator("a[href$='/blocks/catalog/algorithm']").first.click()
    expect(main.get_by_text("What to run in a container image")).to_be_visible()
    expect(main.get_by_text("command=")).to_be_visible()
    main.get_by_role("link", name="Create").click()

    expect(main.get_by_role("group").filter(has=page.get_by_role("img", name="Docker Image", exact=True))).to_be_visible()
    for name, facts in Algorithm.model_fields.items():
        if name != "docker_image":
            label = f"{name.replace('_', ' ').title()} (Optional)"
            expect(help_below(page, label)).to_have_text(str(facts.description))
    expect(main.get_by_label("Memory (Optional)")).to_have_value("1GiB")
    expect(main.get_by_text(str(Algorithm.model_fields["docker_image"].description))).to_be_visible()
    picture(page, "algorithm-block", whole=True)
