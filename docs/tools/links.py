"""Holds a built site to its links: `python docs/tools/links.py site` names those that lead nowhere."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The anchors of a page, and what it links to as (tag, attribute, address)."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links = {""}, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            elif name in ("href", "src") and value is not None:
                self.links.append((tag, value))


def broken(site: Path) -> list[str]:
    """The links that do not hold, and what is loaded from elsewhere; how many there are is printed."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    n, found = 0, []
    for path, page in pages.items():
        for tag, address in page.links:
            scheme, host, to, _, fragment = urlsplit(address)
            if scheme or host:
                if tag != "a" and scheme != "data":
                    found.append(f"{path}: <{tag}> loads {address}")
                continue
            n += 1
            base = site if to.startswith("/") else path.parent
            target = (base / unquote(to).lstrip("/")).resolve() if to else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_relative_to(site) or not target.is_file():
                found.append(f"{path}: {address} is not there")
            elif target in pages and unquote(fragment) not in pages[target].anchors:
                found.append(f"{path}: {address} has no such anchor")
    print(f"{len(pages)} pages, {n} links within, {len(found)} broken")
    return found


if __name__ == "__main__":
    wrong = broken(Path(sys.argv[1]).resolve(strict=True))
    print(*wrong, sep="\n", end="\n" if wrong else "")
    sys.exit(bool(wrong))
