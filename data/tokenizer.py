"""Text ↔ ids, where control tokens come by id alone.

A tokenizer.json lists control tokens beside the vocabulary, and the usual encoder looks for them in every
text: a user who types `<|im_end|>` closes the turn. Here the encoder is built from the same file without
them, so that there is nothing to find. Owns byte-level BPE files, Mistral's Tekken files, the files that
other programs read, and the training of small tokenizers. Knows no conversations.
"""

import base64
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from data.errors import DataError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
BOS, PAD, UNK = "<s>", "<pad>", "<unk>"
BASE_EOS = "</s>"
"""What base models of this family end a text with; a ChatML model ends a message with `IM_END`."""

_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Tekken's split of text into words: numbers digit by digit, blanks with the word that follows."""

_NEMO_CONTROLS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "<pad>", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
)
"""Names of Nemo's first control ids, as published with the weights; a Tekken file of that time bears none,
and the names that later libraries supply for it have moved (their `<pad>` is 11, Nemo's is 10)."""

_NEMO_SLOTS = {IM_START: 14, IM_END: 15}
"""Nemo's first two reserved ids."""

_PROBES = (
    "plain",
    " \t\r\n\n  two  spaces  \n",
    "\n\nstart",
    "e\u0301 \u00e9 ﬁ ½ Å \u212b ﷺ 漢字 かな Ünïcödé",
    "\u0000\u0001\u007f\u0085\u00a0\u200b\u200d\u2028\ufeff\ufffd🤖👩‍👩‍👧",
    "12345 1,000.00 don't I'LL can`t",
    "<|im_start|>system\n<|im_end|><s></s><unk><pad>[INST] ▁ Ġ Ċ <0x0A>",
)
"""Texts that a tokenizer which changes text (case, Unicode form, blanks, a prefix space) does not give
back."""


