"""Extracts a LoRA adapter from a fine-tune and its base (`merge lora extract`).

select.py      which tensors become factors, which are kept whole, which are left out
difference.py  fine-tune minus base, in blocks of rows
decompose.py   its largest singular vectors, and how much of it they hold
write.py       adapter_config.json, model card and manifest
run.py         extract_adapter: all of it, resumable
"""

from merge.tools.extract.finish import Summary
from merge.tools.extract.run import extract_adapter

__all__ = ["Summary", "extract_adapter"]
