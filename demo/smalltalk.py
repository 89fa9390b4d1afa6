"""Owns chit-chat: greetings, thanks, questions about the model itself. One fixed answer each."""

from __future__ import annotations

from demo.intents import Fact, Intent


def _chat(answer: str, held_out: str, trained: str, weight: float = 1.0) -> Intent:
    """Patterns one per line: chit-chat has no slots, so only the wordings differ."""
    return Intent(
        "small talk",
        trained=tuple(line.strip() for line in trained.strip().splitlines()),
        held_out=tuple(line.strip() for line in held_out.strip().splitlines()),
        facts=(Fact({}, answer),),
        weight=weight,
    )


def smalltalk_intents() -> list[Intent]:
    """Every intent that is not about a fact."""
    return [*_MANNERS, *_SELF]


_MANNERS = [
    _chat(
        "Hello! How can I help you?",
        held_out="""hello to you
                good evening my friend
                hi to everyone
                hey, good morning!""",
        trained="""(hello|hi|hey|hiya|howdy|greetings|yo|hallo)(!|.|)
                (hello|hi|hey) (there|again|friend|you|bot|model|infermesh|everyone|all)(!|)
                good (morning|afternoon|evening|day)(!|)
                good (morning|afternoon|evening) (to you|there|everyone)
                (hello|hi|hey)(, | )(hello|hi|hey)!
                (hello|hi|hey), good (afternoon|evening|day)
                (hello|hi) my friend
                (hello|hi), (world|is anyone there|anybody here|are you there)(?|)
                (i just want|i wanted) to say (hello|hi)
                (what's up|sup)(?|)
                nice to meet you
                pleased to meet you""",
        weight=1.6,
    ),
    _chat(
        "I am fine, thank you. How can I help you?",
        held_out="""how are you doing these days?
                are you fine today?
                how is it going with you?""",
        trained="""how are you( today| doing| doing today| feeling| now|)?
                how (is|are) (it|things|everything) going( today|)?
                how do you (do|feel)( today|)?
                are you (well|ok|okay|fine|good|all right)?
                how have you been( lately|)?
                (hi|hello|hey), how are you( today| doing|)?
                how's (it going|life|everything|your day)?
                how is (life|everything|your day|it going)( today|)?
                i hope you are (well|fine|ok)""",
    ),
    _chat(
        "You are welcome!",
        held_out="""thanks for all of that
                thank you so very much
                many thanks for the answer""",
        trained="""(thanks|thank you|thx|ty|cheers)(!|.|)
                (thanks|thank you) (a lot|so much|very much|again|much|kindly|friend)(!|)
                (thanks|thank you) for (your help|the help|that|this|everything|helping|your answer)
                (many thanks|much appreciated|i appreciate it)
                many thanks for (your help|that|this)
                (great|perfect|good|nice|ok|cool), (thanks|thank you)(!|)
                (that was helpful|very helpful|that helped)(, thanks|)
                thank you for all (the help|your help)
                i (want|would like) to thank you""",
    ),
    _chat(
        "Goodbye! Come back any time.",
        held_out="""bye bye, have a nice evening
                ok goodbye then
                see you later, friend""",
        trained="""(bye|goodbye|bye bye|good bye|farewell|cya|ciao)(!|.|)
                see you( later| soon| tomorrow| again| around|)(!|)
                (i have to|i must|i need to|i've got to) (go|leave)( now|)
                good night(!|)
                have a (nice|good|great) (day|evening|night|weekend|one)
                (bye|goodbye)( for now| then| friend|, see you|, take care|, have a nice day)
                (ok|okay), (bye|see you later)
                take care(!|)
                that is all( for today| for now|)(, bye|)
                until (next time|tomorrow|later)
                talk to you (later|soon)""",
    ),
    _chat(
        "Glad to hear that. What else would you like to know?",
        held_out="""wow, good answer
                that is really nice
                this is very good work""",
        trained="""(ok|okay|cool|nice|great|good|fine|awesome|wow|perfect|right|alright)(!|.|)
                (good|great|nice|very good|excellent) (job|work|answer)(!|)
                (that|this) is (nice|great|good|correct|right|cool|very good|awesome)
                that's (nice|great|good|correct|right|cool|awesome)
                (well done|i like it|i see|got it|makes sense|sounds good)
                you are (great|good|smart|right|helpful|awesome|nice)
                wow, (nice|great|that is good|cool)
                (correct|exactly|yes, that is right)""",
    ),
    _chat(
        "No problem at all.",
        held_out="""sorry for the mistake
                I am so sorry about this""",
        trained="""(sorry|oops|my bad|apologies|pardon|excuse me)(!|.|)
                (i am|i'm) (so |very |really |)sorry
                (sorry|i apologize) (about|for) (that|the trouble|my mistake|the confusion|this)
                (i am|i'm) sorry (about|for) (that|the trouble|my mistake)
                please (forgive|excuse) me
                i made a mistake(, sorry|)""",
        weight=0.7,
    ),
]


