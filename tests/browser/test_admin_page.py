"""The admin page, as its users see it."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from demo_visitor import APP as DEMO
from demo_visitor import Visit
from gunicorns import Gunicorn
from playwright.sync_api import Page, expect
from processes import stop, wait_for

from shmstore.contract import AnyStore
from shmstore.listing import digest

# A column of the application may be this long.
COLUMNS = {"An Address of a long name": "address", "AnotherColumnWhoseNameHasNoSpaces": "device", "Agent": "device"}
AGENT = (
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36 " + "x" * 60
)

# The demo's check of the origin is removed: the page must do that itself.
# Its columns may be longer than the demo's, too.
APP = f"""{DEMO}
app.before_request_funcs[None].remove(demo.same_origin)
columns = {COLUMNS!r}
wide = demo.admin_blueprint(
    lambda: demo.session.get("user") == "admin",
    describe=lambda data: {{name: data.get(key, "") for name, key in columns.items()}},
    name="wide",
)
app.register_blueprint(wide, url_prefix="/wide")
"""


def fill(shop: AnyStore, count: int, owner: str | None = "ada") -> None:
    for number in range(count):
        shop.set(f"{owner}-{number}", {"user": owner, "device": "Firefox; Linux"}, owner=owner)


def end_button(page: Page, sid: str) -> str:
    return f"button[name=end][value='{digest(sid)}']"


def test_the_charts_follow_the_store(visit: Visit, shop: AnyStore) -> None:
    visitor = visit()
    page = visitor.administer()
    expect(page.locator("[data-shown=sessions]")).to_have_text("1")
    expect(page.get_by_role("img", name="nothing yet")).to_have_count(0)
    expect(page.locator(".chart svg")).to_have_count(4)
    fill(shop, 41)
    expect(page.locator("[data-shown=sessions]")).to_have_text("42")
    expect(page.locator("[data-shown=owned]")).to_have_text("42 of them logged in")
    expect(page.get_by_role("img", name="1 to 42")).to_be_visible()
    page.reload()
    expect(page.get_by_role("img", name="1 to 42")).to_be_visible()  # the charts continue with the earlier figures


def test_the_charts_can_be_paused(visit: Visit, shop: AnyStore) -> None:
    page = visit().administer()
    expect(page.get_by_text("Live, every 2 seconds")).to_be_visible()
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#state")).to_have_text("Paused")
    with page.expect_request("**/figures"):
        page.get_by_role("button", name="Go on").click()
    expect(page.locator("#state")).to_have_text("Live, every 2 seconds")


COUNT_FETCHES = """
asked = 0;
const real = fetch;
fetch = (...what) => { asked++; return real(...what); };
"""


def wait_for_questions(page: Page, count: int) -> None:
    before = page.evaluate("asked")
    wait_for(lambda: page.evaluate("asked") >= before + count, "requests for the figures")


@pytest.fixture
def timed(visit: Visit) -> Page:
    """Return the admin page with a clock that tests can advance; it counts what it fetches as `asked`."""
    visitor = visit()
    visitor.page.add_init_script(COUNT_FETCHES)
    visitor.page.clock.install()
    page = visitor.administer()
    wait_for_questions(page, 2)
    return page


def asked_within(page: Page, seconds: int) -> int:
    before: int = page.evaluate("asked")
    page.clock.run_for(1000 * seconds)
    after: int = page.evaluate("asked")
    return after - before


def test_no_request_is_sent_while_the_charts_are_paused(timed: Page) -> None:
    timed.get_by_role("button", name="Pause").click()
    assert asked_within(timed, 60) == 0
    timed.get_by_role("button", name="Go on").click()
    expect(timed.locator("#state")).to_have_text("Live, every 2 seconds")
    wait_for_questions(timed, 2)


def test_it_stops_after_half_an_hour_without_activity(timed: Page) -> None:
    timed.clock.fast_forward("27:00")
    wait_for_questions(timed, 2)
    timed.clock.fast_forward("03:01")
    expect(timed.locator("#state")).to_have_text("Paused after half an hour without activity.")
    assert asked_within(timed, 60) == 0
    timed.get_by_role("button", name="Go on").click()
    expect(timed.locator("#state")).to_have_text("Live, every 2 seconds")


def test_a_user_without_permission_gets_403(visit: Visit) -> None:
    visitor = visit()
    visitor.expected = ("403",)
    visitor.log_in("ada")
    answer = visitor.page.goto("/admin/")
    assert answer is not None
    assert answer.status == 403
    expect(visitor.page.get_by_role("heading")).to_have_text("That is not for you")


def test_a_lost_permission_is_reported(visit: Visit, shop: AnyStore) -> None:
    visitor = visit()
    page = visitor.administer()
    visitor.expected = ("403",)
    expect(page.get_by_text("Live, every 2 seconds")).to_be_visible()
    shop.destroy(visitor.sid())
    expect(page.get_by_text("You may not see this any more")).to_be_visible()


def test_a_double_click_ends_one_session_once(visit: Visit, shop: AnyStore) -> None:
    fill(shop, 5)
    page = visit().administer()
    posts: list[str] = []
    page.on("request", lambda request: posts.append(request.url) if request.method == "POST" else None)
    page.dblclick(end_button(page, "ada-2"))
    expect(page.locator("#said")).to_have_text(f"Ended session {digest('ada-2')[:12]} of ada.")
    assert len(posts) == 1
    assert {*shop.owned_by("ada")} == {"ada-0", "ada-1", "ada-3", "ada-4"}


def test_a_form_can_be_sent_again_after_a_lost_answer(visit: Visit, shop: AnyStore) -> None:
    fill(shop, 2)
    page = visit().administer()
    button = page.locator(end_button(page, "ada-1"))
    page.route("**/admin/", lambda route: route.fulfill(status=204), times=1)
    button.click()
    expect(button).to_have_attribute("aria-disabled", "true")
    expect(button).not_to_have_attribute("aria-disabled", "true")
    assert "ada-1" in shop
    button.click()
    expect(page.locator("#said")).to_contain_text("Ended session")
    assert "ada-1" not in shop


def test_a_session_that_ends_while_it_is_shown(visit: Visit, shop: AnyStore) -> None:
    fill(shop, 2)
    page = visit().administer()
    shop.destroy("ada-1")
    page.click(end_button(page, "ada-1"))
    expect(page.locator("#said")).to_contain_text(f"Session {digest('ada-1')[:12]} does not exist any more")
    expect(page.locator(end_button(page, "ada-1"))).to_have_count(0)
    assert shop.owned_by("ada") == ["ada-0"]


def test_an_admin_can_end_their_own_session(visit: Visit) -> None:
    visitor = visit()
    visitor.expected = ("403",)
    page = visitor.administer()
    page.get_by_role("row", name="yours").get_by_role("button").click()
    expect(page.get_by_role("heading")).to_have_text("That is not for you")


@pytest.mark.parametrize("script", [True, False])
def test_searching_paging_and_ending_with_and_without_script(visit: Visit, shop: AnyStore, script: bool) -> None:
    fill(shop, 60)
    fill(shop, 3, "grace")
    shop.set("old", {}, ttl=0)
    page = visit(java_script_enabled=script).administer()
    expect(page.locator("[data-shown=sessions]")).to_have_text("65")
    page.get_by_role("link", name="Next").click()
    expect(page.get_by_text("Page 2 of 2", exact=True)).to_be_visible()
    expect(page.locator("tbody tr")).to_have_count(15)
    page.get_by_label("Owner, or the first digits").fill("grace")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("tbody tr")).to_have_count(3)
    page.get_by_role("link", name="End all of grace").click()
    expect(page.get_by_role("heading")).to_have_text("End 3 sessions of grace?")
    page.get_by_role("link", name="Cancel").click()
    expect(page.locator("tbody tr")).to_have_count(3)
    page.get_by_role("link", name="End all of grace").click()
    page.get_by_role("button", name="End 3 sessions").click()
    expect(page.locator("#said")).to_have_text("Ended 3 sessions of grace.")
    expect(page.locator(".empty")).to_contain_text("No session matches “grace”.")
    page.get_by_role("link", name="Show all").click()
    page.get_by_label("Only expired").check()
    page.get_by_role("button", name="Search").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    page.get_by_role("button", name="Remove 1 expired").click()
    expect(page.locator("#said")).to_have_text("Removed 1 session that had expired.")
    assert len(shop) == 61
    assert len(shop.owned_by("ada")) == 60


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("script", [True, False])
def test_order_and_page_stay(visit: Visit, shop: AnyStore, script: bool, width: int) -> None:
    """Over refresh, the end of a session, a confirmation and a search."""
    for number in range(120):
        shop.set(str(number), {"pad": "x" * number}, owner="ada")
    page = visit(java_script_enabled=script, viewport={"width": width, "height": 800}).administer()
    page.get_by_role("link", name="Size").click()
    page.get_by_role("link", name="Next").click()
    expect(page.get_by_text("Page 2 of 3", exact=True)).to_be_visible()
    first = page.locator("tbody tr code").first
    expect(first).to_have_text(digest("70")[:12])  # the largest is the admin's own, with a device
    shop.destroy("119")
    page.get_by_role("link", name="Refresh").click()
    expect(first).to_have_text(digest("69")[:12])
    expect(page.get_by_text("Page 2 of 3", exact=True)).to_be_visible()
    page.click(end_button(page, "69"))
    expect(page.locator("#said")).to_contain_text("Ended session")
    expect(first).to_have_text(digest("68")[:12])
    expect(page.get_by_text("Page 2 of 3", exact=True)).to_be_visible()
    expect(page.locator("[aria-sort=descending]")).to_contain_text("Size")
    page.get_by_label("Owner, or the first digits").fill("ada")
    page.get_by_role("button", name="Search").click()
    expect(first).to_have_text(digest("118")[:12])
    page.get_by_role("link", name="Next").click()
    page.get_by_role("link", name="End all of ada").click()
    page.get_by_role("link", name="Cancel").click()
    expect(page.get_by_text("Page 2 of 3", exact=True)).to_be_visible()
    expect(page.locator("[aria-sort=descending]")).to_contain_text("Size")


def test_the_list_says_when_it_was_made_and_what_changed_since(visit: Visit, shop: AnyStore) -> None:
    page = visit().administer()
    expect(page.get_by_text("Updated at")).to_be_visible()
    expect(page.get_by_text("Live, every 2 seconds")).to_be_visible()
    expect(page.locator("#since")).to_have_text("")
    fill(shop, 3)
    expect(page.locator("#since")).to_have_text(", 3 more since")
    expect(page.locator("tbody tr")).to_have_count(1)
    page.get_by_role("link", name="Refresh").click()
    expect(page.locator("tbody tr")).to_have_count(4)
    expect(page.locator(".chart svg")).to_have_count(4)
    expect(page.locator("#since")).to_have_text("")


def test_the_axes_of_the_charts(visit: Visit, shop: AnyStore) -> None:
    """The ends of each axis are named, and the curve ends at now."""
    page = visit().administer()
    expect(page.get_by_role("img", name=re.compile("^Sessions, last .*: 1$"))).to_be_visible()
    fill(shop, 41)
    expect(page.get_by_role("img", name=re.compile("^Sessions, last .*: 1 to 42$"))).to_be_visible()

    def axes(name: str) -> list[str]:
        title, y, x = page.locator(f"[data-chart={name}] p").all_inner_texts()
        past, now = x.split("\n")
        assert re.fullmatch(r"\d+ (s|min) ago", past)
        assert now in ("now", "no data")
        return [title, *y.split("\n")]

    assert axes("sessions") == ["Sessions", "42", "1"]
    assert axes("memory") == ["Memory in use", "100%", "0%"]
    assert axes("hits") == ["Hit rate", "100%", "0%"]
    assert axes("evicted") == ["Evictions per second", "1/s", "0/s"]
    ends = page.locator("[data-chart=sessions] svg").evaluate(
        "(svg) => { const box = svg.querySelector('.curve').getBBox(); return box.x + box.width; }"
    )
    assert ends == pytest.approx(300, abs=0.1)


def test_the_way_back_and_the_logout(visit: Visit, shop: AnyStore) -> None:
    page = visit().administer()
    page.get_by_role("link", name="Back to the application").click()
    expect(page.get_by_role("heading", name="One session, many workers")).to_be_visible()
    page.goto("/admin/")
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("status").first).to_contain_text("You are logged out")
    assert shop.owned_by("admin") == []


def test_a_killed_server_is_reported_until_it_is_back(visit: Visit, demo: Gunicorn) -> None:
    page = visit().administer()
    expect(page.get_by_text("Live, every 2 seconds")).to_be_visible()
    expect(page.locator("#stopped")).to_be_hidden()
    server = demo.server
    assert server
    stop(demo.process.pid)  # the master would start it again at once
    try:
        os.kill(server, signal.SIGKILL)
        expect(page.locator("#stopped")).to_be_visible()
    finally:
        os.kill(demo.process.pid, signal.SIGCONT)
    expect(page.locator("#stopped")).to_be_hidden()


def test_a_narrow_window(visit: Visit, shop: AnyStore) -> None:
    """No text is cut off, and each control is large enough for a finger."""
    shop.set("long", {"device": "Firefox; Linux", "address": "2001:db8:1234:5678:9abc:def0:1234:5678"}, owner="x" * 250)
    fill(shop, 60)
    page = visit(viewport={"width": 320, "height": 640}, has_touch=True).administer()
    expect(page.locator(".chart svg")).to_have_count(4)
    for query in ("", "?page=2", f"?q={'x' * 250}"):
        page.goto(f"/admin/{query}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        for button in page.locator("button:visible").all():
            box = button.bounding_box()
            assert box is not None
            assert box["height"] >= 32
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 320
    expect(page.get_by_role("table").get_by_role("row")).to_have_count(2)  # still a table with its head
    page.locator(end_button(page, "long")).tap()
    expect(page.locator("#said")).to_contain_text("Ended session")
    assert "long" not in shop


@pytest.mark.parametrize("width", [320, 390, 600, 840, 900, 1024, 1280])
def test_long_columns_cause_no_horizontal_scrolling(visit: Visit, shop: AnyStore, width: int) -> None:
    for number in range(3):
        address = "2001:db8:1234:5678:9abc:def0:1234:5678%enp0s31f6"
        shop.set(str(number), {"device": AGENT, "address": address}, owner=f"ada{number}.lovelace@example.org")
    page = visit(viewport={"width": width, "height": 800}).administer()
    for path in ("/admin/", "/wide/"):
        page.goto(path)
        expect(page.locator(".chart svg")).to_have_count(4)
        expect(page.locator("tbody tr")).to_have_count(4)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_card_shows_each_label_beside_its_value(visit: Visit, shop: AnyStore) -> None:
    fill(shop, 1)
    page = visit(viewport={"width": 390, "height": 800}).administer()
    row = page.get_by_role("row", name=digest("ada-0")[:12])
    starts = {
        cell.get_attribute("data-label"): cell.evaluate(
            """(cell) => {
              const range = document.createRange();
              range.selectNodeContents(cell);
              return Math.round(range.getBoundingClientRect().left - cell.getBoundingClientRect().left);
            }"""
        )
        for cell in row.locator("[data-label]").all()
    }
    assert {"Session", "Owner", "Size"} <= {*starts}
    assert len({*starts.values()}) == 1, starts
    size = row.locator("[data-label=Size]").evaluate("(cell) => getComputedStyle(cell, '::before').textAlign")
    assert size == "start"


def test_the_page_works_with_the_keyboard_alone(visit: Visit, shop: AnyStore) -> None:
    fill(shop, 3)
    page = visit().administer()

    def press_until(locator: str, key: str = "Tab") -> None:
        for _ in range(60):
            if page.evaluate("(locator) => document.activeElement.matches(locator)", locator):
                return
            page.keyboard.press(key)
        raise AssertionError(f"{locator} is not reached")

    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the sessions")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#sessions")).to_be_focused()
    press_until("#q")
    page.keyboard.type("ada")
    page.keyboard.press("Enter")
    expect(page.locator("tbody tr")).to_have_count(3)
    press_until(end_button(page, "ada-1"))
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_be_focused()
    expect(page.locator("#said")).to_contain_text("Ended session")
    assert "ada-1" not in shop
    press_until("button[name=end]")  # and continue from there


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_colours_of_the_system(visit: Visit, scheme: str) -> None:
    page = visit(color_scheme=scheme).administer()
    brightness = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => +a + +b, 0)"
    )
    assert (brightness > 3 * 128) == (scheme == "light")


def test_no_id_reaches_the_browser(visit: Visit, shop: AnyStore) -> None:
    fill(shop, 3)
    visitor = visit()
    seen: list[str] = []
    visitor.page.on("response", lambda response: seen.append(response.text()) if response.status == 200 else None)
    page = visitor.administer()
    expect(page.locator(".chart svg")).to_have_count(4)
    page.click(end_button(page, "ada-0"))
    expect(page.locator("#said")).to_be_visible()
    assert any(digest("ada-1") in text for text in seen)
    for sid in ("ada-1", "ada-2", visitor.sid()):
        assert not [text for text in seen if sid in text]


def test_user_input_is_shown_as_text(visit: Visit, shop: AnyStore) -> None:
    owner = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    shop.set("a", {"device": "<script>alert(3)</script>", "address": "javascript:alert(4)"}, owner=owner)
    visitor = visit()
    visitor.page.on("dialog", lambda dialog: visitor.problems.append(dialog.message))
    page = visitor.administer()
    page.get_by_role("link", name=owner).click()
    expect(page.locator("#q")).to_have_value(owner)
    page.get_by_role("link", name=f"End all of {owner}").click()
    page.get_by_role("button", name="End 1 session").click()
    expect(page.locator("#said")).to_have_text(f"Ended 1 session of {owner}.")


# -- another site -----------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere() -> Iterator[ThreadingHTTPServer]:
    """Return another server on this machine, whose page sends a form to wherever its query says."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            target, _, token = self.path.partition("?")[2].partition("&")
            page = (
                f'<form method="post" action="{target}"><input name="token" value="{token}">'
                f'<button name="end_owner" value="ada">Win a prize</button></form><iframe src="{target}"></iframe>'
            )
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_form_of_another_site_ends_nothing(
    visit: Visit, shop: AnyStore, elsewhere: ThreadingHTTPServer, address: str, host: str
) -> None:
    """With another port it is the same site to browsers, and gets the cookie; even the token does not help it."""
    fill(shop, 2)
    visitor = visit()
    visitor.expected = ("403", "frame-ancestors")
    token = visitor.administer().locator("input[name=token]").input_value()
    visitor.page.goto(f"http://{host}:{elsewhere.server_port}/?{address}/admin/&{token}")
    with visitor.page.expect_response(lambda response: response.request.method == "POST") as answer:
        visitor.page.get_by_role("button", name="Win a prize").click()
    assert answer.value.status == 403
    assert len(shop.owned_by("ada")) == 2
    assert "frame-ancestors 'none'" in answer.value.headers["content-security-policy"]
