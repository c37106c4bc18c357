"""Accuracy and speed of the OCR reward by picture size, on signs whose words are known.

    python -m benchmarks.ocr [--count 100] [--processes 2]

Random words of 1 to 4 letters (no I, O, Q, G, W), dark on a white plaque across the middle third,
in Pillow's font; Chinese words of 1 to 4 characters in OpenCV's. "known box" reads the plaque,
"looked for" finds the text first. Times are CPU milliseconds a picture, with one thread, after a
warm-up; the last table is pictures a second of wall time when processes share the work.
"""

import argparse
import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rewards.ocr import ocr

SIDES = (32, 48, 64, 128, 256, 512)
LETTERS = "ABCDEFHJKLMNPRSTUVXYZ"
CHARACTERS = "出入口上下左右中大小开关停车场你好图书馆学校医院银行公园电影水火山"
MIDDLE = (0, 1 / 3, 1, 2 / 3)


def words(alphabet: str, count: int, seed: int) -> list[str]:
    """Return `count` random words of 1, 2, 3, 4, 1, ... characters."""
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=1 + i % 4)) for i in range(count)]


def plaque(side: int) -> Image.Image:
    picture = Image.new("RGB", (side, side), (150, 160, 170))
    ImageDraw.Draw(picture).rectangle((0, side / 3, side, 2 * side / 3), fill=(250, 250, 250))
    return picture


def latin_sign(word: str, side: int) -> Image.Image:
    picture = plaque(side)
    font = ImageFont.load_default(size=side * 0.27)
    ImageDraw.Draw(picture).text((side / 2, side / 2), word, (24, 24, 28), font=font, anchor="mm")
    return picture


def chinese_sign(word: str, side: int) -> Image.Image:
    """Drawn at 512 pixels and reduced, because OpenCV's letters come in whole pixels."""
    pixels = np.asarray(plaque(512)).copy()
    size = 120
    font = cv2.FontFace("uni")
    left, top, width, height = cv2.getTextSize((512, 512), word, (0, 0), font, size)
    place = (256 - width // 2 - left, 256 - height // 2 - top)
    cv2.putText(pixels, word, place, (28, 24, 24), font, size)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)


SCRIPTS = {"Latin": (LETTERS, latin_sign), "Chinese": (CHARACTERS, chinese_sign)}


def measure(script: str, side: int, box, count: int) -> tuple[float, float]:
    """Return the share of words read right and CPU milliseconds a picture."""
    alphabet, sign = SCRIPTS[script]
    truth = words(alphabet, count, side)
    pictures = [sign(word, side) for word in truth]
    prompts = [f'"{word}"' for word in truth]
    ocr(pictures[:4], prompts[:4], box=box)
    start = time.process_time()
    scores = ocr(pictures, prompts, box=box)
    seconds = time.process_time() - start
    return sum(s.details["exact"] for s in scores) / count, 1000 * seconds / count


def read_chunk(truth: list[str], side: int) -> int:
    ocr([latin_sign(word, side) for word in truth], [f'"{word}"' for word in truth])
    return len(truth)


def throughput(processes: int, count: int, side: int = 128) -> float:
    """Return pictures a second of wall time, text looked for, in chunks of 8."""
    truth = words(LETTERS, count, 0)
    chunks = [truth[i : i + 8] for i in range(0, count, 8)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        list(pool.map(partial(read_chunk, side=side), [truth[:2]] * 2 * processes))  # warm up
        start = time.perf_counter()
        list(pool.map(partial(read_chunk, side=side), chunks))
        return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    print("| script | picture | words right, known box | ms | words right, looked for | ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for script in SCRIPTS:
        for side in SIDES:
            known, known_ms = measure(script, side, MIDDLE, args.count)
            found, found_ms = measure(script, side, None, args.count)
            print(
                f"| {script} | {side} px | {known:.1%} | {known_ms:.0f} "
                f"| {found:.1%} | {found_ms:.0f} |",
                flush=True,
            )
    print("\n| processes | pictures/s |\n| --- | --- |")
    for processes in range(1, args.processes + 1):
        print(f"| {processes} | {throughput(processes, args.count):.1f} |", flush=True)


if __name__ == "__main__":
    main()
