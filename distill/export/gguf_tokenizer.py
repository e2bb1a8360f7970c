"""A tokenizer in the words of a GGUF file: pieces, kinds, merges or scores, and which reader of llama.cpp takes them.

Three kinds are held: byte-level BPE whose pre-tokenizer llama.cpp knows by name, BPE with byte fallback (Llama 2 and
Mistral, read as SentencePiece), and the embedded one-character tokenizer. All is read off the tokenizer as transformers
made it, whichever files it came from. Another kind is refused: it would cut text otherwise, and nobody would be told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.data.tokenizer import WORDS, build_tokenizer
from distill.errors import UserError
from distill.records import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's kinds of tokens (``LLAMA_TOKEN_TYPE_*``)."""
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = "ByteLevel"
SPLITS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((CONTRACTIONS + LETTERS + r"\p{N}{1,3}" + REST,), True): "llama-bpe",
    ((CONTRACTIONS + LETTERS + r"\p{N}{1,3}" + REST,), False): "smaug-bpe",
    ((CONTRACTIONS + LETTERS + r"\p{N}" + REST,), False): "qwen2",
    ((CASED % ("", "", ""),), True): "tekken",
    ((CASED % (CONTRACTIONS + "?", CONTRACTIONS + "?", "{1,3}"),), False): "gpt-4o",
    ((GPT2,), False): "gpt-2",
    (("Digits", GPT2), False): "smollm",
}
"""How a pre-tokenizer splits text, and whether a word that is a token is taken whole (``ignore_merges``) -> the name by
which llama.cpp knows it (``tokenizer.ggml.pre``)."""


@dataclass
class Vocabulary:
    """What a GGUF file tells of a tokenizer: ``model`` and ``pre`` choose llama.cpp's reader."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    """bos, eos, eot, unk, pad: those that there are."""
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: str = ""
    core: str = ""
    """tokenizer.json, for programs that read it (``tokenizer.huggingface.json``)."""


def vocabulary(folder: Path, tokenizer: Any, size: int) -> Vocabulary:
    """The tokenizer of the model in ``folder``, filled up to its ``size`` embeddings; UserError for one that llama.cpp
    would read otherwise."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise refusal(folder, f"of the class {type(tokenizer).__name__}, which has no tokenizer.json")
    core.no_padding()
    core.no_truncation()
    text = core.to_str()
    content = json.loads(text)
    model = content["model"]
    if is_embedded(content):
        made = embedded(model)
    elif model["type"] == "BPE" and "ByteLevel" in [part["type"] for part in sequence(content, "decoder")]:
        made = byte_level(folder, content)
    elif model["type"] == "BPE" and model.get("byte_fallback"):
        made = sentencepiece(folder, content)
    else:
        raise refusal(folder, f"of the kind {model['type']}")
    fill(made, content["added_tokens"], size)
    made.core = text
    special(made, folder, tokenizer)
    return made


def refusal(folder: Path, what: str) -> UserError:
    """What a tokenizer that cannot be held ends in."""
    return UserError(
        f"{folder} has a tokenizer {what}, which no GGUF holds exactly; held are byte-level BPE with the pre-tokenizer "
        f"of {', '.join(sorted(set(SPLITS.values())))}, BPE with byte fallback (Llama 2, Mistral), the embedded one\n"
        "without llama.cpp: distill export --to hf-native, whose folder takes any tokenizer along"
    )


