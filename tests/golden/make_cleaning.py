"""Record how open_clip cleans captions with references, mojibake and special tokens in unusual places.

    pip install open_clip_torch==3.3.0 ftfy==6.3.1 regex
    python tests/golden/make_cleaning.py

Writes `text/cleaning.json`: captions, as `SimpleTokenizer` cleans them, and their ids with the merges of
`text/merges.txt.gz`, without start and end. `captions.json` has whole sentences; these rows cover cases that a
crate for HTML, mojibake or byte pairs may get wrong (docs/decisions/0003-text-crates.md).
"""

import json
import random
from html.entities import html5
from pathlib import Path

import ftfy.bad_codecs  # noqa: F401, registers the sloppy encodings
from open_clip.tokenizer import SimpleTokenizer, _clean_lower

FOLDER = Path(__file__).resolve().parent / "text"
SEED = 7
RANDOM_ROWS = 160

# Control characters and noncharacters, which Python drops; numbers out of range; ordinary ones.
CODES = [0, 1, 8, 9, 11, 13, 0x1F, 0x7F, 0x80, 0x81, 0x9F, 0xA0, 0xAD, 0xD800, 0xDFFF, 0xFDD0, 0xFDEF, 0xFFFE, 0xFFFF]
CODES += [0x1FFFE, 0x10FFFF, 0x110000, 2**32, 2**64, 38, 39, 60, 0x2019, 0x1F600]

ROWS = [
    # Tags make ftfy skip references, so that only `html.unescape` reads them.
    "<b>&#1; &#x8; &#127; &#xFDD0; &#xFFFE; &#1114111;",
    "<b>&#0; &#129; &#x80; &#xD800; &#1114112; &#99999999999999999999;",
    "&#x8g &#31 &#131070 x",
    "<i>&amp;amp;lt; &amp;#38;amp; &#38;#38;#39;",
    "<i>&nbsp;a&nbsp b&amp;nbsp;c&NBSP;",
    "<i>&EACUTE; &Eacute &eacutex &SZLIG;",
    "<i>&notit; &notin; &sup1 &sup &frac123",
    "<i>&" + "amp" * 20 + "; &CounterClockwiseContourIntegral &a;&b",
    "fish &AMP chips &AMP; &copy2020 &COPY; &lt &LT;3",
    "&&amp;&&lt;&;&#;&#x;",
    "&é; &amp;é; &#é;",
    # Quotes, and mojibake of mojibake.
    "‘a’ “b” ‚c‛ „d‟ ʼe `f´",
    "â€™tis â€œxâ€\x9d â€˜yâ€™ â€¦",
    "Ã¢â‚¬â„¢tis Ã¢â‚¬Å“twiceÃ¢â‚¬\x9d",
    "ÃƒÂ¢Ã¢â€šÂ¬Ã¢â€žÂ¢ three times",
    "ÃƒÆ’Ã‚Â© ÃƒÂ© Ã© é",
    "voilÃ\xa0 voilÃ  voilÃ. Ã\xa0 la",
    "l&rsquo;Ã©tÃ© &Atilde;&copy; &#195;&#169;",
    "â€� Ã? ï¿½ \ufffd",
    "РљРѕС‚ Ð\x9aÐ¾Ñ\x82 кот",
    # Special tokens are recognized only where a word may begin.
    "x!<end_of_text> a<end_of_text>b !<start_of_text>!",
    "<START_OF_TEXT> <End_Of_Text>",
    "<|endoftext|> !<|endoftext|>",
    "&lt;end_of_text&gt; <end_of_text&gt;",
    # Long words, single bytes, and letters whose lowercase form is longer.
    "ab" * 500,
    "🎉" * 60,
    "\u0100\u00ad\u007f\u0143 \U000e0001 \U0010fffd",
    "İİ ẞß ŉ ǰ ΟΔΟΣ. ΟΔΟΣΑ",
    "don't DON'T 'S 'ſ ''s 'll'll",
]


def reference(rng):
    kind = rng.random()
    if kind < 0.35:
        text = "&" + rng.choice(sorted(html5))
    elif kind < 0.5:
        text = "&" + rng.choice(sorted(html5)).rstrip(";")
    elif kind < 0.55:
        text = "&" + rng.choice(sorted(html5)).upper()
    elif kind < 0.75:
        text = f"&#{rng.choice(CODES)}" + rng.choice([";", "", "; "])
    elif kind < 0.9:
        text = f"&#x{rng.choice(CODES):x}" + rng.choice([";", "", "g"])
    else:
        text = "&" + "".join(rng.choice("amplt#x0;&é ") for _ in range(rng.randrange(40)))
    while rng.random() < 0.2:
        text = text.replace("&", rng.choice(["&amp;", "&#38;"]), 1)
    return text


def mojibake(rng):
    texts = ["l’été à Paris", "piñata “señor”", "žluťoučký kůň", "日本語", "Привет", "naïve — café…", "😀", "½ €", "ελληνικά"]
    windows = [f"sloppy-windows-{number}" for number in (1250, 1251, 1252, 1253, 1257)]
    text = rng.choice(texts)
    for _ in range(rng.choice([1, 1, 1, 2])):
        text = text.encode().decode(rng.choice(["latin-1", *windows, "macroman", "cp437", "iso-8859-2"]), errors="replace")
    return text.replace("\xa0", " ") if rng.random() < 0.3 else text


def word(rng):
    return rng.choice(["a", "photo", "cat's", "<b>", "&", ";", "#12", "“x”", "Ã la", "!<end_of_text>", "<start_of_text>", "\x85"])


def main():
    rng = random.Random(SEED)
    captions = list(ROWS)
    for _ in range(RANDOM_ROWS):
        parts = [rng.choice([reference, reference, mojibake, word])(rng) for _ in range(rng.randrange(1, 5))]
        captions.append(rng.choice([" ", " ", "", "\n"]).join(parts))
    clip = SimpleTokenizer(bpe_path=str(FOLDER / "merges.txt.gz"))
    recorded = {
        "captions": captions,
        "cleaned": [_clean_lower(caption) for caption in captions],
        "clip": [" ".join(map(str, clip.encode(caption))) for caption in captions],
    }
    (FOLDER / "cleaning.json").write_text(json.dumps(recorded, indent=0) + "\n")


if __name__ == "__main__":
    main()
