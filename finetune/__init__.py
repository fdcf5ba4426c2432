"""Trains models and adapters over transformers, peft and accelerate (`merge finetune`).

Start with train.py.

keys.py         every key of a config: type, range, default, help
config.py       YAML and flags -> Config; arguments.py: Config -> transformers' arguments
data/           files -> samples -> examples -> batches
objectives/     what is learnt: one file an objective
trainables.py   what is trained: full, partial (partial.py), LoRA, prompts, bottlenecks, ...
models.py       the base and its tokenizer
rope.py         longer contexts
checks.py       what only the loaded model shows: disk space, packing
prepare.py      all that is checked before weights are read
train.py        the whole way; trainer.py: the loop; adapters.py: continues an adapter
distributed.py  several processes; tensorboard.py: one log, also after a kill
output.py       OUT.partial -> OUT; result.py, record.py: what is written there
strategies/     several tasks: simultaneous, sequential, parallel and merged, in one table
"""
