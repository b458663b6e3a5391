"""Helper of scripts/site: lays the sources of the site out, and checks the links of what mdBook made of them.

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


def prepare():
    summary = (ROOT / "docs/SUMMARY.md").read_text()
    pages = [(ROOT / "docs" / link).resolve() for link in LINK.findall(summary)]
    listed = {page.relative_to(ROOT) for page in pages}
    # Decisions are linked from their index and listed nowhere else.
    decisions = sorted((ROOT / "docs/decisions").glob("0*.md"))
    shutil.rmtree(SOURCE, ignore_errors=True)
    wanted = set(pages) | set(decisions)
    for page in list(wanted):
        text = page.read_text()
        for link in LINK.findall(text) + IMAGE.findall(text):
            if (path := local(link)) and (target := (page.parent / path).resolve()).is_file():
                wanted.add(target)
    for path in wanted:
        copy = SOURCE / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    titles = [f"  - [{d.read_text().splitlines()[0].lstrip('# ')}]({d.relative_to(ROOT)})" for d in decisions]

    def from_root(match):
        return str((ROOT / "docs" / match[0]).resolve().relative_to(ROOT))

    lines = LINK.sub(from_root, summary).splitlines()
    at = next(i for i, line in enumerate(lines) if "docs/decisions/README.md" in line)
    (SOURCE / "SUMMARY.md").write_text("\n".join(lines[: at + 1] + titles + lines[at + 1 :]) + "\n")
    missing = [str(d) for d in (ROOT / "docs").rglob("*.md") if d.relative_to(ROOT) not in listed and d not in decisions]
    missing = [d for d in missing if not d.endswith("SUMMARY.md")]
    if missing:
        sys.exit("docs/SUMMARY.md does not list: " + ", ".join(missing))


class Page(html.parser.HTMLParser):
    """Links and anchors of a page."""

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
                broken.append(f"{path.relative_to(HTML)}: {link} has no such heading")
    if broken:
        sys.exit("\n".join(broken))
    print(f"{len(pages)} pages, all links work")


{"prepare": prepare, "check": check}[sys.argv[1]]()
