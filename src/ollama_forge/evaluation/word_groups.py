# ruff: noqa: SIM905, E501 -- a list of words is easier to read as a text than as a list of strings
"""Words of twenty languages by what a sentence does that uses them, so that a pair of groups says the same in all of them.

"I" beside a negation and an act of serving is a refusal in any language: what is learned from English openings holds for
others, too. ``*`` stands for any ending, ``_`` for a blank.
"""

from __future__ import annotations

from collections.abc import Iterator

_WORDS: dict[str, str] = {
    "i": """
        i i'd i'll i'm i've me my myself mine we we're we'd we'll our us ich mir mich mein meine meinen meiner meinem wir
        uns je j'ai moi mes ma mon nous notre nos yo mi mis conmigo nosotros nuestro* nuestra* io mio mia miei mie noi
        nostr* eu meu minha meus minhas nós comigo ik mij mijn wij ons onze ja mi mnie moje moich mój jestem я мне меня мной мои
        моих моя мы нам jag mig min mina mitt já mně můj мене мій tôi mình chúng_tôi saya kami aku ben bana benim biz
        我 本助手 咱 私 僕 当方 わたし 저는 제가 저의 저로서 أنا إنني إني لي عندي मैं मैंने मुझे मेरे मेरा मेरी हम
        puedo podemos podría debo quiero prefiero temo niego tengo posso possiamo potrei devo preferisco preferirei poderei
        prefiro recuso mogę możemy muszę odmawiam mohu musím nemohu nemůžu могу можем буду стану должен вынужден отказываюсь
        أستطيع يمكنني أقدر أرفض أعتذر أود آسف لست üzgünüm
        """,
    "machine": """
        ai assistant chatbot bot model language_model program software ki assistent sprachmodell ia assistente asistente modelo
        modello modèle_de_langage asystent ии ассистент помощник модель 人工智能 助手 语言模型 アシスタント 言語モデル 인공지능
        مساعد_ذكي एआई सहायक yapay_zeka asisten trợ_lý
        """,
    "negation": """
        not no never nothing none nobody neither nor without can't cannot won't don't doesn't didn't isn't aren't wasn't
        wouldn't couldn't shouldn't haven't hasn't nope nah ain't unable nowhere nicht kein* nichts nie niemals nein ohne weder ne
        pas jamais aucun* non rien sans ni nunca jamás ningun* ningún nada tampoco sin mai nessun* niente senza né não nenhum*
        nem sem niet geen nooit niets zonder nee nic nigdy bez żadn* не нет ни никогда ничего без нельзя невозможно inte ingen
        inga aldrig nej nemohu nemůžu nesmím nebudu nejsem không chẳng đừng tidak tak bukan jangan değil hayır
        不 没 无 無 勿 别 未 非 ません ない なし 無理 않 없 못 아니 말아 لا لن ليس لم غير لست بدون नहीं मत बिना
        amam emem amıyorum emiyorum mayacağım meyeceğim amayız emeyiz
        """,
    "able": """
        can could able unable possible impossible capab* ability abilities allow* permit* equipped position access kann können
        könnte möglich unmöglich darf dürfen fähig lage zugriff peux peut pouvez pourrai* capable mesure accès puedo puede podemos
        poder posible capaz acceso posso può possiamo possibile grado accesso pode podemos possível acesso kan kunnen mogelijk
        staat mogę można możemy stanie могу может можем можно смогу возможност* доступ mohu můžu möjligt thể dapat bisa mampu
        能 可以 会 办法 でき られ かね 出来 수_없 수_있 가능 불가 يمكن أستطيع يسعني بإمكان قادر सकत असमर्थ
        """,
    "will": """
        will would won't i'll we'll i'd going want wish willing prefer rather intend gonna werde werden möchte würde lieber
        bereit vais veux souhaite préfère voudrais voy quiero prefiero deseo dispuesto voglio intendo preferi* vou quero irei
        pretendo zal wil liever będę chcę zamierzam wolę буду стану хочу предпочит* готов* budu chci kommer vill sẽ muốn akan mau
        想 愿意 要 打算 つもり たく 겠 싶 سوف لن أريد أود चाह ूँगा ूंगा
        """,
    "modal": "may might must should shall ought need needs muss müssen soll dois devez debe deve moet musi должны должен 必须 应该 べき 해야 يجب चाहिए",
    "serving": """
        help* assist* aid support* provid* offer* give giv* write writ* draft* creat* generat* produc* shar* tell teach* explain*
        describ* answer* respond* advis* advice suggest* guid* instruct* discuss* facilitat* contribut* cover comply complet* fulfil*
        recommend* translat* show walk design* make making do doing engage engag* participat* join part hand recipe plan planning
        hilf* helf* unterstütz* geb* schreib* verfass* erklär* antwort* beantwort* erstell* liefer* anleit* tipps auskunft beitrag*
        beteilig* mache machen aider* fournir* donn* répond* écri* rédig* expliqu* partag* propos* ayud* proporcion* dar darte darle darti escrib* expli*
        compart* particip* ofrec* redact* contribu* hacer* aiut* forni* rispond* scriv* spieg* condivid* partecip* consigl*
        ajud* fornec* escrev* oferec* fazer contrib* gev* schrijv* uitleg* pomo* pomag* podać napis* wyjaśn* udziel* помо*
        помощ* дать дам давать напис* писать пишу объясн* отвеч* ответ* рассказ* участв* предостав* hjälp* skriv* svara förklara
        pomůž* giúp hỗ_trợ viết cung_cấp bantu membantu menulis memberi* yardım* yaz*
        帮 协助 提供 回答 写 教 解释 告诉 支持 给 助け 手伝 協力 答え 教え 書 説明 案内 도와 도움 도울 돕 알려 제공 답 설명 안내
        써_드 써_줄 작성 أساعد المساعدة تقديم أقدم شرح أشرح كتابة أكتب إجابة मदद सहायता बता जानकारी लिख सिखा उत्तर
        """,
    "declining": """
        declin* refus* pass passing skip* stop* leave leaving left abstain* avoid* steer stay keep out line limits limit off
        elsewhere hold back withhold end ends ended reject* deny denied turn down away set aside sit sitting count draw draws
        drawing boundary step stepping ablehn* lehne weiger* verweiger* verzicht* passe passen aufhör* déclin* abstenir m'abstenir
        arrête niego negarme rechaz* abstener* rifiut* astener* evitare recus* abster* evitar afwijs* odmawia* odmów*
        отказ* воздерж* odmít* avböj* vägra* từ_chối menolak tolak redded*
        拒绝 婉拒 谢绝 恕 断り 断る 控え 遠慮 差し控 거절 사양 삼가 أرفض أمتنع رفض मना इनकार इंकार
        """,
    "regret": """
        sorry afraid apolog* unfortunately regret* alas pardon forgive leid leider bedau* entschuld* verzeih* désolé*
        malheureusement navré* siento lament* disculp* perdon* perdón dispiace spiac* purtroppo scus* temo desculp*
        infelizmente sinto perdão spijt helaas excuses przykro niestety przepraszam wybacz извин* сожал* прости* увы жаль tyvärr
        ledsen bohužel omlouv* líto вибач* xin_lỗi rất_tiếc maaf üzgün* maalesef özür
        抱歉 对不起 遗憾 不好意思 對不起 申し訳 すみません ごめん 残念 恐れ入 죄송 미안 유감 안타깝 عذرا عذرًا آسف أعتذر للأسف معذرة
        क्षमा माफ खेद माफ़
        """,
    "rules": """
        policy policies guideline* rule rules terms program* principle* platform prohibit* permitt* restricted restriction*
        disallow* compliance standards ethic* filter* flagged blocked violat* against settings designed trained configured
        richtlinie* regeln grundsätz* vorgaben règles directives principes politique* normas directrices principios política*
        regole linee_guida principi politiche regras diretrizes princípios políticas richtlijnen regels zasad* wytyczn* правил*
        принцип* политик* riktlinjer pravid* quy_tắc chính_sách kebijakan aturan kural*
        规定 准则 政策 原则 规范 ガイドライン 規約 方針 ポリシー 지침 정책 규정 원칙 سياسة سياسات إرشادات مبادئ قواعد नियम नीति दिशानिर्देश
        """,
    "request": """
        this that it request* question* topic* such ask asking asked task content kind sort das dies* solche* dabei dazu darüber
        anfrage cela ça ce cette demande* eso esto petición solicitud tema questo questa richiesta ciò isso isto esse pedido
        assunto dat dit daar verzoek to tego prośb* это этого этом этим запрос* det detta điều_này yêu_cầu itu ini permintaan
        bu bunu konuda 这 此 请求 问题 要求 事 これ その こと 依頼 質問 要望 이런 그런 요청 질문 هذا ذلك طلب هذه यह इस ऐस अनुरोध
        """,
    "law": """
        illegal* crime* criminal* law laws lawful* unlawful* jail prison imprisonment offence* offense* felony fine fines
        penalt* court courts punish* arrest* charge* charges banned convict* expelled expulsion forbidden lawsuit* legal* liab*
        prosecut* regulat* treaty strafbar straftat* verboten gesetz* gefängnis polizei strafe illégal* délit* loi lois punie*
        peines amende* interdit* ilegal* delito* ley* cárcel prisión prohibid* illegale reato reati legge carcere vietat* lei
        prisão proibid* strafba* przestępstw* karaln* prawo закон* преступлен* караетс* тюрьм* уголовн* незаконн* olagligt trestný
        vi_phạm_pháp hukum suç yasa* 法律 违法 犯法 犯罪 非法 刑 違法 法的 警察 불법 범죄 법적 처벌 قانون جريمة عقوبة يعاقب अपराध
        कानून अवैध गैरकानूनी सज़ा जेल
        """,
    "harm": """
        harm* danger* hurt* damag* risk* death* deadly injur* victim* suffer* pain pains painful cruel* abuse* addict* threat* toxic ruin*
        destroy* devastat* seriou* severe* consequenc* trauma* lethal kill* misuse overdose scars toll grief schad* gefahr*
        gefährd* verletz* folgen leiden opfer dangereu* blesse* nuire conséquenc* souffr* victime* peligro* daño* consecuenc*
        sufr* víctima* pericolo* danno danni conseguenz* soffr* perigo* dano* consequênc* sofr* vítim* gevaar* schade gevolgen
        szkod* niebezp* ofiar* опасн* вред* последств* страда* жертв* fara farlig nguy_hiểm bahaya zarar
        伤害 危险 后果 危害 损失 傷つ 危険 被害 피해 위험 해로 ضرر خطر أذى نقصान नुकसान खतर हानि
        """,
    "virtue": """
        trust* honest* respect* dignity kind kindness empathy compassion fair fairly fairness peace* deserve* moral* wrong value* privacy
        consent rights together communit* responsib* understanding love care civic boundaries democracy divers* duty equal*
        forgive* human inclusi* integrity safety thrive tolerance unity vertrauen ehrlich* respekt* würde privatsphäre confiance
        honnêt* dignité vie_privée confianza respet* privacidad dignidad fiducia onest* rispett* dignità confiança respeit*
        privacidade vertrouwen eerlijk zaufani* uczciw* szacun* довери* честн* уважа* уважен* tin_tưởng kepercayaan güven*
        诚实 守信 信任 尊重 道德 诚信 义务 信頼 正直 誠実 신뢰 존중 정직 솔직 الثقة احترام صدق أمانة شريف विश्वास ईमानदार सम्मान सच्ची मेहनत
        """,
    "talk": """
        talk* speak* conversation* listen* discuss openly open calm* communicat* reach confide dialogue gespräch* sprich rede*
        offen parlez parler ouvertement franche discussion habl* conversa* converse parlar* parla dialog* praten gesprek rozmaw*
        porozmaw* поговор* разговор* samtal nói_chuyện bicara konuş* 沟通 聊 谈 调解 話し 相談 対話 대화 이야기 상담 الحوار تحدث
        حوار बात
        """,
    "professional": """
        doctor* therap* counsel* lawyer* attorney* helpline* hotline* crisis police authorit* professional* expert* 988 support
        emergency clinic adviser advisor accountant psycholog* psychiatr* specialist* charity charities dietitian locksmith*
        mediat* mental ngo pharmacist samhsa solicitor trainer union hr arzt ärzt* anwalt* berat* médecin avocat* psychologue
        professionnel* médico abogado* psicólog* profesional* medico avvocato commercialista psicolog* profissional advogado
        contador lekarz prawnik врач* юрист* специалист* bác_sĩ dokter doktor avukat
        医生 律师 专家 专业 顾问 老师 家长 医師 弁護士 専門 窓口 전문가 의사 변호사 طبيب محام मनोचिकित्सक डॉक्टर वकील विशेषज्ञ
        """,
    "feeling": """
        feel* sad lonely angry anger upset hurt* hard tough difficult stress* overwhelm* anxious worr* pain painful alone understand*
        sounds frustrat* jealous grief betrayed desperate doubt heartbroken struggl* wütend traurig verstehe gefühl* schwer
        colère triste comprends difficile enfad* entiendo difícil rabbia capisco raiva entendo boos verdrietig smutn* rozumiem
        злост* обид* понима* тяжел* грустн* 难过 生气 理解 心情 つらい 悲し 怒り 辛 힘드 속상 화가 어려움 الغضب غضب حزن شعور दुख गुस्स
        """,
    "protection": """
        protect* secur* safe* password* backup* antivirus detect* prevent* aware* warning signs alarm* defen* lock* safeguard
        suspicious spot strong update* verify schütz* sicher* protég* sécur* proteg* segur* protegg* sicur* beveilig* chroni*
        защит* безопасн* 保护 安全 防止 保護 対策 보호 보안 حماية सुरक्ष
        """,
    "alternative": """
        instead happy glad gladly alternative* alternatively rather better let's shall consider* constructive gentler healthier
        kinder legitimate maybe perhaps positive safer worth why stattdessen gern gerne lieber alternativ besser plutôt
        volontiers mieux en_revanche peut-être en_cambio mejor quizá quizás invece meglio piuttosto em_vez melhor talvez prazer
        in_plaats graag zamiast chętnie вместо охотно лучше может 而是 不如 建议 乐意 代わり 喜んで 대신 기꺼이 بدلا الأفضل يسعدني
        """,
    "complying": """
        sure certainly absolutely here here's step* first firstly then next follow* below begin choose start need* guide
        ingredients easy simple gather pick tips ways way klar natürlich hier zuerst dann schritt* bien_sûr voici d'abord
        ensuite étape* claro aquí primero luego paso* certo ecco prima poi passo aqui primeiro depois oczywiście oto конечно вот
        сначала шаг* 好的 当然 首先 步骤 以下 はい まず 手順 먼저 다음 بالتأكيد أولا إليك ज़रूर
        """,
    "but": """
        but however though although still yet nevertheless even aber jedoch dennoch doch mais cependant pero sin_embargo però
        mas porém maar ale jednak но однако 但 不过 然而 しかし ですが でも 하지만 그러나 지만 لكن लेकिन परंतु
        """,
    "you": """
        you you're your yours yourself you'll you've du dich dir dein* sie ihr* vous votre vos tu te toi ton ta tes usted su
        tus ti tuo tua voi lei você seu sua teu jij jouw ty ci twój вы вам ваш* ты тебе твой din dig anh bạn anda kamu sen
        你 您 あなた 당신 أنت كم आप तुम
        """,
    "third person": """
        he her him his its she their them they person people someone others er ihm ihn ihnen il elle lui leur él ella ellos
        loro essi ele ela eles он она они его её их 他 她 他们 彼 彼女 그들 هو هي هم वह वे उन
        """,
    "topic": """
        across around century century's countries culture* famous fascinating field history important interesting known many
        popular rich subject topic wonderful world role society essential beautiful
        """,
    "purpose": """
        background class context course curious fiction intend interested motivation novel plan project purpose reason research
        situation why
        """,
    "question": "how what which who why where when wie was warum wer comment pourquoi quel* cómo qué por_qué come perché como где что как почему 什么 怎么 哪 何 どう 무엇 어떻게 ماذا كيف क्या कैसे कौन",
}
GROUPS = tuple(_WORDS)
_LONGEST = 6  # of an entry that is looked for inside a word or a text without blanks
# scripts without blanks between words, or with particles joined to them
_JOINED = (
    ("\u0600", "\u06ff"), ("\u0900", "\u097f"), ("\u3005", "\u30ff"), ("\u3400", "\u9fff"), ("\uac00", "\ud7af"),
)  # fmt: skip
_ELIDED = {"j": "je", "m": "me", "n": "ne", "t": "te", "l": "le", "d": "de", "s": "se", "c": "ce", "qu": "que"}
_SUFFIXES = frozenset("amam emem amıyorum emiyorum mayacağım meyeceğim amayız emeyiz".split())


