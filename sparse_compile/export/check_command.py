"""``python -m sparse_compile check PATH``: tells whether the weights of a checkpoint are 2:4."""

import argparse
import sys
from pathlib import Path

from sparse_compile.printable import printable

_DESCRIPTION = """\
Check whether the matrices of a checkpoint are 2:4: in each group of four consecutive elements along in_features, at
most two are nonzero.

A file does not tell how a weight is stored, so both layouts are checked: nn.Linear stores [out_features, in_features],
the Conv1D of GPT-2 stores the transpose. A weight is "2:4" if every group is 2:4 in one of the layouts, "2:4 in part"
if more than half of the groups are, "zero" if all of its elements are zero, and otherwise "dense".

With --weights, the exit status is 0 if all weights that match are 2:4 and each pattern matches at least one. Without
it, the exit status is 0 if at least one weight is 2:4 and none is 2:4 in part. Otherwise it is 1, or 2 if PATH cannot
be read.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "check",
        help="check whether the weights of a checkpoint are 2:4",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="a safetensors file, a torch.save file, or a folder of either"
    )
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="GLOB",
        help="check only the weights that match, such as '*.mlp.*.weight', all of which must be 2:4; can be repeated",
    )
    parser.set_defaults(parser=parser, execute=check)


def check(args: argparse.Namespace) -> None:
    """Print the table, and exit with the status that the description promises."""
    from sparse_compile.export.check import as_table, check_weights, summary, wrong
    from sparse_compile.export.read_checkpoint import read_checkpoint

    try:
        rows = list(check_weights(read_checkpoint(args.path), args.weights))
    except (OSError, ValueError) as error:
        args.parser.error(printable(str(error)))
    sys.stdout.write(
        f"{as_table(rows)}\n\n{summary(rows)}\n" if rows else "the checkpoint holds no floating-point matrix\n"
    )
    reasons = wrong(rows, args.weights)
    if reasons:
        sys.stdout.write(printable("\n".join(["the check failed:", *reasons]) + "\n"))
        sys.exit(1)
