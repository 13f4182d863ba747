"""A notebook in a real browser: JupyterLab opens it and runs it, a slider is moved, and the figure
follows.

This is the one thing that nbval cannot see: a widget lives in the page.
"""

import base64
import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from PIL import Image

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
NOTEBOOK = (
    Path(__file__).resolve().parents[1] / "notebooks" / "in_depth" / "00_measuring_memory.ipynb"
)

# Seconds. Generous: what is tested is that it happens, not how fast.
START_TIMEOUT, RUN_TIMEOUT, REDRAW_TIMEOUT = 600, 3600, 300

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)"),
]

# Runs every cell of the notebook in front through JupyterLab's own commands (a click in the menu
# can be lost), and returns what its cells show: execution count, and whether there is an error that
# the notebook does not expect.
RUN_ALL = """async (timeout) => {
    const lab = window.jupyterapp;
    await lab.restored;
    while (!lab.shell.currentWidget?.sessionContext) {
        await new Promise((done) => setTimeout(done, 100));
    }
    const panel = lab.shell.currentWidget;
    await panel.sessionContext.ready;
    const late = new Error("the notebook did not end in time");
    await Promise.race([
        lab.commands.execute("notebook:run-all-cells"),
        new Promise((_, fail) => setTimeout(() => fail(late), timeout)),
    ]);
    const kernel = panel.sessionContext.session.kernel;
    while (kernel.status !== "idle") await new Promise((done) => setTimeout(done, 100));
    const cells = panel.content.model.toJSON().cells.filter((cell) => cell.cell_type === "code");
    return cells.map((cell) => ({
        source: [].concat(cell.source).join(""),
        count: cell.execution_count,
        error: cell.outputs.some((output) => output.output_type === "error")
            && !(cell.metadata.tags ?? []).includes("raises-exception"),
    }));
}"""

# The bytes of a picture as the page shows it (a widget's picture is a blob: that only the page can
# read).
PICTURE = """async (image) => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
}"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as p:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = p.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    yield page
    page.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What JupyterLab serves."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def lab(folder, tmp_path_factory):
    """Starts JupyterLab in `folder`, with no settings of the person who runs the test; gives its
    address.
    """
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
    own = tmp_path_factory.mktemp("jupyter")
    kinds = (
        "JUPYTER_CONFIG",
        "JUPYTER_DATA",
        "JUPYTER_RUNTIME",
        "JUPYTERLAB_WORKSPACES",
        "JUPYTERLAB_SETTINGS",
    )
    environment = {**os.environ, **{f"{kind}_DIR": str(own / kind.lower()) for kind in kinds}}
    # Every cell is in the page, whether it is scrolled to or not.
    settings = (
        own
        / "jupyterlab_settings"
        / "@jupyterlab"
        / "notebook-extension"
        / "tracker.jupyterlab-settings"
    )
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        *(
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--allow-root",
            "--ip=127.0.0.1",
            f"--port={port}",
        ),
        *(
            "--ServerApp.port_retries=0",
            f"--ServerApp.root_dir={folder}",
            "--IdentityProvider.token=",
        ),
        "--LabApp.expose_app_in_browser=True",
        # No question in the page, whether news may be fetched, over what is tested.
        *(
            "--LabApp.news_url=None",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        ),
    ]
    log = own / "lab.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()  # JupyterLab ends its kernels
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def run_all(page, lab, name):
    """Open a notebook and run all of it; returns its code cells as the page has them afterwards."""
    page.goto(f"{lab}/lab/tree/{name}?reset")
    page.wait_for_function("() => window.jupyterapp !== undefined", timeout=START_TIMEOUT * 1000)
    cells = page.evaluate(RUN_ALL, RUN_TIMEOUT * 1000)
    return [cell for cell in cells if cell["source"].strip()]


def assert_figure_follows_slider(page):
    """Move the first slider by the arrow keys; the picture beside it has to become another one."""
    slider = page.locator("[role=slider]").first
    slider.wait_for(timeout=REDRAW_TIMEOUT * 1000)
    output = page.locator(".jp-OutputArea-child").filter(has=page.locator("[role=slider]")).first
    image = output.locator("img").first
    image.wait_for(timeout=REDRAW_TIMEOUT * 1000)
    slider.scroll_into_view_if_needed()

    value, picture = slider.get_attribute("aria-valuetext"), image.evaluate(PICTURE)
    assert len(picture) > 0
    slider.focus()
    # A slider that stands at its end can move one way only.
    for key in ("ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        if slider.get_attribute("aria-valuetext") != value:
            break
    assert slider.get_attribute("aria-valuetext") != value, "the arrow keys did not move the slider"
    deadline = time.monotonic() + REDRAW_TIMEOUT
    while image.evaluate(PICTURE) == picture:
        assert time.monotonic() < deadline, "the slider moved, and the figure stayed as it was"
        page.wait_for_timeout(100)


# The smallest notebook with a slider, and a picture that follows it.
STAND_IN = """
import base64
import ipywidgets
from IPython.display import display

