"""The report in a real browser: nothing sticks out on a phone, charts are drawn, dark is dark."""

import json
import re
import shutil
import subprocess

import pytest
from test_report import run  # noqa: F401  a run folder with every part

from qlora_dpo.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")]

MEASURE = """<!DOCTYPE html><iframe src="run/report.html" width="WIDTH" height="900" frameborder="0"></iframe>
<pre id="found"></pre><script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument, body = page.body;
  const charts = [...page.querySelectorAll("figure > svg")].map(svg => svg.getBoundingClientRect());
  const text = page.querySelector("figure > svg text");
  const outside = [...page.querySelectorAll("figure > svg text")].filter(text => {
    const box = text.getBoundingClientRect(), frame = text.ownerSVGElement.getBoundingClientRect();
    return box.left < frame.left || box.right > frame.right;
  });
  document.getElementById("found").textContent = JSON.stringify({
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    height: page.documentElement.scrollHeight,
    charts: charts.map(box => [box.width, box.height]),
    outside: outside.map(text => text.textContent),
    letters: text.getBoundingClientRect().height,
    paper: page.defaultView.getComputedStyle(body).backgroundColor,
  });
});
</script>"""


def measured(folder, width, dark):
    """What a browser says of the page in a frame so many pixels wide."""
    page = folder / "measure.html"
    page.write_text(MEASURE.replace("WIDTH", str(width)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    options += [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    output = subprocess.run([BROWSER, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(re.search('<pre id="found">(.*?)</pre>', output.stdout, re.DOTALL)[1])


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 800, 1200])
def test_the_page_fits_and_its_charts_are_drawn(run, width, dark):  # noqa: F811
    write_report(str(run))
    found = measured(run.parent, width, dark)
    assert found["overflow"] == 0
    assert found["outside"] == []
    assert len(found["charts"]) == 11
    assert all(w > 250 and h > 80 for w, h in found["charts"])
    assert found["letters"] > 8
    assert found["paper"] == ("rgb(18, 21, 28)" if dark else "rgb(255, 255, 255)")


def test_a_page_that_sticks_out_would_be_found(run):  # noqa: F811
    write_report(str(run))
    page = run / "report.html"
    page.write_text(page.read_text().replace("<body>", '<body><p style="width:2000px">wide</p>'))
    assert measured(run.parent, 360, dark=False)["overflow"] > 1000
