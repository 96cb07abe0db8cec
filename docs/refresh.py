"""Runs the shell blocks of a page against a running server and writes what they print into the block below each.

    python docs/refresh.py docs/api.md

Only a ```bash block that is directly followed by a ```json or ```text block is run, in order, by bash from the
repository's root. JSON is indented; long lists, texts and outputs are cut with `…`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAIR = re.compile(r"(```bash\n(?P<command>.*?)```\n```(?P<kind>json|text)\n)(?P<output>.*?)(```\n)", re.DOTALL)
MAX_ITEMS = 4
MAX_TEXT = 160
MAX_LINES = 20
LAST_LINES = 6


def refresh(page: str) -> str:
    """The page with fresh outputs. Raises RuntimeError naming a command that failed."""
    return PAIR.sub(lambda pair: pair[1] + show(run(pair["command"]), pair["kind"]) + pair[5], page)


def run(command: str) -> str:
    """What the command prints on standard output."""
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode} of:\n{command}{done.stdout}{done.stderr}")
    return done.stdout


def show(output: str, kind: str) -> str:
    """An output as a page shows it."""
    if kind == "json":
        return json.dumps(_cut(json.loads(output)), indent=2, ensure_ascii=False) + "\n"
    lines = [
        line.rstrip()[:MAX_TEXT] + "…" * (len(line.rstrip()) > MAX_TEXT) for line in output.strip("\n").split("\n")
    ]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - LAST_LINES], "…", *lines[-LAST_LINES:]]
    return "\n".join(lines) + "\n"


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cut(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_cut(item) for item in value[:MAX_ITEMS]] + (["…"] if len(value) > MAX_ITEMS else [])
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"{value[:MAX_TEXT]}…"
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(refresh(path.read_text(encoding="utf-8")), encoding="utf-8")