pictures = [base64.b64decode(p) for p in {pictures}]
slider = {slider}
image = ipywidgets.Image(value=pictures[slider.value], format="png")
slider.observe(lambda change: setattr(image, "value", pictures[change.new]), names="value")
display(ipywidgets.VBox([slider, image]))
"""
SLIDERS = {
    "at_its_start": "ipywidgets.IntSlider(value=0, min=0, max=1)",
    "at_its_end": "ipywidgets.IntSlider(value=1, min=0, max=1)",
    "of_words": "ipywidgets.SelectionSlider(options=[('no', 0), ('yes', 1)])",
}


def stand_in(folder, name, slider, grays):
    """Write a notebook whose picture is one pixel of these grays; returns its file name."""
    pictures = []
    for gray in grays:
        file = io.BytesIO()
        Image.new("L", (1, 1), gray).save(file, "png")
        pictures.append(base64.b64encode(file.getvalue()).decode())
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )
    source = STAND_IN.format(pictures=pictures, slider=slider)
    notebook.cells = [nbformat.v4.new_code_cell("1 + 1"), nbformat.v4.new_code_cell(source)]
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return f"{name}.ipynb"


def test_the_figure_of_the_first_notebook_follows_its_slider(page, lab, folder):
    if not NOTEBOOK.exists():
        pytest.skip(f"{NOTEBOOK.name} is not written yet")
    # A copy, so that running it changes nothing here; memlab is found because it is installed.
    shutil.copy(NOTEBOOK, folder)
    cells = run_all(page, lab, NOTEBOOK.name)
    assert [cell["count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert [cell["source"] for cell in cells if cell["error"]] == []
    assert_figure_follows_slider(page)


FORM = """
from memlab import will_it_fit
will_it_fit.form(will_it_fit.load())
"""


def test_the_form_of_the_lesson_predicts_when_it_is_clicked(page, lab, folder):
    pytest.importorskip("transformers")
    kernel = {"name": "python3", "display_name": "Python 3"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [nbformat.v4.new_code_cell(FORM)]
    nbformat.write(notebook, folder / "form.ipynb")
    assert [cell["error"] for cell in run_all(page, lab, "form.ipynb")] == [False]

    output = page.locator(".jp-OutputArea-child").filter(has=page.locator("button")).first
    image = output.locator("img").first
    image.wait_for(timeout=REDRAW_TIMEOUT * 1000)
    kept = image.evaluate(PICTURE)
    models, sequences = output.locator("select").nth(0), output.locator("select").nth(1)
    models.select_option(label="GPT-2 124M")
    sequences.select_option(label="512")
    output.locator("button").click()
    said = output.get_by_text("GPT-2 124M, LoRA, checkpoints, 1 × 512 tokens fits")
    said.wait_for(timeout=REDRAW_TIMEOUT * 1000)
    assert image.evaluate(PICTURE) != kept


@pytest.mark.parametrize("name", SLIDERS)
def test_the_figure_of_a_stand_in_follows_its_slider(page, lab, folder, name):
    cells = run_all(page, lab, stand_in(folder, name, SLIDERS[name], grays=[0, 255]))
    assert [(cell["count"], cell["error"]) for cell in cells] == [(1, False), (2, False)]
    assert_figure_follows_slider(page)


def test_a_figure_that_stays_is_found(page, lab, folder, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "REDRAW_TIMEOUT", 5)
    run_all(page, lab, stand_in(folder, "stays", SLIDERS["at_its_start"], grays=[0, 0]))
    with pytest.raises(AssertionError, match="the figure stayed as it was"):
        assert_figure_follows_slider(page)


def test_a_cell_that_fails_is_found(page, lab, folder):
    cells = run_all(page, lab, stand_in(folder, "fails", "no_such_slider", grays=[0]))
    assert [cell["error"] for cell in cells] == [False, True]
