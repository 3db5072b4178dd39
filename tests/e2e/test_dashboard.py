"""The dashboard in a real browser: of a real deployment with simulated models, and of a made-up one with 64 workers.

Sixty-four processes take minutes on two cores, so there the browser is given what `router.dashboard_data` makes of as
many; page, polling and drawing are the real ones. `DASHBOARD_WORKERS=64` has as many real ones. Needs Debian's
chromium. `SCREENSHOT=docs/dashboard.png` keeps the picture that the README shows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright

from tests.e2e.policies import WANTED
from tests.router.conftest import model_directory
from tests.router.dashboards import answer
from tests.router.harness import Api
from tests.serving import Served, command, environment, serving, wait_until

__all__ = ["model_directory"]

POLICY = "tests.e2e.policies:as_the_file_says"
WITHIN_S = 2.0  # that the page may take to show a change of role
SETTLE_S = 60.0
SIZES = {"desk": (1280, 900), "phone": (390, 844), "picture": (1280, 1320)}
NAMED = {
    *("button", "textbox", "link", "image", "img", "region", "table", "list", "figure", "status", "form"),
    *("DisclosureTriangle", "DescriptionList", "heading"),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policy") / "workers"


@pytest.fixture(scope="module")
def served(tiny: Path, wanted: Path) -> Iterator[Served]:
    """One prefill and one decode worker; one of both when the file says so."""
    wanted.write_text("2")
    settings = {
        "TANDEM_SIM_MS": "5,0.1,0",
        "TANDEM_THREADS": "1",
        "PYTHONPATH": os.getcwd(),
        WANTED: str(wanted),
    }
    arguments = ("--placement", "least_loaded", "--scale", "1..2", "--autoscaling", POLICY)
    with serving(str(tiny), "--runner", "sim", *arguments, **settings) as one:
        yield one


@contextmanager
def opened(
    browser: Browser, url: str, size: str = "desk", scheme: str = "light", data: dict[str, Any] | None = None
) -> Iterator[Page]:
    """The page, when it has drawn something; afterwards, that the browser had nothing to complain of. `data`: what the
    page is told instead of what the router says."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    problems: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    if data is not None:
        page.route("**/dashboard/data*", lambda route: tell(route, data))
    page.goto(f"{url}/dashboard")
    page.wait_for_selector("#charts path", state="attached")
    yield page
    assert problems == []
    assert [other for other in asked if not other.startswith((f"{url}/dashboard", "data:"))] == []
    context.close()


def tell(route: Route, data: dict[str, Any]) -> None:
    """As the router would: everything at first, then only what is new, which is nothing."""
    first = "sample=0" in route.request.url
    history = data["history"] if first else data["history"] | {"samples": []}
    body = data | {"history": history, "requests": data["requests"] if first else []}
    route.fulfill(body=orjson.dumps(body).decode(), content_type="application/json")


def names(page: Page) -> list[tuple[str, str]]:
    """(role, accessible name) of what a person can use or is shown, as the browser tells assistive software."""
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")
    nodes = [node for node in tree["nodes"] if not node.get("ignored") and "role" in node]
    return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]


def tiles(page: Page) -> dict[str, str]:
    """Worker -> the pool that it is drawn in."""
    found = page.evaluate(
        "() => [...document.querySelectorAll('.tiles svg')].map((tile) =>"
        " [tile.getAttribute('aria-label').split(',')[0], tile.closest('.pool').id])"
    )
    return {worker: pool.removeprefix("pool-") for worker, pool in found}


def await_count(page: Page, selector: str, count: int) -> None:
    """What a click opens is there a moment later."""
    page.wait_for_function("([s, n]) => document.querySelectorAll(s).length === n", arg=[selector, count])


def overflow(page: Page) -> int:
    """Pixels that the page is wider than its window."""
    return int(page.evaluate("() => document.documentElement.scrollWidth - innerWidth"))


