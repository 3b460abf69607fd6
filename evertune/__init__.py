"""Evertune keeps one language model learning for years, and proves that nothing it could do was lost.

The names below are the small functions everything larger agrees with; what they need is imported when they are used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evertune.data.replay import make_replay_stream
    from evertune.merge.arithmetic import model_soup, task_arithmetic

__all__ = ["make_replay_stream", "model_soup", "task_arithmetic"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "make_replay_stream":
        from evertune.data.replay import make_replay_stream

        return make_replay_stream
    if name in ("model_soup", "task_arithmetic"):
        from evertune.merge import arithmetic

        return getattr(arithmetic, name)
    raise AttributeError(f"module 'evertune' has no attribute {name!r}")
