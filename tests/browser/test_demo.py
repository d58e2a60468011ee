"""The demo of `make run`: killing has no effect on visitors, and users manage their devices."""

from __future__ import annotations

import re

import pytest
from demo_visitor import APP as APP
from demo_visitor import Visit
from gunicorns import Gunicorn
from playwright.sync_api import Page, expect
from processes import alive, wait_for

from shmstore.contract import AnyStore

PHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 Version/17.5 Mobile Safari/604.1"
pytestmark = pytest.mark.processes("executed")  # the demo knows the server by its command line
ANSWERS = "#answers li:not(.killed):not(.failed)"


def answers(page: Page) -> list[tuple[int, int]]:
    """Return the visits and the worker of each answer that is shown."""
    texts = page.locator(ANSWERS).all_inner_texts()
    return [(int(visits), int(worker)) for visits, worker in map(str.split, texts)]


def visits_of(page: Page) -> int:
    return int(page.locator("dd").first.inner_text())


def test_killing_workers_and_the_server_under_requests(visit: Visit, demo: Gunicorn) -> None:
    page = visit().page
    page.goto("/")
    before = visits_of(page)
    page.get_by_role("button", name="Keep asking").click()
    for kill in ("Kill a worker", "Kill the store's server", "Kill a worker"):
        seen = len(answers(page))
        page.get_by_role("button", name=kill).click()
        expect(page.locator("#tally")).to_contain_text("was killed")
        killed = re.search(r"\d+", page.locator("#tally").inner_text())
        assert killed
        assert not alive(int(killed[0]))
        expect(page.locator(ANSWERS).nth(seen + 2)).to_be_attached()
        page.evaluate("document.getElementById('tally').textContent = ''")
    page.get_by_role("button", name="Stop asking").click()
    expect(page.locator("#tally")).to_contain_text("0 requests failed")
    counted = [visits for visits, _ in answers(page)]
    assert counted == [*range(before + 1, before + 1 + len(counted))]
    expect(page.locator("#answers li.killed")).to_have_count(3)
    wait_for(lambda: len(demo.workers()) >= 3, "the workers' return")


@pytest.mark.parametrize("button", ["Kill a worker", "Kill the store's server"])
def test_killing_without_script(visit: Visit, demo: Gunicorn, button: str) -> None:
    page = visit(java_script_enabled=False).page
    page.goto("/")
    before = visits_of(page)
    page.get_by_role("button", name=button).click()
    expect(page.get_by_role("status").first).to_contain_text("was killed")
    assert visits_of(page) == before + 1


def test_the_answering_worker_is_shown(visit: Visit, demo: Gunicorn) -> None:
    page = visit().page
    page.goto("/")
    assert int(page.locator("dd").nth(1).inner_text()) in demo.workers()
    assert int(page.locator("dd").nth(3).inner_text()) == demo.server


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
