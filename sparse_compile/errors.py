"""The package's own exceptions.  User mistakes raise ValueError; these are for what the user could not know."""


class SparseCompileError(Exception):
    """A stage broke its own contract: a bug in sparse_compile.  Names the stage and the node."""

    def __init__(self, stage: str, node: str, detail: str) -> None:
        super().__init__(f"{stage} failed at {node!r}: {detail}; this is a bug in sparse_compile, please report it")
