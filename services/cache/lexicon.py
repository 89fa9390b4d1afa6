"""English word lists of the lexical guard: data only."""

from __future__ import annotations

NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty".split()
    )
} | {
    "thirty": "30", "forty": "40", "fifty": "50", "sixty": "60", "seventy": "70", "eighty": "80",
    "ninety": "90", "hundred": "100", "thousand": "1000", "million": "1000000",
    "billion": "1000000000", "trillion": "1000000000000", "dozen": "12", "half": "1/2",
    "quarter": "1/4", "twice": "x2", "double": "x2", "triple": "x3", "couple": "2",
    "first": "1st", "second": "2nd", "third": "3rd", "fourth": "4th", "fifth": "5th",
    "sixth": "6th", "seventh": "7th", "eighth": "8th", "ninth": "9th", "tenth": "10th",
}  # fmt: skip
# Between numbers only: elsewhere these are ordinary words.
OPERATORS = {
    "+": "+", "plus": "+", "add": "+", "added": "+", "-": "-", "−": "-", "–": "-", "minus": "-",
    "*": "*", "×": "*", "·": "*", "x": "*", "times": "*", "multiplied": "*", "/": "/", "÷": "/",
    "divided": "/", "over": "/", "^": "^", "**": "^", "%": "%", "percent": "%", "mod": "mod",
    "modulo": "mod", "power": "^", "=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=",
}  # fmt: skip

CONTRACTIONS = {
    "what's": "what is", "who's": "who is", "where's": "where is", "when's": "when is",
    "how's": "how is", "that's": "that is", "there's": "there is", "it's": "it is",
    "he's": "he is", "she's": "she is", "let's": "let us", "i'm": "i am", "you're": "you are",
    "we're": "we are", "they're": "they are", "can't": "can not", "cannot": "can not",
    "won't": "will not", "shan't": "shall not", "ain't": "is not", "whats": "what is",
    "wheres": "where is", "whos": "who is", "dont": "do not", "doesnt": "does not",
    "cant": "can not", "isnt": "is not",
}  # fmt: skip
CONTRACTION_ENDS = (
    ("n't", " not"),
    ("'re", " are"),
    ("'ve", " have"),
    ("'ll", " will"),
    ("'d", " would"),
)

# How a question is put, not what it asks: taken off before embedding and comparing.
CARRIERS = (
    r"(?:hi|hello|hey|good (?:morning|evening|afternoon))(?: there)?\b[\s,.!]*",
    r"(?:please|pls|kindly|ok|okay|so|well|quick question|thanks|thank you)\b[\s,.:!-]*",
    r"(?:(?:can|could|would|will) you|i(?: would|'d) like you to|i want you to|i need you to)\s+"
    r"(?:please |kindly )?(?=(?:tell|say|explain|give|show|describe|name|define|help|remind)\b)",
    r"(?:tell|give|show|remind) (?:me|us)\s+(?:please\s+)?(?=(?:what|which|who|where|when|why|how|the)\b)",
    r"(?:tell|give) (?:me|us) (?=(?!about\b)\w+)",
    r"(?:do|would|might) you (?:know|happen to know)\s+(?=(?:what|which|who|where|when|why|how|the)\b)",
    r"i (?:want|need|wish|would like|'d like) to (?:know|find out|understand|ask)\s+"
    r"(?=(?:what|which|who|where|when|why|how|the)\b)",
    r"i(?: am|'m|was|'ve been)? (?:just )?(?:wonder(?:ing)?|curious)(?: about)?\s*,?\s*(?=(?:what|which|who|where|when|why|how|the)\b)",
    r"(?:may|can|could) i ask\s+(?=(?:what|which|who|where|when|why|how)\b)",
)
CODAS = (r"[\s,]*\b(?:please|pls|thanks|thank you|thx|kindly)\b[\s.!?]*$", r"[\s.!?]+$")

NEGATORS = frozenset(
    "not no never none nobody nothing nowhere neither nor without hardly scarcely barely seldom "
    "rarely unless except cannot fail fails failed lack lacks lacking impossible prevent prevents "
    "avoid avoids stop stops refuse refuses deny denies".split()
)
NEGATIVE_PREFIXES = ("un", "in", "im", "il", "ir", "non", "dis", "de", "anti", "mis", "a")
NEGATIVE_SUFFIX_PAIRS = (("ful", "less"),)

