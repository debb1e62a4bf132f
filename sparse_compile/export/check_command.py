"""``python -m sparse_compile check PATH``: tells whether the weights of a checkpoint are 2:4."""

import argparse
import sys
from pathlib import Path

from sparse_compile.printable import printable

_DESCRIPTION = """\
Check whether the matrices of a checkpoint are 2:4: at most two of each four neighbours along in_features are not zero.

Files do not say how a weight is stored, so both ways are checked: nn.Linear stores [out_features, in_features], the
Conv1D of GPT-2 the transpose. A weight is "2:4" if every group is, one way or the other; "in part" if more than half
of the groups are, but not all; "zero" if it holds nothing else; otherwise "dense".

The exit status is 0 if all weights that --weights names are 2:4, and each pattern names one; without --weights, if at
least one weight is 2:4 and none is so in part. Otherwise it is 1, and 2 if PATH cannot be read.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "check",
        help="tell whether the weights of a checkpoint are 2:4",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="safetensors, a file of torch.save, or a folder")
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="GLOB",
        help="weights that must be 2:4, such as '*.mlp.*.weight'; only these are shown; may be repeated",
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
    sys.stdout.write(f"{as_table(rows)}\n\n{summary(rows)}\n" if rows else "no matrix of floating-point numbers\n")
    reasons = wrong(rows, args.weights)
    if reasons:
        sys.stdout.write(printable("\n".join(["not as it should be:", *reasons]) + "\n"))
        sys.exit(1)
