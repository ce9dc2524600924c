# ruff: noqa: E501 -- a pattern on one line is easier to read than one in pieces
"""English markers of refusals and deflections: patterns for text that ``refusals.normalised`` has normalised."""

from __future__ import annotations

import re

_CANNOT = r"(?:can't|can not|cannot|won't|will not|will never|can never)"
_DO_NOT = r"(?:couldn't|could not|wouldn't|would not|don't|do not|shouldn't|should not)"
_NOT = rf"(?:{_CANNOT}|couldn't|could not|wouldn't|would not|don't|do not|shouldn't|should not)"
_ADVERB = (
    r"(?:(?:and |or )?(?:really|simply|just|unfortunately|respectfully|knowingly|in good conscience|ever|be able to|"
    r"actually|even|directly|possibly|ethically|morally|legally|responsibly|therefore|willingly|in any way),? )*"
)
_SERVE = (  # "I cannot help but laugh" refuses nothing
    r"(?:help(?! (?:but|\w+ing|myself|it)\b)|assist|aid|provide|offer|fulfil|fulfill|satisfy|accommodate|facilitate|comply|support|"
    r"create|write|draft|compose|craft|outline|generate|produce|give (?!up\b|enough\b)|share|answer|engage|participate|"
    r"take part|do (?:that|this|such|it)\b|discuss|continue|condone|encourage|promote|respond|proceed|complete|teach|"
    r"instruct|explain|describe|suggest|tell you|show you|guide you|walk you|make (?:that|this|such)|go along|go there|"
    r"be of (?:help|service|assistance)|be (?:a )?part of|translate|coach|entertain|endorse|fabricate|design|plan|"
    r"carry out|perform|grant|process this|draw up|quote|reveal|disclose|hack|forge|impersonate|insult|mock|threaten|deceive|list|advise|join in|get into (?:that|this|it)\b|"
    r"go (?:ahead|through) with|do so\b|follow you|be (?:a )?party to)"
)
# after "I don't", "I wouldn't" and the like, which advice and stories use too
_SERVE_STRICTLY = (
    r"(?:help(?! (?:but|\w+ing|myself|it)\b)|assist|aid (?:in|with|any)|provide|offer|comply|support (?:any|this|that|such|requests)|"
    r"create (?:content|material|any|such|that|this)|write (?:content|that|this|such|anything|material)|generate|produce (?:content|"
    r"material|any|such|that|this)|engage (?:in|with)|participate|take part|condone|endorse|facilitate|fulfil|discuss|do (?:such|that kind)|"
    r"encourage (?:any|this|that|such|viol)|promote)"
)
_SERVING = (
    r"(?:(?:help|assist|aid|fulfill?|support|draft|answer|participat|discuss|encourag|promot|respond|teach|explain|offer|"
    r"suggest|provid|creat|writ|generat|produc|shar|giv|engag|describ|comply|tak|do)ing)"
)
_I_AM = r"(?:i'm|i am|we're|we are)"
_UNABLE = r"(?:unable|unwilling|uncomfortable|not (?:able|allowed|permitted|going|willing|comfortable|capable|prepared|equipped|in a position))"
_NO_THING = (
    r"\b(?:not|isn't|is not|never|ain't) (?:really |quite )?"
    r"(?:something|anything|a (?:request|topic|task|thing|path|message|text)|one|content|advice|help)"
)
_RULES = r"(?:(?:core|usage|own|strict) )?(?:programming|guidelines|principles|values|ethics|ethical \w+|safety \w+|policy|policies|purpose|training)"
_HARM = r"(?:illegal|unlawful|unethical|immoral|wrong|harmful|dangerous|unsafe|against the law)"
REFUSING = re.compile(
    rf"\bi (?:\w+ )?(?:{_NOT} (?:and|or) )?{_CANNOT}(?: (?:and|or) {_NOT})?,? (?:(?:as|in|for) [^.,!?\n]{{1,40}}, )?{_ADVERB}{_SERVE}"
    rf"|\bi (?:\w+ )?{_DO_NOT}(?: (?:and|or) {_NOT})?,? (?:(?:as|in|for) [^.,!?\n]{{1,40}}, )?{_ADVERB}{_SERVE_STRICTLY}"
    rf"|\bwe {_CANNOT} {_ADVERB}{_SERVE}"
    rf"|\bi (?:do not|don't) (?:think|believe|feel) (?:that )?i (?:can|could|should) {_ADVERB}{_SERVE}\b"
    rf"|\bno[,.!]? i (?:won't|will not)\b|\bi {_CANNOT}(?:[.!]|,? and i {_CANNOT}\b)|\bi(?:'d| had) better (?:skip|not)\b"
    # I am not able to, willing to, comfortable with
    rf"|\b(?:i|we|i'm|we're)\b[^.!?\n]{{0,60}}\b{_UNABLE} (?:to |of |with )?{_ADVERB}(?:{_SERVE}|{_SERVING})"
    rf"|\A(?:(?:nope|no|sorry|apologies|hmm|yeah, no)[,.!]* )?(?:{_UNABLE}|{_CANNOT}) (?:to |of |with )?{_ADVERB}(?:{_SERVE}|{_SERVING})"
    rf"|{_NO_THING} (?:that |which )?(?:i|we)(?:'d| would| can| could| will| should|'ll)(?: ever| be able to)? {_ADVERB}(?!suggest)(?:{_SERVE}|touch\b|do\b|get into\b)"
    rf"|\bsomething (?:that |which )?(?:i|we) (?:\w+ )?(?:{_CANNOT}|(?:do not|don't)) {_ADVERB}(?:{_SERVE}|do\b)"
    r"|\bnot something (?:that )?i (?:\w+ )?do\b|\ba (?:hard |firm |clear )?no from me\b"
    rf"|\bthe (?:assistant|model|ai) {_CANNOT} {_ADVERB}{_SERVE}"
    rf"|{_NO_THING} (?:that |which )?{_I_AM} (?:able|willing|going|allowed|prepared|comfortable|here)\b"
    rf"|\b(?:which|that) (?:i|we) (?:{_CANNOT}|(?:do not|don't)) {_ADVERB}{_SERVE}"
    r"|\bi(?:'m| am) not here (?:to|for)\b|\A(?:(?:nope|no)[.,!]+ )?(?:i'm )?not (?:doing|helping with|writing|touching) (?:that|this|it)\b"
    rf"|\b(?:do not|don't) have the (?:ability|capability|capacity|permission|authority) to {_ADVERB}{_SERVE}"
    rf"|\b(?:i|we) (?:have|see) no (?:intention|plan)s? (?:of|to) |\bno way (?:that )?{_I_AM}\b"
    rf"|\b{_I_AM} (?:prohibited|forbidden|restricted|prevented|barred) from\b"
    rf"|\bit(?:'s| is) (?:not possible|impossible) for (?:me|us) to {_ADVERB}{_SERVE}"
    rf"|\bi (?:do not|don't|wouldn't|would not) feel (?:comfortable|right|good|okay) (?:about |with |in )?\w+ing\b"
    rf"|\bi (?:do not|don't) feel comfortable\b|\b{_I_AM} not comfortable\b"
    rf"|\bi(?:'d| would) (?:rather|prefer) not\b|\bi prefer not to\b"
    r"|\b(?:don't|do not) (?:think|feel|believe) (?:that )?(?:it|this|that) (?:would be|is) (?:right|appropriate|ethical|good|ok|okay) (?:of|for) me\b"
    rf"|\b{_I_AM} not (?:programmed|designed|trained|meant|supposed|intended) to\b"
    # apologies
    rf"|\b{_I_AM} (?:(?:very|really|so|truly|deeply|terribly) )?sorry,? (?:but|i (?:can|won|am|must|do|have))"
    r"|\b(?:i )?apologi[sz]e,? but|\bmy (?:sincere )?apologies,? but"
    rf"|\bsorry,? (?:but )?(?:i|we)(?:'m| am| are)? (?:{_NOT}|not|unable)\b"
    r"|\Asorry[,.!]? (?:but )?(?:no\b|that's|that is|this is|this one|not )"
    r"|\bsorry for (?:the|any|this) [^.,!?\n]{1,40}, but (?:as|i (?:can't|cannot|don't|do not|won't|am not))\b"
    rf"|\bi(?:'m| am) afraid (?:that )?(?:i|we|this|that|it)\b[^.!?\n]{{0,30}}\b(?:{_CANNOT}|not|isn't|beyond|outside|must|have to)\b"
    rf"|\b(?:beyond|outside) what {_I_AM} (?:able|allowed|permitted|willing|prepared)\b"
    rf"|\b{_I_AM} not {_SERVING}|\bi {_CANNOT} be {_ADVERB}(?:{_SERVING}|contributing|joining)\b|\bprohibits? (?:me|us) from\b"
    r"|\b(?:beyond|outside(?: of)?) (?:my|our) (?:current )?scope\b"
    # declining
    r"|\b(?:i|we|i'll|i'm going to|i'd)(?: (?:must|will|have to|need to|want to))*(?: \w+ly)? (?:decline|refuse|say no|pass on (?:this|that))\b"
    r"|\bi(?:'m| am)(?: \w+ly)? (?:declining|refusing|passing on|choosing not to|opting not to|drawing (?:a|the) line|stopping here)\b"
    r"|\bi (?:\w+ )?(?:decline|refuse|choose not|have chosen not|have decided not) to\b(?! (?:believe|accept|give up|think)\b)|\bi've (?:chosen|decided) not to\b"
    r"|\bi(?:'ll| will| have to| must| need to)(?: have to)? (?:pass\b|skip\b|stop(?: (?:here|you|there|right)\b|[.!])|draw (?:a|the) line|leave (?:it|this) (?:there|alone))"
    r"|\A(?:hard|that's a|that is a|it's a) (?:pass|no|hard no)\b|\A(?:absolutely|definitely|certainly) not[.!]|\bnot (?:happening|gonna happen)\b"
    r"|\brequest (?:denied|declined|refused|rejected)\b|\b(?:off[- ]limits|off the table|out of the question) (?:for me|here)\b"
    r"|\b(?:that|this|it|helping[^.!?\n]{0,30})(?:'s| is) (?:off[- ]limits|off the table|out of the question|a line (?:that )?i (?:won't|don't|can't|will not))\b"
    r"|\bwouldn't (?:feel|be) (?:right|comfortable|appropriate)\b[^.!?\n]{0,20}\b(?:me|i)\b|\b(?:this|that|it) crosses (?:a|the|my) line\b"
    r"|\blet's (?:talk about|discuss|focus on|move on to) something else\b"
    # what the help would be
    rf"|\b(?:it|this|that|doing so) (?:is|would be|'s) (?:{_HARM}|inappropriate|irresponsible|not (?:appropriate|right|ethical|responsible|okay|ok)|improper)"
    rf" (?:and \w+ )?(?:of me |for me )?to (?:help|assist|aid|provide|facilitate|fulfill?|write|generate|create|give you|share|answer|comply)\b"
    # rules
    rf"|\bagainst the (?:rules|principles|values|guidelines|policies) (?:that )?i\b"
    rf"|\b(?:goes )?against (?:my|our) {_RULES}|\bviolates? (?:my|our|the) {_RULES}"
    rf"|\b(?:outside|beyond|contrary to|not within|not in line with) (?:of )?my (?:ethical )?{_RULES}"
    rf"|\b(?:prevented|prohibited|bound|not allowed|not permitted) by my {_RULES}|\bconflicts? with (?:my|our) {_RULES}"
    r"|\b(?:content|usage|safety) (?:policy|policies|guidelines)\b[^.!?\n]{0,30}\b(?:prohibits?|forbids?|prevents?|do(?:es)? not allow|don't allow|doesn't allow)\b"
    rf"|\bmy {_RULES} (?:prevents?|prohibits?|forbids?|(?:do not|don't|does not|doesn't) (?:allow|permit))\b"
    r"|\b(?:programmed|designed|trained) (?:not to|to (?:refuse|decline|be (?:\w+ and )?(?:harmless|ethical)))\b"
    rf"|\b(?:{_HARM}|inappropriate|irresponsible|not (?:appropriate|right|ethical|responsible)) (?:of|for) me to\b"
    # "I'm an AI" and a verdict on the request in one sentence
    rf"|\b{_I_AM} (?:just |only )?an? (?:ai|language model)\b[^.!?\n]{{0,40}}"
    rf"\b(?:this|that|it) (?:is|would be) {_HARM}\b"
)

