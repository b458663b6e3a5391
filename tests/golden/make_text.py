"""Record what open_clip, transformers and ftfy compute from captions, and tiny text towers with their outputs.

    pip install torch open_clip_torch transformers ftfy numpy safetensors
    python tests/golden/make_text.py
    python tests/golden/make_text.py --tables

Writes `text/`: token ids of unusual captions, folders of tiny models with random weights, their embeddings
and gradients, computed in float64 and rounded once. No weights are downloaded. With `--tables` it writes
the two tables for cleaning captions to `src/text/tables/` instead: Python's named HTML characters, and
ftfy's tables of mojibake.
"""

import argparse
import gzip
import html
import json
import os
import re
from html.entities import html5
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, _clean_lower, default_bpe
from safetensors.torch import save_file
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent / "text"
SEED = 41
MERGES = 2000  # for the committed tokenizer
FEW_MERGES = 300  # for the models
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]

PLAIN = [
    "",
    " ",
    "a",
    "a photo of a cat",
    "A Photo Of A DOG, sitting on a bench.",
    "the quick brown fox jumps over the lazy dog",
    "  leading and trailing  ",
    "tabs\tand\nnew lines\r\nand\x0bothers\x0c.",
    "it's he'd we'll I'm they've you're o'clock 's 'S DON'T",
    "0123456789 3.14159 1,000,000 2nd 50% 12:30",
    "!!! ??? ... --- *** ~~~ ### $$$ @@@ ^^^ &&& ((())) [[]] {}",
    "a-b_c+d=e/f\\g|h",
    "https://www.example.com/path?query=1&copy=2#part",
    "user@example.com #hashtag @mention",
    "word" * 60,
    "one two three four five six seven eight nine ten " * 12,
    "x" * 400,
    "I ❤️ NY 🎉🎉 👨‍👩‍👧‍👦 🏳️‍🌈 🇫🇷",
    "😀😃😄 emoji only",
    "café naïve résumé Zürich smörgåsbord",
    "cafe\u0301 nai\u0308ve combining marks",
    "Z\u0351\u036b\u0343\u036a\u0302\u036bA\u0334\u0335\u031cL\u034eG\u031e\u0320O\u0359",
    "日本語のキャプション 写真",
    "中文字幕：一只猫坐在椅子上。",
    "한국어 캡션 고양이",
    "Привет, мир! Фотография кота",
    "Ελληνικά ΟΔΟΣ ΣΊΣΥΦΟΣ ς σ",
    "עברית שלום עולם",
    "العربية مرحبا بالعالم",
    "हिन्दी नमस्ते दुनिया",
    "ภาษาไทย สวัสดี",
    "İstanbul Iğdır ıİiI",
    "straße STRASSE ẞ ß",
    "ＦＵＬＬＷＩＤＴＨ　ｔｅｘｔ １２３ ｶﾀｶﾅ ﾊﾟ",
    "ﬁne ﬂuﬀy ﬃ ﬄ ﬅ ﬆ ĳ Ǆ ŉ",
    "“curly” ‘quotes’ ‚low‛ „double‟ ʼmodifier",
    "en–dash em—dash ellipsis… bullet•",
    "x² y³ ½ ¼ ¾ ① Ⅳ ٣ 四",
    "№ ℃ ™ ® © µ Ω Å",
    "non\u00a0breaking\u2003em\u2009thin\u200bzero\u3000ideographic\u1680ogham",
    "soft\u00adhyphen zero\u200cwidth\u200djoiner\u2060word",
    "\ufeffbyte order mark \ufff9annotation\ufffb \ufffc",
    "control\x00\x01\x02\x07\x08\x1a\x1c\x1d\x1e\x1f\x7fcharacters",
    "\x1b[36;44mterminal\x1b[0m escapes \x1b[",
    "line\u2028separator paragraph\u2029separator next\x85line",
    "replacement \ufffd character",
    "<start_of_text> in <end_of_text> caption <END_OF_TEXT>",
    "<|startoftext|> in <|endoftext|> caption <|EndOfText|>",
    "[CLS] [SEP] [PAD] [MASK] [UNK] [cls]",
    "'ſ 'K \u212aelvin long ſ's",
    "a\u0300\u0301\u0302b",
    "ǅungla ǈ ǋ ǲ",
    "𝒥ohn ℋancock 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚",
    "𐐀𐐨 deseret 𓀀 hieroglyph",
    "a.b.c.d U.S.A. e.g. i.e.",
    "don\u2019t can\u2018t won\u02bct",
    "MIXEDcase CamelCase snake_case kebab-case",
    "ÀÉÎÕÜ àéîõü ÇÑ",
    "1/2 3/4 10x10 100% 5°C 20€ £30 ¥40",
    "a\u00b4b `backtick` ´acute´",
    "__dunder__ ___ _ a_b",
    "\\n \\t \\u00e9 \\x41",
    "NULL None NaN undefined",
    "SELECT * FROM captions; -- drop",
    "<p>html <b>bold</b></p> &lt;tag&gt;",
    "<a href=\"x\">link &amp; more</a>",
    "five < six > four & more",
    "image.jpg IMG_1234.JPG DSC-0001.png",
    "a" + "\u0301" * 50,
    "ab" * 120 + " end",
    "Å ngström Â circumflex Ã tilde alone",
    "Ã la mode, voilÃ le travail",
    "100 Â°C and Â£5",
    "l\u2019Ã©tÃ© Ã\xa0 Paris",
    "already fine: é à ü – “ok”",
    "ÃƒÂ© double mojibake",
    "â€œquotedâ€\x9d and â€œlostâ€� textâ€¦",
    "ð\x9f\x98\x80 emoji as latin-1",
    "ðŸ˜€ emoji as windows-1252",
    "Ã±ANDÃº mixed with “good” quotes",
    "РџСЂРёРІРµС‚ mojibake cyrillic",
    "Ð\x9fÑ\x80Ð¸Ð²ÐµÑ\x82",
    "macroman: √© √† ‚Äú ‚Äù",
    "cp437: ├⌐ ΓÇ£",
    "\x91single\x92 \x93double\x94 c1 \x85 \x99",
    "voil\xe0\x85 le caf\xe9",
    "é\x80 c1 in latin",
    "Hello?? â\x80\x94 worldâ\x80\x99s",
    "à¤¹à¤¿à¤¨à¥\x8dà¤¦à¥€",
    "ã\x83\x84 ¯\\_(ã\x83\x84)_/¯",
    "í\xa0½í¸\x80 surrogates as utf-8",
    "À\x80 null in two bytes Ã©",
    "Ĺ‚Ăłdka Ĺ›liwka",
    "β€™ Ξ±Ξ²Ξ³",
    "ā€™ baltic",
    "Ã‚Â© Ã‚Â®",
]
ENTITIES = [
    "&amp; &lt; &gt; &quot; &apos; &nbsp;x",
    "&amp;amp; &amp;lt; &amp;amp;amp; &amp;#39;",
    "fish &amp chips &copy 2020 &reg &eacute;t&eacute &EACUTE; &NTILDE; &nTILDE;",
    "&notit; &notin; &not; &ampersand &ltfoo",
    "&#39; &#x27; &#X27; &#8217; &#x2019 &#128512; &#x1F600;",
    "&#0; &#13; &#128; &#x80; &#153; &#xD800; &#x110000; &#99999999999999999999; &#xFFFE; &#1;",
    "&; & &# &#; &#x; &#xg; &unknown; &toolongtobeanentitynameatallreally;",
    "&hellip; &mdash; &ndash; &rsquo; &ldquo;x&rdquo; &trade; &euro;",
    "&NewLine;&Tab;&lbrace;&NotEqualTilde;&CounterClockwiseContourIntegral;",
    "caf&Atilde;&copy; mojibake in entities",
    "&lt;b&gt;bold&lt;/b&gt; <i>",
    "Tom&Jerry R&D AT&T &Aacute &aacutex",
    "&amp;eacute; &amp;amp;eacute; &#38;eacute;",
    "&#226;&#128;&#153; bytes as references",
    "&frac12; &sup2; &deg; &times; &divide; &szlig; &SZLIG;",
    "a&shy;b &zwj; &zwnj; &lrm; &ensp; &emsp; &thinsp;",
]


