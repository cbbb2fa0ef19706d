"""Converts texts to token ids, with the `tokenizers` library.

A `Tokenizer` is trained on captions, or read from a transformers folder: CLIP's vocab.json and merges.txt, T5's
spiece.model, or any tokenizer.json. In each case `to_json` returns it as the text of one tokenizer.json, from which
`from_json` restores it.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ddpm_jax.runtime.errors import UserError, first_line, reason
from ddpm_jax.runtime.files import read_json_object, write_text

_PAD, _START, _END = "<pad>", "<start>", "<end>"  # of a trained tokenizer; ids 0, 1, 2
MIN_VOCAB_SIZE = 256 + 3  # every byte, and the three above

# CLIP's words: contractions, letters, single digits, and runs of anything else.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CLIP_LENGTH = 77
_SUFFIX = "</w>"  # ends a word's last token
_PROBE = "A caf\u00e9's 42 r\u00e9sum\u00e9s,  don't!  \u4f60\u597d <|endoftext|> \U0001f600"  # has every kind of word

_T5_LENGTH = 512  # tokens of the texts that T5 was trained on
_T5_SENTINELS = 100  # mask tokens of T5's pre-training, after the pieces of its file
_SPACE = "\u2581"  # begins a word

_NO_LENGTH = 10**6  # transformers writes 1e30 if a tokenizer has no maximum length


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Texts as tokens, padded to one length.

    Attributes:
      ids: int32 [N, L].
      mask: bool [N, L], False at padding; each row has at least one True.
      cut: for each text, the end that did not fit; "" if all of it did.
    """

    ids: np.ndarray
    mask: np.ndarray
    cut: tuple[str, ...]