def test_a_real_deployment_of_two_workers(browser: Browser, served: Served) -> None:
    for _ in range(3):
        served.complete(list(range(20, 90)), 8, ignore_eos=True)
    with opened(browser, served.url) as page:
        await_count(page, "#requests li", 3)
        assert tiles(page) == {"prefill-0": "prefill", "decode-0": "decode"}
        assert "2 workers serve" in page.inner_text("#health")
        page.wait_for_function("() => document.querySelector('#figures .value').innerText.includes('%')")
        page.click("#requests li:first-child summary")
        why = page.inner_text("#requests li:first-child .why")
        assert "prefill-0 \u2192 decode-0" in why
        assert "least_loaded" in why
        page.click("#workers summary")
        await_count(page, "#workers-table tbody tr", 2)
        shown = page.get_attribute("#charts figure:first-child svg", "aria-label")
        assert shown is not None
        assert "prefill 1" in shown


def test_a_list_that_is_read_does_not_move(browser: Browser, served: Served) -> None:
    with opened(browser, served.url) as page:
        known = page.locator("#requests li").count()
        page.click("#requests li:first-child summary")
        served.complete(list(range(20, 90)), 4, ignore_eos=True)
        page.wait_for_function("() => document.getElementById('held').innerText.startsWith('1 newer request')")
        assert page.locator("#requests li").count() == known
        page.click("#requests li:first-child summary")
        await_count(page, "#requests li", known + 1)
        assert page.is_hidden("#held")


def test_a_change_of_role_is_shown_at_once(
    browser: Browser, served: Served, wanted: Path, record_property: Callable[[str, Any], None]
) -> None:
    """With one worker of two left, that one is given both roles. The clock starts when the controller's report or the
    worker's own says so, whichever comes first."""
    with opened(browser, served.url) as page:
        assert sorted(tiles(page).values()) == ["decode", "prefill"]
        wanted.write_text("1")
        try:
            wait_until(lambda: flipped(served), SETTLE_S, lambda: json.dumps(served.status(), indent=1))
            begun = time.monotonic()
            page.wait_for_selector("#pool-both .tile", timeout=1000 * WITHIN_S)
            record_property("seconds until the page showed it", time.monotonic() - begun)
            page.wait_for_function("() => document.getElementById('events').innerText.includes('turns to both')")
        finally:
            wanted.write_text("2")


