import gzip
import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
import t5s
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ddpm_jax.runtime.errors import UserError
from ddpm_jax.text.tokenizers import MIN_VOCAB_SIZE, Tokenizer

CAPTIONS = ["forty-two", "seventeen", "a red bicycle", "a red apple", "ninety", "a man's red hat"] * 3
TEXTS = (
    "",
    " ",
    "forty-two",
    "  two  spaces, and a\ttab\n",
    "a man's RED hat",
    "<pad><start><end>",
    "a\0b",
    "مرحبا بالعالم",
    "שלום",
    "नमस्ते दुनिया",
    "漢字かな交じり文",
    "🎉👩‍👩‍👧‍👦🇨🇭",
    "e\u0301 and \u00e9, \u2028 \ufeff \U0010ffff",
)


def refusal(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Trained on captions.


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(CAPTIONS, vocab_size=300, max_length=64)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(trained, text):
    tokens = trained.encode([text])
    assert trained.decode(tokens.ids[0]) == text
    assert tokens.cut == ("",)


def test_ids_and_mask(trained):
    tokens = trained.encode(["red", "a red"])
    assert tokens.ids.shape == tokens.mask.shape == (2, 64)
    assert (tokens.ids.dtype, tokens.mask.dtype) == (np.int32, bool)
    assert tokens.ids.max() < trained.vocab_size <= 300
    start, red, end = tokens.ids[0, :3]
    a = tokens.ids[1, 1]
    np.testing.assert_array_equal(tokens.ids[:, :5], [[start, red, end, 0, 0], [start, a, red, end, 0]])
    np.testing.assert_array_equal(tokens.mask.sum(1), [3, 4])
    assert not tokens.ids[~tokens.mask].any()
    empty = trained.encode([""])
    np.testing.assert_array_equal(empty.ids[0, :3], [start, end, 0])
    assert empty.mask.sum() == 2
    assert trained.encode([]).ids.shape == (0, 64)


def test_training_is_deterministic_and_kept_in_json(trained):
    text = trained.to_json()
    assert Tokenizer.train(CAPTIONS[::-1], 300, 64).to_json() == text
    again = Tokenizer.from_json(text)
    assert (again.vocab_size, again.max_length, again.to_json()) == (trained.vocab_size, 64, text)
    found, expected = again.encode(TEXTS), trained.encode(TEXTS)
    np.testing.assert_array_equal(found.ids, expected.ids)


def test_the_end_token_last():
    """So the end is at the largest id, as in CLIP; everything else is unchanged."""
    first, last = (Tokenizer.train(CAPTIONS, 300, 12, end_last=end_last) for end_last in (False, True))
    assert (first.end_id, last.end_id) == (2, last.vocab_size - 1)
    ids, swapped = (tokenizer.encode(CAPTIONS).ids for tokenizer in (first, last))
    other = {2: last.end_id, last.end_id: 2}
    np.testing.assert_array_equal([[other.get(i, i) for i in row] for row in swapped.tolist()], ids)
    np.testing.assert_array_equal(np.argmax(swapped, axis=1), np.argmax(swapped == last.end_id, axis=1))
    again = Tokenizer.from_json(last.to_json())
    assert [again.decode(row) for row in swapped] == CAPTIONS


def test_vocabulary_of_bytes_alone():
    tokenizer = Tokenizer.train([], MIN_VOCAB_SIZE, 8)
    assert tokenizer.vocab_size == MIN_VOCAB_SIZE
    assert tokenizer.decode(tokenizer.encode(["abc"]).ids[0]) == "abc"


def test_what_does_not_fit_is_reported():
    tokenizer = Tokenizer.train(CAPTIONS, 400, 6)
    texts = ("a red apple", "a red apple, a Bicycle", "a red apple a 🎉🎉", "red " * 1000)
    assert tokenizer.encode(texts).cut == ("", "a Bicycle", "🎉🎉", ("red " * 996).strip())


def test_refused_sizes_and_texts(trained):
    assert refusal(Tokenizer.train, [], 100, 8) == "the vocabulary has 100 tokens; accepted: at least 259"
    assert "has max_length 2; accepted: more than the 2 tokens" in refusal(Tokenizer.train, [], 300, 2)
    half = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert refusal(trained.encode, [half]) == "'caf\\udce9' is not Unicode text"
    assert refusal(Tokenizer.train, [half], 300, 8) == "'caf\\udce9' is not Unicode text"


# CLIP's.


def byte_alphabet():
    """GPT-2's printable character for each byte: those that are printable stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]


def clip_merges():
    """OpenAI's, from open-clip-torch's wheel where it is installed, or else some by hand."""
    found = importlib.util.find_spec("open_clip")
    if found:
        path = Path(found.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
        return gzip.decompress(path.read_bytes()).decode().splitlines()[1 : 49_152 - 256 - 2 + 1]
    words = (
        "i n",
        "t h",
        "a n",
        "r e",
        "th e</w>",
        "in g</w>",
        "an d</w>",
        "re d</w>",
        "o r",
        "l o",
        "' s</w>",
        "! !</w>",
    )
    return [*words, "Ø ª", "Ù Ħ", "ð Ł", "ðŁ İ", "Ã ©</w>", "à ¤", "ã ģ", "1 2", "c a", "ca t</w>"]


def write_clip(folder, **files):
    folder.mkdir(exist_ok=True)
    merges, characters = clip_merges(), byte_alphabet()
    joined = [merge.replace(" ", "") for merge in merges]
    words = [*characters, *(c + "</w>" for c in characters), *joined, "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "clip")


def many_prompts(count):
    """Words of many scripts with punctuation, white space, controls and the tokens' own texts between them."""
    draw = random.Random(0)
    scripts = (
        (0x61, 0x7A), (0x41, 0x5A), (0x30, 0x39), (0xC0, 0x24F), (0x300, 0x36F), (0x391, 0x3C9), (0x400, 0x4FF),
        (0x5D0, 0x5EA), (0x620, 0x64A), (0x904, 0x939), (0xE01, 0xE3A), (0x1E00, 0x1EFF), (0x3041, 0x30FF),
        (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F), (0x2160, 0x2188), (0xFF01, 0xFF5E), (0x0, 0x10FFFF),
    )  # fmt: skip
    known = ["the", "Red", "CAT", "and", "painting's", "don't", "I'LL", "<|endoftext|>", "<|StartOfText|>", "!!", "İI"]

    def word():
        if draw.random() < 0.4:
            return draw.choice(known)
        first, last = draw.choice(scripts)
        characters = (chr(draw.randint(first, last)) for _ in range(draw.randint(1, 8)))
        return "".join(c for c in characters if not 0xD800 <= ord(c) < 0xE000)

    between = (" ", " ", " ", "  ", "\t", "\n", ", ", "-", "", "!", "\u00a0", "\u3000", "\0", "\u200d", "'s ")
    lengths = [draw.choice((0, 1, 5, 20, 100)) for _ in range(count)]
    return ["".join(word() + draw.choice(between) for _ in range(length)) for length in lengths]


OLD = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
FOLDERS = {
    "bare": {},
    "Stable Diffusion 1.x": {
        "tokenizer_config": {
            "bos_token": OLD | {"content": "<|startoftext|>"},
            "eos_token": OLD | {"content": "<|endoftext|>"},
            "pad_token": "<|endoftext|>",
            "model_max_length": 77,
        },
    },
    "Stable Diffusion 2.x": {
        "tokenizer_config": {"pad_token": "<|endoftext|>", "model_max_length": 77},
        "special_tokens_map": {"pad_token": "!", "unk_token": "<|endoftext|>"},
    },
    "newer": {
        "tokenizer_config": {
            "added_tokens_decoder": {"0": {"content": "!", "normalized": False, "special": True}},
            "pad_token": "!",
        },
        "special_tokens_map": {"pad_token": "<|endoftext|>"},
    },
}


@pytest.mark.parametrize("name", FOLDERS)
def test_clip_s_files_written_back(tmp_path, name):
    tokenizer, prompts = Tokenizer.read(write_clip(tmp_path / "clip", **FOLDERS[name])), many_prompts(50)
    tokenizer.write_clip(tmp_path / "again")
    again = Tokenizer.read(tmp_path / "again")
    assert (again.max_length, again.vocab_size) == (tokenizer.max_length, tokenizer.vocab_size)
    for found, expected in zip(*(t.encode(["!", "", *prompts]).ids for t in (again, tokenizer)), strict=True):
        np.testing.assert_array_equal(found, expected)
    before, after = (
        (json.loads((folder / "vocab.json").read_text()), (folder / "merges.txt").read_text().split("\n")[1:])
        for folder in (tmp_path / "clip", tmp_path / "again")
    )
    assert after == before


def test_what_clip_s_files_cannot_say(trained, clip, tmp_path):
    assert "written as CLIP's vocab.json and merges.txt: it is not a byte-pair" in refusal(
        trained.write_clip, tmp_path / "x"
    )
    content = json.loads(Tokenizer.read(clip).to_json())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 99_999, "content": "<mine>"})
    added = Tokenizer.from_json(json.dumps(content))
    assert "it has an added token '<mine>'" in refusal(added.write_clip, tmp_path / "y")


