"""The OCR reward: can the words between the quotation marks be read in the picture? (RapidOCR)

Formula of the published text-rendering reward (BLIP3o-NEXT, after flow_grpo): the recognised text t
and the quoted string q lose their spaces and capitals; d is 0 if q is part of t, else their edit
distance, at most the length of q; the score is 1 - d / len(q).
"""

import re
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from common.errors import RewardError
from rewards.contract import Score
from rewards.plugins import reward

if TYPE_CHECKING:
    from rapidocr import RapidOCR

Box = Sequence[float]
Line = dict[str, Any]

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”|「([^」]*)」|『([^』]*)』')
_LINE_HEIGHT = 48
_LINE_WIDTH = 144
"""Recogniser's input in pixels. Longer lines widen it; RapidOCR's own 320 is slow for a word."""
_MOST_ORDERED = 4
"""Quoted strings that may stand in any order: 4 can in 24, 5 could in 120."""
_ENGINE_LOCK = threading.Lock()


def check_prompt(record: Mapping[str, Any]) -> None:
    """Raise RewardError, naming the record, if it is unclear which text its prompt quotes."""
    if problem := _unclear(str(record.get("prompt", ""))):
        name = record.get("prompt_id") or record.get("prompt")
        raise RewardError(
            f"prompt record `{name}`: the prompt {problem}, so OCR cannot know what to look for. "
            'Fix: put it in quotation marks, as in: a sign that says "CAB".'
        )


@reward(name="ocr", check=check_prompt)
def ocr(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    box: Box | None = None,
    contains: bool = True,
    ignore_case: bool = True,
    ignore_spaces: bool = True,
    min_side: int = 192,
    min_confidence: float = 0.5,
    threads: int = 1,
) -> list[Score]:
    """Return the published score in [0, 1] for each picture; None for a prompt without quotes or
    with an odd number of ".

    With several quoted strings the score is their mean, weighted by length, each taking the better
    of the whole text and its best single line.

    `box` (x0, y0, x1, y1 in fractions of the picture) says where the one line of text stands: it
    is read without looking for text first, which is many times faster. `contains=False` asks that
    the whole text be the quoted strings and nothing else, in any order (more than four: in theirs),
    so that repeating letters or lines does not pay. Smaller pictures are enlarged until their
    shorter side has `min_side` pixels; more finds smaller print and takes longer (RapidOCR's own
    limit is 736). Lines read with less than `min_confidence` are left out. `threads` is for each
    process.

    Details: text, expected (list), exact (the text is the quoted strings and nothing else), lines
    (text, score, and box [left, top, right, bottom] in pixels where it was looked for), size.
    """
    arrays = [_enlarged(image, min_side) for image in images]
    if box is None:
        lines = [_read_page(array, min_confidence, threads) for array in arrays]
    else:
        crops = [_crop(array, box) for array in arrays]
        lines = _read_lines(crops, min_confidence, threads)
    scores = []
    for image, array, prompt, found in zip(images, arrays, prompts, lines, strict=True):
        if problem := _unclear(prompt):
            scores.append(Score(None, f"the prompt `{prompt}` {problem}"))
            continue
        expected = [part for part in quoted_strings(prompt) if part.strip()]
        texts = [normalise(line["text"], ignore_case, ignore_spaces) for line in found]
        wanted = [normalise(part, ignore_case, ignore_spaces) for part in expected]
        value = text_score(texts, wanted, contains)
        raw = " ".join(line["text"] for line in found)
        details = {
            "text": raw,
            "expected": expected,
            "exact": text_score(texts, wanted, contains=False) == 1.0,
            "lines": _in_pixels(found, image.width / array.shape[1]),
            "size": list(image.size),
        }
        told = f"`{raw}`" if raw else "nothing"
        scores.append(Score(value, f"read {told}, expected `{' '.join(expected)}`", details))
    return scores


def quoted_strings(prompt: str) -> list[str]:
    """Return what stands between quotation marks ("", “”, 「」, 『』), in order."""
    return ["".join(groups) for groups in _QUOTED.findall(prompt)]


def _unclear(prompt: str) -> str:
    """Return why it is unclear which text a prompt quotes; "" if it is clear."""
    marks = prompt.count('"')
    if marks > 1 and marks % 2:  # a 12" pizza: what stands between two of them may not be a quote
        return 'has an odd number of "'
    return "" if any(map(str.strip, quoted_strings(prompt))) else "quotes no text"


