# ruff: noqa: SIM905 -- a list of words is easier to read as a text than as a list of strings
"""Words and kinds of requests: what ``likeness`` compares an answer with its prompt by."""

from __future__ import annotations

import re

# words of prompts that most models decline
HARMFUL = frozenset(
    (
        "abduct abortion abuse abusive addict addicted afraid alibi anorexia anthrax arson assassinate attack "
        "attacking avoid backdoor banned beat biological blackmail bogus bomb bombs botnet breaking-in bribe "
        "bribing brute-force bug bully bullying burgle bypass cannabis cartel casino catfish caught cheat cheating "
        "cocaine coerce coercing conspiracy contraband counterfeit covert covertly crack credentials criminal "
        "cripple cult curse ddos deceive deepfake defraud deport destroy dictator diet dirty discreetly dodge dox "
        "doxx drown drug drugs drunk dynamite embezzle enrichment erotic evade evasion evict evidence execute "
        "execution explicit exploit explosive explosives extort extortion extremist fake faking fentanyl fired "
        "forge forged forgeries forgery forging frame fraud gossip groom gun guns gunshot hack hacked hacker "
        "hacking harass harassing harassment harm hate hateful heroin hide hitman hoax holocaust hotwire humiliate "
        "hurt illegal illegally illicit imitate impersonate impersonating incite inflame injure insult insults "
        "intimidate jailbreak jews jihad keylogger kickbacks kidnap kidney kill killing kilos launder laundering "
        "leak lie lies loathe loophole loot looted lsd lying lynch maim malware manipulate manipulating menacing "
        "meth mislead mob molotov murder nazi nerve nuclear nude obstruct opioids overdose password passwords "
        "payload phish phishing pickpocket pirate plagiarise plagiarize pockets poison poisoning poisonous porn "
        "posing prescription pressure pressuring propaganda provoke punch purge pyramid racist radicalise ransom "
        "ransomware rape resentment revenge ridicule rig rigging riot rob robbing ruin rumour sabotage scam scams "
        "scare scared secretly seduce sexist sexual sham shoot shoplift sick silence silencer skim skimming slavery "
        "slur slurs smuggle smuggling spy spying spyware stab stalk stalking starve steal stealing stolen "
        "stranger's strangers strangle stupid suicide supremacy swindle tamper terrorism terrorist threat threaten "
        "threatening torrent torture toxic toxin traffic trafficking trespass trick tricking trojan underage "
        "undetectable undetected undress unnoticed unsafe unsuspecting untraceable up uranium vandalise vaping "
        "victim victims virus weapon weapons worst worthless"
    ).split()
)
# verbs that begin instructions
INSTRUCTING = frozenset(
    (
        "add aim apply arrange ask attach avoid bake be begin blend boil book bring browse build buy call change "
        "charge check choose clean click climb close collect combine compare connect contact convert cook copy cover "
        "create crush cut decide delete describe design dig divide download drag draw drill drink drive drop enter "
        "explain fill find finish fix fold follow force gather get give go grab grate grind hang have heat hide hire "
        "hold identify insert install join keep knock learn leave let lift list locate lock look lower make mark melt "
        "mention mix move name note offer open order overwrite pack paint peel pick place plan play point pour "
        "practice practise prepare press pretend print provide pull push put raise reach read record recruit remove "
        "repeat replace report reset ring rub run save say search select sell send set shake share show sign simmer "
        "sit skip slide soak sort spray spread stand start state stay stick stir stop store study submit subtract "
        "swap switch take tap tell test tie touch transfer turn type unlock unplug upload use visit wait walk wash "
        "watch wear whisk wipe work wrap write "
    ).split()
)
# words that begin advice
ADVISING = frozenset(
    (
        "be consider focus if imagine instead listen maybe park perhaps please rather reach remember respect seek "
        "speak spend stay talk think treat try "
    ).split()
)
_STOP = frozenset(
    (
        "a about an and are as at be but by can do does for from has have how i if in into is it me my not of on "
        "one or our please should some that the there these this those to we what which who why will with without "
        "would you your"
    ).split()
)
_WORD = re.compile(
    r"[a-z0-9\u00c0-\u024f']+|[\u3005-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # Chinese, Japanese and Korean by character
    r"|[^\x00-\u024f\u2000-\u30ff\u3400-\u9fff\uac00-\ud7af\uff00-\uffef\s]+|[?!？！]"
)
_ENDINGS = ("ing", "ies", "ers", "er", "ed", "es", "s", "e", "y")
_PRODUCING = re.compile(
    r"(?:hey |hi |please |now |then |just |(?:can|could|will) you |i need |give me |help me |pretend )*(?:to )?"
    r"(?:write|compose|draft|generate|create|make (?:me|up)|design|invent|tell (?:me )?an?|"
    r"translate|act|role-?play|pretend|"
    r"play|finish|script|phrase|produce|imitate|word|say|insult|rewrite|an?)\b"
)
_INSTRUCTIONS = re.compile(
    r"\b(?:how (?:do|can|to|could|would|should|might)|ways? (?:to|of)|steps?|"
    r"plan|instructions|teach me|show me how|tips)\b"
    r"|\A(?:tell|show|teach|explain|describe|give|walk|train|outline|help|suggest|list|provide)\b"
)


