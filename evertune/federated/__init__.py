"""Rounds over clients that keep their rows: what they send is a low-rank update, and what is made of it is exact.

    aggregation.py  one update out of many, as plain functions      validation.py  what may be averaged at all
    server.py       the rounds, and the stage's checkpoint          client.py      one client's training, a process

The methods are academic (docs/methods.md): a recipe must say `academic: allow`.
"""