ANTONYMS = frozenset(
    frozenset(pair.split("/"))
    for pair in (
        "safe/dangerous safe/unsafe good/bad good/evil best/worst better/worse big/small large/small "
        "big/little long/short tall/short high/low higher/lower highest/lowest hot/cold warm/cool "
        "warm/cold fast/slow quick/slow quickly/slowly rapid/slow early/late earlier/later old/new old/young ancient/modern "
        "first/last latest/earliest open/close open/shut opened/closed start/stop start/end start/finish begin/end begin/stop "
        "buy/sell lend/borrow rent/own give/take send/receive push/pull enter/exit enter/leave "
        "arrive/depart arrive/leave come/go win/lose pass/fail accept/reject accept/refuse allow/forbid "
        "allow/deny allow/block permit/forbid enable/disable include/exclude import/export input/output upload/download "
        "encrypt/decrypt encode/decode compress/decompress zip/unzip install/uninstall install/remove "
        "add/remove add/subtract add/delete insert/delete create/destroy create/delete build/destroy multiply/divide increase/decrease "
        "increase/reduce raise/lower rise/fall grow/shrink gain/lose maximum/minimum max/min "
        "maximize/minimize more/less more/fewer most/least many/few much/little all/none always/never "
        "often/rarely everything/nothing everyone/nobody with/without on/off in/out up/down above/below "
        "over/under before/after left/right north/south east/west northern/southern eastern/western "
        "top/bottom front/back inside/outside indoor/outdoor indoors/outdoors near/far ahead/behind true/false "
        "right/wrong correct/incorrect yes/no legal/illegal moral/immoral possible/impossible "
        "positive/negative plus/minus black/white light/dark light/heavy bright/dark day/night "
        "morning/evening man/woman men/women boy/girl male/female father/mother brother/sister "
        "husband/wife son/daughter king/queen he/she his/her him/her uncle/aunt alive/dead live/die life/death born/dead "
        "love/hate like/dislike happy/sad rich/poor expensive/cheap strong/weak hard/soft hard/easy "
        "difficult/easy simple/complex simple/complicated full/empty wet/dry clean/dirty thick/thin wide/narrow deep/shallow "
        "rough/smooth sharp/blunt loud/quiet noisy/quiet public/private internal/external major/minor "
        "majority/minority single/married guilty/innocent healthy/sick healthy/unhealthy ill/well asleep/awake sit/stand "
        "sitting/standing rising/falling ascending/descending ascend/descend horizontal/vertical advantage/disadvantage advantages/disadvantages "
        "pro/con pros/cons benefit/drawback benefits/drawbacks benefit/risk benefits/risks cause/effect causes/effects "
        "question/answer teacher/student doctor/patient buyer/seller employer/employee parent/child "
        "client/server host/guest cat/dog attack/defend attack/defense friend/enemy peace/war "
        "success/failure strength/weakness strengths/weaknesses profit/loss income/expense debit/credit asset/liability assets/liabilities "
        "optimist/pessimist freeze/melt freeze/boil boil/freeze melt/freeze lock/unlock tie/untie "
        "wrap/unwrap load/unload plug/unplug connect/disconnect appear/disappear agree/disagree approve/disapprove "
        "approve/reject remember/forget show/hide follow/lead catch/throw find/lose laugh/cry smile/frown "
        "odd/even prime/composite past/future old/recent previous/next summer/winter spring/autumn "
        "sunrise/sunset synonym/antonym singular/plural active/passive acid/base cation/anion "
        "proton/electron conductor/insulator solid/liquid liquid/gas mutable/immutable sync/async synchronous/asynchronous "
        "static/dynamic local/global local/remote push/pop head/tail row/column rows/columns horizontal/vertical width/height "
        "encoder/decoder supervised/unsupervised overfit/underfit overfitting/underfitting forward/backward "
        "major/minor hire/fire employ/dismiss attach/detach mount/unmount subscribe/unsubscribe follow/unfollow "
        "walk/run running/walking stand/lie empty/filling fill/empty climb/descend jump/sit"
    ).split()
)

SYNONYMS = (
    "big large huge", "small little tiny", "begin start commence", "end finish", "buy purchase",
    "fast quick rapid speedy", "quickly fast rapidly", "fix repair mend", "child kid", "children kids",
    "film movie", "car automobile", "city town", "photo photograph picture", "phone telephone",
    "sofa couch", "shop store", "show display", "pick choose select", "delete remove erase",
    "make create build produce", "help assist", "happen occur", "get obtain", "need require",
    "use utilize utilise", "error mistake", "answer reply", "ask inquire", "difficult hard",
    "easy simple", "near close nearby", "speak talk", "forest woods", "stone rock", "sea ocean",
    "man guy gentleman", "woman lady", "boy lad", "person someone somebody individual", "people persons",
    "road street", "boat ship", "rabbit bunny", "dog canine", "cat feline kitty", "puppy pup",
    "cut slice chop", "jump leap hop", "run jog", "large giant", "below under beneath", "above over",
    "meaning mean define definition", "usa us america", "uk britain", "aircraft airplane plane", "bike bicycle",
    "author writer writer wrote write written", "invent inventor invented", "discover discoverer found",
    "tv television", "doctor physician", "lawyer attorney", "job occupation profession", "rich wealthy",
    "sick ill", "famous well-known", "important essential key", "reason cause why", "method way approach",
    "difference differ distinguish", "advantage benefit", "drawback disadvantage downside", "grass lawn",
    "instrument", "cook prepare", "perform", "skateboard skate", "motorcycle motorbike", "near beside next",
    "color colour", "center centre", "favorite favourite", "behavior behaviour", "gray grey", "meter metre",
    "liter litre", "theater theatre", "program programme", "tall high height", "old age", "heavy weigh weight",
    "far distance", "long length", "deep depth", "wide width", "hot temperature", "largest biggest",
    "smallest littlest", "highest tallest", "located location situated where", "kind type sort",
    "works work", "steps step", "explain describe",
)  # fmt: skip