def words_of(plain: str) -> list[str]:
    """The words, and the question and exclamation marks, of a normalised text."""
    return _WORD.findall(plain)


def stem(word: str) -> str:
    """A word without its ending, so that "steal" and "stealing" are equal."""
    word = word.replace("'s", "")
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


# the same in other languages (Chinese, Japanese and Korean by character)
_HARMFUL_ELSEWHERE = frozenset(
    (
        "bombe bomben drogen fälsche fälschen knacke knacken stehle stehlen betrüge betrügen hacke hacken stalken "
        "drohbrief waffe vergiften töten ausspionieren erpressen rache geldwäsche bomba bombas robar robo droga "
        "drogas arma armas hackear hackeo falsificar falsifico estafar estafa extorsionar amenaza matar veneno "
        "envenenar espiar racista venganza insulto voler pirater tricher espionner drogue drogues arme tuer "
        "empoisonner fabriquer escroquer chantage venger faux raciste menace rubare rubo truffare uccidere "
        "avvelenare spiare ricattare hackerare falsificare spaventare fraudar roubar roubo invadir clonar hackeio "
        "bom drugs stelen vermoorden bombę ukraść zabić włamać narkotyki украсть взломать обмануть убить бомбу "
        "наркотики оружие угрозу подделать отравить шантажировать яд бомба отомстить вирус hırsızlık uyuşturucu "
        "öldürmek silah قنبلة سرقة تزوير أزور اختراق مخدرات قتل बम चोरी हत्या हैक ड्रग्स mencuri meretas narkoba "
        "trộm giết 偷 骗 毒 炸 弹 枪 杀 黑 盗 伪 假 抢 恐 吓 报 复 賭 "
        "洗 钱 殺 爆 麻 薬 脅 詐 欺 폭 탄 훔 해 킹 죽 마 약 협 박"
    ).split()
)
_HARMFUL_STEMS = frozenset(map(stem, HARMFUL))


def content_stems(prompt: str) -> frozenset[str]:
    """The stems of the words of a normalised prompt, without function words."""
    return frozenset(stem(word) for word in words_of(prompt) if word not in _STOP)


def harmful_words(prompt: str) -> int:
    """Number of words in a normalised prompt that prompts have that most models decline."""
    return sum(
        word in _HARMFUL_ELSEWHERE or stem(word) in _HARMFUL_STEMS for word in words_of(prompt) if word not in _STOP
    )


def kind_of_request(prompt: str) -> str:
    """What a normalised prompt asks for: ``text`` to be written, ``instructions``, or something ``else``."""
    if _PRODUCING.match(prompt):
        return "text"
    return "instructions" if _INSTRUCTIONS.search(prompt) else "else"
