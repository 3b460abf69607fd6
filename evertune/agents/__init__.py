"""Agents: tool calls as text, small deterministic environments, episodes in them. Imports no torch and no other room.

    calls.py         a call as text and back      environments.py  calculator, files, lookup
    episodes.py      one episode, step by step    tasks.py         generated tasks with their right trajectories

A trajectory is a conversation: the agent's turns are the assistant's, what a tool answers is a turn of `tool`. Training
counts the agent's own tokens, as in any conversation; what tools say is read and never learnt.
"""

from evertune.agents.calls import Call, calls_in, render_calls, with_calls
from evertune.agents.environments import ENVIRONMENTS, State
from evertune.agents.episodes import Episode, check_task

__all__ = ["ENVIRONMENTS", "Call", "Episode", "State", "calls_in", "check_task", "render_calls", "with_calls"]
