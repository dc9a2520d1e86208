"""The HTML report: one file, nothing fetched, every row and chart in it, well-formed."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from trimtab.api import make_plan, predict
from trimtab.spec.machine import load_machine
from trimtab.spec.workload import Workload
from trimtab.ui.comparison import Compared
from trimtab.ui.html import write_report
from trimtab.ui.svg import Dot, LogAxis, roofline, scatter


def test_report_is_one_offline_file(tmp_path: Path) -> None:
    reports = [
        predict(make_plan("smollm2-135m", "a100", Workload(), [t] if t else [])) for t in ("", "rtn", "streaming-llm")
    ]
    rows = [
        Compared(label=label, predicted=r, measured=r)
        for label, r in zip(("baseline", "rtn", "<ring> & more"), reports, strict=True)
    ]
    path = tmp_path / "report.html"
    write_report(
        path, title="T <1>", facts=["a & b"], rows=rows, machine=load_machine("a100"), elsewhere=reports[:1], band=0.25
    )
    page = path.read_text()
    assert not re.search(r"(src|href)=.?(https?:)?//", page) and "<script" not in page and "@import" not in page
    assert "width=device-width" in page
    assert "&lt;ring&gt; &amp; more" in page and "<ring>" not in page
    parser = HTMLParser()
    parser.feed(page)
    charts = re.findall(r"<svg viewBox=\"0 0 400.*?</svg>", page)
    assert len(charts) == 2
    dots = [len(ElementTree.fromstring(chart).findall(".//circle")) for chart in charts]
    assert dots[0] == sum(bool(op.flops) for op in reports[0].ops)  # one per operator that multiplies
    assert dots[1] == 2 * 3  # TTFT and TPOT of each row


def test_roof_bends_at_the_ridge_and_dots_stand_where_they_say() -> None:
    dot = Dot(x=10.0, y=1e12, series="decode", title="x")
    chart = ElementTree.fromstring(roofline("r", [dot], 1e14, 1e12))
    points = [tuple(map(float, p.split(","))) for p in chart.find("polyline").get("points").split()]  # type: ignore[union-attr]
    assert points[1][1] == points[2][1] and points[0][1] > points[1][1]
    circle = chart.find("circle")
    assert circle is not None
    assert points[0][0] < float(circle.get("cx", "0")) < points[1][0]


def test_scatter_puts_equal_values_on_the_diagonal() -> None:
    chart = ElementTree.fromstring(
        scatter(
            "s",
            [Dot(x=v, y=v, series="s0", title="") for v in (0.01, 1.0)],
            unit="s",
            x_label="p",
            y_label="m",
            band=0.25,
        )
    )
    line = next(element for element in chart.findall("line") if element.get("class") == "roof")
    x1, y1, x2, y2 = (float(line.get(name, "0")) for name in ("x1", "y1", "x2", "y2"))
    for circle in chart.findall("circle"):
        x, y = float(circle.get("cx", "0")), float(circle.get("cy", "0"))
        assert abs(y - (y1 + (x - x1) * (y2 - y1) / (x2 - x1))) < 0.3  # coordinates are rounded to 0.1


def test_axis_holds_its_values() -> None:
    axis = LogAxis.around([1e-3, 1e3], 0, 100)
    assert 0 < axis.at(1e-3) < axis.at(1) < axis.at(1e3) < 100
    assert abs(axis.at(1) - (axis.at(1e-3) + axis.at(1e3)) / 2) < 1e-9
    assert len(axis.ticks()) <= 6
