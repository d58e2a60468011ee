"""Each page in each state, checked by axe-core: labels, landmarks, names, contrast."""

from __future__ import annotations

from importlib.resources import files

import pytest
from demo_visitor import APP as APP
from demo_visitor import Visit
from playwright.sync_api import Page, expect

from shmstore.contract import AnyStore

AXE = files("axe_playwright_python").joinpath("axe.min.js").read_text()


def judge(page: Page) -> None:
    page.evaluate(AXE)
    found = page.evaluate("axe.run().then((results) => results.violations)")
    assert [(each["id"], each["help"], [node["html"] for node in each["nodes"]]) for each in found] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_accessible(visit: Visit, shop: AnyStore, scheme: str, width: int) -> None:
    for number in range(60):
        shop.set(str(number), {"device": "Safari; iPhone", "address": "192.0.2.1"}, owner="ada" if number % 2 else None)
    shop.set("old", {}, ttl=0)
    visitor = visit(color_scheme=scheme, viewport={"width": width, "height": 800})
    visitor.expected = ("404",)
    page = visitor.page
    page.goto("/")
    judge(page)
    visitor.administer()
    expect(page.locator(".chart svg")).to_have_count(4)
    judge(page)
    for query in ("?q=ada", "?q=nobody+there", "?expired=1", "?page=2&sort=-size", "end-all?owner=ada"):
        page.goto(f"/admin/{query}")
        judge(page)
    page.goto("/admin/?q=ada")
    page.get_by_role("button", name="End session").first.click()
    expect(page.locator("#said")).to_be_visible()
    judge(page)
    page.goto("/")
    page.get_by_role("button", name="Keep asking").click()
    page.get_by_role("button", name="Kill a worker").click()
    expect(page.locator("#answers li.killed")).to_have_count(1)
    page.get_by_role("button", name="Stop asking").click()
    page.get_by_role("button", name="Start both").click()
    expect(page.get_by_text("Both changes are in the session.")).to_be_visible()
    judge(page)
    page.goto("/nothing-here")
    judge(page)
    other = visit()
    other.log_in("admin", "demo")
    page.goto("/devices/")
    expect(page.get_by_role("button", name="Log out all others")).to_be_visible()
    judge(page)