def flipped(served: Served) -> bool:
    status = served.status()
    told = status["controller"]["events"] if status["controller"] else []
    return any("turns to both" in event for event in told) or any(w["role"] == "both" for w in status["workers"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desk", "phone"])
def test_sixty_four_workers(browser: Browser, served: Served, size: str, scheme: str) -> None:
    with opened(browser, served.url, size, scheme, answer(64)) as page:
        assert sorted(tiles(page).values()) == ["decode"] * 31 + ["prefill"] * 33
        assert overflow(page) <= 0
        page.click("#workers summary")
        page.click("#requests li:first-child summary")
        page.click("#charts figure:nth-child(2) summary")
        await_count(page, "#workers-table tbody tr", 64)
        await_count(page, "#requests .why table", 1)
        await_count(page, "#charts tbody tr", 13)
        assert page.locator("#requests li").count() == 50
        assert overflow(page) <= 0
        dark = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert (dark == "rgb(18, 20, 24)") == (scheme == "dark")


@pytest.mark.skipif("DASHBOARD_WORKERS" not in os.environ, reason="DASHBOARD_WORKERS=64: as many processes, minutes")
@pytest.mark.timeout(900)
def test_many_real_workers(browser: Browser, tiny: Path, record_property: Callable[[str, object], None]) -> None:
    """One of them changes its role while all have work."""
    pool = int(os.environ["DASHBOARD_WORKERS"]) // 2
    pools = ("--prefill", str(pool), "--decode", str(pool), "--placement", "least_loaded")
    settings = {"TANDEM_SIM_MS": "200,0.1,0", "TANDEM_THREADS": "1", "TANDEM_MAX_SEQUENCES": "8"}
    with (
        serving(str(tiny), "--runner", "sim", *pools, start_s=600, **settings) as many,
        ThreadPoolExecutor(pool) as users,
        opened(browser, many.url) as page,
    ):
        answers = [users.submit(many.complete, [10 + index] * 100, 60, ignore_eos=True) for index in range(2 * pool)]
        assert sorted(tiles(page).values()) == ["decode"] * pool + ["prefill"] * pool
        assert overflow(page) <= 0
        told = subprocess.run(
            command("roles", "prefill-0=decode", "--url", many.url), env=environment(many.mark), capture_output=True,
            text=True, timeout=120,
        )  # fmt: skip
        assert told.returncode == 0, told.stdout + told.stderr
        begun = time.monotonic()
        page.wait_for_function(
            "count => document.querySelectorAll('#pool-decode .tile').length == count",
            arg=pool + 1, timeout=1000 * WITHIN_S,
        )  # fmt: skip
        record_property("seconds until the page showed it", time.monotonic() - begun)
        assert {len(answer.result().tokens) for answer in answers} == {60}
        many.assert_no_leaks()


def test_everything_has_a_name(browser: Browser, served: Served) -> None:
    with opened(browser, served.url, data=answer(12)) as page:
        page.click("#workers summary")
        page.click("#charts figure:nth-child(2) summary")
        page.click("#requests li:first-child summary")
        await_count(page, "tbody", 3)
        found = names(page)
        assert [role for role, name in found if role in NAMED and not name.strip()] == []
        pictures = [name for role, name in found if role in ("image", "img")]
        assert len([name for name in pictures if "of KV blocks in use" in name]) == 11
        assert len([name for name in pictures if "last ten minutes" in name]) == 7
        assert any("not connected" in name for name in pictures)


def test_it_is_used_by_keyboard(browser: Browser, served: Served) -> None:
    with opened(browser, served.url, data=answer(2)) as page:
        page.focus("#requests li:first-child summary")
        page.keyboard.press("Enter")
        page.wait_for_selector("#requests li:first-child .why table")


def test_a_router_that_does_not_answer_is_said(browser: Browser, served: Served) -> None:
    data = answer(2)
    context = browser.new_context()
    page = context.new_page()
    answers = iter([data])
    page.route("**/dashboard/data*", lambda route: tell(route, d) if (d := next(answers, None)) else route.abort())
    page.goto(f"{served.url}/dashboard")
    page.wait_for_function("() => document.getElementById('health').innerText.includes('does not answer')")
    assert page.locator("#requests li").count() == 50  # what was known is still there
    context.close()


def test_the_operator_key_is_asked_for_once(browser: Browser, model_directory: Path) -> None:
    with Api(model_directory).serving("pd", api_keys=("tenant-key",), operator_key="operator-kéy") as api:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{api.url}/dashboard")
        page.wait_for_selector("#ask:not([hidden])")
        assert not page.is_visible("#main")
        page.fill("#key", "tenant-key")
        page.click("#ask button")
        page.wait_for_function("() => document.getElementById('problem').innerText.includes('not the operator key')")
        page.fill("#key", "operator-kéy")
        page.click("#ask button")
        page.wait_for_selector("#pool-decode .tile")
        page.reload()
        page.wait_for_selector("#pool-decode .tile")
        assert page.is_hidden("#ask")
        context.close()


def test_the_picture_in_the_readme(browser: Browser, served: Served, tmp_path: Path) -> None:
    path = Path(os.environ.get("SCREENSHOT") or tmp_path / "dashboard.png")
    with opened(browser, served.url, "picture", data=answer(8)) as page:
        page.screenshot(path=path)
    assert 20_000 < path.stat().st_size < 300_000
