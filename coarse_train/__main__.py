"""`python -m coarse_train`, and the command `coarse-train`; see `coarse_train.cli`."""

import sys


def main() -> int:
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        print(f"error: coarse-train needs {error.name}: pip install 'coarse-kernels[train]'", file=sys.stderr)
        return 1
    return run()


if __name__ == "__main__":
    sys.exit(main())
