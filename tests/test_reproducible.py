"""The same bytes on every machine: digests that hold whatever the processor, the BLAS and the C library.

`make test-machines` runs this as other machines would. A digest that has to change is a change of numbers: it belongs
in CHANGELOG.md, with its size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from conftest import llama_config, llama_shapes, write_json, write_safetensors, write_weights

from merge import build_plan, parse_recipe, run_plan
from merge.kernels import functions
from merge.kernels.coefficients import slerp_coefficients
from merge.kernels.spherical import arc_factors, karcher_factors
from merge.methods import Method, all_methods

F32 = npt.NDArray[np.float32]
METHODS = {name: method for name, method in all_methods().items() if method.reproducible == "bitwise"}
FUNCTIONS: dict[str, tuple[Callable[[float], float], float, float]] = {
    "exp": (math.exp, -40, 40),
    "expm1": (math.expm1, -2, 2),
    "log": (math.log, 1e-9, 30),
    "log1p": (math.log1p, -0.99, 3),
    "tanh": (math.tanh, -3, 3),
    "sin": (math.sin, -7, 7),
    "cos": (math.cos, -7, 7),
    "acos": (math.acos, -1, 1),
}


def numbers(n: int, key: int) -> npt.NDArray[np.float64]:
    """n numbers from 0 to 1, whole multiples of 2^-24; numpy's normal numbers would need the C library."""
    mixed = (np.arange(n, dtype=np.uint64) + np.uint64(key << 32)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(40)).astype(np.float64) / 2**24


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_those_of_the_c_library_to_rounding(name: str) -> None:
    exact, low, high = FUNCTIONS[name]
    own = getattr(functions, name)
    for x in [*(low + (high - low) * numbers(2000, 1)).tolist(), *(1e-6 * numbers(50, 2) + max(low, 0)).tolist()]:
        assert abs(own(x) - exact(x)) <= 8 * math.ulp(exact(x)), x
    assert math.isnan(own(math.nan))


@pytest.mark.parametrize("x", [1e7, -3e8, 2**60])
def test_large_angles_are_reduced(x: float) -> None:
    assert abs(functions.sin(x) - math.sin(x)) <= 1e-16 * abs(x)
    assert math.isnan(functions.cos(math.inf))


def test_functions_have_the_same_bits_on_every_machine() -> None:
    found = {
        name: sha("".join(getattr(functions, name)(x).hex() for x in (low + (high - low) * numbers(500, 3)).tolist()))
        for name, (_, low, high) in FUNCTIONS.items()
    }
    assert found == {
        "exp": "7765a504eb5c06c9",
        "expm1": "50cdf0561d1dfcfe",
        "log": "d90ef5206e71d9e0",
        "log1p": "62a3023a74b7d93f",
        "tanh": "558d222ea424fb2f",
        "sin": "e75d9151e70abb45",
        "cos": "1b7872aea21d03a5",
        "acos": "80e36ca8cc02ac52",
    }