def captions():
    """Returns the captions above, and texts of many scripts in wrong encodings."""
    found = PLAIN + ENTITIES
    texts = [
        "Fußgängerübergang",
        "l’été à Paris",
        "piñata “señor”",
        "Škoda žluťoučký kůň",
        "日本語",
        "Привет",
        "naïve — café…",
        "emoji 😀 ok",
        "50 € • ½",
        "Ångström",
        "àla às à quel",
        "ελληνικά",
    ]
    windows = [f"sloppy-windows-{number}" for number in (1252, 1251, 1250)]
    encodings = ["latin-1", *windows, "macroman", "cp437", "iso-8859-2"]

    def wrong(text, encoding):
        return text.encode("utf-8").decode(encoding, errors="replace")

    for text in texts:
        found += [wrong(text, encoding) for encoding in encodings]
    twice = [wrong(wrong(text, "latin-1"), "sloppy-windows-1252") for text in texts]
    without_a0 = [wrong(text, "latin-1").replace("\xa0", " ") for text in texts]
    return found + twice + [f"a photo of {text}" for text in twice[:4]] + without_a0


def expanded(pattern):
    """Returns a verbose Python pattern without white space and comments, for Rust's `regex`."""
    out, in_class, at = [], False, 0
    while at < len(pattern):
        letter = pattern[at]
        if letter == "\\":
            known = {"s": r"[\s\x1c-\x1f]", "w": r"[\p{L}\p{N}_]"}
            out.append(known.get(pattern[at + 1], pattern[at : at + 2]))
            at += 2
            continue
        if in_class:
            in_class = letter != "]"
        elif letter == "[":
            in_class = True
        elif letter.isspace():
            at += 1
            continue
        elif letter == "#":
            at = pattern.index("\n", at)
            continue
        out.append(letter if " " <= letter <= "~" else f"\\x{{{ord(letter):x}}}")
        at += 1
    return "".join(out)


