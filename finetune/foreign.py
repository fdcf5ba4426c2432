"""Names of our keys in other tools: LLaMA-Factory, axolotl, TRL and transformers' TrainingArguments, PEFT.

These names are not keys here, since their values often differ; the error names the right key.
"""

from __future__ import annotations

# foreign key -> (ours, what differs)
FOREIGN: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("model_name_or_path", "base_model", "model_name", "model_id"), ("model", "")),
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "train_file", "data_path"), ("data", "files, or a hub id")),
    **dict.fromkeys(("output_dir", "output", "save_path"), ("out", "")),
    **dict.fromkeys(("finetuning_type", "peft_type"), ("train", "")),
    **dict.fromkeys(("load_in_4bit", "quantization_bit"), ("train", "train: qlora")),
    **dict.fromkeys(("stage", "rl"), ("objective", "usually found from the data")),
    **dict.fromkeys(("lora_r", "lora_rank", "r"), ("rank", "")),
    "lora_alpha": ("alpha", ""),
    "lora_dropout": ("dropout", ""),
    **dict.fromkeys(("lora_target", "lora_target_modules", "lora_target_linear"), ("target_modules", "")),
    **dict.fromkeys(("lora_modules_to_save", "additional_target"), ("modules_to_save", "")),
    **dict.fromkeys(("use_rslora", "peft_use_rslora"), ("rslora", "")),
    **dict.fromkeys(("use_dora", "peft_use_dora"), ("dora", "")),
    **dict.fromkeys(
        ("val_set_size", "val_size", "eval_dataset", "test_datasets"), ("validation", "a share, or a file")
    ),
    **dict.fromkeys(("template", "chat_template_path"), ("chat_template", "chatml, or a Jinja file")),
    **dict.fromkeys(
        ("cutoff_len", "sequence_len", "max_seq_length", "max_seq_len", "model_max_length"), ("max_length", "")
    ),
    **dict.fromkeys(("sample_packing", "neat_packing"), ("packing", "")),
    **dict.fromkeys(
        ("train_on_inputs", "train_on_prompt", "completion_only_loss", "assistant_only_loss"),
        ("prompt_loss_weight", "0 to 1"),
    ),
    "mask_history": ("last_turn_only", ""),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), ("epochs", "")),
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size", "train_batch_size"), ("batch_size", "")),
    "gradient_accumulation_steps": ("gradient_accumulation", ""),
    **dict.fromkeys(("lr", "lr_rate"), ("learning_rate", "")),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), ("scheduler", "")),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), ("warmup", "below 1 a share, else steps")),
    "optim": ("optimizer", ""),
    **dict.fromkeys(("bf16", "fp16", "tf32"), ("precision", "bf16, fp16 or fp32")),
    **dict.fromkeys(("flash_attn", "flash_attention", "attn_implementation"), ("attention", "")),
    **dict.fromkeys(("eval_steps", "evals_per_epoch"), ("eval_every", "steps")),
    **dict.fromkeys(("save_steps", "saves_per_epoch"), ("save_every", "steps")),
    "logging_steps": ("log_every", ""),
    "early_stopping_patience": ("early_stopping", ""),
    "load_best_model_at_end": ("keep_best", ""),
    "report_to": ("tensorboard", "tensorboard: true"),
    **dict.fromkeys(("add_tokens", "tokens", "new_special_tokens", "add_special_tokens"), ("new_tokens", "")),
    **dict.fromkeys(("pref_beta", "rl_beta", "dpo_beta"), ("beta", "")),
    "desirable_weight": ("wanted_weight", ""),
    "undesirable_weight": ("unwanted_weight", ""),
}


def ours(name: str, flag: bool = False) -> str | None:
    """`here it is "rank"`, or None for a key of no other tool. `flag`: as on the command line."""
    if name not in FOREIGN:
        return None
    key, difference = FOREIGN[name]
    here = f"--{key.replace('_', '-')}" if flag else f'"{key}"'
    return f"here it is {here}" + (f" ({difference})" if difference else "")
