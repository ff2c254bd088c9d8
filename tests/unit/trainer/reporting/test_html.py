"""Pages as a browser shows them: the compressed library is unpacked, and every chart is drawn."""

import shutil
import subprocess

import pytest

from tests.unit.trainer.reporting.test_run_report import full_run, write_run
from trainer.reporting.run_report import write_report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no browser")
@pytest.mark.parametrize("width", [1400, 500])  # of a window; 500 is the least
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_every_chart_without_a_request(tmp_path, width, scheme):
    page = write_report(write_run(tmp_path / "run", full_run()))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
        "--virtual-time-budget=20000",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True
    )
    page = done.stdout
    charts = page.count('<figure class="plot"')
    assert charts == page.count('data-drawn="yes"') == 7
    assert "The chart needs JavaScript" not in page
    colours = {"light": "rgb(31, 41, 51)", "dark": "rgb(228, 232, 236)"}
    assert colours[scheme] in page
    (other,) = set(colours) - {scheme}
    assert colours[other] not in page
