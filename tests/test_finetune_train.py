"""Training: every kind learns, what is frozen stays, results load again."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from safetensors.torch import load_file
from tiny_llama import make_tiny_llama, words, write_lines
from training import Run, same, weights

from finetune.config import load_config
from finetune.keys import TRAIN
from finetune.prepare import prepare
from finetune.train import finetune
from merge.errors import NumbersError, UsageError

place, run = training.place, training.run  # fixtures

EXTRA: dict[str, dict[str, Any]] = {"partial": {"train_last": 1}, "ia3": {"learning_rate": 0.05}}


@pytest.mark.parametrize("train", TRAIN)
def test_every_kind_learns(run: Run, place: Path, tmp_path: Path, train: str) -> None:
    model = place / ("biased" if train == "bitfit" else "model")
    before = weights(model)
    report = run(train=train, model=model, **EXTRA.get(train, {}))
    losses = report.losses
    assert losses["validation_before"] is not None
    assert losses["validation"] is not None
    assert losses["validation"] < losses["validation_before"] - 0.02
    assert report.trained_parameters > 0
    assert same(weights(model), before)
    record = json.loads((tmp_path / "out" / "finetune_manifest.json").read_text(encoding="utf-8"))
    assert record["losses"] == losses
    assert record["trained_parameters"] == report.trained_parameters
    assert not (tmp_path / "out.partial").exists()
    if train != "qlora":  # whose base has other weights than its 4 bits
        exact = train not in ("full", "partial", "bitfit")  # these are saved as the base is, in bfloat16
        assert loss_of_result(tmp_path / "out", model, place, train) == pytest.approx(
            losses["validation"], rel=1e-5 if exact else 1e-2
        )


def loss_of_result(out: Path, model: Path, place: Path, train: str) -> float:
    """Validation loss of what was written, loaded as its users load it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from merge.loading.bottleneck import load_bottlenecks
    from merge.loading.libraries import quiet_libraries

    flags = {"model": [str(model)], "data": [str(place / "data.jsonl")], "out": ["o"], "validation": ["0.2"]}
    data = prepare(load_config(None, flags)).data
    whole = train in ("full", "partial", "bitfit")
    with quiet_libraries():
        net = AutoModelForCausalLM.from_pretrained(out if whole else model, dtype=torch.float32)
        if train == "bottleneck":
            net = load_bottlenecks(net, out)
        elif not whole:
            net = PeftModel.from_pretrained(net, out)
        return loss_of(net, data)


def loss_of(net: Any, run_data: Any) -> float:
    from finetune.objectives import OBJECTIVES

    objective = OBJECTIVES[run_data.objective]
    batch = objective.collate([run_data.validation[i] for i in range(len(run_data.validation))], 0)
    with torch.no_grad():
        return float(objective.loss(net.eval(), batch).sum() / objective.weights(batch).sum())


def test_lora_b_is_no_longer_zero_and_every_linear_layer_has_one(run: Run, tmp_path: Path) -> None:
    run(train="lora", rank=4)
    adapter = weights(tmp_path / "out")
    b = {name: value for name, value in adapter.items() if "lora_B" in name}
    assert len(b) == 2 * 7
    assert all(bool((value != 0).any()) for value in b.values())
    assert {value.shape[1] for value in b.values()} == {4}


def test_lora_by_pattern_with_dora_and_rslora(run: Run, tmp_path: Path) -> None:
    run(
        train="lora",
        rank=4,
        dora=True,
        rslora=True,
        rank_pattern="{q_proj: 8}",
        alpha_pattern="{v_proj: 3}",
        max_steps=1,
    )
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["use_dora"], settings["use_rslora"], settings["alpha_pattern"]) == (True, True, {"v_proj": 3})
    ranks = {
        name.split(".")[-3]: value.shape[1] for name, value in weights(tmp_path / "out").items() if "lora_B" in name
    }
    assert ranks["q_proj"] == 8
    assert ranks["k_proj"] == 4
    assert any("lora_magnitude_vector" in name for name in weights(tmp_path / "out"))


def test_partial_training_leaves_the_rest_bit_for_bit(run: Run, place: Path, tmp_path: Path) -> None:
    before = weights(place / "model")
    run(train="partial", train_last=1)
    after = weights(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith(("model.layers.1.", "model.norm", "lm_head")) for name in moved)
    assert len(moved) >= 8
    assert {value.dtype for value in after.values()} == {torch.bfloat16}  # as the base, so recipes find one dtype
    run(train="partial", freeze_first=1, freeze="mlp,lm_head", out="other")
    after = weights(tmp_path / "other")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(("model.layers.1.", "model.norm")) and "mlp" not in name for name in moved)


