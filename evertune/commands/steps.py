"""`evertune data steps`: trajectories as questions, one for each step of the agent."""

import json
from pathlib import Path
from typing import Annotated

import typer


def steps(
    trajectories: Annotated[Path, typer.Argument(help="Rows with messages: conversations of an agent with its tools.")],
    out: Annotated[Path, typer.Argument(help="The JSONL file to write.")],
) -> None:
    """Split trajectories into steps: the turns before, and what the agent said. For rl, with verifier tool_call."""
    from evertune.agents.tasks import steps_of
    from evertune.data.rows import messages_of, read_rows

    rows = read_rows(trajectories, format="messages", source=trajectories.stem)
    found = [
        {"id": f"{row.id}/{i + 1}", **one} for row in rows for i, one in enumerate(steps_of(messages_of(row.value)))
    ]
    out.write_text("".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in found), encoding="utf-8")
    typer.echo(f"wrote {len(found)} steps of {len(rows)} trajectories to {out}")
