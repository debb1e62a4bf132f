"""Where and when something was measured, and the tables that programs printed."""

from figures.results import as_day, section_of


def measured(program: str, part: str, device: str) -> str:
    """Device, day and versions of a measurement."""
    found = section_of(program, part, device)["provenance"]
    return f"{found['device']}, {as_day(found['date'])}, torch {found['torch']}, triton {found['triton']}"


def measured_on(program: str, part: str, device: str) -> str:
    """The day of a measurement."""
    return as_day(section_of(program, part, device)["provenance"]["date"])


def printed(program: str, part: str, device: str) -> str:
    """The table that a program printed."""
    return "\n".join(section_of(program, part, device)["table"])