def test_bitfit_moves_biases_only(run: Run, place: Path, tmp_path: Path) -> None:
    run(train="bitfit", model=place / "biased")
    before, after = weights(place / "biased"), weights(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} <= {n for n in before if "bias" in n}
    with pytest.raises(UsageError, match=r"has no biases"):
        run(train="bitfit", out="none")


def test_a_bottleneck_starts_as_the_base(place: Path) -> None:
    from transformers import AutoModelForCausalLM

    from merge.loading.bottleneck import add_bottlenecks

    net = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()
    ids = torch.arange(8, 20)[None]
    with torch.no_grad():
        before = net(ids).logits
        assert len(add_bottlenecks(net, 8)) == 4
        assert torch.equal(net(ids).logits, before)
        net.model.layers[0].mlp.down_proj.bottleneck.up.bias += 1
        assert not torch.equal(net(ids).logits, before)


def test_qlora_stays_in_4_bits_and_its_gradient_is_that_of_the_weights_it_stands_for(
    place: Path, tmp_path: Path
) -> None:
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit

    from finetune.models import load_model
    from merge.loading.libraries import quiet_libraries

    flags = {"model": [str(place / "model")], "data": [str(place / "data.jsonl")], "out": ["o"], "train": ["qlora"]}
    prepared = prepare(load_config(None, flags))
    with quiet_libraries():
        net = load_model(prepared.base, prepared.config, "AutoModelForCausalLM", "cpu")
    layer = net.model.layers[0].self_attn.q_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.quant_state.nested
    x = torch.randn(3, 64)
    layer.eval()(x)  # an evaluation must not change how it is trained
    y = x.clone().requires_grad_()
    layer.train()(y).sum().backward()
    full = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.allclose(y.grad, full.sum(0).expand(3, -1), atol=1e-5)


@pytest.mark.filterwarnings("default")  # what bitsandbytes warns of on a processor is not ours
@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("to", ["int8", "int4", "nf4", "fp8"])
def test_quantised_models_are_trained_or_refused_in_one_line(
    place: Path, tmp_path: Path, run: Run, to: str, train: str
) -> None:
    from merge.recipe.references import parse_reference
    from merge.tools.quantize import quantize

    quantize(parse_reference(str(place / "model")), tmp_path / "q", to)
    keys: dict[str, Any] = {"model": tmp_path / "q", "data": place / "data.jsonl", "train": train, "max_steps": 1}
    if train == "lora" and to in ("int8", "nf4"):
        run(**keys)
        assert (tmp_path / "out/adapter_model.safetensors").is_file()
        return
    with pytest.raises(UsageError, match=r"its weights are quantised .* (Use train: lora|Start from )"):
        run(**keys)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_get_rows_of_their_own(run: Run, tmp_path: Path, tied: bool) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from merge.loading.libraries import quiet_libraries

    model = make_tiny_llama(tmp_path / "model", tied=tied)
    file = write_lines(tmp_path / "d.jsonl", [{"prompt": "@a=", "completion": "@A"}] * 20)
    keys: dict[str, Any] = {"model": model, "data": file, "validation": file, "new_tokens": "@"}
    report = run(**keys)
    rows = {name: value for name, value in weights(tmp_path / "out").items() if name.endswith("tokens_delta")}
    assert {value.shape for value in rows.values()} == {(1, 64)}
    data = prepare(load_config(None, {name: [str(value)] for name, value in {**keys, "out": "o"}.items()})).data
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    with quiet_libraries():
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        base.resize_token_embeddings(len(tokenizer))
        net = PeftModel.from_pretrained(base, tmp_path / "out")
        assert loss_of(net, data) == pytest.approx(report.losses["validation"], rel=1e-5)


def test_gradient_accumulation_and_checkpointing_change_no_result(run: Run, tmp_path: Path) -> None:
    one = run(out="one", train="full", batch_size=16, max_steps=4, learning_rate=1e-3)
    two = run(
        out="two",
        train="full",
        batch_size=4,
        gradient_accumulation=4,
        max_steps=4,
        learning_rate=1e-3,
        gradient_checkpointing=True,
    )
    assert two.losses["train_last"] == pytest.approx(one.losses["train_last"], rel=1e-4)
    assert two.losses["validation"] == pytest.approx(one.losses["validation"], rel=1e-4)


