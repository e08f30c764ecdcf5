"""`python -m coarse_train`, and the command `coarse-train`; see `coarse_train.cli`."""

import io
import os
import sys

# Before OpenMP is loaded. Threads that spin while they wait for each other burn the time of whatever else runs on their core:
# a step of the MNIST recipe on a core that two threads share takes 1.3 s of CPU, 0.06 s where they sleep, 0.05 s with one
# thread (with four times the channels and half the batch 2.8, 0.16, 0.15). On two idle cores those that sleep cost CamVid's
# network nothing, and the one of the MNIST recipe a third, which one thread serves better than two in any case.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main() -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # ? for what a terminal has not, instead of an error after all the work
        sys.stdout.reconfigure(errors="replace")
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        print(f"error: coarse-train needs {error.name}: pip install 'coarse-kernels[train]'", file=sys.stderr)
        return 1
    return run()


if __name__ == "__main__":
    status = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Under torchrun the end of the interpreter races with gloo's threads: 2 of 12 runs of two processes were aborted
        # there ("terminate called without an active exception"), with everything written and the group destroyed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
