"""Text from data (captions, file names) made safe to show: in a terminal, in Markdown, in a spreadsheet."""

_MARKDOWN = str.maketrans({c: f"&#{ord(c)};" for c in "&<>|[]`"})


def printable(text: object) -> str:
    """`str(text)` in one line that does nothing but show: what is not a printable character becomes its escape.

    Control characters (and with them ANSI sequences and line breaks), invisible and direction-changing ones, and the
    undecodable bytes of file names: '\\x1b', '\\n', '\\u202e', '\\udcff'. Letters of any script stay.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def markdown(text: object) -> str:
    """`printable`, and without a meaning in Markdown's tables, links, code and HTML."""
    return printable(text).translate(_MARKDOWN)


def cell(text: object) -> str:
    """`printable`, and behind an apostrophe where a spreadsheet would take it for a formula."""
    shown = printable(text)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown
