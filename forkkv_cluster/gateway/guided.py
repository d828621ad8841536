"""OpenAI's ``response_format`` and vLLM's ``guided_*`` and ``structured_outputs`` as one guide. Pure."""

from __future__ import annotations

import json
import re
from typing import Any

from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.core.request import Guide, GuideKind


def json_guide(schema: object) -> Guide:
    """``schema`` is a JSON schema as a value."""
    return Guide(GuideKind.JSON_SCHEMA, json.dumps(schema))


def read_guide(
    response_format: dict[str, Any] | None,
    schema: object | None,
    regex: str | None,
    choices: list[str] | None = None,
    structured: dict[str, Any] | None = None,
) -> Guide | None:
    """At most one of them. ``structured`` is vLLM's structured_outputs, which holds one of them in its turn.

    Raises InvalidArgument or Unsupported, naming the field.
    """
    guides = [
        ("response_format", _from_format(response_format)),
        ("guided_json", _from_schema(schema, "guided_json")),
        ("guided_regex", Guide(GuideKind.REGEX, regex) if regex is not None else None),
        ("guided_choice", _from_choices(choices, "guided_choice")),
        ("structured_outputs", _from_structured(structured)),
    ]
    given = [(name, guide) for name, guide in guides if guide is not None]
    if len(given) > 1:
        raise InvalidArgument(given[1][0], given[1][1].text, f"and {given[0][0]} exclude each other", "Send one of both.")
    return given[0][1] if given else None


def _from_structured(fields: dict[str, Any] | None) -> Guide | None:
    given = {name: value for name, value in (fields or {}).items() if value not in (None, False)}
    if not given:
        return None
    (name, value), *others = given.items()
    path = f"structured_outputs.{name}"
    if others:
        raise InvalidArgument(path, value, f"and {others[0][0]} exclude each other", "Send one of both.")
    if name == "json":
        return _from_schema(value, path)
    if name == "json_object":
        return json_guide({"type": "object"})
    if name == "regex" and isinstance(value, str):
        return Guide(GuideKind.REGEX, value)
    if name == "choice":
        return _from_choices(value, path)
    raise Unsupported(path, value, "is not supported", "Send json, json_object, regex or choice.")


def _from_choices(choices: object, name: str) -> Guide | None:
    """An expression that matches any of the texts."""
    if choices is None:
        return None
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise InvalidArgument(name, choices, "is not a list of texts", "Send at least one, none of them empty.")
    return Guide(GuideKind.REGEX, "|".join(f"(?:{re.escape(choice)})" for choice in choices))


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


def _from_schema(schema: object | None, name: str) -> Guide | None:
    if not isinstance(schema, str):
        return json_guide(schema) if schema is not None else None
    try:
        return json_guide(json.loads(schema))
    except ValueError as error:
        raise InvalidArgument(name, schema, f"is not JSON ({error})", "Send a JSON schema.") from None
