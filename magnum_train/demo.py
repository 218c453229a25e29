"""The demo: train a small Nemo on the shipped conversations, then let it answer prompts it has not seen.

`python -m magnum_train.demo` is what `make demo` runs. It starts torchrun as a user would and shows the lines.
"""

import subprocess
import sys

import torch

from magnum_train.config import compose

RUN_DIR = "runs/demo"


def processes(packs_per_step: int, gpus: int) -> int:
    """Processes to start: two on CPU; on GPUs the largest number that divides a step's packs."""
    if gpus == 0:
        return 2
    return max(n for n in range(1, gpus + 1) if packs_per_step % n == 0)


def main() -> int:
    """Train, answer, and say where to look; returns the exit status of what failed, or 0."""
    count = processes(compose(["experiment=demo"]).packs_per_step, torch.cuda.device_count())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    train = ["-m", "magnum_train.train", "experiment=demo", f"run_dir={RUN_DIR}"]
    answer = [
        "-m",
        "magnum_train.chat",
        f"weights={RUN_DIR}",
        "prompts=shipped:held_out.jsonl",
        "max_prompts=3",
    ]
    print(f"$ torchrun --standalone --nproc-per-node={count} {' '.join(train)}", flush=True)
    status = subprocess.run([*launcher, *train], check=False).returncode
    if status:
        print("\nThe training stopped. `make demo` again goes on from its newest checkpoint.", file=sys.stderr)
        return status
    print(f"\nThree prompts that were not in the training:\n\n$ python {' '.join(answer)}", flush=True)
    status = subprocess.run([sys.executable, *answer], check=False).returncode
    if status == 0:
        print(f"The run is in {RUN_DIR}. Its curves: .venv/bin/tensorboard --logdir {RUN_DIR}/tensorboard")
    return status


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
