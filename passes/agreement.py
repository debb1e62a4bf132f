"""One answer for all processes of a job: what they measure differs, what they conclude from it must not."""

from collections.abc import Callable

from sparse_compile.torch_internals.distributed import shared_store


def agreed(question: str, answer: Callable[[], str]) -> str:
    """What a process of the job answered first; in a job of one process its own answer.

    Nobody waits for anybody: who finds no answer in the store of the process group gives its own, and takes the one
    that came to be kept there.  So processes may ask in any order, and need not all ask.

    Args:
        answer: called where no answer is found; not empty.
    """
    store = shared_store()
    if store is None:
        return answer()
    key = f"sparse_compile/{question}"
    kept: bytes = store.get(key) if store.check([key]) else store.compare_set(key, "", answer())
    return kept.decode()
