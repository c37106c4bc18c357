"""What the suites share that ask a policy questions about pictures."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

LETTERS = "ABCDEFGHIJ"
SHORT = "Answer with a single word or phrase."
ONE_LETTER = "Answer with the letter of the right choice."
OWN_WORDS = "what is asked of the policy beside the question is in our own words"


def with_choices(question: str, choices: Sequence[str]) -> str:
    """Return the text of a multiple-choice question: each choice on a line behind its letter."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *lines, ONE_LETTER])


def parse_choice(answer: str, choices: Sequence[str]) -> str | None:
    """Return the letter that an answer means, by MMMU's rules; None if it means none.

    In turn: letters in brackets, letters that stand alone, letters before a full stop, and, in
    answers of more than five words, the text of a choice. Of several the last one in the answer
    counts. Source: MMMU-Benchmark/MMMU, eval/utils/eval_utils.py.
    """
    text = answer
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[: len(choices)]
    for form in ("({})", " {} ", "{}."):
        places = {letter: text.rfind(form.format(letter)) for letter in letters}
        if max(places.values()) >= 0:
            return max(places, key=places.__getitem__)
    if len(text.split()) <= 5:
        return None
    lower = text.lower()
    places = {x: lower.rfind(choice.lower()) for x, choice in zip(letters, choices, strict=True)}
    return max(places, key=places.__getitem__) if max(places.values()) >= 0 else None


# --- short answers, as VQA counts them ------------------------------------------------------------

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_ARTICLES = ("a", "an", "the")
_CONTRACTED = re.split(
    r"\s+",
    """\
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""",
)
_WITHOUT_APOSTROPHE = {
    word[: match.start()] + word[match.end() :]: word
    for word in _CONTRACTED
    for match in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}


def vqa_normal(answer: str) -> str:
    """Return an answer as VQA's evaluation compares it: lower case, no articles, digits, ...

    Source: the answer processor of EvalAI, as TextVQA's evaluation has it (Singh et al. 2019).
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    bare = text
    for mark in _MARKS:
        apart = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if apart else " ")
    bare = re.sub(r"\.(?!\d)", "", bare)
    words = [_NUMBERS.get(word, word) for word in bare.split()]
    return " ".join(_WITHOUT_APOSTROPHE.get(w, w) for w in words if w not in _ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Return how far an answer agrees with those of people (ten in the published sets), 0 to 1.

    Against nine of the ten at a time it is min(matches / 3, 1); the ten results are averaged.
    """
    said = vqa_normal(answer)
    same = [vqa_normal(other) == said for other in people]
    return sum(min((sum(same) - own) / 3, 1.0) for own in same) / len(people)


# --- open answers, as MMMU counts them ------------------------------------------------------------

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBER_FORMS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_open(answer: str, right: Sequence[str]) -> bool:
    """Return whether an open answer is right by MMMU's rules.

    What follows the last "is ", "answer ", ... of each line is looked at, with the numbers in it:
    a number has to equal a right one to two decimals, a right text has to be contained.
    """
    wanted = [form for text in right for form in _mmmu_normal(text)]
    for said in _mmmu_said(answer):
        for form in _mmmu_normal(said):
            if isinstance(form, float):
                if form in wanted:
                    return True
            elif any(isinstance(text, str) and text in form for text in wanted):
                return True
    return False


def _mmmu_said(answer: str) -> list[str]:
    lines = answer.strip().strip(".").lower().split("\n")
    keys = []
    for number, line in enumerate(lines):
        indicators = [*_INDICATORS, "="] if number == len(lines) - 1 else _INDICATORS
        shortest = ""
        for rest in (line.split(word)[-1].strip() for word in indicators if word in line):
            if not shortest or len(rest) < len(shortest):  # so an empty one gives way to the next
                shortest = rest
        if shortest not in ("", *":,.!?;'"):
            keys.append(shortest)
    keys = keys or [answer.strip().strip(".").lower()]
    return keys + [n for key in keys for form in _NUMBER_FORMS for n in re.findall(form, key)]


def _mmmu_normal(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def overall_and_tasks(samples: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """Return the mean over questions and that of each task, times 100."""
    values = [sample["values"][metric] for sample in samples]
    told = {"overall": 100 * sum(values) / len(values)}
    for task in dict.fromkeys(sample["task"] for sample in samples):
        own = [sample["values"][metric] for sample in samples if sample["task"] == task]
        told[task] = 100 * sum(own) / len(own)
    return told
