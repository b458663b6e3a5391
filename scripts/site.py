"""Helper of scripts/site: arranges the sources of the site, and checks the links of the HTML that mdBook builds.

`prepare` copies the pages of docs/SUMMARY.md to target/site/source under their paths in the repository, with every other file
they link to, so that links that work in the repository work in the site. `check` follows every link of the HTML.
"""

import html.parser
import pathlib
import re
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = ROOT / "target/site/source"
HTML = ROOT / "target/site/html"
LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")
IMAGE = re.compile(r'(?<=src=")[^"]+(?=")')


def local(link):
    """The file part of a link within the repository, or None."""
    return None if re.match(r"[a-z]+:|#", link) else link.partition("#")[0]


def linked(page):
    """The files of the repository that a page links to."""
    text = page.read_text()
    links = [local(link) for link in LINK.findall(text) + IMAGE.findall(text)]
    targets = {(page.parent / link).resolve() for link in links if link}
    return {target for target in targets if target.is_file() and target.is_relative_to(ROOT)}


def title(page):
    return page.read_text().splitlines()[0].lstrip("# ")


def prepare():
    summary = ROOT / "docs/SUMMARY.md"
    listed = {(summary.parent / link).resolve() for link in LINK.findall(summary.read_text())}
    decisions = sorted((ROOT / "docs/decisions").glob("0*.md"))
    listed |= set(decisions)
    missing = set((ROOT / "docs").rglob("*.md")) - listed - {summary}
    if missing:
        sys.exit("docs/SUMMARY.md does not list: " + ", ".join(sorted(map(str, missing))))
    # Pages elsewhere in the repository that these pages link to, and all linked files.
    wanted, queue = set(), list(listed)
    while queue:
        path = queue.pop()
        if path in wanted or path == summary:
            continue
        wanted.add(path)
        if path.suffix == ".md":
            queue.extend(linked(path))
    shutil.rmtree(SOURCE, ignore_errors=True)
    for path in wanted:
        copy = SOURCE / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            # mdBook renders README.md as index.html, but does not rewrite links to it.
            copy.write_text(re.sub(r"(?<=[(/])README\.md(?=[)#])", "index.md", path.read_text()))
        else:
            shutil.copyfile(path, copy)

    def from_root(match):
        return str((summary.parent / match[0]).resolve().relative_to(ROOT))

    lines = LINK.sub(from_root, summary.read_text()).splitlines()
    at = next(i for i, line in enumerate(lines) if "docs/decisions/README.md" in line)
    lines[at + 1 : at + 1] = [f"  - [{title(page)}]({page.relative_to(ROOT)})" for page in decisions]
    others = sorted(path for path in wanted - listed if path.suffix == ".md")
    lines += ["", "# Elsewhere in the repository", ""]
    lines += [f"- [{title(page)}]({page.relative_to(ROOT)})" for page in others]
    (SOURCE / "SUMMARY.md").write_text("\n".join(lines) + "\n")


class Page(html.parser.HTMLParser):
    """Collects the links and anchors of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[key] for key in ("id", "name") if key in attributes}
        self.links += [attributes[key] for key in ("href", "src") if attributes.get(key)]


def check():
    pages = {path: Page(path) for path in HTML.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        if path.name in ("404.html", "toc.html", "print.html"):
            continue
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            if not target.is_file():
                broken.append(f"{path.relative_to(HTML)}: {link} is missing")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                broken.append(f"{path.relative_to(HTML)}: the heading of {link} is missing")
    if broken:
        sys.exit("\n".join(broken))
    print(f"{len(pages)} pages, all links work")


{"prepare": prepare, "check": check}[sys.argv[1]]()