_SELF = [
    _chat(
        "I am the infermesh demo model, a small language model that runs on any laptop.",
        held_out="""could you tell me who you are?
                what exactly are you?
                who is it that I am talking with?
                do you have some name?""",
        trained="""who are you(?|)
                what are you(?|)
                (what is|what's|tell me|say) your name(?|)
                who am i (talking|speaking|chatting) (to|with)?
                what am i talking to?
                introduce yourself
                (can you|please|could you) introduce yourself
                (please |)(tell me|say something) about yourself
                tell me (who|what) you are
                (what|which) (model|AI|bot|language model|LLM) (are you|is this)?
                what should i call you?
                what kind of (model|AI|bot|assistant) are you?
                do you have a name?
                are you (ChatGPT|GPT|Llama|Qwen|Claude|Gemini)?
                (so |and |)who exactly are you?
                who is (this|there|talking)?
                describe yourself""",
        weight=1.6,
    ),
    _chat(
        "I was trained from scratch by a script in the infermesh repository, in a few minutes"
        " on a CPU.",
        held_out="""do you know who made you?
                which people created you?
                how have you been trained?""",
        trained="""who (made|created|built|trained|wrote|developed|programmed) you?
                (who is|who's) your (creator|maker|author|developer)?
                how were you (made|trained|created|built)?
                where (do you come|are you) from?
                (by whom|when) were you (made|trained|created|built)?
                what were you trained on?
                who (are the people|is the person) (who|that) (made|created|trained) you?
                tell me (who|how they) (made|created|trained) you
                which company (made|created|trained|built) you?""",
    ),
    _chat(
        "I know capitals, small sums, colours, days and months, and the terms of model"
        " serving. I can also count.",
        held_out="""could you tell me what you can do?
                which topics do you know?
                what may I ask you?
                how could you help me?""",
        trained="""what can you do( for me|)?
                what do you know( about|)?
                what (can|could|should) i ask( you|)?
                how can you help( me|)?
                what (topics|things|subjects) (do you know|can you talk about|can i ask about)?
                what are you (good at|good for|able to do|for)?
                help( me|)(!|?|)
                (i need|can i get) (some |)help
                what are your (skills|abilities|capabilities|topics)?
                tell me what you (know|can do)
                (list|show me|tell me) your (skills|abilities|capabilities|topics)
                can you help me?
                which (questions|things) can (you answer|i ask)?
                which (subjects|things) do you know( about|)?
                what kind of questions can you answer?""",
        weight=1.4,
    ),
    _chat(
        "No, I am a small neural network, not a person.",
        held_out="""so, are you a living human being?
                am I speaking to a human?""",
        trained="""are you (a |)(human|real|person|alive|man|woman|living being)(?|)
                are you (a |)(bot|robot|machine|computer|AI|real person|human being)(?|)
                are you (conscious|sentient)?
                am i (talking|speaking|chatting) (to|with) a (person|robot|machine|real human|bot)?
                is this a (human|person|bot|robot|real person)?
                do you have (feelings|a body|a soul|emotions)?
                (so |)you are (a robot|not human|a machine), right?""",
    ),
    _chat(
        "I have about four million parameters, which is very small for a language model.",
        held_out="""what number of parameters do you have?
                tell me how big you are""",
        trained="""how (big|large|small) (are you|is this model|is the model)?
                how many (parameters|weights) (do you have|are in you|does this model have)?
                what (is|'s) your size?
                how many parameters?
                what is the size of (you|this model|your network)?
                what is the number of your (parameters|weights)?
                your (parameter count|size|number of parameters)?""",
        weight=0.8,
    ),
    _chat(
        "Why did the token wait? It was stuck in the middle of a batch.",
        held_out="""do you know a funny joke?
                let me hear a joke""",
        trained="""(tell|give) me (a|another|one more|some) (joke|funny joke|good joke|jokes)
                (do you know|know) (a|any|some) (joke|jokes)?
                make me laugh
                (a joke|joke)(, please|)
                (say|tell me) something funny
                can you (tell|make) (me |)a joke?
                i want to hear a joke""",
        weight=0.8,
    ),
]
