"""Usage for spreadsheets."""

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.admin_bodies import BadField


def wants_csv(http: Request, format: str) -> bool:
    """Raises BadField."""
    if format not in ("", "csv", "json"):
        raise BadField("is neither csv nor json", "format")
    return format == "csv" or (not format and "text/csv" in http.headers.get("accept", ""))


def csv_response(name: str, rows: Iterable[Mapping[str, Any]], columns: list[str], more: str | None = None) -> Response:
    """`more`: the cursor of the next page, in a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows({name: _harmless(value) for name, value in row.items()} for row in rows)
    headers = {"Content-Disposition": f'attachment; filename="{name}.csv"', **({"X-Next-Cursor": more} if more else {})}
    return Response(text.getvalue(), headers=headers, media_type="text/csv; charset=utf-8")


def _harmless(value: Any) -> Any:
    """Callers choose some of these texts, and a spreadsheet computes what begins like a formula."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value.isoformat() if hasattr(value, "isoformat") else value
