"""What the string behind each attribute of a recipe's models says, read from their source where it is asked for.

pydantic would read every model's source at import, which is a tenth of the time of a light command.
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

from pydantic import BaseModel


def attribute_docs(model: type[BaseModel]) -> dict[str, str]:
    """By the attribute's name; what a class says goes before what its bases say."""
    found: dict[str, str] = {}
    for one in reversed(model.__mro__):
        if issubclass(one, BaseModel) and one is not BaseModel:
            found |= _of_module(one.__module__).get(one.__qualname__, {})
    return found


@lru_cache
def _of_module(name: str) -> dict[str, dict[str, str]]:
    tree = ast.parse(inspect.getsource(sys.modules[name]))
    return {one.name: dict(_documented(one)) for one in tree.body if isinstance(one, ast.ClassDef)}


def _documented(model: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for one, after in pairwise(model.body):
        match one, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as text)):
                yield name, inspect.cleandoc(text)
