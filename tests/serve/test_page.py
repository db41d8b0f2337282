"""The page in a browser: type, write, move the slider, see the map grow, read it with the keyboard."""

import re
import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page()
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("request", lambda request: request.url.startswith((address, "data:")) or failures.append(request.url))
    page.goto(address)
    page.get_by_role("slider").first.wait_for()
    yield page
    page.close()
    assert not failures


def finished(page) -> str:
    """What the page says at the end."""
    done = page.get_by_role("status").filter(has_text="Done")
    done.wait_for()
    text: str = done.inner_text()
    return text


def columns(page, side: int = 0) -> int:
    """Tokens in the map."""
    label = page.locator("canvas").nth(side).get_attribute("aria-label")
    return int(re.search(r"Map of (\d+) tokens by 6 layers", label)[1])


def test_a_text_is_written_and_the_map_grows(page):
    page.get_by_label("Prompt").fill("a prompt that was typed")
    page.get_by_label("New tokens").fill("5")
    page.get_by_role("button", name="Write").click()
    assert "50 % of the layers" in finished(page)
    assert columns(page) == 5
    page.get_by_label("New tokens").fill("9")
    page.get_by_label("Prompt").press("Control+Enter")
    grown = re.compile("^Map of 9 tokens")
    playwright.expect(page.locator("canvas").first).to_have_attribute("aria-label", grown)


def test_the_slider_sets_the_layers(page):
    slider = page.get_by_role("slider").first
    slider.focus()
    slider.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "4 of 6 layers"
    page.get_by_label("New tokens").fill("3")
    page.get_by_role("button", name="Write").click()
    assert "67 % of the layers" in finished(page)


def test_two_budgets_side_by_side(page):
    page.get_by_label("Two budgets side by side").check()
    page.get_by_label("New tokens").fill("4")
    page.get_by_role("button", name="Write").click()
    assert "Budget B" in finished(page)
    assert (columns(page, 0), columns(page, 1)) == (4, 4)


def test_the_keyboard_reads_the_plan_of_a_token(page):
    page.get_by_label("New tokens").fill("3")
    page.get_by_role("button", name="Write").click()
    finished(page)
    page.locator("canvas").first.focus()
    page.keyboard.press("Home")
    told = page.locator(".token").first
    assert told.inner_text().startswith("Token 1, ")
    assert "3 of 6 layers, skips" in told.inner_text()
    page.keyboard.press("End")
    assert told.inner_text().startswith("Token 3, ")


def test_an_error_is_shown(page):
    page.get_by_label("Prompt").fill("word " * 3000)
    page.get_by_role("button", name="Write").click()
    alert = page.get_by_role("alert")
    playwright.expect(alert).to_contain_text("tokens")
    assert columns(page) == 0