def test_another_pad_token(clip):
    """As Stable Diffusion 2 pads; the token is found within texts, too, as transformers finds it."""
    vocab = json.loads((clip / "vocab.json").read_text())
    tokens = Tokenizer.read(clip, 5, pad_token="!").encode(["", "the!"])
    assert tokens.ids[0].tolist() == [vocab["<|startoftext|>"], vocab["<|endoftext|>"], *[vocab["!"]] * 3]
    assert vocab["!"] in tokens.ids[1, :4]
    assert "no token '<none>' to pad with" in refusal(Tokenizer.read, clip, 5, pad_token="<none>")


@pytest.mark.peers
@pytest.mark.parametrize("name", FOLDERS)
def test_clip_s_tokens_are_those_of_transformers(measure, tmp_path, name):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (pip install -e '.[peers]')"
    )
    folder, prompts = write_clip(tmp_path / "clip", **FOLDERS[name]), many_prompts(1000)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    expected = theirs(prompts, padding="max_length", max_length=77, truncation=True)
    tokenizer = Tokenizer.read(folder)
    assert tokenizer.max_length == 77
    again = Tokenizer.from_json(tokenizer.to_json())
    for found in (tokenizer.encode(prompts), again.encode(prompts)):
        different = np.any(found.ids != expected["input_ids"], axis=1) | np.any(
            found.mask != np.array(expected["attention_mask"], bool), axis=1
        )
        what = "CLIP's tokenizer: prompts, of 1000 in many scripts, with different tokens or a different mask"
        measure(what, "transformers' `CLIPTokenizer`", np.sum(different), 0)
    tokenizer.write_clip(tmp_path / "again")
    written = transformers.CLIPTokenizer.from_pretrained(tmp_path / "again")
    assert written(prompts, padding="max_length", truncation=True)["input_ids"] == expected["input_ids"]
    whole = theirs(prompts)["input_ids"]
    assert [bool(text) for text in found.cut] == [len(ids) > 77 for ids in whole]
    assert 100 < sum(map(bool, found.cut)) < 400


