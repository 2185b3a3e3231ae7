"""The pages in a real headless Chromium, used as a person would; needs chromium and its driver."""

import shutil

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import fxquant
from tests import models
from tests.report.test_drawing import Deep

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1200,1600",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pages") / "report.html"
    data = [torch.randn(4, 6, 32)]
    fxquant.sensitivity(Deep(4), data, group_size=32, method="exact").to_html(path)
    return path


def opened(browser, path):
    browser.get(path.as_uri())
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []
    return browser


def cells(browser, column):
    return [c.text for c in browser.find_elements(By.CSS_SELECTOR, f"#rows td:nth-child({column})")]


def test_bars_are_sorted_by_damage(browser, page):
    opened(browser, page)
    figures = [
        float(e.text.removesuffix(" dB"))
        for e in browser.find_elements(By.CSS_SELECTOR, ".bar > span:last-child")
    ]
    assert len(figures) == 16
    assert figures == sorted(figures)
    widths = [e.size["width"] for e in browser.find_elements(By.CSS_SELECTOR, ".track > div")]
    assert widths == sorted(widths, reverse=True)


def test_the_ledger_is_searched_and_sorted(browser, page):
    opened(browser, page)
    everything = cells(browser, 1)
    browser.find_element(By.ID, "search").send_keys("layers.2.linear int4")
    assert cells(browser, 1) == ["layers.2.linear1", "layers.2.linear2"]
    assert browser.find_element(By.ID, "count").text == f"2 of {len(everything)}"
    browser.find_element(By.ID, "search").clear()
    browser.find_element(By.ID, "search").send_keys("Linear", Keys.TAB)
    header = browser.find_elements(By.CSS_SELECTOR, "#heads button")[5]
    header.send_keys(Keys.ENTER)
    figures = [float(v) for v in cells(browser, 6) if v]
    assert figures == sorted(figures)
    header.send_keys(Keys.ENTER)
    figures = [float(v) for v in cells(browser, 6) if v]
    assert figures == sorted(figures, reverse=True)


def test_a_node_tells_its_facts_by_click_and_by_keyboard(browser, page):
    opened(browser, page)
    node = browser.find_element(By.CSS_SELECTOR, '[data-node="layers_0_linear1"]')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", node)
    node.click()
    facts = browser.find_element(By.ID, "details").text
    for word in ("layers.0.linear1", "QuantizedLinearInt4", "int4", "64x32", "reason"):
        assert word in facts
    head = browser.find_element(By.CSS_SELECTOR, '[data-node="head"]')
    browser.execute_script("arguments[0].focus()", head)
    head.send_keys(Keys.ENTER)
    assert "8x32" in browser.find_element(By.ID, "details").text
    assert head.get_attribute("aria-pressed") == "true"
    assert node.get_attribute("aria-pressed") is None


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_have_enough_contrast(browser, page, theme):
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    opened(browser, page)

    def luminance(name):
        style = browser.execute_script(f"return getComputedStyle(document.body).{name}")
        return sum(int(v) for v in style.split("(")[1].rstrip(")").split(",")[:3]) / 3

    difference = luminance("color") - luminance("backgroundColor")
    assert abs(difference) > 150
    assert (difference > 0) == (theme == "dark")


def test_nothing_is_wider_than_a_phone(browser, page):
    browser.set_window_size(500, 900)
    opened(browser, page)
    scroll = browser.execute_script("return document.documentElement.scrollWidth")
    inner = browser.execute_script("return window.innerWidth")
    browser.set_window_size(1200, 1600)
    assert scroll <= inner


def test_a_graph_of_two_thousand_nodes_opens(browser, tmp_path):
    fxquant.draw(fxquant.trace(Deep(80)), tmp_path / "big.html")
    opened(browser, tmp_path / "big.html")
    assert len(browser.find_elements(By.CSS_SELECTOR, "g[data-node]")) < 120


def test_a_diff_is_searched(browser, tmp_path):
    gm = fxquant.trace(models.Plain())
    q, _ = fxquant.quantize(gm, group_size=32, accuracy_warning="ignore")
    fxquant.diff(gm, q).to_html(tmp_path / "d.html")
    opened(browser, tmp_path / "d.html")
    browser.find_element(By.ID, "search").send_keys("rewritten")
    assert cells(browser, 2) == ["first", "second"]


def test_a_bar_a_row_and_a_node_find_one_another(browser, page):
    opened(browser, page)
    bar = browser.find_element(By.CSS_SELECTOR, ".bar .link")
    name = bar.text
    bar.click()
    assert browser.find_element(By.CSS_SELECTOR, "tr.chosen td").text == name
    folded = browser.find_elements(By.CSS_SELECTOR, "g[data-node][aria-pressed=true]")
    link = browser.find_elements(By.CSS_SELECTOR, "#rows .link")[-1]
    other = link.text
    link.click()
    assert browser.find_element(By.CSS_SELECTOR, "tr.chosen td").text == other
    assert f"module\n{other}" in browser.find_element(By.ID, "details").text
    assert len(folded) <= 1
    node = browser.find_element(By.CSS_SELECTOR, "g[data-node]")
    node.send_keys(Keys.ENTER)
    assert node.get_attribute("aria-pressed") == "true"
