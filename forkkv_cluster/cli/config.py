"""``forkkv config``: every key of the configuration file with its meaning, default and constraints, from the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from forkkv_cluster.cli.common import errors_for_people
from forkkv_cluster.core.config import ClusterConfig, load_config


def config(
    check: Annotated[Path | None, typer.Option(help="Validate this file instead, and print what it comes to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON Schema, for editors.")] = False,
) -> None:
    """Print a complete configuration with all defaults: it is a valid file to start from."""
    with errors_for_people():
        if check is not None:
            typer.echo(json.dumps(load_config(check).model_dump(mode="json"), indent=2))
        elif as_json:
            typer.echo(json.dumps(ClusterConfig.model_json_schema(), indent=2))
        else:
            typer.echo("\n".join(config_lines()))


def config_lines() -> Iterator[str]:
    """The defaults as YAML, a comment before each key."""
    yield "# ForkKV Cluster configuration: every key with its default. Start with `forkkv serve --config FILE`."
    defaults = ClusterConfig()
    for name, info in ClusterConfig.model_fields.items():
        value = getattr(defaults, name)
        yield ""
        if isinstance(value, BaseModel):
            yield f"# {(type(value).__doc__ or '').strip().splitlines()[0]}"
            yield f"{name}:"
            yield from _section_lines(value)
        else:
            yield f"# {info.description}"
            yield f"{name}: {_yaml(value)}"


def _section_lines(section: BaseModel) -> Iterator[str]:
    for name, info in type(section).model_fields.items():
        yield f"  # {info.description}{_choices(info)}"
        yield f"  {name}: {_yaml(getattr(section, name))}"


def _choices(info: FieldInfo) -> str:
    arguments = getattr(info.annotation, "__args__", ())
    texts = [argument for argument in arguments if isinstance(argument, str)]
    return f" One of {', '.join(texts)}." if texts else ""


def _yaml(value: Any) -> str:
    """A default as a YAML scalar; JSON is YAML."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)
