"""Writes the parts of docs/API*.md and all of docs/CONFIGURATION*.md that the code knows best.

    .venv/bin/python -m scripts.make_docs            # writes them
    .venv/bin/python -m scripts.make_docs --check    # says what is out of date, and fails then

Names, defaults, bounds, statuses and codes come from the code; what a thing means stands in its definition, in English,
and in Chinese in README_zh.md or in scripts/docs_zh.yaml.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from scripts import doc_api, doc_configuration

ROOT = Path(__file__).resolve().parent.parent
MARKS = re.compile(r"(<!-- reference: written by scripts/make_docs.py -->\n).*?(<!-- end of the reference -->\n)",
                   re.DOTALL)
LANGUAGES = ("en", "zh")


def named(folder: str, language: str) -> Path:
    return ROOT / "docs" / f"{folder}{'' if language == 'en' else '_zh'}.md"


def documents() -> Mapping[Path, str]:
    """What each should hold."""
    found = {}
    for language in LANGUAGES:
        path = named("API", language)
        reference = doc_api.reference(ROOT, language)
        found[path] = MARKS.sub(lambda marks, text=reference: marks[1] + text + marks[2],      # type: ignore[misc]
                                path.read_text())
        found[named("CONFIGURATION", language)] = doc_configuration.document(ROOT, language)
    return found


def main() -> None:
    stale = {path: text for path, text in documents().items() if not path.exists() or path.read_text() != text}
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: .venv/bin/python -m scripts.make_docs")
        sys.exit(bool(stale))
    for path, text in stale.items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
