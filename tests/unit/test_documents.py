"""The documents: what they point to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = [link for link in LINK.findall(document.read_text()) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_every_document_is_found_from_the_readme() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        document = todo.pop()
        if document in seen:
            continue
        seen.add(document)
        for link in LINK.findall(document.read_text()):
            target = (document.parent / link).resolve()
            todo += sorted(target.glob("*.md")) if target.is_dir() else [target] if target.suffix == ".md" else []
    assert set(DOCUMENTS) <= seen
