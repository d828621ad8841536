"""OpenAI's ``response_format`` and vLLM's ``guided_json`` and ``guided_regex`` as one guide. Pure."""

from __future__ import annotations

import json
from typing import Any

from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.core.request import Guide, GuideKind


def json_guide(schema: object) -> Guide:
    """``schema`` is a JSON schema as a value."""
    return Guide(GuideKind.JSON_SCHEMA, json.dumps(schema))


def read_guide(response_format: dict[str, Any] | None, schema: object | None, regex: str | None) -> Guide | None:
    """At most one of the three. Raises InvalidArgument or Unsupported, naming the field."""
    guides = [("response_format", _from_format(response_format)), ("guided_json", _from_schema(schema))]
    guides.append(("guided_regex", Guide(GuideKind.REGEX, regex) if regex is not None else None))
    given = [(name, guide) for name, guide in guides if guide is not None]
    if len(given) > 1:
        raise InvalidArgument(given[1][0], given[1][1].text, f"and {given[0][0]} exclude each other", "Send one of both.")
    return given[0][1] if given else None


def _from_format(response_format: dict[str, Any] | None) -> Guide | None:
    kind = response_format.get("type") if response_format is not None else "text"
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return json_guide({"type": "object"})
    if kind != "json_schema":
        raise Unsupported("response_format", kind, "is not a known type", "Send text, json_object or json_schema.")
    described = response_format.get("json_schema")
    if not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
        problem = "has no json_schema.schema"
        raise InvalidArgument("response_format", response_format, problem, 'Send {"name": ..., "schema": {...}}.')
    return json_guide(described["schema"])


def _from_schema(schema: object | None) -> Guide | None:
    if not isinstance(schema, str):
        return json_guide(schema) if schema is not None else None
    try:
        return json_guide(json.loads(schema))
    except ValueError as error:
        raise InvalidArgument("guided_json", schema, f"is not JSON ({error})", "Send a JSON schema.") from None