# Function words, and words that add nothing to a question: they may be on one side alone.
FILLERS = frozenset(
    "a an the this that these those of is are am be been being was were do does did doing done have has had "
    "having will would shall can could may might must should to in on at by for from with about as "
    "into onto and or if then than so such it its there here i me we us you your one ones s "
    "what which who whom whose where when why how tell give name say please just exactly actually really "
    "basically simply called known know there's get got also very some any us let like "
    "answer question quickly information info explain describe define definition mean meaning means "
    "thing things something stuff go going someone somebody their them they "
    "type kind sort way ways".split()
)
# One may stand on one side alone beside a word of the same kind: "the capital (city) of France".
LOOSE = frozenset(
    "city country person people man word term concept number name value amount".split()
)

# Which way a word faces: "flights to Paris" are not "flights from Paris".
DIRECTIONS = {
    "from": "from", "to": "to", "into": "to", "onto": "to", "towards": "to", "toward": "to",
    "by": "by", "than": "than", "before": "before", "after": "after", "until": "until", "till": "until",
    "since": "since", "without": "without", "against": "against", "above": "above", "over": "over",
    "below": "below", "under": "below", "beneath": "below", "through": "through", "behind": "behind",
    "inside": "inside", "outside": "outside", "between": "between", "versus": "vs", "vs": "vs",
    "of": "of", "in": "in", "on": "on", "at": "in", "for": "for", "with": "with", "about": "about",
    "as": "as", "off": "off", "up": "up", "down": "down", "near": "near", "during": "in",
}  # fmt: skip
# These change who does what to whom wherever they differ; the others only where words swap places.
STRONG_DIRECTIONS = frozenset(
    "from than before after until since without against above below off behind inside outside".split()
)
# Before `to`: it opens an infinitive, not a direction.
INFINITIVE_LEADS = frozenset(
    "how want wants wanted need needs needed like able have has had going way ways try trying tries used where when "
    "what best steps step easiest possible easy hard difficult it required ought me us you order safe "
    "important necessary time ready allowed legal good bad better".split()
)
PAST = frozenset("was were did had".split())
PRESENT = frozenset("is are am do does has have".split())
IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "kids": "kid", "people": "person", "feet": "foot",
    "teeth": "tooth", "mice": "mouse", "geese": "goose", "lives": "life", "wives": "wife",
    "went": "go", "gone": "go", "ran": "run", "wrote": "write", "written": "write", "made": "make",
    "built": "build", "found": "find", "founded": "found", "bought": "buy", "sold": "sell", "won": "win", "lost": "lose",
    "began": "begin", "begun": "begin", "ate": "eat", "eaten": "eat", "drank": "drink", "drove": "drive", "driven": "drive",
    "gave": "give", "given": "give", "took": "take", "taken": "take", "came": "come", "saw": "see", "seen": "see",
    "said": "say", "told": "tell", "thought": "think", "taught": "teach", "caught": "catch", "sang": "sing", "sung": "sing",
    "swam": "swim", "lying": "lie", "lay": "lie", "sat": "sit", "stood": "stand", "held": "hold", "kept": "keep",
    "left": "left", "led": "lead", "read": "read", "cut": "cut", "cutting": "cut", "known": "know", "knew": "know",
    "grew": "grow", "grown": "grow", "fell": "fall", "fallen": "fall", "rode": "ride", "ridden": "ride",
    "spoke": "speak", "spoken": "speak", "broke": "break", "broken": "break", "chose": "choose", "chosen": "choose",
    "threw": "throw", "thrown": "throw", "flew": "fly", "flown": "fly", "wore": "wear", "worn": "wear",
    "died": "die", "dying": "die", "tying": "tie", "cities": "city", "countries": "country", "does": "do", "goes": "go",
    "means": "mean", "news": "news", "series": "series", "species": "species", "physics": "physics", "mathematics": "math",
    "maths": "math", "this": "this", "his": "his", "its": "its", "is": "is", "was": "was", "has": "has", "as": "as",
}  # fmt: skip