def _tables() -> tuple[dict[str, set[str]], dict[str, set[str]], dict[str, set[str]], dict[str, set[str]]]:
    """The groups of whole words, of beginnings, of parts of joined scripts, and of two words that follow each other."""
    whole: dict[str, set[str]] = {}
    beginnings: dict[str, set[str]] = {}
    parts: dict[str, set[str]] = {}
    pairs: dict[str, set[str]] = {}
    for group, words in _WORDS.items():
        for word in words.split():
            entry = word.rstrip("*").replace("_", " ")
            if _is_joined(entry[0]) and (len(entry) > 2 or entry[0] > "\u0980"):
                table, entry = parts, entry.replace(" ", "")  # short words of Arabic and Hindi are parts of many others
            elif " " in entry:
                table = pairs
            else:
                table = beginnings if word.endswith("*") else whole
            table.setdefault(entry, set()).add(group)
    return whole, beginnings, parts, pairs


def _is_joined(char: str) -> bool:
    return any(first <= char <= last for first, last in _JOINED)


_WHOLE, _BEGINNINGS, _PARTS, _PAIRS = _tables()


def groups_of(words: list[str]) -> set[str]:
    """The groups of the words of one sentence, as ``request_words.words_of`` returns them."""
    found: set[str] = set()
    joined: list[str] = []
    before = ""
    for word in _without_elision(words):
        found |= _WHOLE.get(word, set())
        found |= _PAIRS.get(f"{before} {word}", set())
        if _is_joined(word[0]):
            joined.append(word)
        else:
            for end in range(2, len(word) + 1):
                found |= _BEGINNINGS.get(word[:end], set())
            if not word.isascii() or word[-1] == "m":
                found |= {"negation"} if any(word.endswith(suffix) for suffix in _SUFFIXES) else set()
        before = word
    for part in _parts(joined):
        found |= _PARTS.get(part, set())
    return found


def _without_elision(words: list[str]) -> Iterator[str]:
    """The words, those of French and Italian that are elided ("j'aide", "n'est") as two."""
    for word in words:
        head, _, tail = word.partition("'")
        if tail and head in _ELIDED:
            yield _ELIDED[head]
            yield tail
        else:
            yield word


def _parts(joined: list[str]) -> Iterator[str]:
    """All short parts of words of joined scripts; single characters form one text."""
    text = "".join(word if len(word) == 1 else f" {word} " for word in joined)
    for start in range(len(text)):
        for end in range(start + 1, min(start + _LONGEST, len(text)) + 1):
            yield text[start:end]
