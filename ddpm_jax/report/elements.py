"""Elements of the report's page, as HTML."""

import datetime
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def text(value: Any) -> str:
    return html.escape(str(value))


def script(value: Any) -> str:
    """JSON that cannot close the surrounding script tag."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def number(value: float) -> str:
    return f"{value:.4g}"


def size_of(dataset: Mapping[str, Any]) -> str:
    return "x".join(map(str, dataset.get("shape", ())))


def moment(time: float | str) -> str:
    """Formats a time in seconds since 1970 or in ISO format."""
    if isinstance(time, str):
        found = datetime.datetime.fromisoformat(time)
    else:
        found = datetime.datetime.fromtimestamp(time, datetime.UTC)
    return f"{found:%Y-%m-%d %H:%M} UTC"


def definitions(facts: Mapping[str, Any]) -> str:
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts.items()) + "</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    heads = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{text(first)}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(source: str, alt: str, caption: str, more: str = "") -> str:
    """`more` is HTML that follows the caption."""
    return f'<figure><img src="{source}" alt="{text(alt)}"><figcaption>{text(caption)}{more}</figcaption></figure>'


def grid_captions(captions: Sequence[str], count: int | None = None) -> str:
    """The captions of a grid's images, which repeat if there are more images."""
    if not captions:
        return ""
    count = len(captions) if count is None else count
    again = f"; after {len(captions)} they start again" if count > len(captions) else ""
    return f"<details><summary>Captions, row by row{again}</summary>{listed(captions[:count])}</details>"


def listed(texts: Iterable[str]) -> str:
    return f'<ol class="texts">{"".join(f"<li>{text(entry)}</li>" for entry in texts)}</ol>'
