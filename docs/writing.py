"""Text that cells make: Markdown that notebooks show as such, and tables of it."""

from collections.abc import Iterable, Sequence


class Markdown(str):
    """Text that notebooks show as Markdown where it is the last value of a cell."""

    def _repr_markdown_(self) -> str:
        return str(self)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Markdown:
    """Rows under a head, every value as `str` shows it. Raises ValueError for a row of another length."""
    lines = [[str(value).replace("|", r"\|") for value in row] for row in (head, ["---"] * len(head), *rows)]
    if any(len(line) != len(head) for line in lines):
        raise ValueError(f"every row wants {len(head)} values, as many as the head has")
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))
