"""The demo of `make run`: killing has no effect on visitors, and users manage their devices."""

from __future__ import annotations

import re

import pytest
from demo_visitor import APP as APP
from demo_visitor import Visit
from gunicorns import Gunicorn
from playwright.sync_api import Page, Route, expect
from processes import alive, wait_for

from shmstore.contract import AnyStore

PHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 Version/17.5 Mobile Safari/604.1"
pytestmark = pytest.mark.processes("executed")  # the demo knows the server by its command line
ANSWERS = "#answers li:not(.killed):not(.failed)"


def answers(page: Page) -> list[tuple[int, int]]:
    """Return the visits and the worker of each answer that is shown."""
    texts = page.locator(ANSWERS).all_inner_texts()
    return [(int(visits), int(worker)) for visits, _, worker in map(str.split, texts)]


def tile(page: Page, name: str) -> int:
    return int(page.locator(f"[data-live={name}]").inner_text().split()[0])


def test_killing_workers_and_the_server_under_requests(visit: Visit, demo: Gunicorn) -> None:
    """Each kill is visible: in a line that says that the count went on, among the answers, and by the pids."""
    page = visit().page
    page.goto("/")
    before = tile(page, "visits")
    page.get_by_role("button", name="Keep asking").click()
    for kill in ("Kill a worker", "Kill the store's server", "Kill a worker"):
        page.get_by_role("button", name=kill).click()
        expect(page.locator("#tally")).to_contain_text("was counted by worker")
        told = re.search(
            r"(\d+) was killed after your visit (\d+).* Visit (\d+) was", page.locator("#tally").inner_text()
        )
        assert told
        killed, visits_before, visits_after = map(int, told.groups())
        assert not alive(killed)
        assert visits_before < visits_after
        if kill == "Kill a worker":
            expect(page.locator("#workers .killed").last).to_have_text(f"{killed} killed")
        else:
            expect(page.locator("[data-live=server]")).to_have_attribute("data-before", str(killed))
            wait_for(lambda: tile(page, "server") == demo.server, "the successor")
        expect(page.locator("#answers li.killed").last).to_contain_text(str(killed))
        wait_for(lambda least=visits_after + 2: tile(page, "visits") >= least, "more answers")  # type: ignore[misc]
        page.evaluate("document.getElementById('tally').textContent = ''")
    page.get_by_role("button", name="Stop asking").click()
    expect(page.locator("#tally")).to_contain_text("0 requests failed")
    counted = [visits for visits, _ in answers(page)]
    assert counted == [*range(counted[0], counted[0] + len(counted))]
    assert tile(page, "visits") == counted[-1] > before
    assert tile(page, "pid") == answers(page)[-1][1]
    wait_for(lambda: len(demo.workers()) >= 3, "the workers' return")


def test_a_kill_begins_to_ask(visit: Visit) -> None:
    page = visit().page
    page.goto("/")
    page.get_by_role("button", name="Kill a worker").click()
    expect(page.locator(ANSWERS).nth(2)).to_be_attached()
    expect(page.get_by_role("button", name="Stop asking")).to_be_visible()


def test_no_worker_is_killed_while_a_request_waits_for_its_answer(visit: Visit) -> None:
    """The killed worker may be the one that has begun the request."""
    page = visit().page
    page.goto("/")
    held: list[Route] = []
    kills: list[str] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/live", hold, times=1)
    page.on("request", lambda request: kills.append(request.url) if request.method == "POST" else None)
    page.get_by_role("button", name="Keep asking").click()
    wait_for(lambda: page.evaluate("true") and held, "a request that waits")
    page.get_by_role("button", name="Kill a worker").click()
    page.evaluate("new Promise(requestAnimationFrame)")
    assert not kills
    held[0].continue_()
    expect(page.locator("#tally")).to_contain_text("was counted by worker")
    assert kills


@pytest.mark.parametrize("script", [True, False])
def test_two_requests_at_once_keep_both_changes(visit: Visit, script: bool) -> None:
    page = visit(java_script_enabled=script).page
    page.goto("/")
    before = tile(page, "visits")
    for _ in range(2):
        page.get_by_role("button", name="Start both").click()
        expect(page.get_by_text("Both changes are in the session.")).to_be_visible()
        workers = [int(text.split()[-1]) for text in page.locator(".changes li > :first-child").all_inner_texts()]
        assert len({*workers}) == (2 if script else 1)
    page.goto("/")
    assert tile(page, "visits") == before + (1 if script else 3)
    expect(page.get_by_text("Both changes are in the session.")).to_be_visible()