def test_coefficients_have_the_same_bits_on_every_machine() -> None:
    found = []
    for n in (2, 3, 9):
        rows = (numbers(n * 40, n).reshape(n, 40) * 2**10).round()
        gram = np.array([[float((a * b).sum()) for b in rows] for a in rows])  # whole numbers: any order of sums
        found += karcher_factors(gram, tuple(range(1, n + 1)), 10, 1e-5)
        found += arc_factors(gram[0, 0], gram[1, 1], gram[0, 1], 0.3)
        found += slerp_coefficients(float(gram[0, 0]), float(gram[1, 1]), float(gram[0, 1]), 0.3)
    assert sha("".join(float(x).hex() for x in found)) == "074d8b23f6e25e89"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three fine-tunes with Fisher information, three adapters; all of it from whole numbers."""
    root = tmp_path_factory.mktemp("family")
    shapes = llama_shapes(1, 40, False)

    def values(shape: tuple[int, ...], key: int, scale: float) -> F32:
        return ((numbers(math.prod(shape), key).reshape(shape) - 0.5) * scale).astype(np.float32)

    for place, model in enumerate(("base", "a", "b", "c")):
        (root / model).mkdir()
        tensors = {}
        for number, (name, shape) in enumerate(shapes.items()):
            whole = values(shape, number, 0.25)
            if place:
                whole = whole + values(shape, 100 * place + number, 0.5 if number == 2 else 2**-6)
            tensors[name] = (whole, "float32")
        write_weights(root / model, tensors, 1)
        write_json(root / model / "config.json", llama_config(1, 40, False, "float32"))
        write_json(root / model / "tokenizer.json", {"model": {}})
        information = {
            f"fisher.{name}": (values(shape, 1000 + place, 1) ** 2, "float32") for name, shape in shapes.items()
        }
        write_safetensors(root / f"{model}.fisher.safetensors", information)
        adapter = root / f"adapter-{model}"
        adapter.mkdir()
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        factors = {"lora_A": (4, 40), "lora_B": (40, 4)}
        write_safetensors(
            adapter / "adapter_model.safetensors",
            {f"{module}.{key}.weight": (values(shape, 2000 + place, 1), "float32") for key, shape in factors.items()},
        )
        write_json(
            adapter / "adapter_config.json",
            {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]},
        )
    return root


def recipe(method: Method, root: Path, own: dict[str, Any]) -> str:
    """The method on the family: weights 0.4, density 0.5, and what `own` says."""
    usual = {"weight": 0.4, "density": 0.5, "epsilon": 0.1 if "della" in method.name else 1e-6, "t": 0.35}
    settings = {p.name: usual[p.name] for p in method.parameters if p.name in usual}
    settings |= {key: value for key, value in own.items() if key != "base_model"}
    kind = "adapter-" if method.inputs == "adapters" else ""
    models: list[dict[str, str]] = [{"model": f"{root}/{kind}{name}"} for name in "abc"[: method.n_models[1] or 3]]
    if method.statistics is not None:
        models = [model | {"statistics": f"{model['model']}.fisher.safetensors"} for model in models]
    base = models[0]["model"] if method.base_is_input else f"{root}/base"
    wants_base = method.base == "required" or "base_model" in own
    whole = {"merge_method": method.name, "models": models, "dtype": "float32", "parameters": settings}
    return yaml.safe_dump(whole | ({"base_model": base} if wants_base else {}) | {"allow": ["unrelated_base"]})


# More than its usual settings, of methods with several ways.
WAYS: dict[str, list[dict[str, Any]]] = {
    "breadcrumbs": [{"rescale": "l1"}],
    "dare_ties": [{"rescale": "l1"}],
    "della": [{"rescale": "l1"}],
    "model_stock": [{"filter_wise": True}],
    "multislerp": [{"base_model": True}],
    "nuslerp": [{"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, {"base_model": True}],
    "ties": [{"trim": "model"}],
}


DIGESTS: dict[str, list[str]] = {
    "arcee_fusion": ["1ae7cba81726d1b5"],
    "breadcrumbs": ["08fd6f85756cc3f8", "d263c70336f28b55"],
    "breadcrumbs_ties": ["be469aa4635558db"],
    "cat": ["68475674c9098645"],
    "consensus_ta": ["e690cdd4ea88d174"],
    "dare_linear": ["7d0c468b5842b635"],
    "dare_ties": ["4d6ad1ec522ef65f", "199c71222de850a4"],
    "della": ["5b519fb848b80e35", "2b762dc1b3696b83"],
    "della_linear": ["93f2d96e6e17597f"],
    "fisher": ["301abe60e0225287"],
    "karcher": ["d875b545fc431b5f"],
    "linear": ["2b0892e6bfcfc466"],
    "magmax": ["254a7284869dd6ce"],
    "model_stock": ["000104070c0a5777", "fb8f95ab825993b3"],
    "multislerp": ["f126df030b5a2ca7", "af3a762cd2ec8a1e"],
    "nearswap": ["687bdea83d2b32a5"],
    "nuslerp": ["4ef351d8a969c55d", "4ec6ba6f10b79fb0", "3aa787696e4f495e", "48115203558df102"],
    "passthrough": ["2820baa75f60761e"],
    "pcb": ["b864c5caff759d74"],
    "ram": ["774adacbfbe13783"],
    "ramplus_tl": ["774adacbfbe13783"],
    "sce": ["ff54f672d81efe52"],
    "slerp": ["bba4103030aad978"],
    "task_arithmetic": ["4ecda5ec97dcf1d3"],
    "ties": ["a5395adc21316bbe", "310dc491690e44f0"],
}


@pytest.mark.parametrize("name", METHODS)
def test_results_have_the_same_bytes_on_every_machine(name: str, family: Path, tmp_path: Path) -> None:
    found = []
    for place, own in enumerate([{}, *WAYS.get(name, [])]):
        run_plan(build_plan(parse_recipe(recipe(METHODS[name], family, own))), tmp_path / str(place))
        tensors = json.loads((tmp_path / str(place) / "merge_manifest.json").read_text())["tensors"]
        found.append(sha("".join(tensor["digest"] for tensor in tensors.values())))
    assert found == DIGESTS[name]
