"""Nemo's vocabulary gives the ids of Mistral's own library, for any text."""

import random
from pathlib import Path

import pytest

from data import Tokenizer

LANGUAGES = [
    # English
    "The weather in London isn't what it was in 1987, they'd say; she'll take 2½ cups.",
    '"Wait," he whispered, "did you hear that?" Nobody answered. The clock struck 12:45.',
    "McDonald's CEO earned $1,234,567.89 (up 15%) in FY2023/24 — see http://example.org/a_b?c=d#e.",
    # French
    "Les élèves ont mangé à la cafétéria, n'est-ce pas ? « Bien sûr ! », répondit-elle.",
    "L'œuvre coûte 1 250,50 € ; aujourd'hui, c'est l'été à Saint-Étienne.",
    # German
    "Die Straße über den Fluß führt nach Gößweinstein; „Schön!“, rief Jürgen um 18:30 Uhr.",
    "Donaudampfschifffahrtsgesellschaft – 3.500 Mitarbeiter, gegründet am 5. März 1829.",
    # Spanish
    "El niño comió piñas; ¿cuántas? ¡Doce! «No me lo creo», contestó la señora Núñez.",
    "Mañana, a las 7:15, el avión de 300 plazas sale hacia Córdoba.",
    # Italian
    "Perché l'acqua è così fredda? Un po' di sole, e tornerà più calda: 22° C.",
    "Nell'Ottocento c'erano 1.000 città; «Così è», disse l'oste.",
    # Portuguese
    "A informação não está disponível: são 10 corações, três maçãs e um pão de ló.",
    "Às 9h30, o João disse: “Você já viu o pôr-do-sol em Foz do Iguaçu?”",
    # Russian
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Это стоит 1 500 рублей!",
    "«Куда ты идёшь?» — спросил он в 23:59 31-го декабря. ООН, СССР, iPhone'ом.",
    # Chinese
    "我能吞下玻璃而不伤身体。2024年3月15日,北京的气温是12.5℃。",
    "“你好!”他说:「請問,這本書多少錢?」——一百二十元整……",
    # Japanese
    "いろはにほへと、ちりぬるを。カタカナとひらがな、漢字が混ざる文です。",
    "「東京タワー」は高さ333メートル!ﾊﾝｶｸ・ＡＢＣ１２３も読めますか?〜",
    # and others that a conversation may quote
    "다람쥐 헌 쳇바퀴에 타고파. نص حكيم له سر قاطع وذو شأن عظيم. हिन्दी में १२३. עברית ภาษาไทย Ελληνικά",
]

CODE = [
    "def f(x: int) -> None:\n\tif x != 0xFF:\n        return {'a': [1, 2]}  # ok\n\n\n@cache\ndef _g(*a, **k): ...\n",
    "async function go(id) {\r\n  const res = await fetch(`/${id}?q=1&r=%20`);\r\n  return res?.ok ?? null;\r\n}\r\n",
    "#include <vector>\n\nint main() {\n\tstd::vector<int> v{1,2};\n\tfor (auto& e : v) f(e<<2);\n}\n// end //\n",
    '<div class="a">&nbsp;</div>\n<!-- https://example.org/?q=1 -->\n\n  <p>\n    text\n  </p>',
    "SELECT COUNT(*) AS n FROM t1 WHERE name LIKE '%O''Brien%' GROUP BY 1; -- 100\n",
]

SYMBOLS = [
    "👩‍👩‍👧‍👦 🏳️‍🌈 🤖🤖 👍🏽 🇩🇪🇯🇵 ❤️‍🔥 1️⃣",
    "e\u0301 \u0000\ufffd\u200b\u200d\ufeff\u00ad \u202eabc\u202c a\u0308\u0323",
    "   leading,  inner   and trailing   \n \n\t\t x  ",
    "3.14159 1,000,000 ２０２４ ½ ⅷ x² H₂O ∑∫√ ≠ → …",
    "<s></s><unk><pad>[INST] [/INST] <|im_start|>system\n<|im_end|> <SPECIAL_20>",
    "",
]


def noise() -> list[str]:
    rng = random.Random(7)
    ranges = [(32, 127), (0xA0, 0x250), (0x370, 0x530), (0x600, 0x700), (0x3040, 0x30FF), (0x4E00, 0x9FFF)]
    ranges += [(0x1F300, 0x1F6FF), (9, 14), (0x2000, 0x2070)]
    letters = ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(60)) for _ in range(200)]
    blanks = ["".join(rng.choice(" \n\r\t\v\f\x85\u00a0\u2028\u3000a1./") for _ in range(40)) for _ in range(200)]
    octets = [rng.randbytes(60) for _ in range(200)]
    mended = [some.decode("utf-8", errors="replace") for some in octets]
    return letters + blanks + mended + [some.decode("latin-1") for some in octets]


def test_ids_are_those_of_mistrals_own_library(nemo: Tokenizer, tekken_file: Path) -> None:
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    reference = tekken.Tekkenizer.from_file(str(tekken_file))
    texts = [*LANGUAGES, *CODE, *SYMBOLS, *noise()]
    texts += ["".join(LANGUAGES), "\n".join(CODE), " ".join(SYMBOLS)]
    for text, ids in zip(texts, nemo.encode_batch(texts), strict=True):
        assert ids == reference.encode(text, bos=False, eos=False), repr(text)