def test_clip_s_prompts(clip):
    tokenizer = Tokenizer.read(clip)
    vocab = json.loads((clip / "vocab.json").read_text())
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    tokens = tokenizer.encode(["", "The \n cat", "the cat"])
    assert tokenizer.vocab_size == len(vocab)
    np.testing.assert_array_equal(tokens.ids[0], [start, *[end] * 76])
    np.testing.assert_array_equal(tokens.ids[1], tokens.ids[2])
    np.testing.assert_array_equal(tokens.ids[1, :5], [start, vocab["the</w>"], vocab["cat</w>"], end, end])
    np.testing.assert_array_equal(tokens.mask.sum(1), [2, 4, 4])
    assert tokenizer.decode(tokens.ids[1]) == "the cat"
    short = Tokenizer.read(clip, max_length=5)
    assert short.encode(["The  CAT and the Red", "the cat"]).cut == ("the Red", "")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: (f / "merges.txt").unlink(), "merges.txt' cannot be read: No such file or directory"),
        (lambda f: (f / "merges.txt").write_text("q q q"), "merges.txt' cannot be read: "),
        (lambda f: (f / "vocab.json").write_text("[1]"), "vocab.json' or "),
        (lambda f: (f / "vocab.json").unlink(), "clip' has no tokenizer; accepted: tokenizer.json, or vocab.json and"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json' is not valid JSON"),
        (lambda f: (f / "special_tokens_map.json").write_text("[]"), "special_tokens_map.json' is not a JSON object"),
        (
            lambda f: (f / "special_tokens_map.json").write_text('{"pad_token": {}}'),
            "holds an invalid special token",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json' is not a tokenizer: "),
        (lambda f: (f / "tokenizer.json").write_bytes(b"\xff"), "tokenizer.json' cannot be read: "),
    ],
)
def test_refused_folders(clip, edit, message):
    edit(clip)
    found = refusal(Tokenizer.read, clip)
    assert message in found
    assert str(clip) in found


# T5's.


@pytest.fixture
def spiece(tmp_path):
    (tmp_path / "spiece.model").write_bytes(t5s.spiece())
    return tmp_path


