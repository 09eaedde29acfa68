"""The HTML of reports: pages, sections, tables and images, in files that need no server, no network and no other file.

Names and messages on a page are untrusted. ``text`` escapes them and removes passwords and signatures from URLs, and
the page's content security policy allows no script but its own.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
from collections.abc import Collection, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from PIL import Image

from catgan.command import without_queries
from catgan.text import printable
from infer.files import load
from trainer.tracking.messages import redact


def document(
    title: str, headline: str, sections: Sequence[str], footer: str, styles: Sequence[str], scripts: Sequence[str]
) -> str:
    """A page. ``title`` is plain text; ``headline``, ``sections`` and ``footer`` are HTML. ``styles`` and ``scripts``
    are files of ``trainer/report/web``, in the order in which they follow each other."""
    web = resources.files("trainer.report") / "web"

    def joined(names: Sequence[str]) -> str:
        return "".join((web / name).read_text(encoding="utf-8") for name in names)

    style, script = joined(styles), joined(scripts)
    return Template((web / "report.html").read_text(encoding="utf-8")).substitute(
        name=text(title),
        headline=headline,
        sections="\n".join(filter(None, sections)),
        footer=footer,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def plain(value: object) -> str:
    """``value`` as one line of text without passwords and signatures of URLs; not escaped."""
    return printable(without_queries(redact(str(value))))


def text(value: object) -> str:
    """``value`` as text that is safe anywhere in HTML, attributes included."""
    return escape(plain(value))


def section(title: str, body: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{title}</h2>{body}</section>' if body else ""


def table(head: Sequence[str], rows: Collection[Sequence[object]], kind: str = "", best: Sequence[bool] = ()) -> str:
    """A table of text. Rows for which ``best`` is true are highlighted."""
    lines = []
    for row, mark in zip(rows, best or [False] * len(rows), strict=True):
        start = '<tr class="best">' if mark else "<tr>"
        lines.append(start + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>")
    heads = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    return (
        f'<div class="scroll" role="region" aria-label="{text(head[0])}" tabindex="0">'
        f'<table class="{kind}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def image_url(path: Path, most: int, quality: int = 85) -> str:
    """A data URL of the image as WebP of the ``quality`` 0 to 100, reduced to ``most`` pixels on its longer side.

    Raises:
        ValueError: it cannot be read.
    """
    return pixels_url(load(path), most, quality)


def pixels_url(image: Image.Image, most: int, quality: int = 85) -> str:
    """The same for an image in memory."""
    small = image.copy()
    small.thumbnail((most, most), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=quality, xmp=small.info.get("xmp", b""))  # says of generated images that they are
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def timestamp(time: datetime.datetime) -> str:
    """``time``, which is in UTC, to the minute."""
    return f"{time:%Y-%m-%d %H:%M} UTC"


def _hash(content: str) -> str:
    """The hash of an inline style or script for the content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
