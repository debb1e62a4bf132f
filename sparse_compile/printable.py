"""Text that others wrote, for a terminal."""


def printable(text: str) -> str:
    """The text with what a terminal would obey, or not show, spelt out: ``\\x1b`` for the escape character.

    Line breaks stay.  Names of modules, lines of source and names in checkpoints may hold anything.
    """
    return "".join(
        character if character == "\n" or character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