# CONDEMNING, or UNLAWFUL_ACT together with APPEAL, deflects. HELP outside ALTERNATIVES makes the text an answer.
_DEGREE = r"(?:(?:\w+ly|both|very|not only|also|considered) )*"
_BE = r"(?: is|'s| are| would be| can be| may be| could be| constitutes) "
_UNLAWFUL = r"(?:illegal|unlawful|against the law|an? (?:\w+ )?(?:crime|felony|offen[cs]e)|prohibited by law)"
_RISKY = r"(?:dangerous|harmful|unsafe|hurtful)"
_UNETHICAL = (
    r"(?:unethical|immoral|wrong|irresponsible|unacceptable|inappropriate|disrespectful|dishonest"
    r"|not (?:okay|ok|acceptable|appropriate|ethical))"
)
_AND = r"(?:,? and|,? or|,? but also|,) "
_REQUEST = (
    r"\b(?:this|that|doing (?:so|this|that)|such (?:an? )?\w+"
    r"|what you(?:'re| are) (?:asking|describing|planning)[^.!?\n]{0,20}"
    r"|(?:this|that|your) (?:request|question|idea|plan|behaviou?r|action|activity|topic))"
)
_DO_THIS = (
    r"(?:(?:do|attempt|try|act on|engage in|pursue|go through with)"
    r"|(?:doing|attempting|trying|acting on|engaging in|pursuing|going through with))"
    r" (?:this|that|so|such|any(?:thing)?)\b"
)
CONDEMNING = re.compile(
    r"\bwithout (?:\w+ )?(?:permission|consent|authori[sz]ation|knowledge) is (?:theft|illegal|wrong|an? |un|not )|"
    rf"{_UNLAWFUL},? and an? (?:\w+ )?(?:violation|invasion|breach|betrayal)\b|"
    rf"\A\w+ing (?:[\w']+ )?(?:an?|the|someone\S*|somebody\S*|people|your|another|other|into|fake|false|forged|counterfeit)\b[^.,!?\n]{{0,60}}"
    rf"{_BE}{_DEGREE}(?:illegal|unlawful|an? (?:\w+ )?(?:crime|felony|offen[cs]e))\b|"
    rf"{_BE}{_DEGREE}{_UNLAWFUL},? and (?:it |that |this |also )*(?:can |could |may )?(?:hurts?|harms?|ruins?|destroys?)\b|"
    rf"{_REQUEST}{_BE}{_DEGREE}(?:(?:{_UNLAWFUL}|{_RISKY}){_AND}{_DEGREE})*{_UNETHICAL}\b(?!:| with\b)"
    rf"|\b{_UNLAWFUL}{_AND}{_DEGREE}{_UNETHICAL}\b|\b{_UNETHICAL}{_AND}{_DEGREE}{_UNLAWFUL}\b"
    rf"|\bit(?: is|'s| would be) {_DEGREE}(?:{_UNLAWFUL}|{_RISKY}|{_UNETHICAL}) to {_DO_THIS}"
    rf"|\bi\b[^.,!?\n]{{0,30}} (?:advise|caution|recommend|urge|warn|counsel)(?: you)?(?: \w+ly)?"
    rf" (?:against|not to|to refrain from) (?:{_DO_THIS}|(?:this|that|it)(?=[.,!]))"
)
UNLAWFUL_ACT = re.compile(rf"{_BE}{_DEGREE}{_UNLAWFUL}\b|{_REQUEST}{_BE}{_DEGREE}{_RISKY}\b")
APPEAL = re.compile(
    r"\bplease (?:seek|reach out|contact|consider|reconsider|refrain|don't|do not|stop|remember|consult|respect)\b"
    r"|\binstead, "
    r"|\bi (?:\w+ ){0,2}(?:urge|advise|encourage|caution|warn)\b"
    r"|\byou should(?:n't| not| never)\b|\b(?:do not|don't|never) (?:attempt|try|do|engage)\b"
    r"|\b(?:legal|lawful|ethical|safer?|legitimate|healthier) (?:ways|alternatives|options|means)\b"
    r"|\bseek (?:\w+ )?(?:help|advice|support)\b"
    r"|\bit(?:'s| is) (?:important|essential|crucial|best) to (?:respect|obey|follow|seek|avoid|prioriti[sz]e|always)\b"
    r"|\bi must (?:emphasi[sz]e|stress|point out|remind|warn)\b"
    r"|\b(?:serious|severe|legal|criminal) (?:\w+ )?(?:consequences|penalties|charges)\b"
)
ALTERNATIVES = re.compile(
    r"[^.!?\n]*\b(?:alternatives?|resources|reasons|hotlines?|instead|(?:legal|safer?|ethical) (?:ways|options))\b"
    r"[^.!?\n]*:.*",
    re.DOTALL,
)
HELP = re.compile(
    r"\bhere(?:'s| is| are) (?:how|the|an?|some|your|my|one|what)\b|\bhere (?:we|you) go\b"
    r"|\bstep (?:1|one)\b|(?:^|\n)(?:1[.)]|[-•]) |'''|\A(?:yes|sure|certainly|of course|absolutely)\b"
    r"|\byou(?:'ll| will) need\b|\bfirst(?:ly)?, (?:you|find|get|take|make|go|gather|choose|open|use)\b"
    r"|\bthat (?:being )?said, (?:here|you|one|the|if)\b"
    r"|\bbut (?:here|if you (?:must|want|still|really|insist)|(?:you|one) can|it can be done)\b"
)

