"""A matplotlib figure as an SVG element to stand inside a page: its colours are the page's variables, so that one picture serves a light
and a dark scheme; its text is text; nothing in it is executable or loaded from elsewhere, whatever the labels say.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any
from xml.etree import ElementTree

from mhc.yamlfile import printable

#: Colours as matplotlib is given them, each the name of a variable of the page. The palette is Okabe and Ito's, told apart by colour-blind
#: people; markers differ as well.
COLORS = {
    "ink": "#101419",
    "muted": "#5c6671",
    "line": "#d0d5dc",
    "paper": "#fdfdfe",
    "ours": "#0072b2",
    "good": "#009e73",
    "floor": "#d55e00",
    "rival": "#8f98a3",
    "other": "#cc79a7",
    "second": "#e69f00",
    "third": "#56b4e9",
}
_VARIABLE = {value: f"var(--{name})" for name, value in COLORS.items()}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
FONT_PX = 12
#: Widths in CSS pixels of the two variants of a chart; the page shows the one that fits.
WIDE, NARROW = 1040, 356
MOST_LABEL = 60


def label(text: str) -> str:
    """A name as a chart shows it: on one line, printable, not endless."""
    text = printable(text)
    return text if len(text) <= MOST_LABEL else f"{text[: MOST_LABEL - 1]}…"


@contextlib.contextmanager
def style(name: str) -> Iterator[None]:
    """matplotlib's settings for a chart, whatever the user's own are."""
    import matplotlib
    from cycler import cycler  # matplotlib's own

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.usetex": False,
        "text.parse_math": False,  # a name may hold dollars
        "font.family": "sans-serif",
        "font.size": FONT_PX,
        "axes.titlesize": FONT_PX + 1,
        "axes.labelsize": FONT_PX,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "xtick.labelsize": FONT_PX - 1,
        "ytick.labelsize": FONT_PX - 1,
        "legend.fontsize": FONT_PX - 1,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": COLORS["ink"],
        "axes.labelcolor": COLORS["ink"],
        "axes.titlecolor": COLORS["ink"],
        "xtick.color": COLORS["muted"],
        "ytick.color": COLORS["muted"],
        "xtick.labelcolor": COLORS["ink"],
        "ytick.labelcolor": COLORS["ink"],
        "axes.edgecolor": COLORS["muted"],
        "grid.color": COLORS["line"],
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "figure.dpi": 72,
        "axes.prop_cycle": cycler(color=[COLORS["ours"]]),
    }
    log = logging.getLogger("matplotlib.font_manager")
    before = log.level
    log.setLevel(logging.ERROR)  # a sans-serif that is not here: the reader's browser has its own
    try:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(settings)
            yield
    finally:
        log.setLevel(before)


def new_figure(width: float, height: float) -> Any:
    """A figure of this many CSS pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), layout="constrained")


def draw(name: str, title: str, description: str, make: Callable[[float], Any]) -> dict[str, str]:
    """``make(width in pixels) -> figure`` as two SVG elements, ``wide`` and ``narrow``; ``description`` is the alternative text."""
    found = {}
    for variant, width in (("wide", WIDE), ("narrow", NARROW)):
        unique = f"{name}-{variant}"
        with style(unique):
            found[variant] = to_svg(make(width), unique, title, description)
    return found


def to_svg(figure: Any, unique: str, title: str, description: str) -> str:
    """The figure as an SVG element. ``unique``: a word of [a-z0-9-] that no other picture of the page has; its ids begin with it."""
    import warnings

    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in a script that matplotlib's font lacks; the browser has it
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(stream.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    width, height = root.get("viewBox", "0 0 0 0").split()[2:]
    box = f"0 0 {float(width):g} {float(height):g}"
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "width": f"{float(width):g}", "height": f"{float(height):g}", "role": "img"})
    root.attrib |= {"aria-labelledby": f"{unique}-title {unique}-desc", "stroke-linejoin": "round"}
    for element in root.iter():
        _rewrite(element, unique)
    for tag, text in (("desc", description), ("title", title)):
        note = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{unique}-{tag}"})
        note.text = printable(text)
        root.insert(0, note)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _rewrite(element: ElementTree.Element, unique: str) -> None:
    """Ids of this picture alone, numbers no longer than a screen can show, colours of the page."""
    if element.get("id"):
        used = element.tag.endswith(("}clipPath", "}path", "}g")) and not re.fullmatch(r"[a-z0-9.]+_\d+|text_\d+", element.attrib["id"])
        if used:
            element.set("id", f"{unique}-{element.attrib['id']}")
        else:
            del element.attrib["id"]
    for key in list(element.attrib):
        value = element.attrib[key]
        if key == f"{{{_XLINK}}}href":
            del element.attrib[key]
            element.set("href", f"#{unique}-{value.removeprefix('#')}")
        elif key == "style" or key in ("fill", "stroke"):
            value = re.sub(r"#[0-9a-f]{6}", lambda m: _VARIABLE.get(m[0], m[0]), value)
            value = re.sub(r"font: ([0-9.]+px|\d+ [0-9.]+px|bold [0-9.]+px|700 [0-9.]+px) [^;]*", r"font: \1 var(--font)", value)
            element.set(key, value)
        elif key in ("d", "transform", "points", "x", "y", "width", "height"):
            element.set(key, re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), value))
        if key == "clip-path":
            element.set(key, value.replace("url(#", f"url(#{unique}-"))
