"""`python -m wan_model.tiny DIR`: writes a complete random checkpoint (see `checkpoint`)."""

from __future__ import annotations

import argparse
import sys

from wan_model.tiny.checkpoint import TASKS, write_tiny_checkpoint


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(prog="python -m wan_model.tiny", description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="where to write; new or empty")
    parser.add_argument("--task", choices=list(TASKS), default="t2v-A14B")
    parser.add_argument("--layout", choices=["official", "diffusers"], default="diffusers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="remove what is in DIR")
    given = parser.parse_args(arguments)
    try:
        write_tiny_checkpoint(
            given.folder,
            task=given.task,
            layout=given.layout,
            seed=given.seed,
            overwrite=given.overwrite,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"wrote a tiny {given.task} in the {given.layout} layout to {given.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