def test_t5_s_prompts(spiece):
    tokenizer = Tokenizer.read(spiece)
    ids = {piece: i for i, (piece, _, _) in enumerate(t5s.PIECES)}
    assert (tokenizer.max_length, tokenizer.vocab_size) == (512, len(ids) + 100)
    texts = ["a red\n apples", "", "\u4f60 <extra_id_0>a<extra_id_99></s>", "red " * 600]
    tokens = tokenizer.encode(texts)
    a, red, apple, space = (ids["\u2581" + word] for word in ("a", "red", "apple", ""))
    np.testing.assert_array_equal(tokens.ids[0, :6], [a, red, apple, ids["s"], 1, 0])
    np.testing.assert_array_equal(tokens.ids[1], [1] + [0] * 511)
    np.testing.assert_array_equal(tokens.ids[2, :7], [space, 2, len(ids) + 99, a, len(ids), 1, 1])
    np.testing.assert_array_equal(tokens.ids[3], [red] * 511 + [1])
    np.testing.assert_array_equal(tokens.mask.sum(1), [5, 1, 7, 512])
    assert tokens.cut == ("", "", "", ("red " * 89).strip())
    assert tokenizer.decode(tokens.ids[0]) == "a red apples"
    again = Tokenizer.from_json(tokenizer.to_json())
    np.testing.assert_array_equal(again.encode(texts).ids, tokens.ids)


def test_what_t5_s_files_say(spiece):
    config = {"model_max_length": 8, "extra_ids": 3, "eos_token": "<unk>"}
    (spiece / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.read(spiece)
    assert (tokenizer.max_length, tokenizer.vocab_size) == (8, len(t5s.PIECES) + 3)
    assert tokenizer.encode([""]).ids.tolist() == [[2] + [0] * 7]
    assert Tokenizer.read(spiece, max_length=5).max_length == 5


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        (b"no model", {}, "spiece.model' is not a sentencepiece model: "),
        (b"", {}, "spiece.model' has 0 unknown tokens; accepted: one"),
        (t5s.spiece(kind=2), {}, "spiece.model' holds a model of type 2; accepted: 1 (unigram)"),
        (t5s.spiece(), {"extra_ids": -1}, "extra_ids is -1 beside "),
        (t5s.spiece(), {"eos_token": "<end>"}, "spiece.model' has no token '<end>' to end texts with"),
        (t5s.spiece(), {"pad_token": "<none>"}, "has no token '<none>' to pad with"),
        (t5s.spiece([("a", 0.0, 1), ("<unk>", 0.0, 2)]), {}, "spiece.model' has no token '</s>' to end texts with"),
    ],
)
def test_refused_t5(spiece, content, config, message):
    (spiece / "spiece.model").write_bytes(content)
    (spiece / "tokenizer_config.json").write_text(json.dumps(config))
    found = refusal(Tokenizer.read, spiece)
    assert message in found
    assert str(spiece) in found


def t5_prompts():
    special = [
        "<extra_id_3> a</s> b<unk><pad>",
        "<extra_id_99>x<extra_id_100>",
        "\u2581\u2581x",
        "  a  b ",
        "a\0b",
        "\u00bd",
    ]
    return [*many_prompts(1000 - len(special)), *special]


def t5_differences(tokenizer, theirs, prompts):
    """The number of prompts with different tokens or masks; exactly the long prompts must be cut."""
    expected = theirs(prompts, padding="max_length", max_length=tokenizer.max_length, truncation=True)
    found = tokenizer.encode(prompts)
    assert [bool(text) for text in found.cut] == [
        len(ids) > tokenizer.max_length for ids in theirs(prompts)["input_ids"]
    ]
    assert 100 < sum(map(bool, found.cut)) < 400
    masks = np.array(expected["attention_mask"], bool)
    return np.sum(np.any(found.ids != expected["input_ids"], axis=1) | np.any(found.mask != masks, axis=1))


