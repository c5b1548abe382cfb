"""The pages of docs/checks/ and the tables of docs/doctor.md, from `checks.py` and `proofs.py`.

python -m headwise.doctor.docs DOCS
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from headwise.doctor.checks import CHECKS, PROBE_CHECKS, Check
from headwise.doctor.proofs import PROOFS

MADE = "<!-- made by `python -m headwise.doctor.docs docs` -->\n"


def page(check: Check) -> str:
    return f"""{MADE}# {check.title}

`{check.id}`, {check.severity}. [All checks](../doctor.md#checks)

**Looks at** {check.looks_at}.

**What people believe.** {check.believed}

**What is true.** {check.true}

**Cure.** {check.cure}

Sources: {check.sources}.
"""


def proofs() -> str:
    rows = ["| proof | verdict | engines | what must stand in the log | why that follows | source |", "|---|---|---|---|---|---|"]
    rows += [f"| `{p.id}` | {p.verdict} | {p.engines} | {p.sees} | {p.why} | {p.source} |" for p in PROOFS]
    return "\n".join(rows) + "\n"


def checks() -> str:
    rows = ["| check | severity | |", "|---|---|---|"]
    rows += [f"| [`{c.id}`](checks/{c.id}.md) | {c.severity} | {c.title} |" for c in (*CHECKS, *PROBE_CHECKS)]
    return "\n".join(rows) + "\n"


def pages(docs: Path) -> dict[Path, str]:
    """Every generated file and what it must hold."""
    out = {docs / f"checks/{c.id}.md": page(c) for c in (*CHECKS, *PROBE_CHECKS)}
    text = (docs / "doctor.md").read_text(encoding="utf-8")
    for name, table in (("proofs", proofs()), ("checks", checks())):
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", lambda m, t=table: m[1] + t + m[2], text, flags=re.DOTALL)
    return out | {docs / "doctor.md": text}


if __name__ == "__main__":
    for path, text in pages(Path(sys.argv[1])).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
