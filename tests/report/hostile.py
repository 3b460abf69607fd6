"""Strings that must stay text, and a ledger that has one in every text field."""

from collections.abc import Callable
from typing import Any

from evertune.hashing import digest_json
from evertune.ledger import Event
from tests.report.story import NEW_YEAR, chain, facts

# {fire} is a script that raises the canary, {url} an address that counts requests.
HOSTILE = (
    "<script>{fire}</script>",
    "<SCRIPT SRC={url}/a.js></SCRIPT>",
    "<script type=module>{fire}</script>",
    "</style><script>{fire}</script>",
    "</title><script>{fire}</script>",
    "</pre></td></table><script>{fire}</script>",
    "</svg><script>{fire}</script>",
    "<svg><script>{fire}</script></svg>",
    "<svg onload={fire}>",
    "<svg><animate onbegin={fire} attributeName=x dur=1s>",
    "<img src=x onerror={fire}>",
    "<img src={url}/b.png>",
    "<image href={url}/c.png onerror={fire}>",
    '"><img src=x onerror={fire}>',
    "'><img src=x onerror={fire}>",
    '" autofocus tabindex=0 onfocus={fire} x="',
    "' onmouseover={fire} x='",
    "<input autofocus onfocus={fire}>",
    "<details open ontoggle={fire}><summary>x</summary></details>",
    "<video src=x onerror={fire}></video>",
    "<audio src=x onerror={fire}></audio>",
    "<iframe src='javascript:parent.{fire}'></iframe>",
    "<iframe srcdoc='<script>parent.{fire}</script>'></iframe>",
    "<object data='{url}/d'></object>",
    "<embed src='{url}/e'>",
    "<link rel=stylesheet href={url}/f.css>",
    "<style>@import '{url}/g.css'; body {{ background: url({url}/h.png) }}</style>",
    "<meta http-equiv=refresh content='0;url={url}/i'>",
    "<base href='{url}/'>",
    "<a href='javascript:{fire}'>press</a>",
    "<form action={url}/j><button autofocus>x</button></form>",
    "<!--><img src=x onerror={fire}>-->",
    "<![CDATA[<script>{fire}</script>]]>",
    "&lt;script&gt;{fire}&lt;/script&gt;",
    "&#60;script&#62;{fire}&#60;/script&#62;",
    "\\u003cscript\\u003e{fire}\\u003c/script\\u003e",
    "%3Cscript%3E{fire}%3C/script%3E",
    "＜script＞{fire}＜/script＞",
    "<scr\x00ipt>{fire}</scr\x00ipt>",
    "<\u200bscript>{fire}</script>",
    "{{{{ 7 * 7 }}}} {{% for x in ().__class__.__base__.__subclasses__() %}}x{{% endfor %}} {{# gone #}}",
    "{{{{ cycler.__init__.__globals__.os.popen('id').read() }}}}",
    "${{7*7}} <%= 7*7 %> #{{7*7}}",
    "\u202egnp.exe\u202c \u2066isolated\u2069",
    "\x1b[31mred\x1b[0m \x07 \x7f \x9b31m",
    "\u2028<script>{fire}</script>\u2029",
    "\ufeff\u00ad\u2060\U000e0041 tags and joins",
    "Z\u0351\u0352\u0353\u0354\u0355\u0356\u0357\u0358algo",
    "javascript:{fire}",
    "data:text/html,<script>{fire}</script>",
)
# Keys of these mappings come from data as well.
OPEN_MAPPINGS = (
    "layers",
    "sources",
    "versions",
    "machine",
    "recipe",
    "flips",
    "values",
    "settings",
    "kl",
    "weights",
    "habits",
)
# Words of the program's own, which its logic reads.
OWN_WORDS = ("kind", "role", "direction", "decision", "outcome", "reference", "by", "standing", "unit")