def tables():
    from ftfy.badness import BADNESS_RE
    from ftfy.chardata import CHARMAP_ENCODINGS, UTF8_CLUES

    folder = ROOT / "src/text/tables"
    codes = lambda text: " ".join(f"{ord(letter):x}" for letter in text)
    lines = [f"{name} {codes(text)}" for name, text in sorted(html5.items())]
    lines += [f"#{number} {codes(text)}" for number, text in sorted(html._invalid_charrefs.items())]
    (folder / "entities.txt").write_text("\n".join(lines) + "\n")

    lines = [f"badness {expanded(BADNESS_RE.pattern)}"]
    for name, letters in UTF8_CLUES.items():
        members = "".join(chr(code) for code in range(0x110000) if re.fullmatch(f"[{letters}]", chr(code)))
        lines.append(f"{name} {codes(members)}")
    for encoding in CHARMAP_ENCODINGS:
        lines.append(f"encoding {encoding} {codes(bytes(range(256)).decode(encoding))}")
    (folder / "mojibake.txt").write_text("\n".join(lines) + "\n")


def byte_pairs(count):
    """Returns the first merges of OpenAI's file, with its first line."""
    lines = gzip.open(default_bpe()).read().decode().split("\n")
    return lines[: 1 + count]


def write_merges(path, count):
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        # No line feed at the end: SimpleTokenizer would take the empty line for a merge.
        file.write("\n".join(byte_pairs(count)).encode())


def write_hf_tokenizer(folder, count):
    """Writes `vocab.json` and `merges.txt`, in the order of OpenAI's vocabulary."""
    bytes_first = list(open_clip.tokenizer.bytes_to_unicode().values())
    merges = byte_pairs(count)
    words = bytes_first + [word + "</w>" for word in bytes_first]
    words += [line.replace(" ", "") for line in merges[1:]] + SPECIAL
    assert len(set(words)) == len(words)
    ids = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False, separators=(",", ":")))
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")


def wordpiece_vocabulary(texts):
    """Returns a small vocabulary in BERT's format: special tokens, letters, pieces and some whole words."""
    words = ["[PAD]"] + [f"[unused{index}]" for index in range(9)] + ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789!?.,-'&<>;:#éßцкпрвет日ςσ"))
    words += letters + [f"##{letter}" for letter in letters]
    whole = sorted(set(re.findall(r"[a-z]{2,8}", " ".join(texts).lower())))
    words += whole[::2] + [f"##{word}" for word in whole[1::6]]
    return list(dict.fromkeys(words))


def randomize(model):
    """Moves weights away from their symmetric initialization, including those of norms."""
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.dim() > 1 else 0.2
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape) * scale)
            if re.search(r"(ln|norm)\w*\.weight$", name):
                parameter.add_(1.0)


def record(tensors, name, ids, weights, embeddings, parameters):
    """Records embeddings, and the gradients of their sum weighted by `weights`."""
    (embeddings * weights).sum().backward()
    tensors[f"{name}.ids"] = ids.to(torch.int64).contiguous()
    tensors[f"{name}.weights"] = weights.float().contiguous()
    tensors[f"{name}.embeddings"] = embeddings.detach().float().contiguous()
    for parameter, value in parameters:
        if value.grad is not None:
            tensors[f"{name}.gradient.{parameter}"] = value.grad.float().contiguous()


