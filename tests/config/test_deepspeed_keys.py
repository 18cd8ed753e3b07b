"""The table of DeepSpeed's keys against the installed DeepSpeed: a key that it reads and we do not know fails here."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lmscale.config.deepspeed_keys import KEYS
from tests.config.test_deepspeed_json import AGREEMENTS, DS_CONFIGS

TOP_LEVEL = {path for path in KEYS if "." not in path}
# Dictionaries that hold the whole JSON, by the names that DeepSpeed gives them.
JSON_NAMES = {"param_dict", "_param_dict", "ds_config", "config_params", "config_dict", "ds_config_dict"}
# Modules in which `config` is the JSON too.
ENTRANCES = {"__init__.py", "runtime/config.py", "runtime/engine.py"}
# Parts of DeepSpeed that call a section, or what is no JSON of training, by one of these names.
ELSEWHERE = {"inference", "module_inject", "ops", "launcher"}
READERS = {"get_scalar_param", "get_dict_param", "get_list_param"}


@functools.cache
def deepspeed(name: str) -> ModuleType:
    """Import a module of DeepSpeed, as on a machine without a GPU (conftest.py)."""
    return pytest.importorskip(f"deepspeed.{name}")


class Asked(dict[str, Any]):
    """Keeps note of every key that is asked for, also in the sections below."""

    def __init__(self, keys: dict[str, Any], path: str = "", asked: set[str] | None = None):
        self.asked: set[str] = set() if asked is None else asked
        self.path = path
        inner = {k: Asked(v, f"{path}{k}.", self.asked) if isinstance(v, dict) else v for k, v in keys.items()}
        super().__init__(inner)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(self.path + key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(self.path + key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(f"{self.path}{key}")
        return super().__contains__(key)

    def keys(self) -> Any:
        return self


def asked_for() -> set[str]:
    """Collect the keys, by dotted path, that DeepSpeed asks for when it reads a JSON with every section of ours."""
    config = deepspeed("runtime.config")
    sections = {key.path: {} for key in KEYS.values() if key.kind == "section" and "." not in key.path}
    keys = Asked({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, **sections})
    config._reject_removed_config_keys(keys)
    config.DeepSpeedConfig.__new__(config.DeepSpeedConfig)._initialize_params(keys)
    return keys.asked


def fields_of_models() -> set[str]:
    """Collect the fields of DeepSpeed's config classes, by dotted path."""
    zero, precision = deepspeed("runtime.zero.config"), deepspeed("runtime.precision_config")
    models = {
        "zero_optimization": zero.DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": zero.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": zero.DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.leaf_module": deepspeed("runtime.zero.leaf_module_config").DeepSpeedZeroLeafModuleConfig,
        "fp16": precision.DeepSpeedFP16Config,
        "bf16": precision.DeepSpeedBF16Config,
        "timers.throughput": deepspeed("utils.config").DeepSpeedThroughputTimerConfig,
        "comms_logger": deepspeed("comm.config").CommsLoggerConfig,
    }
    return {
        f"{path}.{field.alias or name}" for path, model in models.items() for name, field in model.model_fields.items()
    }


def removed_keys() -> set[str]:
    """Collect the keys that DeepSpeed itself refuses since it has removed what they asked for."""
    config = deepspeed("runtime.config")
    return {*config._REMOVED_TOP_LEVEL_CONFIG_KEYS} | {
        f"zero_optimization.{name}" for name in config._REMOVED_ZERO_CONFIG_KEYS
    }


def read_in_source() -> set[str]:
    """Collect the keys that any of DeepSpeed's modules reads from what it calls its JSON, by reading the source.

    Some keys are looked up where they are used, long after the JSON was read: `asked_for` does not see those.
    """
    root = Path(str(deepspeed("runtime.config").__file__)).parents[1]
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    trees = {str(path): ast.parse((root / path).read_text()) for path in paths if path.parts[0] not in ELSEWHERE}
    constants = {name: value for tree in trees.values() for name, value in _constants(tree)}
    return {key for path, tree in trees.items() for key in _keys_read(tree, constants, path in ENTRANCES)}


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            if isinstance(value, str):
                yield node.targets[0].id, value


def _keys_read(tree: ast.Module, constants: dict[str, str], is_entrance: bool = False) -> Iterator[str]:
    names = JSON_NAMES | ({"config"} if is_entrance else set())
    for holder, key in filter(None, map(_lookup, ast.walk(tree))):
        text = constants.get(key.id) if isinstance(key, ast.Name) else getattr(key, "value", None)
        if isinstance(text, str) and getattr(holder, "id", getattr(holder, "attr", None)) in names:
            yield text


