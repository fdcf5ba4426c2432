"""Runs `merge finetune` as one of several processes, for tests: python several_processes.py MODE ARGUMENTS.

MODE, words joined by commas: `fsdp` shards on processors, which accelerate itself does on GPUs only (the plugin and
torch are the real ones); `killed:N` and `failing:N` end the second process at step N.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def let_processors_shard() -> None:
    import accelerate.state as state
    from accelerate.utils import DistributedType

    import finetune.train

    begin = state.AcceleratorState.__init__

    def begin_sharded(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = begin_sharded  # type: ignore[method-assign]
    finetune.train.check_launch = lambda config, device: finetune.train.pick_device(config, device)  # type: ignore[assignment]


def watch_steps(last: int | None, killed: bool, sharded: bool) -> None:
    from torch.distributed.tensor import DTensor

    from finetune.trainer import Tuner

    honest = Tuner.training_step

    def step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        # The outermost module's own parameters stay whole from a forward pass to the next backward pass.
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()) != sharded:
            raise AssertionError(f"parameters are {'not ' * sharded}sharded")
        if last is not None and self.args.process_index == 1 and self.state.global_step == last:
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("made to fail")
        return honest(self, model, *args, **kwargs)

    Tuner.training_step = step


def main() -> None:
    from merge.cli import main as merge

    words = sys.argv.pop(1).split(",")
    if "fsdp" in words:
        let_processors_shard()
    ends = {name: int(step) for name, _, step in (word.partition(":") for word in words) if step}
    watch_steps(next(iter(ends.values()), None), "killed" in ends, "fsdp" in words)
    merge()


if __name__ == "__main__":
    main()