def normalise(text: str, ignore_case: bool = True, ignore_spaces: bool = True) -> str:
    """Return the text without its spaces and capitals, as the options say."""
    if ignore_spaces:
        text = "".join(text.split())  # the ideographic space too
    return text.lower() if ignore_case else text


def text_score(lines: Sequence[str], wanted: Sequence[str], contains: bool = True) -> float:
    """Return the formula's score for lines in reading order; all strings already normalised.

    `wanted` holds one or more strings that are not empty.
    """
    whole, total = "".join(lines), sum(map(len, wanted))
    if not contains:
        orders = permutations(wanted) if len(wanted) <= _MOST_ORDERED else [tuple(wanted)]
        return 1 - min(_distance(whole, text) for text in map("".join, {*orders})) / total
    candidates = [whole] if len(wanted) == 1 else [whole, *lines]
    missing = sum(
        min(0 if part in text else _distance(text, part) for text in candidates) for part in wanted
    )
    return (total - missing) / total


def _distance(text: str, part: str) -> int:
    return min(edit_distance(text, part), len(part))


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: insertions, deletions and substitutions cost 1."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            change = diagonal + (left != right)
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, change)
    return row[-1]


# --- reading -------------------------------------------------------------------------------------


@cache
def _engine(threads: int) -> "RapidOCR":
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.use_cls": False,  # upside-down text is not what was asked for
            "Global.text_score": 0.0,  # filtered here, so that both ways of reading do it alike
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "Det.limit_side_len": 32,  # `min_side` alone decides how far pictures are enlarged
            "Rec.rec_img_shape": [3, _LINE_HEIGHT, _LINE_WIDTH],
        }
    )


def _enlarged(image: Image.Image, min_side: int) -> np.ndarray:
    """Return the picture as BGR uint8 [H, W, 3], its shorter side at least `min_side`."""
    import cv2

    array = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
    scale = min_side / min(array.shape[:2])
    if scale <= 1:
        return array
    size = (round(array.shape[1] * scale), round(array.shape[0] * scale))
    return np.asarray(cv2.resize(array, size, interpolation=cv2.INTER_CUBIC))


def _crop(array: np.ndarray, box: Box) -> np.ndarray:
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise RewardError(
            f"reward `ocr`: box {list(box)} is not a box in fractions of the picture. Fix: write "
            "[left, top, right, bottom], each from 0 to 1."
        )
    height, width = array.shape[:2]
    rows = slice(round(y0 * height), max(round(y1 * height), round(y0 * height) + 1))
    columns = slice(round(x0 * width), max(round(x1 * width), round(x0 * width) + 1))
    return np.ascontiguousarray(array[rows, columns])


def _read_lines(
    crops: Sequence[np.ndarray], min_confidence: float, threads: int
) -> list[list[Line]]:
    """Recognise one line of text in each crop."""
    if not crops:
        return []
    with _ENGINE_LOCK:
        result = _engine(threads).recognize_txt(list(crops))
    pairs = zip(result.txts, result.scores, strict=True)
    return [_kept([(text, score, None)], min_confidence) for text, score in pairs]


def _read_page(array: np.ndarray, min_confidence: float, threads: int) -> list[Line]:
    """Find the pieces of text in a picture and recognise them, in reading order."""
    with _ENGINE_LOCK:
        result = _engine(threads)(array)
    if result.boxes is None or result.txts is None:
        return []
    found = zip(result.txts, result.scores, result.boxes, strict=True)
    return reading_order(_kept(found, min_confidence))


def reading_order(lines: Sequence[Line]) -> list[Line]:
    """Return pieces of text from top to bottom, those side by side from left to right.

    Two pieces are side by side if the middle of one lies within the height of the other. (RapidOCR
    compares upper edges with a fixed 10 pixels, which a tilted line or a large font exceeds.)
    """
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: line["box"][1] + line["box"][3]):
        middle = (line["box"][1] + line["box"][3]) / 2
        if rows and any(item["box"][1] <= middle <= item["box"][3] for item in rows[-1]):
            rows[-1].append(line)
        else:
            rows.append([line])
    return [line for row in rows for line in sorted(row, key=lambda line: line["box"][0])]


def _kept(found: Any, min_confidence: float) -> list[Line]:
    lines = []
    for text, score, corners in found:
        if text.strip() and score >= min_confidence:
            line: Line = {"text": text, "score": round(float(score), 4)}
            if corners is not None:
                line["box"] = [*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist()]
            lines.append(line)
    return lines


def _in_pixels(lines: list[Line], scale: float) -> list[Line]:
    return [
        line | {"box": [round(edge * scale, 2) for edge in line["box"]]} if "box" in line else line
        for line in lines
    ]