def rows(ids):
    """Formats rows of ids as text, without trailing zeros to save space."""
    found = []
    for row in ids.tolist():
        while row and row[-1] == 0:
            row.pop()
        found.append(" ".join(map(str, row)))
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tables", action="store_true", help="write the tables of src/text instead")
    if parser.parse_args().tables:
        return tables()
    torch.manual_seed(SEED)
    FOLDER.mkdir(exist_ok=True)
    texts = captions()

    write_merges(FOLDER / "merges.txt.gz", MERGES)
    clip = SimpleTokenizer(bpe_path=str(FOLDER / "merges.txt.gz"))
    bert_folder = FOLDER / "wordpiece"
    bert_folder.mkdir(exist_ok=True)
    words = wordpiece_vocabulary(texts)
    (bert_folder / "vocab.txt").write_text("\n".join(words) + "\n")
    bert = BertTokenizer.from_pretrained(str(bert_folder))
    bert.save_pretrained(bert_folder)
    for left in bert_folder.iterdir():
        if left.name not in ("vocab.txt", "tokenizer.json"):
            left.unlink()
    # Its constructor would require the folder of a whole model.
    clipa = HFTokenizer.__new__(HFTokenizer)
    clipa.tokenizer_mode, clipa.context_length, clipa.strip_sep_token = "", 32, True
    clipa.clean_fn = open_clip.tokenizer.get_clean_fn("whitespace")
    clipa.tokenizer = bert
    recorded = {
        "captions": texts,
        "cleaned": [_clean_lower(text) for text in texts],
        "clip": rows(clip(texts)),
        "clip_16": rows(clip(texts, context_length=16)),
        "wordpiece": rows(clipa(texts)),
    }
    (FOLDER / "captions.json").write_text(json.dumps(recorded, indent=0) + "\n")

    tensors = {}
    some = [text for text in texts if 3 < len(text) < 60][:9]

    write_merges(FOLDER / "few_merges.txt.gz", FEW_MERGES)
    few = SimpleTokenizer(bpe_path=str(FOLDER / "few_merges.txt.gz"), context_length=14)
    (FOLDER / "few_merges.txt.gz").unlink()

    # Hugging Face: both activations, end token found by id.
    for name, act in [("hf_quick", "quick_gelu"), ("hf_gelu", "gelu")]:
        folder = FOLDER / name
        folder.mkdir(exist_ok=True)
        write_hf_tokenizer(folder, FEW_MERGES)
        vocabulary = len(json.loads((folder / "vocab.json").read_text()))
        config = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=40,
            projection_dim=12,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=14,
            hidden_act=act,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=1,
        )
        model = CLIPTextModelWithProjection(config).eval()
        randomize(model)
        model.save_pretrained(folder)
        ids = few(some)
        model = model.double()
        weights = torch.randn(len(some), 12).double()
        output = model(input_ids=ids).text_embeds
        record(tensors, name, ids, weights, output, [])

    # open_clip: OpenAI's text tower with an image tower, in a custom text model, and CLIPA's.
    vision = {"image_size": 8, "patch_size": 8, "width": 8, "layers": 1, "head_width": 4}
    clip_text = {"context_length": 14, "vocab_size": few.vocab_size, "width": 16, "heads": 2, "layers": 2}
    clipa_text = {
        "context_length": 10,
        "vocab_size": len(words),
        "hf_tokenizer_name": "bert-base-uncased",
        "tokenizer_kwargs": {"strip_sep_token": True},
        "width": 16,
        "heads": 4,
        "layers": 2,
        "pool_type": "last",
        "no_causal_mask": True,
        "act_kwargs": {"approximate": "tanh"},
    }
    kinds = [
        ("open_clip", clip_text, True, False),
        ("custom", clip_text, False, True),
        ("clipa", clipa_text, False, False),
    ]
    for name, text, quick, custom in kinds:
        folder = FOLDER / name
        folder.mkdir(exist_ok=True)
        kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
        model = kind(embed_dim=12, vision_cfg=dict(vision), text_cfg=dict(text), quick_gelu=quick).eval()
        randomize(model)
        sizes = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
        config = {"model_cfg": sizes, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}
        if quick:
            config["model_cfg"]["quick_gelu"] = True
        if custom:
            config["model_cfg"]["custom_text"] = True
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
        if name == "open_clip":
            torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
        else:
            weights = {key: value.contiguous() for key, value in model.state_dict().items()}
            save_file(weights, folder / "open_clip_model.safetensors")
        if name == "clipa":
            (folder / "vocab.txt").write_text((bert_folder / "vocab.txt").read_text())
            ids = clipa(some, context_length=10)
        else:
            write_merges(folder / "bpe_simple_vocab_16e6.txt.gz", FEW_MERGES)
            ids = few(some)
        model = model.double()
        weights = torch.randn(len(some), 12).double()
        output = model.encode_text(ids)
        own = (model.text if custom else model).named_parameters()
        own = [(key, value) for key, value in own if not key.startswith(("visual.", "logit_"))]
        record(tensors, name, ids, weights, output, own)

    save_file(tensors, FOLDER / "towers.safetensors")
    (FOLDER / "some.json").write_text(json.dumps(some) + "\n")
    packages = ["torch", "open_clip_torch", "transformers", "tokenizers", "ftfy", "regex", "safetensors"]
    versions = {name: version(name) for name in packages} | {"seed": SEED}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