def sequence(content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The parts of a normaliser, pre-tokenizer or decoder, one after the other."""
    part = content.get(key)
    if part is None:
        return []
    inner = part.get({"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[key])
    return list(inner) if part["type"] == "Sequence" else [part]


def is_embedded(content: Mapping[str, Any]) -> bool:
    """Whether this is the embedded tokenizer: the same words, split by the same expression."""
    ours = json.loads(build_tokenizer().backend_tokenizer.to_str())
    return all(content[key] == ours[key] for key in ("model", "pre_tokenizer", "normalizer"))


def embedded(model: Mapping[str, Any]) -> Vocabulary:
    """The embedded tokenizer as a BPE of which every token is a character, but for its words.

    A word that begins a text is found whole (``llama-bpe`` takes words that are tokens); "from", which stands in the
    middle, is merged, and merged on with a letter beside it, which leaves characters. That is every text that the
    families write, save one: keys asked for by "from" that spell "from" themselves. Characters beyond the alphabet
    vanish, where ours are <|unknown|>.
    """
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokens = ["Ġ" if piece == " " else piece for piece in pieces]
    letters = [piece for piece in pieces if len(piece) == 1 and piece.isalpha()]
    inside = WORDS[-1]
    merges = [f"{inside[:end]} {inside[end]}" for end in range(1, len(inside))]
    merges += [f"{letter} {inside}" for letter in letters] + [f"{inside} {letter}" for letter in letters]
    merges.append(f"{inside} {inside}")
    return Vocabulary("gpt2", "llama-bpe", tokens, [NORMAL] * len(tokens), merges=merges)


def byte_level(folder: Path, content: Mapping[str, Any]) -> Vocabulary:
    """Byte-level BPE; its pieces are in GPT-2's letters for bytes, as llama.cpp has them."""
    model = content["model"]
    splits: list[str] = []
    for part in sequence(content, "pre_tokenizer"):
        if part["type"] == "ByteLevel":
            if part.get("add_prefix_space"):
                raise refusal(folder, "that puts a space before every text (add_prefix_space)")
            splits += [GPT2] if part.get("use_regex", True) else []
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            splits.append(next(iter(part["pattern"].values())))
        elif part["type"] == "Digits" and part["individual_digits"]:
            splits.append("Digits")
        else:
            splits.append(part["type"])
    whole = bool(model.get("ignore_merges"))
    pre = SPLITS.get((tuple(splits), whole))
    if pre is None:
        raise refusal(folder, f"whose pre-tokenizer llama.cpp does not know: {', '.join(splits) or 'none'!r:.200}")
    if others := [part["type"] for part in sequence(content, "normalizer") if part["type"] != "NFC"]:
        raise refusal(folder, f"with the normaliser {others[0]}")
    if model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        raise refusal(folder, "with marks at the ends of words")
    tokens = by_id(model["vocab"])
    return Vocabulary("gpt2", pre, tokens, [NORMAL] * len(tokens), merges=[" ".join(pair) for pair in pairs(model)])


def sentencepiece(folder: Path, content: Mapping[str, Any]) -> Vocabulary:
    """BPE with byte fallback. SentencePiece joins whatever neighbours make the piece of the best score, so that the
    rank of a piece's first merge is its score; a tokenizer that knows a piece without all of its merges is another."""
    model = content["model"]
    tokens = by_id(model["vocab"])
    ranks: dict[str, int] = {}
    joined = pairs(model)
    for rank, (left, right) in enumerate(joined):
        ranks.setdefault(left + right, rank)
    known, vocab = set(joined), model["vocab"]
    for piece in ranks:
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            if pair[0] in vocab and pair[1] in vocab and pair not in known:
                raise refusal(folder, f"that does not merge {pair[0]!r} and {pair[1]!r}, as SentencePiece would")
    kinds = [BYTE if len(t) == 6 and t.startswith("<0x") and t.endswith(">") else NORMAL for t in tokens]
    if kinds.count(BYTE) != 256:
        raise refusal(folder, f"with {kinds.count(BYTE)} of 256 bytes")
    if model.get("unk_token") in vocab:
        kinds[vocab[model["unk_token"]]] = UNKNOWN
    worst = -float(len(joined) + 1)
    return Vocabulary(
        "llama", "default", tokens, kinds,
        scores=[-float(ranks[token]) if token in ranks else worst for token in tokens],
        add_space_prefix=space_prefix(folder, content),
    )  # fmt: skip


def space_prefix(folder: Path, content: Mapping[str, Any]) -> bool:
    """Whether a space goes before a text; UserError for what else is done to text before it is cut."""
    prefix = False
    for part in (*sequence(content, "normalizer"), *sequence(content, "pre_tokenizer")):
        if part["type"] == "Prepend" and part["prepend"] == "▁":
            prefix = True
        elif part["type"] == "Metaspace" and part["replacement"] == "▁" and not part.get("split"):
            prefix = part["prepend_scheme"] != "never"
        elif part["type"] != "Replace" or (part["pattern"], part["content"]) != ({"String": " "}, "▁"):
            raise refusal(folder, f"with {part['type']}, which SentencePiece has not")
    return prefix


def by_id(vocab: Mapping[str, int]) -> list[str]:
    """Pieces in the order of their ids; "" where an id has none."""
    tokens = [""] * (max(vocab.values(), default=-1) + 1)
    for piece, place in vocab.items():
        tokens[place] = piece
    return tokens


def pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE, in either of the forms that they are stored in."""
    split = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return [(left, right) for left, right in split]


def fill(made: Vocabulary, added: list[dict[str, Any]], size: int) -> None:
    """Put the added tokens in their places, and something unused where an embedding has no token."""
    wanted = max(size, max((token["id"] + 1 for token in added), default=0))
    made.kinds += [UNUSED] * (wanted - len(made.tokens))
    made.tokens += [""] * (wanted - len(made.tokens))
    for token in added:
        place = token["id"]
        made.tokens[place] = token["content"]
        if made.kinds[place] != UNKNOWN:
            made.kinds[place] = CONTROL if token["special"] else USER_DEFINED
    for place, piece in enumerate(made.tokens):
        if not piece:
            made.tokens[place], made.kinds[place] = f"[PAD{place}]", UNUSED
    if made.scores:
        made.scores += [-1000.0 - len(made.tokens)] * (len(made.tokens) - len(made.scores))


def special(made: Vocabulary, folder: Path, tokenizer: Any) -> None:
    """Which tokens begin and end a text, whether they are put there, and how a chat is written."""
    made.ids = {
        name: place
        for name in ("bos", "eos", "unk", "pad")
        if (place := getattr(tokenizer, f"{name}_token_id")) is not None
    }
    file = folder / "generation_config.json"
    ends = (read_json(file) if file.is_file() else {}).get("eos_token_id")
    others = [
        place for place in (ends if isinstance(ends, list) else [ends]) if place not in (None, made.ids.get("eos"))
    ]
    if others:
        made.ids["eot"] = others[0]
    bare, dressed = (tokenizer("1", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    made.add_bos = len(dressed) > len(bare) and dressed[0] == made.ids.get("bos")
    made.add_eos = len(dressed) > len(bare) and dressed[-1] == made.ids.get("eos")
    template = tokenizer.chat_template
    made.chat_template = template if isinstance(template, str) else (template or {}).get("default", "")
