"""A strict little reader of HTML: every tag must close in order. Enough to ask a page what it says."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

BLOCKS = ("dd", "details", "div", "dt", "li", "p", "pre", "small", "summary", "td", "th", "tr")
VOID = ("meta", "br", "col", "link", "img", "input", "hr")


@dataclass
class Node:
    """An element: its tag, attributes, and children (elements and texts)."""

    tag: str
    attributes: dict[str, str]
    children: list["Node | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text inside as words: white space squeezed, what stands in a block of its own set apart."""
        return " ".join(self._spaced().split())

    def _spaced(self) -> str:
        inside = "".join(one if isinstance(one, str) else one._spaced() for one in self.children)
        return f" {inside} " if self.tag in BLOCKS else inside

    @property
    def raw(self) -> str:
        """All text inside as it is."""
        return "".join(one if isinstance(one, str) else one.raw for one in self.children)

    def all(self, tag: str, **attributes: str) -> list["Node"]:
        """Elements below with this tag and these attributes (`class_` names one class)."""
        return [one for one in self.walk() if one.tag == tag and one._has(attributes)]

    def one(self, tag: str, **attributes: str) -> "Node":
        found = self.all(tag, **attributes)
        assert found, f"no <{tag} {attributes}>"
        return found[0]

    def walk(self) -> Iterator["Node"]:
        for child in self.children:
            if isinstance(child, Node):
                yield child
                yield from child.walk()

    def _has(self, wanted: dict[str, str]) -> bool:
        for name, value in wanted.items():
            if name == "class_":
                if value not in self.attributes.get("class", "").split():
                    return False
            elif self.attributes.get(name) != value:
                return False
        return True


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("#root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        assert len(node.attributes) == len(attrs), f"<{tag}> has an attribute twice"
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data[:60]}")


def parse(page: str) -> Node:
    """The page as a tree; fails on a tag that is not closed in order, or a comment."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is never closed"
    return reader.root


def table_rows(table: Node) -> list[list[Node]]:
    """Cells of each body row."""
    return [
        [cell for cell in row.walk() if cell.tag in ("th", "td")]
        for body in table.all("tbody")
        for row in body.all("tr")
    ]
