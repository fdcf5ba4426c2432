"""JSON -> Plan: the inverse of Plan.to_json. What was a tuple comes back as one."""

from __future__ import annotations

import json
from typing import Any

from merge.plan import (
    Derived,
    Experts,
    Gates,
    Member,
    Plan,
    Shard,
    SideFile,
    SourceFile,
    SourceModel,
    Step,
    TensorRef,
    Units,
)


def read_plan(text: str) -> Plan:
    """The plan that `to_json` wrote."""
    return _plan(json.loads(text))


def _tuples(value: Any) -> Any:
    """JSON has no tuples; everything in a plan that was one comes back as one."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _ref(data: dict[str, Any] | None) -> TensorRef | None:
    if data is None:
        return None
    values = {key: _tuples(value) for key, value in data.items()}
    return TensorRef(**values | {"scale": _ref(data["scale"]), "derived": _derived(data["derived"])})


def _derived(data: dict[str, Any] | None) -> Derived | None:
    if data is None:
        return None
    inputs = tuple(ref for item in data["inputs"] if (ref := _ref(item)) is not None)
    return Derived(data["operation"], inputs, {key: _tuples(value) for key, value in data["parameters"].items()})


def _step(data: dict[str, Any]) -> Step:
    values = {key: _tuples(value) for key, value in data.items()}
    values["inputs"] = tuple(ref for item in data["inputs"] if (ref := _ref(item)) is not None)
    values["base"] = _ref(data["base"])
    values["statistics"] = tuple(ref for item in data["statistics"] if (ref := _ref(item)) is not None)
    values["parameters"] = {key: _tuples(value) for key, value in data["parameters"].items()}
    return Step(**values)


def _units(data: dict[str, Any]) -> Units:
    members = (
        Member(**{**member, "source": _ref(member["source"]), "reference": _ref(member["reference"])})
        for member in data["members"]
    )
    return Units(**{**data, "members": tuple(members)})


def _experts(data: dict[str, Any] | None) -> Experts | None:
    if data is None:
        return None
    gates = data["gates"]
    if gates is None:
        return Experts(**data)
    layers = tuple({name: _ref(ref) for name, ref in layer.items()} for layer in gates["layers"])
    values = {key: _tuples(value) for key, value in gates.items()}
    return Experts(**{**data, "gates": Gates(**{**values, "embedding": _ref(gates["embedding"]), "layers": layers})})


def _plan(data: dict[str, Any]) -> Plan:
    values = {key: _tuples(value) for key, value in data.items()}
    values["models"] = tuple(
        SourceModel(**{**model, "files": tuple(SourceFile(**file) for file in model["files"])})
        for model in data["models"]
    )
    values["steps"] = tuple(_step(step) for step in data["steps"])
    values["stages"] = tuple(_plan(stage) for stage in data["stages"])
    values["units"] = tuple(_units(units) for units in data["units"])
    values["experts"] = _experts(data["experts"])
    values["shards"] = tuple(Shard(**shard) for shard in data["shards"])
    values["statistics_files"] = tuple(SourceFile(**file) for file in data["statistics_files"])
    values["side_files"] = tuple(SideFile(**file) for file in data["side_files"])
    return Plan(**values)