def test_packed_training_runs_and_learns(run: Run) -> None:
    report = run(train="full", packing=True, epochs=6, batch_size=2)
    assert (report.losses["validation"] or 9) < (report.losses["validation_before"] or 0) - 0.5


def test_early_stopping_keeps_the_best(run: Run, tmp_path: Path) -> None:
    report = run(train="full", learning_rate=0.3, max_grad_norm=0, epochs=20, eval_every=1, early_stopping=2)
    log = json.loads((tmp_path / "out" / "training_log.json").read_text(encoding="utf-8"))
    held_out = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert report.steps < 20 * 6
    assert report.losses["validation"] == min(held_out[1:])
    assert held_out[-1] > min(held_out[1:])


def test_a_loss_that_is_not_finite_names_step_and_examples(run: Run, place: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    broken = make_tiny_llama(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    token = AutoTokenizer.from_pretrained(broken)("Z").input_ids[0]
    tensors["model.embed_tokens.weight"][token] = float("inf")  # only whoever reads a Z meets it
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    rows = [*words(30), {"prompt": "Z=", "completion": "A"}]
    file = write_lines(tmp_path / "d.jsonl", rows)
    with pytest.raises(NumbersError) as caught:
        run(model=broken, data=file, validation=None, batch_size=4)
    message = str(caught.value)
    assert message.startswith("step ")
    assert f"for data {file}:31. Nothing was updated by it." in message
    with pytest.raises(NumbersError, match=r"step 2: the loss is not finite, because .* no longer is"):
        run(
            train="full",
            learning_rate=10,
            max_grad_norm=0,
            optimizer="sgd",
            force=True,
            out="far",
            batch_size=60,
            weight_decay=0,
            watch=poison(),
        )


def poison() -> Any:
    """After the first step a weight is made NaN, as an update that overflowed would."""
    from transformers import LlamaForCausalLM

    def watch(step: int, steps: int, logs: dict[str, float]) -> None:
        if step == 1 and not logs:
            for thing in gc.get_objects():
                if isinstance(thing, LlamaForCausalLM) and thing.training:
                    with torch.no_grad():
                        thing.lm_head.weight[0, 0] = float("nan")

    return watch


def test_packing_that_would_leak_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.objectives.supervised import Supervised

    honest = Supervised.loss

    def deaf(self: Any, model: Any, batch: dict[str, Any]) -> Any:  # an architecture that ignores position ids
        return honest(self, model, {name: value for name, value in batch.items() if name != "position_ids"})

    monkeypatch.setattr(Supervised, "loss", deaf)
    with pytest.raises(UsageError, match=r"does not keep packed examples apart"):
        run(packing=True)


def test_the_curve_is_a_picture_of_every_logged_loss(tmp_path: Path) -> None:
    from finetune.record import draw_losses

    log = [{"step": step, "loss": 1 / step} for step in range(1, 60)] + [{"step": 30, "eval_loss": 0.5}, {"step": 59}]
    assert draw_losses(log, tmp_path / "loss.png") is None
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_losses_by_task(run: Run, place: Path, tmp_path: Path) -> None:
    import yaml

    config = {
        "model": str(place / "model"),
        "out": str(tmp_path / "o"),
        "validation": 0.2,
        "batch_size": 16,
        "data": [{"path": str(place / "data.jsonl"), "task": name} for name in ("one", "two")],
    }
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    report = finetune(prepare(load_config(str(file))), device="cpu", threads=1)
    log = json.loads((tmp_path / "o" / "training_log.json").read_text(encoding="utf-8"))
    last = [entry for entry in log if "eval_loss" in entry][-1]
    assert last["eval_loss_one"] == pytest.approx(last["eval_loss_two"])  # the same data under two names
    assert report.losses["validation"] == pytest.approx(last["eval_loss"])


def test_a_tuned_model_and_its_base_merge(run: Run, place: Path, tmp_path: Path) -> None:
    from merge.engine.run import run_plan
    from merge.jobs.build import build_plan
    from merge.planning.load import parse_recipe

    run(train="full", max_steps=2)
    text = f"merge_method: linear\nmodels: [{{model: {place / 'model'}}}, {{model: {tmp_path / 'out'}}}]\n"
    run_plan(build_plan(parse_recipe(text + "parameters: {weight: 0.5}\n")), tmp_path / "merged", threads=1)
    base, tuned, merged = (weights(folder) for folder in (place / "model", tmp_path / "out", tmp_path / "merged"))
    name = "model.layers.0.mlp.up_proj.weight"
    mean = ((base[name].float() + tuned[name].float()) / 2).to(torch.bfloat16)
    assert torch.equal(merged[name], mean)
