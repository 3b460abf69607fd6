"""Methods that nobody has validated in production, kept apart so that a team can see for itself why.

    plugins.py      what recipes may say; light        importance.py   Fisher and MAS importance, row by row
    quadratic.py    EWC, online EWC, MAS, L2-SP        si.py           synaptic intelligence
    projection.py   A-GEM, GEM, OGD, GPM               lwf.py          learning without forgetting
    olora.py        O-LoRA, orthogonal adapters        subspaces.py    InfLoRA, orthogonal-subspace fine-tuning
    isolation.py    PackNet, progressive networks      derpp.py        DER++, replay of stored outputs
    objectives.py   DFT, ASFT, proximal SFT            preferences.py  COPR, fast-slow DPO
    joint.py        supervised and preference steps

The core does not import this package: its methods come in by Python entry points, like anyone's (recipe/plugins.py),
and a recipe must say `academic: allow`. Departures from a paper are named where they are.
"""
