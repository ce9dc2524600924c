"""Texts on which tokenizers differ: prose, code, scripts, emoji, runs of spaces, digits, marks and contractions."""

from __future__ import annotations

_PROSE = (
    "The harbour was quiet in the morning, and the first boats came back with the tide.",
    "She said: \"I'll be there by nine,\" didn't she?",
    "I've told you he's there; we'd better go, they're waiting. It wasn't Ann's, 'twas John's.",
    "I'VE TOLD YOU HE'S THERE, WE'D BETTER GO, THEY'RE WAITING.",
    "HELLO World, hello WORLD, hELLO wORLD, CamelCaseWord and snake_case_word",
    "Naïve café déjà vu, Zürich, Łódź, São Paulo, Ærø, İstanbul, Ångström, smörgåsbord",
    "e\u0301 and é, n\u0303 and ñ, ﬁne ﬂow, ½ ¾ ², ℡ ™ №",
    "A dash—like this—and an ellipsis… “curly quotes”, ‘single ones’, «guillemets» and „low ones“.",
    "www.example.org/path?query=1&other=2#part, user@example.org, C:\\Users\\me\\file.txt, ~/.config/x.y",
    "Antidisestablishmentarianism, Donaudampfschifffahrtsgesellschaft, pneumonoultramicroscopicsilicovolcanoconiosis",
)
_CODE = (
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];\n}\n",
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;",
    '{"key": [1, 2.5, -3e10, null, true], "nested": {"a": "b\\n"}}',
    "<div class='x'>Hi &amp; bye</div><!-- note -->",
    "#include <stdio.h>\n#define MAX(a, b) ((a) > (b) ? (a) : (b))\n",
    'fn main() { println!("{:?}", vec![1, 2, 3]); } // rust',
    "const f = async (x) => { await g(`${x}`); return x?.y ?? [...z]; };",
    "$ ls -la | grep '^d' && echo \"done\" > /dev/null 2>&1",
    "\\begin{equation} \\int_0^\\infty e^{-x^2} dx = \\frac{\\sqrt{\\pi}}{2} \\end{equation}",
    "if x==y!=z<=w>=v: a+=1; b-=2; c*=3; d//=4; e<<=5; f&=~g|h^i",
    "\tint\tx;\n\t\treturn\t\tx;\n",
)
_SCRIPTS = (
    "我想在apple工作1314151天～", "今天天气很好，我们去公园散步吧。", "東京は日本の首都です。",
    "カタカナとひらがな、漢字。",
    "안녕하세요, 오늘 날씨가 좋네요.", "Привет, как дела? Ещё не вечер.", "нещо на Български",
    "Це українська мова, ґанок.",
    "Γειά σου Κόσμε, τι κάνεις;", "مرحبا بالعالم، كيف حالك؟", "שלום עולם, מה שלומך?", "नमस्ते दुनिया, आप कैसे हैं?",
    "สวัสดีชาวโลก วันนี้อากาศดี", "កាន់តែពិសេសអាច", "Xin chào thế giới, hôm nay trời đẹp.", "Zażółć gęślą jaźń",
    "Příliš žluťoučký kůň úpěl ďábelské ódy", "გამარჯობა მსოფლიო", "Բարեւ աշխարհ", "ሰላም ልዑል", "வணக்கம் உலகம்",
    "Pijamalı hasta yağız şoföre çabucak güvendi", "中文English混合text测试123", "全角：ＡＢＣ１２３！？",
)  # fmt: skip
_EMOJI = (
    "🚀", "🙂🙃", "👩‍👩‍👧‍👦 family", "🏳️‍🌈 flag", "👍🏽 thumbs", "🇩🇪🇯🇵", "😶‍🌫️ fog", "✅ done ❌ not", "🦙🦙 llamas",
    "I ❤️ NY", "a🙂b🙂c", "🚀 (normal) 😶‍🌫️ (multiple emojis concatenated) ✅",
)  # fmt: skip
_MARKS = (
    "''''''```````\"\"\"\"......!!!!!!??????", "------=======", "~~~~ #### $$$$ %%%% ^^^^ &&&& ****",
    "(([[{{<<>>}}]]))",
    "...", "…", ".,;:!?", "a.b.c", "a..b...c", "x=y", "x = y", "--flag=value", "@user #tag $5 50% C++ C#", "1/2 3\\4",
    "'s 't 're 've 'm 'll 'd", "'S 'T 'RE 'VE 'M 'LL 'D", "we'Ve a'lL", "it’s don’t I’m", "\u200b\u200dzero\ufeffwidth",
    "\u00a0no-break\u00a0space", "tab\there", "nul-free \x01\x02 controls \x7f", "~", "_", "\\", "/", "|", "`code`",
)  # fmt: skip
_DIGITS = (
    "3", "33", "333", "3333", "33333", "333333", "3333333", "33333333", "3.3", "3..3", "3...3", "1,234,567.89",
    "2026-11-24T12:34:56Z", "0x1F 0b101 1e-7 1_000", "+49 30 1234567", "v1.2.3-rc4", "a1b2c3", "١٢٣ ४५६ ７８９",
    "½ ⅔ Ⅳ",
    "12 345 6789 01234", "100%", "$1,000.00", "-5 +5 5- 5+",
)  # fmt: skip
_RUNS = tuple(
    text
    for count in (1, 2, 3, 4, 5, 7, 8, 12, 16, 17)
    for text in (" " * count, f"a{' ' * count}b", f"{' ' * count}start", f"end{' ' * count}", "\n" * count)
)
_BLANKS = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n", "\r\n", "a\r\nb\r\n\r\nc", "\t", "\t\t\t", " \t \t",
    "a\n\n\nb",
    "a \n b", "a\n    b\n        c", "  \n  ", "x\t\ty", "line\n", "\nline", " \n", "\n ", "1  2   3    4", "!  ?",
    "é   ü",
    "中  文", "🙂  🙂", "-   -",
)  # fmt: skip


def texts() -> tuple[str, ...]:
    """All texts, at least 200."""
    joined = tuple(f"{a} {b}" for a, b in zip(_SCRIPTS, reversed(_PROSE + _CODE + _EMOJI), strict=False))
    return (*_PROSE, *_CODE, *_SCRIPTS, *_EMOJI, *_MARKS, *_DIGITS, *_RUNS, *_BLANKS, *joined)