def test_the_demo_works_with_the_keyboard_alone(visit: Visit) -> None:
    page = visit().page
    page.goto("/")

    def press_until(name: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent") == name:
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
                return page.keyboard.press("Enter")
        raise AssertionError(f"{name} is not reached")

    press_until("Kill a worker")
    expect(page.locator("#tally")).to_contain_text("was counted by worker")
    press_until("Start both")
    expect(page.get_by_text("Both changes are in the session.")).to_be_visible()
    page.get_by_label("Your name").focus()
    page.keyboard.type("ada")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status").first).to_contain_text("Hello ada.")
    press_until("Your devices")
    expect(page.get_by_role("heading")).to_have_text("Your devices")


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_no_state_scrolls_sideways(visit: Visit, shop: AnyStore, width: int) -> None:
    visitor = visit(viewport={"width": width, "height": 800})
    visitor.expected = ("404",)
    page = visitor.page
    page.goto("/")
    page.get_by_role("button", name="Kill a worker").click()
    expect(page.locator("#tally")).to_contain_text("was counted by worker")
    page.get_by_role("button", name="Start both").click()
    expect(page.get_by_text("Both changes are in the session.")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    clipped = page.locator("main *").evaluate_all(
        "(all) => all.filter((each) => each.getBoundingClientRect().right > innerWidth).map((each) => each.outerHTML)"
    )
    assert clipped == []
    page.goto(f"/{'x' * 200}")
    expect(page.get_by_role("heading")).to_have_text("There is no such page")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_session_ended_elsewhere_is_reported(visit: Visit, shop: AnyStore) -> None:
    visitor = visit()
    page = visitor.page
    page.goto("/")
    shop.destroy(visitor.sid())
    page.reload()
    expect(page.get_by_role("status").first).to_contain_text("Your session has ended")
    assert tile(page, "visits") == 1
    page.get_by_role("button", name="Keep asking").click()
    expect(page.locator(ANSWERS)).not_to_have_count(0)
    shop.destroy(visitor.sid())
    expect(page.locator("#tally")).to_contain_text("Your session has ended")


@pytest.mark.parametrize("button", ["Kill a worker", "Kill the store's server"])
def test_killing_without_script(visit: Visit, demo: Gunicorn, button: str) -> None:
    page = visit(java_script_enabled=False).page
    page.goto("/")
    before = tile(page, "visits")
    page.get_by_role("button", name=button).click()
    expect(page.get_by_role("status").first).to_contain_text(f"was killed after your visit {before}")
    expect(page.get_by_role("status").first).to_contain_text(f"Visit {before + 1} was counted by worker")
    assert tile(page, "visits") == before + 1


def test_the_answering_worker_is_shown(visit: Visit, demo: Gunicorn) -> None:
    page = visit().page
    page.goto("/")
    assert tile(page, "pid") in demo.workers()
    assert tile(page, "server") == demo.server
    assert {*map(int, page.locator("#workers li").all_inner_texts())} == {*demo.workers()}
    expect(page.locator("#workers [aria-current]")).to_have_text(str(tile(page, "pid")))


# -- your devices -----------------------------------------------------------------------------------------------------


def test_logging_out_a_lost_phone(visit: Visit, shop: AnyStore) -> None:
    """With a double click, and while the phone is in use."""
    laptop, phone, eve = visit(), visit(user_agent=PHONE), visit()
    laptop.log_in("ada")
    phone.log_in("ada")
    eve.log_in("eve")
    page = laptop.page
    page.get_by_role("link", name="Your devices").click()
    expect(page.get_by_role("listitem")).to_have_count(2)
    expect(page.get_by_role("listitem").filter(has_text="this device")).to_contain_text("Chrome on Linux")
    for sid in (laptop.sid(), phone.sid(), eve.sid()):
        assert sid not in page.content()
    page.get_by_role("listitem").filter(has_text="Safari on iPhone").get_by_role("button").dblclick()
    expect(page.get_by_role("status")).to_contain_text("That device is logged out")
    expect(page.get_by_role("listitem")).to_have_count(1)
    phone.page.goto("/")
    expect(phone.page.get_by_role("button", name="Log in")).to_be_visible()
    eve.page.goto("/")
    expect(eve.page.get_by_text("You are eve.")).to_be_visible()
    assert shop.owned_by("ada") == [laptop.sid()]


def test_logging_out_a_device_that_is_already_logged_out(visit: Visit) -> None:
    laptop, phone = visit(), visit(user_agent=PHONE)
    for visitor in (laptop, phone):
        visitor.log_in("ada")
    laptop.page.goto("/devices/")
    phone.page.get_by_role("button", name="Log out").click()
    laptop.page.get_by_role("button", name="Log out Safari").click()
    expect(laptop.page.get_by_role("status")).to_contain_text("That device is not in the list any more")


def test_logging_out_everywhere_else_on_a_phone(visit: Visit, shop: AnyStore) -> None:
    others = [visit() for _ in range(2)]
    phone = visit(user_agent=PHONE, viewport={"width": 320, "height": 600}, color_scheme="dark")
    for visitor in (*others, phone):
        visitor.log_in("ada")
    phone.page.goto("/devices/")
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 320
    phone.page.get_by_role("button", name="Log out all others").click()
    expect(phone.page.get_by_role("status")).to_have_text("2 other devices logged out.")
    assert shop.owned_by("ada") == [phone.sid()]