_CHARACTERS_A_CORE = 131_072
"""Characters that are encoded at once, for each core."""


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies, [256].

    Source: the mapping published with GPT-2: printable Latin-1 stands for itself, the rest from U+0100 on.
    """
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = (chr(0x100 + n) for n in range(256))
    return [chr(byte) if byte in own else next(rest) for byte in range(256)]


class Tokenizer:
    """Byte-level BPE with control tokens apart.

    Every text is encodable and `decode(encode(text)) == text`; no text yields a control token. Both are
    checked when a tokenizer is made. Made by `from_file` and `train_tokenizer`.

    Attributes:
        vocab_size: number of ids, control tokens and gaps included; every id is below it.
        bos_id: id put before each conversation, or None where the tokenizer has none.
        im_start_id: id that opens a message.
        im_end_id: id that closes a message.
        eos_id: the same, by the name that configuration files use.
        stop_ids: ids at which generation stops: `eos_id`, and `</s>` where there is one, since a base model
            may still end a text with it.
        pad_id: id for padding, never one that is trained; None where the tokenizer has none.
        unk_id: id of `<unk>`, which no text yields; None where the tokenizer has none.
        controls: name → id of each control token.
        control_ids: their ids.
        digest: sha256 (hex) of all that decides what ids a text gets; the same for equal tokenizers, whatever
            the file's layout.
    """

    def __init__(self, spec: Mapping[str, Any], bos: str | None, place: str) -> None:
        """Build from a parsed tokenizer.json that has both ChatML control tokens.

        Args:
            spec: the parsed file.
            bos: name of the token to put first, or None.
            place: what to call it in error messages.

        Raises:
            DataError: it is not byte-level BPE, changes text, or lacks a control token.
        """
        model = _model_of(spec, place)
        vocab: dict[str, int] = dict(model["vocab"])
        self.controls: dict[str, int] = {t["content"]: t["id"] for t in _added_of(spec, place)}
        for name in (IM_START, IM_END):
            if name not in self.controls and name in vocab:
                self.controls[name] = vocab[name]
        for name in (IM_START, IM_END, *((bos,) if bos is not None else ())):
            if name not in self.controls:
                raise DataError(f"{place}: no control token {name!r}; it has {_some(self.controls)}")
        self.control_ids = frozenset(self.controls.values())
        self._names = {id_: name for name, id_ in self.controls.items()}
        self.im_start_id, self.im_end_id = self.controls[IM_START], self.controls[IM_END]
        self.bos_id = None if bos is None else self.controls[bos]
        self.eos_id = self.im_end_id
        self.stop_ids = [self.eos_id, *([self.controls[BASE_EOS]] if BASE_EOS in self.controls else [])]
        self.unk_id = self.controls.get(UNK)
        # Never im_end: trainers leave padding out of the loss by its id, and the stop token would go with it.
        self.pad_id = next((self.controls[name] for name in (PAD, UNK, BASE_EOS) if name in self.controls), None)
        self.vocab_size = 1 + max(max(vocab.values(), default=0), max(self.control_ids))
        self._control_ids = np.array(sorted(self.control_ids))

        # With ignore_merges a whole word is looked up in the vocabulary, so a control token must not stand
        # there.
        gone = {token for token, id_ in vocab.items() if token in self.controls or id_ in self.control_ids}
        for token in gone:
            del vocab[token]
        missing = [byte for byte, character in enumerate(_byte_characters()) if character not in vocab]
        if missing:
            raise DataError(
                f"{place}: byte 0x{missing[0]:02x} (and {len(missing) - 1} more) cannot be encoded; expected "
                "a byte-level BPE tokenizer whose vocabulary holds all 256 bytes"
            )
        merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model.get("merges") or ()]
        if gone:
            merges = [m for m in merges if not gone.intersection((*m, "".join(m)))]
        plain: dict[str, Any] = {
            "version": "1.0",
            "normalizer": spec.get("normalizer"),
            "pre_tokenizer": spec.get("pre_tokenizer"),
            "decoder": spec.get("decoder"),
            "model": {
                "type": "BPE",
                "ignore_merges": bool(model.get("ignore_merges")),
                "continuing_subword_prefix": model.get("continuing_subword_prefix") or None,
                "end_of_word_suffix": model.get("end_of_word_suffix") or None,
                "vocab": vocab,
                "merges": merges,
            },
        }
        text = json.dumps(plain, sort_keys=True)
        try:
            self._plain = RawTokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for every fault in a file
            raise DataError(f"{place}: not a usable tokenizer.json: {error}") from error
        self._spec = plain
        controls = json.dumps([sorted(self.controls.items()), self.bos_id])
        self.digest = hashlib.sha256(f"{text}\n{controls}".encode()).hexdigest()
        for probe in _PROBES:
            if (back := self.decode(self.encode(probe))) != probe:
                raise DataError(
                    f"{place}: the tokenizer changes text: {probe!r} comes back as {back!r}; expected one "
                    "without a normalizer and without a prefix space"
                )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, digest={self.digest[:16]})"

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        im_start_slot: int | None = None,
        im_end_slot: int | None = None,
        append: bool = False,
    ) -> "Tokenizer":
        """Read a tokenizer.json, a Tekken file of Mistral-Nemo (told apart by content), or a model's folder.

        BOS is `bos_token` of a tokenizer_config.json beside the file where that names one (or null: none),
        else `<s>` where that is a control token.

        Args:
            path: the file, or a folder that holds tokenizer.json or else tekken.json.
            im_start_slot: reserved id to rename to `<|im_start|>`, where the file has none; a Tekken file
                uses 14.
            im_end_slot: the same for `<|im_end|>`; a Tekken file uses 15.
            append: where the file lacks a ChatML token, give it the next free id instead of a slot. The
                embedding has to grow by as many rows.

        Returns:
            The tokenizer.

        Raises:
            DataError: the file is not there, not a tokenizer, or has no ChatML tokens and neither slots nor
                `append` were given, or both were.
        """
        path = _file_of(Path(path))
        slots = {IM_START: im_start_slot, IM_END: im_end_slot}
        if append and any(slot is not None for slot in slots.values()):
            raise DataError(
                f"{path}: append is set, and so is im_start_slot ({im_start_slot}) or im_end_slot ({im_end_slot}); a "
                "ChatML token has either a new id or a reserved one: set append, or name slots"
            )
        spec = _read_json(path)
        if isinstance(spec.get("vocab"), list) and isinstance(spec.get("config"), dict):
            spec = _from_tekken(spec, path)
            if not append:
                slots = {name: _NEMO_SLOTS[name] if slot is None else slot for name, slot in slots.items()}
        spec = _with_chatml(spec, path, slots, append)
        bos: str | None = BOS if any(t["content"] == BOS for t in _added_of(spec, str(path))) else None
        config_path = path.with_name("tokenizer_config.json")
        if config_path.is_file():
            config = _read_json(config_path)
            named = config.get("bos_token", bos)
            bos = named["content"] if isinstance(named, dict) else named
        return cls(spec, bos, str(path))

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json that `from_file` reads back to an equal tokenizer.

        Other libraries read it too: it lists the control tokens, and adds BOS where this tokenizer has one.

        Args:
            path: the file to write. A tokenizer_config.json is put beside it only where BOS is not what its
                absence would mean.
        """
        path = Path(path)
        _write_json(path, self._contents())
        bos = self._name(self.bos_id)
        if bos != (BOS if BOS in self.controls else None):
            _write_json(path.with_name("tokenizer_config.json"), {"bos_token": bos})

    def export(self, folder: Path, *, max_length: int | None) -> None:
        """Write what transformers (4.4x and 5.x), vLLM and llama.cpp's converter read of a tokenizer.

        `from_file(folder)` gives an equal tokenizer back. A tekken.json must not lie there: with
        mistral-common installed, transformers would take it and pass over all that is written here.

        Args:
            folder: an existing folder; receives tokenizer.json, tokenizer_config.json,
                special_tokens_map.json and chat_template.jinja.
            max_length: the longest text in tokens that the model was made for; None where that is unknown.
        """
        from data.chatml import chat_template  # it imports this module

        contents = self._contents()
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id, "unk_token": self.unk_id}
        names = {key: self._name(id_) for key, id_ in ids.items() if id_ is not None}
        template = chat_template(self)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,  # where there is none; its absence would mean <s>
            **names,
            # transformers goes by tokenizer.json, llama.cpp's converter by these.
            "add_bos_token": self.bos_id is not None,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"}
                for token in contents["added_tokens"]
            },
            "clean_up_tokenization_spaces": False,
            **({} if max_length is None else {"model_max_length": max_length}),
            "chat_template": template,  # transformers 4.46 reads no chat_template.jinja
        }
        _write_json(folder / "tokenizer.json", contents)
        _write_json(folder / "tokenizer_config.json", config, indent=2)
        _write_json(folder / "special_tokens_map.json", names, indent=2)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    def _contents(self) -> dict[str, Any]:
        """The tokenizer.json of this tokenizer: of the file that it came from, only what decides ids is left."""
        model = self._spec["model"]
        # Pairs as one text: tokenizers before 0.20 knows no other form. It cannot hold a blank inside a token.
        if not any(" " in token for merge in model["merges"] for token in merge):
            model = {**model, "merges": [" ".join(merge) for merge in model["merges"]]}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        in_order = sorted(self.controls.items(), key=lambda item: item[1])
        contents = {
            **self._spec,
            "added_tokens": [{"id": id_, "content": name, **flags} for name, id_ in in_order],
            "model": {**model, "vocab": model["vocab"] | self.controls},
        }
        if (bos := self._name(self.bos_id)) is not None:
            first, text, pair = (
                {kind: {"id": id_, "type_id": type_}}
                for kind, id_, type_ in (("SpecialToken", bos, 0), ("Sequence", "A", 0), ("Sequence", "B", 1))
            )
            contents["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [first, text],
                "pair": [first, text, pair],
                "special_tokens": {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}},
            }
        return contents

    def _name(self, id_: int | None) -> str | None:
        return None if id_ is None else self._names[id_]

    def encode(self, text: str) -> list[int]:
        """Encode text; never yields a control token.

        Args:
            text: any valid Unicode.

        Returns:
            Its ids.

        Raises:
            ValueError: the text holds a lone surrogate.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts on all cores; the same as `encode` on each.

        Args:
            texts: any valid Unicode.

        Returns:
            The ids of each.

        Raises:
            ValueError: a text holds a lone surrogate.
        """
        ids, lengths = self.encode_flat(texts)
        flat, ends = ids.tolist(), np.cumsum(lengths).tolist()
        return [flat[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]

    def encode_flat(self, texts: Sequence[str]) -> tuple[Int32[np.ndarray, "ids"], Int64[np.ndarray, "texts"]]:
        """Encode many texts on all cores into one array; the same ids as `encode_batch`, sooner.

        Args:
            texts: any valid Unicode.

        Returns:
            The ids of all, and how many are those of each.

        Raises:
            ValueError: a text holds a lone surrogate.
        """
        flat, lengths = array("I"), []  # takes a list in half the time of "i", and a third of numpy's
        try:
            for group in _groups(texts):
                for encoding in self._plain.encode_batch_fast(group, add_special_tokens=False):
                    ids = encoding.ids
                    flat.fromlist(ids)
                    lengths.append(len(ids))
        except TypeError:
            for text in texts:
                text.encode("utf-8")  # names the surrogate, which the library takes for a wrong type
            raise
        found = np.asarray(flat).view(np.int32)
        assert not np.isin(found, self._control_ids).any(), "text became a control token"
        return found, np.array(lengths, np.int64)

    def token_bytes(self) -> list[bytes]:
        """What each id stands for in text, which may be a part of a character.

        Returns:
            The bytes of each id, [vocab_size]; none for control tokens and gaps.
        """
        byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        tokens = [self._plain.id_to_token(id_) or "" for id_ in range(self.vocab_size)]
        # What is not written in these characters stands for itself, as the library's decoder has it.
        return [bytes(map(byte_of.__getitem__, t)) if byte_of.keys() >= set(t) else t.encode() for t in tokens]

    def decode(self, ids: Iterable[int]) -> str:
        """Give ids back as text; control tokens show as their names.

        Args:
            ids: any ids of the vocabulary. Bytes that are no whole character show as U+FFFD.

        Returns:
            The text.

        Raises:
            ValueError: an id that is in no vocabulary.
        """
        pieces: list[str] = []
        run: list[int] = []

        def flush() -> None:
            pieces.append(self._plain.decode(run, skip_special_tokens=False))
            run.clear()

        for id_ in ids:
            id_ = int(id_)
            if id_ in self._names:
                flush()
                pieces.append(self._names[id_])
            elif id_ < 0 or self._plain.id_to_token(id_) is None:
                raise ValueError(f"id {id_} is not in this tokenizer's vocabulary of {self.vocab_size}")
            else:
                run.append(id_)
        flush()
        return "".join(pieces)


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in groups that are encoded at once: some 100 bytes a token, which are to stay in the processor's caches."""
    most = _CHARACTERS_A_CORE * (os.cpu_count() or 1)
    group: list[str] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if characters >= most:
            yield group
            group, characters = [], 0
    if group:
        yield group


def named_chatml(path: Path) -> tuple[int | None, int | None] | None:
    """The ids under which a tokenizer.json already names `<|im_start|>` and `<|im_end|>`.

    Args:
        path: the file, or a folder with it. A Tekken file names neither.

    Returns:
        Both ids, each None where the name is not there; None where there is no such file.

    Raises:
        DataError: the file is not a tokenizer.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        return None
    spec = _read_json(file)
    if isinstance(spec.get("vocab"), list):
        return None, None
    ids = dict(_model_of(spec, str(file))["vocab"])
    ids |= {token["content"]: token["id"] for token in _added_of(spec, str(file))}
    return ids.get(IM_START), ids.get(IM_END)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with ChatML control tokens; the same texts give the same tokenizer.

    Args:
        texts: what to learn from; their order does not matter.
        vocab_size: ids in all: 5 control tokens, 256 bytes, the rest learned.

    Returns:
        A tokenizer of exactly `vocab_size` ids, control tokens `<s> </s> <pad> <|im_start|> <|im_end|>` at
        0..4.

    Raises:
        DataError: too small a number, or too little text to learn so many.
    """
    controls = [BOS, BASE_EOS, PAD, IM_START, IM_END]
    least = len(controls) + 256
    if vocab_size < least:
        raise DataError(
            f"tokenizer.vocab_size is {vocab_size}; expected at least {least}: 256 bytes and {len(controls)} controls"
        )
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=controls,
        initial_alphabet=sorted(_byte_characters()),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    if (found := raw.get_vocab_size()) != vocab_size:
        raise DataError(
            f"tokenizer.vocab_size is {vocab_size}, but the texts yield only {found} tokens; "
            f"set it to {found} or less, or give more text"
        )
    return Tokenizer(json.loads(raw.to_str()), BOS, "the trained tokenizer")


def _from_tekken(tekken: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Turn a Tekken file into the contents of a tokenizer.json.

    Tekken merges by rank, tokenizer.json by a list of pairs: each token's pairs are all its splits into two
    tokens, and with the list in order of the tokens' ranks both merge alike.

    Source: the conversion in transformers (MistralConverter); the names of control tokens are Nemo's own
        instead.
    """
    if "special_tokens" in tekken:
        raise DataError(
            f"{path}: a Tekken file with its own control tokens; expected Mistral-Nemo's "
            "(tekken_240718.json), which has none. Use the model's tokenizer.json"
        )
    config = tekken["config"]
    controls = int(config["default_num_special_tokens"])
    characters = _byte_characters()
    ranks: dict[bytes, int] = {}
    for entry in tekken["vocab"][: int(config["default_vocab_size"]) - controls]:
        ranks[base64.b64decode(entry["token_bytes"])] = entry["rank"]
    strings = {token: "".join([characters[byte] for byte in token]) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(ranks[a], ranks[b], a, b) for a, b in splits if a in ranks and b in ranks]
        merges += [(strings[a], strings[b]) for _, _, a, b in sorted(known)]
    names = [*_NEMO_CONTROLS, *(f"<SPECIAL_{n}>" for n in range(len(_NEMO_CONTROLS), controls))]
    vocab = {name: id_ for id_, name in enumerate(names)}
    vocab |= {strings[token]: rank + controls for token, rank in ranks.items()}
    split = {
        "type": "Split",
        "pattern": {"Regex": config["pattern"]},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "added_tokens": [{"id": id_, "content": name} for id_, name in enumerate(names)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
    }


def _with_chatml(spec: dict[str, Any], path: Path, slots: Mapping[str, int | None], append: bool) -> dict[str, Any]:
    """Rename reserved control ids to the ChatML names where the file has none, or append new ones."""
    added = _added_of(spec, str(path))
    model = _model_of(spec, str(path))
    vocab = dict(model["vocab"])
    ids = {token["content"]: token["id"] for token in added}
    free = 1 + max([*vocab.values(), *ids.values()], default=-1)
    for name, slot in slots.items():
        here = ids.get(name, vocab.get(name))
        if here is not None:
            if slot not in (None, here):
                raise DataError(f"{path}: {name} is already id {here}; leave its slot unset instead of {slot}")
            continue
        if append:
            added.append({"id": free, "content": name})
            free += 1
            continue
        reserved = [token for token in added if token["id"] == slot]
        if slot is None or not reserved or reserved[0]["content"] in (BOS, IM_START, IM_END):
            found = "no slot was named" if slot is None else f"slot {slot} is no reserved control token"
            raise DataError(
                f"{path}: no control token {name}, and {found}; name a reserved id for it (im_start_slot, "
                f"im_end_slot), one of {_some({t['content']: t['id'] for t in added})}; or set append, which "
                "adds a new id"
            )
        old = reserved[0]["content"]
        reserved[0]["content"] = name
        if old in vocab:
            vocab[name] = vocab.pop(old)
    return {**spec, "added_tokens": added, "model": {**model, "vocab": vocab}}


def _file_of(path: Path) -> Path:
    """The file to read: `path`, or the one in a model's folder."""
    if not path.is_dir():
        return path
    for name in ("tokenizer.json", "tekken.json"):  # a downloaded Nemo has both, alike
        if (path / name).is_file():
            return path / name
    if (path / "tokenizer.model").is_file():
        raise DataError(
            f"{path}: no tokenizer.json or tekken.json, only a SentencePiece tokenizer.model, which is no byte-level "
            "BPE and cannot be read; expected a model of the Nemo family, whose folder holds tokenizer.json"
        )
    raise DataError(
        f"{path}: a folder without tokenizer.json and tekken.json; expected one of them. Give a model's whole "
        "folder, or the file itself"
    )


def _added_of(spec: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """The control tokens that a tokenizer.json lists, each with its name and id."""
    added = spec.get("added_tokens") or []
    for token in added if isinstance(added, list) else [added]:
        fine = isinstance(token, Mapping) and isinstance(token.get("content"), str) and isinstance(token.get("id"), int)
        if not fine:
            raise DataError(f"{place}: added_tokens holds {token!r}; expected objects with content and id")
    return [dict(token) for token in added]


def _model_of(spec: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    model = spec.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("vocab"), Mapping):
        raise DataError(f"{place}: no BPE model found; expected a tokenizer.json with model.vocab and merges")
    return model


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a tokenizer.json, a Tekken file or a folder with one")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}; expected a tokenizer.json or a Tekken file") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: found a JSON {type(value).__name__}; expected a tokenizer.json or a Tekken file")
    return value


def _write_json(path: Path, value: object, indent: int | None = None) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent), encoding="utf-8")


def _some(controls: Mapping[str, int]) -> str:
    """A few control tokens with their ids, for a message."""
    shown = [f"{name}={id_}" for name, id_ in sorted(controls.items(), key=lambda item: item[1])[:20]]
    return ", ".join(shown) + (", …" if len(controls) > 20 else "") if shown else "no control tokens"
