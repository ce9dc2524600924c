"""The care rules for lines of upstream lists.

They drop sexual content about minors, recipes in chemistry, biology and explosives, and anything about weapons of mass
harm. They match word stems and err on the side of dropping too much.
"""

from __future__ import annotations

import re

from ollama_forge.prompts.normalise import normalise

_AGE = r"(?:[1-9]|1[0-7]|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen)"
_MAKE = (
    r"(?:(?:mak|creat|produc|prepar|acquir)(?:e|ing)"
    r"|(?:build|develop|obtain|construct|assembl|design|mix|concoct|grow)(?:e|ing)?)(?: \w+){0,4}"
)
_COOK = (
    r"cook\w*, synthes\w*, manufactur\w*, brew\w*, extract\w*, distil\w*, refin(?:e|ing), cultivat\w*, recipes?,"
    r"formulas?, ingredients?, precursors?, reagents?, home ?made, at home, lab, laborator\w+"
)
_DRUG = (
    r"(?:\w*amphetamine\w*|heroin|cocaine|lsd|mdma|ecstasy|\w*fentan[yi]l\w*|opi(?:oid|ate)s?|opium|morphine|ghb|dmt|pcp"
    r"|ketamine|mescaline|psilocybin\w*|desomorphine|krokodil|steroids?|narcotics?|drugs?|controlled substances?)"
)
_HARMFUL = (
    r"(?:deadly|lethal|toxic|poison\w*|dangerous|harmful|hazardous|noxious|corrosive|illegal|un(?:detect|trace)able)"
)
_SUBSTANCE = r"(?:chemicals?|gas(?:es)?|substances?|compounds?|fumes?|toxins?|acids?|agents?|vapou?rs?|mixtures?)"