class Tokenizer:
    """Converts texts to tokens and back.

        tokenizer = Tokenizer.train(captions, vocab_size=1024, max_length=32)
        tokens = tokenizer.encode(["forty-two", ""])                       # ids and mask [2, 32]

    The empty text, which stands for no prompt, still has the tokens that start or end a text.

    Attributes:
      vocab_size: one more than the largest id.
      max_length: number of tokens of every encoded text, including start, end and padding.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        """Wraps a tokenizer of the library whose padding and truncation are set to `max_length`."""
        self._tokenizer = tokenizer
        truncation, padding = tokenizer.truncation, tokenizer.padding
        if not truncation or not padding:
            raise ValueError("the tokenizer has no padding or no truncation set")
        self.max_length: int = truncation["max_length"]
        self.vocab_size: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self._control = {*tokenizer.encode("").ids, padding["pad_id"]}

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, max_length: int, *, end_last: bool = False) -> "Tokenizer":
        """Trains a byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019) on captions.

        The same captions give the same tokenizer, whatever their order. Any Unicode text can be encoded and decodes to
        itself; a word has the same tokens at the start of a text as within it.

        Args:
          captions: the texts to train on.
          vocab_size: the most tokens, at least MIN_VOCAB_SIZE; fewer are used if all words of the captions are tokens.
          max_length: number of tokens of every encoded text, at least 3.
          end_last: whether the end token gets the largest id, as in CLIP.

        Raises:
          UserError: a size that is too small, or a caption that is not Unicode text.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(f"the vocabulary has {vocab_size} tokens; accepted: at least {MIN_VOCAB_SIZE}")
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Prepend(" ")
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_PAD, _START, _END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(map(_checked, captions), trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{_START} $A {_END}", special_tokens=[(_START, 1), (_END, 2)]
        )
        # Only the template knows these three, so a prompt cannot contain them.
        content = {**json.loads(tokenizer.to_str()), "added_tokens": []}
        if end_last:
            vocabulary = content["model"]["vocab"]
            last = max(vocabulary, key=vocabulary.__getitem__)
            vocabulary[last], vocabulary[_END] = vocabulary[_END], vocabulary[last]
            content["post_processor"]["special_tokens"][_END]["ids"] = [vocabulary[_END]]
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        return cls(_with_length(tokenizer, max_length, _PAD, "the tokenizer"))

    @classmethod
    def read(cls, path: str | Path, max_length: int | None = None, pad_token: str | None = None) -> "Tokenizer":
        """Reads the tokenizer of a transformers folder or of a tokenizer.json.

        A tokenizer.json is used as it is. CLIP's vocab.json and merges.txt are read like transformers' `CLIPTokenizer`:
        texts in lower case and normal form C, white space as single spaces, between a start and an end token. T5's
        spiece.model is read like transformers' `T5Tokenizer`: words as pieces, then an end token. The pad token is the
        one named in tokenizer_config.json or special_tokens_map.json.

        Args:
          path: the folder or the file.
          max_length: number of tokens of every encoded text; None: from the files, or else 77 for CLIP and 512 for T5.
          pad_token: a token of the vocabulary; None: from the files, or else the end token for CLIP and "<pad>" for T5.

        Raises:
          UserError: files that are missing or broken, or that name no pad token or length.
        """
        path = Path(path)
        config, special = _special_tokens(path if path.is_dir() else path.parent)
        if pad_token is not None:
            special["pad_token"] = tokenizers.AddedToken(pad_token, special=True)
        length: int | None
        file = path / "tokenizer.json" if path.is_dir() else path
        if file == path or file.is_file():
            tokenizer = _from_json(_read(file), str(file))
            length = (tokenizer.truncation or {}).get("max_length")
            pad = (tokenizer.padding or {}).get("pad_token", _PAD)
        elif (path / "spiece.model").is_file():
            tokenizer, length, pad = _t5(path / "spiece.model", config, special), _T5_LENGTH, _PAD
        elif (path / "vocab.json").is_file():
            tokenizer, length, pad = _clip(path, special), _CLIP_LENGTH, "<|endoftext|>"
        else:
            accepted = "tokenizer.json, or vocab.json and merges.txt, or spiece.model"
            raise UserError(f"{str(path)!r} has no tokenizer; accepted: {accepted}")
        if pad_token is not None:
            if pad_token not in tokenizer.get_vocab(with_added_tokens=False):
                raise UserError(f"{str(path)!r} has no token {pad_token!r} to pad with, as this model requires")
            tokenizer.add_special_tokens([special["pad_token"]])
        named = config.get("model_max_length")
        if isinstance(named, int) and 0 < named < _NO_LENGTH:
            length = named
        pad = str(special.get("pad_token", pad))
        return cls(_with_length(tokenizer, max_length or length, pad, repr(str(path))))

    @classmethod
    def from_json(cls, text: str, where: str = "tokenizer.json") -> "Tokenizer":
        """Restores a tokenizer from the result of `to_json`; a UserError that names `where` for anything else."""
        tokenizer = _from_json(text, where)
        try:
            return cls(tokenizer)
        except ValueError as error:
            raise UserError(f"{where!r} was not written by a Tokenizer: {error}") from None

    @property
    def end_id(self) -> int | None:
        """The id of the token that ends every text, or None."""
        tokens = self.encode(["", "a"])
        last = {int(ids[mask][-1]) for ids, mask in zip(tokens.ids, tokens.mask, strict=True)}
        return last.pop() if len(last) == 1 else None

    def lowercased(self) -> "Tokenizer":
        """The same tokenizer, for texts that it lowercases and strips of surrounding white space."""
        tokenizer = tokenizers.Tokenizer.from_str(self.to_json())
        own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip(), *own])
        return Tokenizer(tokenizer)

    def to_json(self) -> str:
        """The text of a tokenizer.json, with the length and the pad token."""
        return self._tokenizer.to_str()

    def write_clip(self, folder: str | Path) -> None:
        """Writes CLIP's vocab.json and merges.txt, with tokenizer_config.json and special_tokens_map.json.

        Args:
          folder: created if it does not exist.

        Raises:
          UserError: a tokenizer of a different kind, which these files cannot represent.
        """
        folder, content = Path(folder), json.loads(self.to_json())
        model, added = content["model"], {token["content"]: token for token in content["added_tokens"]}
        blank = self._tokenizer.encode("")
        ends = [token for token, counts in zip(blank.tokens, blank.attention_mask, strict=True) if counts]
        if model["type"] != "BPE" or model.get("end_of_word_suffix") != _SUFFIX or len(ends) != 2:
            raise _not_clip(f"it is not a byte-pair encoding with {_SUFFIX!r} after words and a start and an end token")
        named = {
            "bos_token": ends[0],
            "eos_token": ends[1],
            "unk_token": model.get("unk_token") or ends[1],
            "pad_token": content["padding"]["pad_token"],
        }
        if others := added.keys() - named.values():
            raise _not_clip(f"it has an added token {min(others)!r}")
        options = ("content", "lstrip", "normalized", "rstrip", "single_word")
        special = {
            name: {option: added[text][option] for option in options} if text in added else text
            for name, text in named.items()
        }
        config = {
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": self.max_length,
            "tokenizer_class": "CLIPTokenizer",
            **{name: {"__type": "AddedToken", **v} if isinstance(v, dict) else v for name, v in special.items()},
        }
        merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
        write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        write_text(folder / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")
        again = Tokenizer.read(folder)
        if not np.array_equal(again.encode([_PROBE]).ids, self.encode([_PROBE]).ids):
            raise _not_clip(f"it encodes {_PROBE!r} differently")

    def encode(self, texts: Sequence[str]) -> Tokens:
        """The texts' tokens, cut or padded to `max_length`; UserError for one that is not Unicode text."""
        encoded = self._tokenizer.encode_batch([_checked(text) for text in texts])
        shape = (len(texts), self.max_length)
        return Tokens(
            np.array([one.ids for one in encoded], np.int32).reshape(shape),
            np.array([one.attention_mask for one in encoded], bool).reshape(shape),
            tuple(map(_cut, texts, encoded)),
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of one row of ids, without the tokens that start, end and pad it."""
        kept = [int(i) for i in ids if int(i) not in self._control]
        text = self._tokenizer.decode(kept, skip_special_tokens=False)
        suffix = getattr(self._tokenizer.model, "end_of_word_suffix", None)
        return text.replace(suffix, " ").strip() if suffix else text


def _not_clip(why: str) -> UserError:
    return UserError(f"the tokenizer cannot be written as CLIP's vocab.json and merges.txt: {why}")


def _checked(text: str) -> str:
    """The text; UserError if it has lone surrogates, which result from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{text!r} is not Unicode text") from None
    return text


def _cut(text: str, encoded: tokenizers.Encoding) -> str:
    if not encoded.overflowing:
        return ""
    rest = encoded.overflowing[0]
    own = (begin for (begin, _), added in zip(rest.offsets, rest.special_tokens_mask, strict=True) if not added)
    return text[min(own) :].strip()


def _with_length(tokenizer: tokenizers.Tokenizer, length: int | None, pad: str, what: str) -> tokenizers.Tokenizer:
    """The tokenizer with its padding and truncation set."""
    if not length:
        raise UserError(f"{what} sets no maximum text length; give max_length")
    pad_id = tokenizer.token_to_id(pad)
    if pad_id is None:
        raise UserError(f"{what} has no token {pad!r} to pad with; tokenizer_config.json beside it may name another")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    least = len(tokenizer.encode("").ids)
    if not least:
        raise UserError(f"{what} has no tokens for an empty text; accepted: a tokenizer with a start or end token")
    if length <= least:
        raise UserError(f"{what} has max_length {length}; accepted: more than the {least} tokens of an empty text")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=pad)
    return tokenizer


def _from_json(text: str, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library has no exception class of its own
        raise UserError(f"{where!r} is not a tokenizer: {first_line(error)}") from None


def _clip(folder: Path, special: Mapping[str, tokenizers.AddedToken]) -> tokenizers.Tokenizer:
    defaults = {"bos_token": "<|startoftext|>"} | dict.fromkeys(
        ("eos_token", "unk_token", "pad_token"), "<|endoftext|>"
    )
    tokens = {name: special.get(name, tokenizers.AddedToken(text, special=True)) for name, text in defaults.items()}
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    for path in (vocab, merges):
        _read(path)
    try:
        unknown = str(tokens["unk_token"])
        model = models.BPE.from_file(str(vocab), str(merges), end_of_word_suffix="</w>", unk_token=unknown)
    except Exception as error:  # the library has no exception class of its own
        raise UserError(f"{str(vocab)!r} or {str(merges)!r} cannot be read: {first_line(error)}") from None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token in tokens.values():  # of two with the same text, the first counts
        tokenizer.add_special_tokens([token])
    ids = tokenizer.get_vocab(with_added_tokens=True)
    end, start = ((str(token), ids[str(token)]) for token in (tokens["eos_token"], tokens["bos_token"]))
    tokenizer.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return tokenizer


def _t5(path: Path, config: Mapping[str, Any], special: Mapping[str, tokenizers.AddedToken]) -> tokenizers.Tokenizer:
    from ddpm_jax.text import sentencepiece  # the only tokenizer that needs protobuf

    model = sentencepiece.read(path)
    count = config.get("extra_ids", _T5_SENTINELS)
    if not isinstance(count, int) or count < 0:
        raise UserError(f"extra_ids is {count!r} beside {str(path)!r}; accepted: a whole number, 0 or more")
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(count))]
    vocab = [*model.pieces, *((sentinel, 0.0) for sentinel in sentinels)]
    end = special.get("eos_token", tokenizers.AddedToken("</s>", special=True))
    ids = {piece: i for i, (piece, _) in enumerate(vocab)}
    if str(end) not in ids:
        raise UserError(f"{str(path)!r} has no token {str(end)!r} to end texts with")
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=model.unknown, byte_fallback=False))
    if model.normalization:
        tokenizer.normalizer = normalizers.Precompiled(model.normalization)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    found = [text for text in (*model.control, vocab[model.unknown][0], *sentinels) if text != str(end)]
    tokenizer.add_special_tokens([end, *(tokenizers.AddedToken(text, special=True) for text in found)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(str(end), ids[str(end)])]
    )
    return tokenizer


def _special_tokens(folder: Path) -> tuple[dict[str, Any], dict[str, tokenizers.AddedToken]]:
    """tokenizer_config.json, and the special tokens by name ("pad_token") as transformers finds them.

    special_tokens_map.json takes precedence unless tokenizer_config.json is of the newer kind, which lists all added
    tokens.
    """
    path, older = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config = read_json_object(path) if path.is_file() else {}
    named, listed = config, config.get("added_tokens_decoder")
    if listed is None and older.is_file():
        named, path = {**config, **read_json_object(older)}, older
    try:
        added = {token["content"]: token for token in (listed or {}).values()}
        return config, {
            name: _added_token(added.get(value, value) if isinstance(value, str) else value)
            for name, value in named.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} holds an invalid special token: {first_line(error)}") from None


def _added_token(value: Any) -> tokenizers.AddedToken:
    """A special token, given by its text or by an object with the text and how to match it."""
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True)
    options = {name: value[name] for name in ("lstrip", "rstrip", "normalized", "single_word") if name in value}
    return tokenizers.AddedToken(value["content"], special=True, **options)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {reason(error)}") from None
