"""The OpenAPI 3.1 description of the service, from the table in ``parameters``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from infer.service.parameters import TYPES, Parameter, Path

_PROBLEM = {
    "type": "object",
    "properties": {"error": {"type": "string", "description": "one line"}},
    "required": ["error"],
    "additionalProperties": False,
}
_ERRORS = {
    "400": "a parameter is wrong",
    "414": "the query is too long",
    "429": "too many requests are waiting; see Retry-After",
    "500": "the generator failed",
}


def describe(paths: dict[str, Path], version: str) -> dict[str, Any]:
    """The description of ``paths``."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "catinfer",
            "version": version,
            "description": "Images of one generator. An image depends on the model, its seed, class and psi alone.",
        },
        "paths": {name: {"get": _operation(name, path)} for name, path in paths.items()},
        "components": {"schemas": {"Problem": _PROBLEM}},
    }


def _operation(name: str, path: Path) -> dict[str, Any]:
    problem = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    # Media types of binary content have an empty schema.
    answers: dict[str, Any] = {
        "200": {
            "description": path.summary,
            "content": {kind: {} if kind in TYPES.values() else {"schema": _schema(kind)} for kind in path.types},
        }
    }
    if path.parameters:
        answers["200"]["headers"] = {
            "ETag": {"schema": {"type": "string"}},
            "Cache-Control": {"schema": {"type": "string"}},
        }
        answers["304"] = {"description": "the client has it already, by If-None-Match"}
    for status, meaning in _ERRORS.items():
        if path.parameters or status == "400":
            answers[status] = {"description": meaning, "content": problem}
    if "429" in answers:
        answers["429"]["headers"] = {"Retry-After": {"schema": {"type": "integer", "description": "seconds"}}}
    return {
        "operationId": name.strip("/").partition(".")[0],
        "summary": path.summary,
        "parameters": list(_parameters(path)),
        "responses": answers,
    }


def _schema(kind: str) -> dict[str, Any]:
    return {"type": "object" if kind == "application/json" else "string"}


def _parameters(path: Path) -> Iterator[dict[str, Any]]:
    for parameter in path.parameters.values():
        yield {
            "name": parameter.name,
            "in": "query",
            "description": parameter.meaning,
            "required": parameter.is_required,
            "schema": _with_default(parameter),
        }


def _with_default(parameter: Parameter) -> dict[str, Any]:
    return {**parameter.schema, **({} if parameter.default is None else {"default": parameter.default})}