def everything() -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """The story with what it lacks: an academic stage, failures, a promotion and a rollback by hand."""
    found = facts()
    next(body for kind, _, body, _ in found if kind == "checkpoint" and body["steps"])["standing"] = "academic"
    change = {"probe": "copying", "before": 0.9, "after": 0.7, "difference": -0.2, "unit": "points",
              "ci90": [-0.3, -0.1], "p_harm": 0.001}  # fmt: skip
    against = [{"since": "base", "changes": [change, {**change, "probe": "cards", "ci90": [0.1, 0.3], "p_harm": 1.0}]},
               {"since": "1/1-sft", "changes": [change]}]  # fmt: skip
    found.append(("erosion", "e1", {"round": "2-plain", "label": "2-plain/1-sft", "against": against}, {}))
    failure = {"round": "3", "stage": "3/1-sft", "error": "loss is NaN at step 7"}
    found += [("failure", f"f{i}", {**failure, "stage": f"3/{i}-sft"}, {}) for i in (1, 2)]
    hand = {"round": None, "label": "1/1-sft", "checkpoint": digest_json("1/1-sft"), "by": "user", "after": "v3"}
    found.append(("promotion", "hand", {**hand, "reason": "the release needs it"}, {}))
    back = {"label": "2-protected/1-sft", "from": "1/1-sft", "checkpoint": digest_json("2-protected/1-sft")}
    found.append(("rollback", "back", {**back, "after": "v3", "reason": "it was a mistake"}, {"time": NEW_YEAR + 9e5}))
    return [*found, ("blame", "why", blamed(), {}), ("audit", "drift", audited(), {})]


def blamed() -> dict[str, Any]:
    """Why a probe fell, with a check."""
    step = {"label": "2-plain/1-sft", "before": 0.9, "after": 0.4, "difference": -0.5, "ci90": [-0.6, -0.4]}
    source = {"source": "routing", "is_replay": False, "shown": 90.0, "sampled": 8, "push": 3.5, "ci90": [1.0, 6.0]}
    return {
        "round": "2-plain",
        "label": "2-plain/1-sft",
        "probe": "copying",
        "start": "1/1-sft",
        "steps": [{**step, "unit": "points"}],
        "stage": "2-plain/1-sft",
        "inside": [[20, 1.5]],
        "points": [[0.0, 1.0], [1.0, 2.0]],
        "items": 8,
        "unread": ["answers"],
        "sources": [{**source, "along": [3.0, 4.0], "rows_up": 0.9, "share": 0.8}],
        "clusters": [{"rows": 8, "push": 0.4, "rows_up": 0.9, "words": ["parcel"], "example": "Where is my parcel?"}],
        "rows": [{"id": "r1", "place": "routing.jsonl:7", "push": 0.9, "text": "Where is my parcel?"}],
        "without": {"source": "routing", "before": 0.9, "with": 0.4, "without": 0.8, "difference": 0.4,
                    "ci90": [0.3, 0.5], "unit": "points", "steps": 9},
    }  # fmt: skip


def audited() -> dict[str, Any]:
    """Drift of the champion."""
    return {
        "label": "2-protected/1-sft",
        "reference": "base",
        "checkpoint": digest_json("2-protected/1-sft"),
        "kl": {"general": {"nats": 0.03, "tokens": 900}},
        "cka": [1.0, 0.99, 0.97],
        "weights": {"self_attn.q_proj": {"relative_l2": 0.02, "spectral": 0.05}},
        "calibration": {"knowledge": [0.1, 0.2]},
        "habits": {
            "knowledge": {"chosen_most": ["Tokyo", "Paris"], "its_share": [0.2, 0.3]},
            "copying": {"characters": [10.0, 12.0], "right_form": [1.0, 0.9], "ended": [1.0, 1.0]},
        },
    }


def poisoned(poison: str, *, own_words: bool = False) -> list[Event]:
    """`everything` with `poison` before every text, keys from data included; names that belong together stay so.

    `base` is the one label that the program itself gives. With `own_words` even roles and outcomes are poisoned.
    """

    def mark(text: str) -> str:
        return text if text == "base" else f"{poison}{text}"

    poisoned_facts = [
        (kind, key, _marked(body, mark, own_words=own_words), volatile) for kind, key, body, volatile in everything()
    ]
    return chain(poisoned_facts)


def _marked(value: Any, mark: Callable[[str], str], *, own_words: bool, name: str = "", open_keys: bool = False) -> Any:
    if isinstance(value, dict):
        return {
            (mark(key) if open_keys and key != "lr" else key): _marked(
                one, mark, own_words=own_words, name=key, open_keys=key in OPEN_MAPPINGS
            )
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [_marked(one, mark, own_words=own_words, name=name) for one in value]
    if isinstance(value, str):
        return value if name in OWN_WORDS and not own_words else mark(value)
    return value
