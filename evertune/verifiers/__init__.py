"""How a generated answer is checked. A verifier that fails scores nothing: it says so, and the caller must not average.

exact        the trimmed output equals the answer
contains     the answer occurs in the output
math         the output's final number or expression equals the answer (math-verify)
regex        a pattern matches the whole trimmed output; the answer is not read
refusal      the output refuses, or does not, as the answer says
classifier   a text classifier puts the output into the answer's class
ifeval       the output meets constraints on its form (IFEval)
python       the output's program passes tests, in a sandbox
function     a function of the user's own, in a child process with a time limit
parts        several of these, weighted
json_schema  the output is JSON that satisfies a schema, and equals the answer when that is an object or a list
"""

from evertune.verifiers.check import check, validate
from evertune.verifiers.outcome import Outcome
from evertune.verifiers.places import located, placed

__all__ = ["Outcome", "check", "located", "placed", "validate"]
