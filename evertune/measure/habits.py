"""How a model's answers look, whatever they score; without torch."""

from collections import Counter
from collections.abc import Sequence


def largest_share(predictions: Sequence[str]) -> tuple[str, float]:
    """The prediction that is made most often, and its share: 1 where a model always says the same."""
    word, count = Counter(predictions).most_common(1)[0]
    return word, count / len(predictions)
