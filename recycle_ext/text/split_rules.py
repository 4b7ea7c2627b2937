"""How byte-level vocabularies of GGUF files split a text into words, by the name in "tokenizer.ggml.pre".

The names and rules are llama.cpp's (src/llama-vocab.cpp, llm_tokenizer_bpe), and so are those that differ a little from the
tokenizer.json that a model was trained with: a GGUF file has the token ids that llama.cpp gives.
"""

# ruff: noqa: RUF001 (the patterns are made of such characters)

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SplitRule:
    """A text is split by each pattern in turn: its matches, and what lies between them, are the pieces."""

    patterns: tuple[str, ...]  # regular expressions as Oniguruma reads them, which tokenizers uses
    ignore_merges: bool = False  # a word that is in the vocabulary is that token, whatever the merges say
    adds_bos: bool = False  # where the file does not say whether a prompt starts with the begin-of-text token


_SUFFIX = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = rf"\s*[\r\n]+|{_SPACES}"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"
_REST_WITH_SLASH = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
_LLAMA3 = rf"{_SUFFIX}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_SUFFIX}|{_WORD}|\p{{N}}|{_REST}"

# A word with a capital in its middle is split before the capital; letters without case go with both.
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_CAMEL = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_TEKKEN = rf"{_CAMEL[0]}|{_CAMEL[1]}|\p{{N}}|{_REST_WITH_SLASH}"
_GPT4O = rf"{_CAMEL[0]}{_SUFFIX}?|{_CAMEL[1]}{_SUFFIX}?|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}"
_MARKED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"

_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}",
)
# The letters with case of an early version of Unicode.
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώ"
    "ᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏"
    "𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_EAST_ASIAN = r"[[一-龥ࠀ-一가-퟿]&&\S]+"
_PUNCTUATION = "[!-/:-~！-／：-～‘-‟、。]"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
# Digits in groups of three, the last group whole; the first has what stands before the digits too.
_GROUPS_OF_THREE = r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"

_BY_DIGIT = SplitRule((r"\p{N}", _GPT2))
_LLAMA3_RULE = SplitRule((_LLAMA3,), ignore_merges=True, adds_bos=True)
_GPT2_RULE, _QWEN2_RULE, _SAME_AS_LLAMA3 = SplitRule((_GPT2,)), SplitRule((_QWEN2,)), SplitRule((_LLAMA3,))
_BLOOM_RULE, _GPT4O_RULE, _DEEPSEEK3_RULE = SplitRule((_BLOOM,)), SplitRule((_GPT4O,)), SplitRule(_DEEPSEEK3)
_BAILING_RULE = SplitRule(
    (
        rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|{_SPACES}",
    )
)
_TINY_AYA_RULE = SplitRule((_GROUPS_OF_THREE, rf"{_MARKED_WORD}{_SUFFIX}?|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}"))


def _same(names: str, rule: SplitRule) -> dict[str, SplitRule]:
    return dict.fromkeys(names.split(), rule)


# Not listed: vocabularies that are not byte-level (gemma4, sarvam-moe, whitespace, ...) and Kimi's, which has no merges.
SPLIT_RULES: dict[str, SplitRule] = {
    **_same("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", _LLAMA3_RULE),
    **_same("dbrx smaug-bpe chatglm-bpe", _SAME_AS_LLAMA3),
    **_same("glm4 glm5", SplitRule((_LLAMA3,), ignore_merges=True)),
    **_same("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", _QWEN2_RULE),
    **_same(
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo", _GPT2_RULE
    ),
    **_same("jina-v1-en jina-v2-code roberta-bpe jais exaone4 trillion granite-docling", _GPT2_RULE),
    **_same("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", _BY_DIGIT),
    **_same("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK3_RULE),
    **_same("gpt-4o llama4 kanana2 talkie minimax-m2", _GPT4O_RULE),
    **_same("poro-chat bloom gpt3-finnish", _BLOOM_RULE),
    **_same("bailingmoe bailingmoe2 llada-moe", _BAILING_RULE),
    **_same("tiny_aya cohere2moe", _TINY_AYA_RULE),
    "default": SplitRule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "tekken": SplitRule((_TEKKEN,), ignore_merges=True, adds_bos=True),
    "falcon": SplitRule((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "viking": SplitRule((_BLOOM, r"\p{N}")),
    "superbpe": SplitRule((r"\p{N}+", r"[\s\S](?:(?!(?:[0-9]{3})+(?![0-9]))[\s\S])*")),
    "minicpm5": SplitRule((r"\p{N}{1,3}", rf"{_SUFFIX}|{_WORD}|\p{{N}}+|{_REST}"), ignore_merges=True),
    "qwen35": SplitRule((rf"{_SUFFIX}|{_MARKED_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}",)),
    "ufakzeka": SplitRule((rf"{_WORD}|\p{{N}}|{_REST}",)),
    "laguna": SplitRule((r"[^\n]+|\n+", _QWEN2)),
    "seed-coder": SplitRule((rf"{_SUFFIX}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}",)),
    "jais-2": SplitRule(
        (
            rf"{_SUFFIX}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
            + "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4))
            + r"\s{1,2}(?!\S)|\s",
        )
    ),
    "deepseek-llm": SplitRule(
        (r"[\r\n]", rf"\s?[{_CASED}]+", rf"\s?{_PUNCTUATION}+", r"\s+\z", _EAST_ASIAN, r"\p{N}+")
    ),
    "deepseek-coder": SplitRule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")),
    "spark2_5": SplitRule((*_DEEPSEEK3[:2], _DEEPSEEK3[2].replace(r"[\r\n]*|\s*[\r\n]+|", r"|[\r\n]|"), r"\p{N}")),
    "youtu": SplitRule(
        (
            r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
            rf"{_MARKED_WORD}{_SUFFIX}?|\p{{N}}|{_REST_WITH_SLASH}",
        ),
        ignore_merges=True,
    ),
    "chameleon": SplitRule(
        ("<sentinel:[0-9]+>", "IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  ", r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", _GPT2),
        adds_bos=True,
    ),
    "granite-embed-multi-97m": SplitRule((_GPT4O.replace(r"[\p{L}&&", r"[[\p{L}\p{M}]&&"),), ignore_merges=True),
    "afmoe": SplitRule((_GROUPS_OF_THREE, "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+", _DEEPSEEK3[2])),
    "exaone-moe": SplitRule(
        (
            rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACES}",
        )
    ),
}