def _lookup(node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
    """Take apart `holder[key]`, `holder.get(key)`, `key in holder` and `get_scalar_param(holder, key, ...)`."""
    match node:
        case ast.Subscript(value=holder, slice=key):
            return holder, key
        case ast.Call(func=ast.Attribute(value=holder, attr="get"), args=[key, *_]):
            return holder, key
        case ast.Call(func=ast.Name(id=name), args=[holder, key, *_]) if name in READERS:
            return holder, key
        case ast.Compare(left=key, ops=[ast.In()], comparators=[ast.Call(func=ast.Attribute(value=holder))]):
            return holder, key
        case ast.Compare(left=key, ops=[ast.In()], comparators=[holder]):
            return holder, key
    return None


def test_table_knows_every_key_that_deepspeed_asks_for() -> None:
    asked = asked_for()
    assert len(asked) > 60
    sections = {key.path for key in KEYS.values() if key.kind == "section"}
    known = {path for path in asked if "." not in path or path.rpartition(".")[0] in sections}
    assert known - set(KEYS) == set()


def test_table_knows_every_field_of_deepspeeds_config_classes() -> None:
    assert fields_of_models() - set(KEYS) == set()


def test_table_knows_every_key_that_deepspeeds_source_reads() -> None:
    read = read_in_source()
    assert {"sequence_parallel_size", "data_parallel_size", "expert_parallel"} <= read
    inside_sections = {"data_sampling", "data_routing", "dynamic_batching", "random_ltd", "writer"}
    assert read - TOP_LEVEL - inside_sections == set()


def test_a_key_new_to_deepspeed_would_be_noticed() -> None:
    new = ast.parse(
        'NEW = "brand_new"\nif NEW in param_dict: x = ds_config["other"]; get_scalar_param(param_dict, NEW, 1)'
    )
    assert set(_keys_read(new, dict(_constants(new)))) == {"brand_new", "other"}


def test_table_holds_no_key_that_deepspeed_no_longer_knows() -> None:
    known = asked_for() | fields_of_models() | removed_keys() | read_in_source()
    assert set(KEYS) - known == set()


def test_keys_removed_from_deepspeed_are_refused() -> None:
    assert {name for name in removed_keys() if KEYS[name].status != "refused"} == set()


def used_in_tests() -> set[str]:
    """Collect the keys, by dotted path, that tests give to DeepSpeed."""
    this, root = Path(__file__), Path(__file__).parents[1]
    trees = [ast.parse(path.read_text()) for path in root.rglob("*.py") if path != this]
    return {path for tree in trees for path in _keys_given(tree)} | {path for path, *_ in AGREEMENTS}


def _keys_given(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted paths of nested dictionaries and of names like deepspeed__zero_optimization__stage."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from _paths(node)
        elif isinstance(node, ast.keyword) and (node.arg or "").startswith("deepspeed__"):
            yield from _path_and_below(str(node.arg), node.value)


def _paths(node: ast.Dict, above: str = "") -> Iterator[str]:
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield from _path_and_below(above + key.value, value)


def _path_and_below(name: str, value: ast.expr) -> Iterator[str]:
    path = name.replace("__", ".").removeprefix("deepspeed.")
    yield path
    if isinstance(value, ast.Dict):
        yield from _paths(value, f"{path}.")


def paths_in(keys: dict[str, Any], above: str = "") -> Iterator[str]:
    """Yield the dotted paths of a JSON."""
    for name, value in keys.items():
        yield above + name
        if isinstance(value, dict):
            yield from paths_in(value, f"{above}{name}.")


def test_keys_that_are_called_tested_are_used_in_a_test() -> None:
    ours = {path for file in DS_CONFIGS.glob("*.json") for path in paths_in(json.loads(file.read_text()))}
    tested = {path for path, key in KEYS.items() if key.status == "tested"}
    assert len(tested) > 30
    assert tested - ours - used_in_tests() == set()


def test_a_key_that_no_test_uses_would_be_noticed() -> None:
    given = ast.parse(
        'run({"a": {"b": 1}, "deepspeed__c__d": {"e": 2}}, deepspeed__f__g=3, deepspeed__h={"i": 4}, j=5)'
    )
    found = set(_keys_given(given))
    assert {"a", "a.b", "c.d", "c.d.e", "f.g", "h", "h.i"} <= found
    assert not {"j", "d", "g", "c.e"} & found
    assert "zero_optimization.no_test_uses_this" not in used_in_tests()


@pytest.mark.parametrize(
    ("feature", "path"),
    [
        ("ZeRO++", "zero_optimization.zero_hpz_partition_size"),
        ("NVMe", "zero_optimization.offload_param.nvme_path"),
        ("Ulysses", "sequence_parallel_size"),
        ("mixtures of experts", "expert_parallel"),
    ],
)
def test_what_is_not_tested_is_refused_by_name(feature: str, path: str) -> None:
    assert KEYS[path].status == "refused"
    assert feature in KEYS[path].note
