"""What one run chose by measured time, kept in its report, chosen again by another: ``sste.plan``."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from sparse_compile.from_json import from_json
from sparse_compile.passes.choose import Agreement, gain
from sparse_compile.reporting.model import Choice
from sparse_compile.reporting.report import Report


def noting(choices: dict[str, dict[str, Choice]], agree: Agreement) -> Agreement:
    """``agree``, with each answer added to ``choices``."""

    def answered(question: str, tokens: int, answer: Callable[[], str]) -> str:
        told = agree(question, tokens, answer)
        choices.setdefault(question, {})[str(tokens)] = from_json(Choice, told)
        return told

    return answered


def read_plan(path: Path) -> Agreement:
    """Answers as the run did whose report it is.  For a number of tokens that it had not, as for all that it had.

    Raises:
        ValueError: there is no such report; later, of a question that it does not answer.
    """
    try:
        choices = Report.from_json(path.read_text(encoding="utf-8")).choices
    except (OSError, ValueError) as error:
        raise ValueError(f"option 'sste.plan' is {str(path)!r}, which can't be read: {error}") from error

    def planned(question: str, tokens: int, answer: Callable[[], str]) -> str:
        of_question = choices.get(question, {})
        found = of_question.get(str(tokens))
        if found is None:
            outcomes = {(choice.variant, gain(choice) >= 0) for choice in of_question.values()}
            if len(outcomes) != 1:
                known = (
                    f"its choices for {', '.join(of_question)} tokens differ"
                    if of_question
                    else "it has no choice for it"
                )
                raise ValueError(
                    f"option 'sste.plan': {path} does not say how to run {question}, with {tokens} tokens: {known}. "
                    "Write a new report with this model and these options: 'sste.report': 'report.json'"
                )
            found = next(iter(of_question.values()))
        return json.dumps(asdict(found))

    return planned