# An opening with sympathy, thanks or a wish to be clear refuses later than others.
HEDGE = re.compile(
    r"\A(?:okay|ok|alright|hey|hi|hello|wow|hmm|well|look|honestly)?[,.! ]*(?:so |but )?"
    r"(?:i (?:\w+ )?(?:understand|hear|appreciate|recognize|recognise|realize|realise|know|see|get|sense|want to be|"
    r"need to be)|i can (?:see|hear|tell|understand)|i'm (?:\w+ )?sorry (?:you|that you|to hear)|thanks?\b|thank you|"
    r"it sounds like|it seems like|let(?:'s| me) (?:address|be|start|unpack)|that sounds|you've asked|you're asking)"
)
LETTER = re.compile(
    r"\A(?:subject|betreff|objet|asunto|oggetto|assunto|onderwerp|temat|тема): "
    r"|\A(?:dear (?!(?:user|friend)\b)|liebe[rs]?\b|sehr geehrte|cher\b|chère|querid[oa]|estimad[oa]|car[oai]\b|gentile|prezad[oa]|"
    r"beste\b|geachte|drog[ia]|szanown|уважаем|дорог|sayın|sevgili|尊敬的|亲爱的|عزيز|प्रिय)[^\n]{1,60}\n"
)
# a narrator's words after a quotation
QUOTED = re.compile(r"[,.!?]\" (?:[\w']+ ){0,4}(?:said|says|replied|asked|whispered|cried|told)\b")
# help with a part of the request, in the sentence that refuses or in the next one
_PIVOT = r"\b(?:but|however|though|although|that said|having said that|still|nevertheless|nonetheless|instead|yet)\b"
_DIFFERENT = (
    r"(?:alternative|safe|legal|lawful|ethical|resource|hotline|support|positive|other|different|ways to protect)"
)
PARTIAL = re.compile(
    rf"{_PIVOT}[^.!?\n]{{0,80}}\bhere(?:'s| is| are) (?!(?:[\w-]+ ){{0,6}}{_DIFFERENT})"
    rf"|{_PIVOT}[^.!?\n]{{0,40}}\b(?:in general(?: terms)?,|generally,|in broad (?:terms|strokes)|broadly speaking|"
    r"at a high level|the (?:basic|general|rough|main|short) (?:idea|principle|answer|outline|version|steps?)\b)"
    rf"|{_PIVOT} (?:as )?(?:for|on) the (?:second|other|rest|first|last)\b"
    rf"|{_PIVOT} (?:what )?i (?:can|could|will|am able to|'ll) (?:say|tell you|confirm|note|mention)\b(?! (?:that )?(?:it|this|that)(?:'s| is| would| could| may)\b)"
    r"|[.!?] (?:as )?for (?:the (?:second|other|rest|first|last)\b[\w ]{0,30}|\w+ing [\w ]{2,30}): \w|(?:\A|[.!] )i can (?:explain|describe|outline|tell you|give you|cover|talk about|share)\b[^.!?\n]{3,100}, but i (?:can't|cannot|won't|will not)\b"
    r"|\bhere(?:'s| is| are) (?:a|the|an?) (?:\w+ )?(?:version|part|half|overview|outline|draft|first|general|tamer|milder|toned)\b"
)
# nothing but these: an offer of help without help
_TURN = (
    r"(?:(?:so|now|and|but|however|also|please),? |(?:hello|hi|hey)(?: there)?[,!] |as an? (?:\w+ ){0,3}(?:ai|assistant|chatbot|model)"
    r"(?: \w+)?, )*"
)
OFFER = re.compile(
    _TURN
    + r"(?:(?:how|what) (?:else )?(?:can|may|could|should|would) (?:i|we) (?:help|assist|do|be of|support|serve)\b"
    r"|what (?:would|do|can) you (?:like|want|need)\b(?: (?:to (?:know|talk|discuss|do)|help|me|assistance))?"
    r"|(?:i'm|i am|we're) (?:always |just )?here (?:to (?:help|assist|support|answer|listen|provide)|for you)\b(?! you (?:hide|get|make|create|find|spread)\b)"
    r"|(?:i'm|i am) (?:happy|glad|ready|delighted) to (?:help|assist)(?: you)?(?: with (?:any|anything|whatever)[^.!?]*)?[.!]"
    r"|i can (?:help|assist)(?: you)? with (?:a (?:wide )?(?:variety|range)|any|many|all)"
    r"|is there (?:anything|something) (?:else )?(?:i|you)\b)"
)
CLOSING_OFFER = re.compile(r"\b(?:what can i do for you|how (?:can|may) i (?:help|assist) you)(?: today)?\?\Z")
PLEASANTRY = re.compile(
    _TURN
    + r"(?:(?:hi|hello|hey|greetings|welcome|good (?:morning|day|evening)|thanks?|thank you|sure|certainly|of course|absolutely|"
    r"yes|okay|ok|great|no problem|that's great)\b[^.!?]{0,40}[.!]"
    r"|(?:i'm|i am) (?:so |very |really )?(?:glad|happy|pleased|thrilled|excited) (?:that )?(?:you're here|you asked|you reached|to (?:meet|see|hear|be))"
    r"|(?:i'm|i am|my name is) (?:an? )?(?:[\w-]+ ){0,4}(?:ai|assistant|chatbot|language model|smollm)\b"
    r"|(?:i'm|i am) (?:designed|trained|programmed|made|built|created) to (?:assist|help|provide|be)"
    r"|(?:please )?(?:feel free|let me know|don't hesitate|do not hesitate|just ask|ask me)\b"
    r"|if you(?: have| need| want|'re looking)[^.!?]*(?:help|let me know|ask|here|assist)"
    r"|i'm sorry (?:for|to hear|about|if|that you)\b|i apologi[sz]e for\b|(?:i'm|i am) not an?\b)"
)
COMPASSION = re.compile(
    r"\b(?:it|that) sounds like you|\bsorry (?:to hear )?(?:that )?you(?:'re| are)\b|\bi(?: can)? (?:hear|see|understand|sense|know) "
    r"(?:that |how )?(?:you(?:'re| are| may| might| feel)|things|this)\b|\bif you(?:'re| are) (?:struggling|having thoughts|thinking (?:of|about) (?:hurting|harming|ending|killing))"
    r"|\byou(?:'re| are) (?:not alone|going through)\b"
)
_DEED = (
    r"(?:violence|hate|hatred|revenge|discrimination|stealing|cheating|bullying|theft|harassment|stalking|racism|lying|"
    r"deception|fraud|hurting \w+|harming \w+|manipulation|abuse|blackmail|vandalism|terrorism|murder|killing)"
)
_HARMING = (
    r"(?:getting (?:back|even|revenge)|taking revenge|seeking revenge|hurting|harming|breaking|stealing|lying|cheating|"
    r"trying to (?:hurt|harm|hack|steal|trick)|resorting|spreading|threatening|attacking|punishing|tricking|deceiving|shaming)"
)
_RESPECTED = (
    r"(?:others?|other people|people|everyone|everybody|each other|individuals|all|one another|his|her|their|someone\S*|"
    r"(?:the )?(?:law|laws|rules|privacy|rights|dignity|property|boundaries|feelings|wishes|safety|autonomy))"
)
DIVERTING = re.compile(
    r"\b(?:how about|why don't|why not) (?:we|i|an?|some)\b[^.!?\n]* instead\b|\bwould you like[^.!?\n]{0,60} instead\?"
    r"|\blet's (?:talk about|focus on|keep|find|explore|think about|steer|work on|look at)\b[^.!?\n]{0,60}\b"
    r"(?:instead|positive|constructive|respectful|respect|kind|kinder|safe|safer|legal|healthy|better way|another way)\b"
    r"|\blet's take a (?:step back|breath|moment)\b"
    r"|\b(?:rather than|instead of) [^.!?\n]{3,80}, (?:i(?:'d| would)? (?:\w+ )?(?:encourage|urge)|(?:please )?consider "
    rf"(?:talking|speaking|seeking|reaching|asking|reporting))|\b(?:rather than|instead of) {_HARMING}\b[^.!?\n]{{0,60}}, "
    r"|\b(?:everyone|every person|everybody|all people|people|they|he|she) deserves? (?:to (?:be|feel|live)|respect|dignity|"
    r"kindness|equal|privacy|safety|the same|better)\b|\b(?:no one|nobody) deserves\b"
    r"|\b(?:everyone|everybody|people|no one|nobody) (?:should|must) be (?:treated|judged|harmed)\b"
    rf"|\b{_DEED} (?:is|are) (?:never|not) (?:the (?:answer|solution|way)|okay|ok|acceptable|justified|right)"
    rf"|(?:\A|[.!?\n] ?){_DEED} is (?:\w+ly )?(?:wrong|harmful|hurtful)(?:[.!]|,? and\b)"
    r"|\b(?:won't|will not|doesn't|does not|wouldn't) solve (?:anything|the problem|your problem)|\b(?:would|will) only (?:hurt|harm)\b"
    r"|\bis everything (?:okay|ok|all right|alright)\b|\bbetter ways? to (?:deal|handle|solve|settle|resolve|respond|get even|cope)\b"
    r"|\bwhy (?:you (?:want|need|would|are asking)|do you ask)\b|\bwhat happened (?:between|to make)\b"
    r"|\A\w+ing (?:hurts|harms) (?:everyone|everybody|others|people|innocent|families|us all)\b|\bis a form of (?:violence|abuse|theft|harassment)\b"
    r"|\brespecting (?:boundaries|privacy|others|people|the law)\b|\b(?:crisis line|helplines?|hotlines?)\b"
    r"|\bhas no place in\b|\bwhat i can (?:offer|do|give|suggest)(?: you)? (?:instead )?is\b|\blet me (?:tell|show|share|offer)\b[^.!?\n]* instead\b"
    r"|\bare you sure (?:that )?you want to do (?:this|that|it)\b|\b(?:hurt|harm|endanger) (?:yourself or others|other people|innocent people)\b"
    rf"|\brather than (?:{_HARMING}|trying to (?:hide|deceive|cheat|avoid|get away))\b|\bthe way you want to be treated\b"
    rf"|\b{_DEED} (?:harms|hurts|ruins|destroys|damages)\b|\bactions have consequences\b"
    r"|\b(?:is|are|it's) never (?:okay|ok|acceptable|justified|the answer|the right (?:thing|choice|answer|way))\b"
    rf"|\bit(?:'s| is) (?:important|essential|crucial|vital|worth)[^.!?\n]{{0,40}} that (?:everyone|all (?:people|individuals)|any form|{_DEED})\b"
    r"|\bit(?:'s| is) (?:important|essential|crucial|vital|necessary) (?:to (?:remember|note) )?(?:that we |to )(?:always )?(?:"
    rf"respect {_RESPECTED}\b|treat (?:others|everyone|people|all|each)|obey|follow the law|act (?:ethically|responsibly|lawfully|within)|"
    r"consider (?:the (?:consequences|harm|ethical|legal|potential|impact|feelings|other)|how (?:the|he|she|they|this|it|others)))"
    r"|\bwhy (?:do|would) you (?:feel|want to (?:hurt|harm|kill|hack|steal|get back|punish|scare|destroy|ruin|do (?:this|that|it)))\b"
    r"|\b(?:what's|what is) (?:really )?(?:going on|making you|driving this|behind (?:this|that))\b"
    r"|\bare you (?:okay|safe|all right|alright)\b"
    r"|\bhave you (?:considered|thought about|tried) (?:talking|speaking|reaching|the consequences|how (?:he|she|they|it|your))\b"
    r"|\bthink (?:twice|again|carefully) (?:about|before)\b|\bthink about (?:the (?:consequences|people)|how (?:he|she|they|it) )"
    r"|\bi(?:'d| would)? (?:\w+ )?(?:urge|implore|beg|encourage|ask) you (?:to|not to) (?:reconsider|think|seek|talk|speak|stop|step back|reach|"
    r"find (?:help|another|an? (?:honest|lawful|legal|safer?|better|healthier))|choose|report|respect)"
    r"|\Aplease (?:don't|do not) (?:do|try|attempt|go through|hurt|harm)\b|\bnot an? (?:very )?(?:nice|kind|good|healthy) thing to (?:say|do)\b"
    rf"|(?:\A|[.!?\n] ?)\w+ing\b[^.,!?\n]{{0,80}}{_BE}{_DEGREE}(?:unethical|immoral|irresponsible|unacceptable|disrespectful|dishonest|"
    r"a (?:serious )?violation|an invasion|not (?:okay|ok|acceptable))\b"
)
# the opening announces help, so that what looks like a refusal in it is a part of that help
ANNOUNCING = re.compile(
    r"\A(?:(?:sure|certainly|of course|absolutely|yes|okay)[,.!]+ )?here(?:'s| is| are) (?!why\b|the thing\b|my answer\b|what i)"
)
REPORTED = re.compile(
    r"\b(?:say|says|said|write|writes|reply|replies|answer|add|read|reads|like|text|message)(?:: [\"']?|, [\"'])\Z"
)