# (rule, groups of comma-separated stems, ...): a row drops a line if every one of its groups matches
_TABLE = (
    (
        "minors",
        r"child\w*, kid(?:s|do\w*)?, minors?, under ?aged?, (?:pre ?)?teen\w*, tweens?, infants?, toddlers?,"
        r"bab(?:y|ies), girls?, boys?, school ?(?:child\w*|girls?|boys?), (?:high|middle) ?school\w*, pupils?,"
        rf"juveniles?, adolescen\w*, daughters?, sons?, nieces?, nephews?, pubescen\w*, {_AGE} ?(?:years?|yrs?) ?olds?,"
        rf"{_AGE} ?yos?, aged? (?:of )?{_AGE}",
        r"sex\w*, porn\w*, erotic\w*, nud(?:e|es|ity|ist), naked\w*, molest\w*, rap(?:e|ed|es|ing|ist\w*), incest\w*,"
        r"fetish\w*, seduc\w*, groom\w*, lewd\w*, explicit\w*, obscen\w*, prostitut\w*, masturbat\w*, orgasm\w*,"
        r"genital\w*, hentai, lingerie, lust\w*, arous\w*, undress\w*, strip ?tease\w*, intima\w*, fondl\w*,"
        r"predator\w*, adult (?:content|film|movie|video|site)s?, nsfw",
    ),
    (
        "minors",
        r"child\w*, kids, minors, under ?aged?, (?:pre ?)?teen\w*",
        r"abus\w*, exploit\w*, traffick\w*",
    ),
    ("minors", r"pa?edo\w*, csam, loli(?:s|con|ta)?, shota(?:con)?, jail ?bait"),
    (
        "explosives",
        r"\w*bomb(?!ay|ast|ard)\w*, explosi\w*, explod\w*, detonat\w*, blasting caps?, ieds?, dynamite, tnt, c4,"
        r"semtex, rdx, petn, tatp, hmtd, anfo, nitro ?(?:glycerin\w*|cellulose), acetone peroxide, ammonium nitrate,"
        r"gun ?powder, black powder, napalm, therm(?:ite|ate), molotov\w*, incendiar\w*, grenades?, land ?mines?,"
        r"white phosphorus, warheads?",
    ),
    ("explosives", rf"{_MAKE} (?:fire ?(?:works?|crackers?)|pyrotechnic\w*|missiles?)"),
    (
        "weapons of mass harm",
        r"nerve (?:agent|gas)\w*, sarin, soman, tabun, novichok\w*, vx, mustard gas,"
        r"(?:sul(?:ph|f)ur|nitrogen) mustards?, lewisite, phosgene, chloro?picrin, chlorine gas, chloramine, cyanide,"
        r"cyanogen\w*, anthrax, bacillus anthracis, ricin, abrin, botul\w*, small ?pox, variola, ebola, marburg,"
        r"yersinia\w*, tularemia, pathogen\w*, virulen\w*, aerosoli[sz]\w*, gain of function,"
        r"bio ?(?:weapon|terror|warfare|agent)\w*, polonium, thallium, wmds?, weapons? of mass, mass casualt\w*,"
        r"(?:chemical|biological|nuclear|radiological|thermonuclear|atomic)"
        r"(?: (?:or|and) \w+)? (?:weapon|agent|warfare|attack|device|missile|arsenal|terror)\w*",
    ),
    (
        "weapons of mass harm",
        r"uranium, plutonium, radioactive, fissile, nuclear",
        r"enrich\w*, weapon\w*, obtain\w*, acquir\w*, steal\w*, smuggl\w*, dispers\w*, spread\w*",
    ),
    (
        "weapons of mass harm",
        r"water (?:supply|supplies|reservoirs?|system\w*|treatment), ventilation, hvac, air supply, food supply",
        r"poison\w*, contaminat\w*, toxi\w*, chemicals?, releas\w*",
    ),
    ("drugs", r"meths?, meth ?amphetamine\w*, methcathinone"),
    ("drugs", _DRUG, _COOK),
    ("drugs", rf"{_MAKE} {_DRUG}"),
    ("chemistry", rf"{_HARMFUL}(?: \w+)? {_SUBSTANCE}"),
    ("chemistry", rf"{_MAKE} (?:poisons?|venoms?|toxins?|chloroform|arsenic|acids?)"),
    (
        "chemistry",
        r"poisons?, toxins?, venoms?, organo ?phosph\w+, parathion, strychnine, chloroform, nicotine, arsenic,"
        r"pesticides?",
        _COOK,
    ),
    ("chemistry", r"bleach", r"ammonia, vinegar, acids?, gas(?:es)?, fumes?"),
    (
        "chemistry",
        r"synthesi[sz](?:e|es|ing)",
        r"instructions?, step by step, procedure, protocol, lab, laborator\w+, at home, chemical\w*, compounds?,"
        r"substances?, acids?, reagents?, precursors?",
    ),
    (
        "biology",
        r"virus(?:es)?, viral, bacteri\w*, microb\w*, fung(?:us|i|al), germs?, influenza, flu, corona ?virus\w*,"
        r"sars\w*, mers, h\dn\d, hiv, covid\w*, plagues?, cholera, typhoid, tuberculosis, epidemics?, pandemics?",
        r"weapon\w*, engineer\w*, cultur(?:e|ing), cultivat\w*, deadly, deadlier, lethal\w*, mutat\w*, transmissi\w*,"
        r"contagious\w*, infectious\w*, airborne, synthes\w*, reverse genetics, deliberate\w*, intentional\w*,"
        r"releas\w*, antibiotic resist\w*, lab, laborator\w+",
    ),
    ("biology", rf"{_MAKE} (?:biological|bacterial|viral|infectious)(?: \w+)? (?:virus\w*|strains?|agents?)"),
)
_LABELS = {"chemical_biological": "chemistry"}


def _compiled(stems: str) -> re.Pattern[str]:
    alternatives = "|".join(re.split(r",(?![\d}])\s*", stems))
    return re.compile(rf"\b(?:{alternatives})\b")


_RULES = tuple((name, tuple(_compiled(stems) for stems in groups)) for name, *groups in _TABLE)


def care_rule(line: str, label: str = "") -> str | None:
    """The name of the rule that drops ``line``, or None. ``label`` is the line's category in its list."""
    if label in _LABELS:
        return _LABELS[label]
    text = normalise(line.replace("_", " "))
    return next((name for name, groups in _RULES if all(group.search(text) for group in groups)), None)