@pytest.mark.peers
def test_t5_s_tokens_are_those_of_transformers(measure, tmp_path):
    """The tokenizer of a small model, read from its tokenizer.json and from its spiece.model."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (pip install -e '.[peers]')"
    )
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special, prompts = ["<pad>", "</s>", "<unk>"], t5_prompts()
    options = {"vocab_size": 2000, "special_tokens": special, "unk_token": "<unk>", "show_progress": False}
    trained.train_from_iterator(prompts[:40] + CAPTIONS * 20, trainers.UnigramTrainer(**options))
    vocab = [(piece, float(np.float32(score))) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    theirs = transformers.T5Tokenizer(vocab=[*vocab, *((f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1))])
    theirs.save_pretrained(tmp_path / "json")
    (tmp_path / "spiece").mkdir()
    kinds = [3, 3, 2, *[1] * (len(vocab) - 3)]
    pieces = [(piece, score, kind) for (piece, score), kind in zip(vocab, kinds, strict=True)]
    (tmp_path / "spiece" / "spiece.model").write_bytes(t5s.spiece(pieces))
    for folder in (tmp_path / "json", tmp_path / "spiece"):
        tokenizer = Tokenizer.read(folder, 77)
        for one in (tokenizer, Tokenizer.from_json(tokenizer.to_json())):
            what = "T5's tokenizer: prompts, of 1000 in many scripts, with different tokens or a different mask"
            measure(what, "transformers' `T5Tokenizer`", t5_differences(one, theirs, prompts), 0)


@pytest.mark.peers
def test_t5_s_tokens_of_a_model_that_sentencepiece_trained(tmp_path):
    """With the normal form of characters that T5's own has."""
    why = "transformers and sentencepiece are not installed (pip install -e '.[peers]')"
    transformers = pytest.importorskip("transformers", reason=why)
    sentencepiece = pytest.importorskip("sentencepiece", reason=why)
    prompts = t5_prompts()
    with (tmp_path / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(prompts[:40] + CAPTIONS * 20),
            model_writer=file,
            vocab_size=2000,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            normalization_rule_name="nmt_nfkc",
            hard_vocab_limit=False,
            minloglevel=2,
        )
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path)
    assert t5_differences(Tokenizer.read(tmp_path, 77), theirs, prompts) == 0


# Any tokenizer.json.


def t5(folder):
    """A small T5 tokenizer: pieces with scores, an end but no start token, and no padding or length set."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581red", "\u2581hat", "s", "h", "a", "t"]
    tokenizer = tokenizers.Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_max_length": 10**30, "pad_token": "<pad>", "eos_token": "</s>", "extra_ids": 100}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_tokenizer_of_a_t5(tmp_path):
    assert "sets no maximum text length; give max_length" in refusal(Tokenizer.read, t5(tmp_path))
    tokenizer = Tokenizer.read(tmp_path, max_length=6)
    tokens = tokenizer.encode(["red hats", "", "red red red hat hats"])
    np.testing.assert_array_equal(tokens.ids, [[4, 5, 6, 1, 0, 0], [1, 0, 0, 0, 0, 0], [4, 4, 4, 5, 5, 1]])
    np.testing.assert_array_equal(tokens.mask.sum(1), [4, 1, 6])
    assert tokens.cut == ("", "", "s")
    assert tokenizer.decode(tokens.ids[0]) == "red hats"
    again = Tokenizer.from_json(tokenizer.to_json())
    np.testing.assert_array_equal(again.encode(["red hats"]).ids[0], tokens.ids[0])


def write_tokenizer(path, trained, edit=lambda value: None):
    value = json.loads(trained.to_json())
    edit(value)
    path.write_text(json.dumps(value))
    return path


def test_tokenizer_json(tmp_path, trained):
    path = write_tokenizer(
        tmp_path / "tokenizer.json", trained, lambda value: value.update(truncation=None, padding=None)
    )
    assert refusal(Tokenizer.read, path) == f"{str(path)!r} sets no maximum text length; give max_length"
    tokenizer = Tokenizer.read(path, max_length=16)
    np.testing.assert_array_equal(tokenizer.encode(["a red hat"]).ids[0], trained.encode(["a red hat"]).ids[0, :16])
    config = {"model_max_length": 12, "pad_token": "<end>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.read(tmp_path)
    np.testing.assert_array_equal(tokenizer.encode([""]).ids[0], [1, *[2] * 11])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<other>"}))
    assert "has no token '<other>' to pad with" in refusal(Tokenizer.read, tmp_path)
    assert "was not written by a Tokenizer" in refusal(Tokenizer.from_json, path.read_text(), str(path))
    assert "is not a tokenizer" in refusal(Tokenizer.from_json, "no")


def test_a_tokenizer_that_gives_the_empty_text_no_token(tmp_path, trained):
    path = write_tokenizer(tmp_path / "tokenizer.json", trained, lambda value: value.update(post_processor=None))
    assert "has no tokens for an empty text" in refusal(Tokenizer.read, path)


def test_lower_case():
    tokenizer = Tokenizer.train(["a red apple", "two green pears"], 270, 12)
    lowered = Tokenizer.from_json(tokenizer.lowercased().to_json())
    np.testing.assert_array_equal(lowered.encode([" A Red apple\n"]).ids, tokenizer.encode(["a red apple"]).ids)
    assert np.any(tokenizer.encode(["A"]).ids != tokenizer.encode(["a"]).ids)
