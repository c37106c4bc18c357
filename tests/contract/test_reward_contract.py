"""What every reward must do, whatever it measures: shipped ones and the example alike."""

import json
import socket
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image
from tiny_preference import save_aesthetic_head, save_image_reward, save_pick_score

from rewards import list_rewards, plugins
from rewards.checks import synthetic_pictures, try_rewards
from rewards.runner import RewardRunner, RewardSpec
from rewards.serving import build_app

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_reward"
CIRCLE = [{"class": "circle", "count": 1}]
RECORD = {
    "prompt": 'a circle and a sign that says "CAB"',
    "prompt_id": "1",
    "metadata": {"tag": "single_object", "include": CIRCLE, "add": CIRCLE},
    "source": Image.new("RGB", (64, 64), "white"),
}
NAMES = [
    "geneval", "ocr", "consistency", "clip_score", "hps_v2", "pick_score", "image_reward",
    "aesthetic", "remote", "vlm_judge", "yes_no",
]  # fmt: skip
WARMTH = f"{EXAMPLE}/warmth.py:warmth"


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint whose answer depends on the request alone."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        chance = zlib.crc32(body)
        answer = json.dumps({"score": chance % 11, "answer": "yes" if chance % 2 else "no"})
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}}
        data = json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def served():
    """GenEval behind HTTP."""
    with RewardRunner([RewardSpec("geneval")]) as runner:
        config = uvicorn.Config(build_app(runner), log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        listening = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def weights(tiny_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_pick_score(folder)
    save_aesthetic_head(folder / "head.pth")
    save_image_reward(folder)
    return folder, tiny_clip


@pytest.fixture(params=[*NAMES, WARMTH], ids=lambda use: use.rpartition(":")[2])
def spec(request):
    """A built-in reward, or the example, with what it needs on this machine."""
    name = request.param
    if name in ("clip_score", "hps_v2", "pick_score", "image_reward", "aesthetic"):
        folder, clip = request.getfixturevalue("weights")
        args = {
            "aesthetic": {**clip, "head": f"{folder}/head.pth"},
            "pick_score": {"weights": f"{folder}/weights", "processor": f"{folder}/processor"},
            "image_reward": {
                "weights": f"{folder}/ImageReward.pt", "tokenizer": f"{folder}/tokenizer"
            },
        }.get(name, clip)  # fmt: skip
    elif name == "remote":
        args = {"servers": [request.getfixturevalue("served")]}
    elif name in ("vlm_judge", "yes_no"):
        args = {"base_url": request.getfixturevalue("judge"), "model": "m"}
    else:
        args = {"box": [0, 0.25, 1, 0.75]} if name == "ocr" else {}
    return RewardSpec(name, args=args)


def test_all_built_in_rewards_are_tested_here():
    assert set(NAMES) == plugins._BUILT_IN.keys()
    assert set(NAMES) <= set(list_rewards())


def test_synthetic_pictures_get_numbers(spec):
    [trial] = try_rewards([spec], [RECORD])
    assert trial.problems == ()
    assert len(trial.scores) == 4


def test_scores_do_not_depend_on_batch_neighbours_or_order_and_inputs_stay_as_they_were(spec):
    pictures = [*synthetic_pictures(), Image.new("RGB", (48, 48), "red")]
    before = [np.asarray(picture).copy() for picture in pictures]
    prompts = [RECORD["prompt"]] * 5
    columns = {key: [RECORD[key]] * 5 for key in ("metadata", "source")}

    def totals(images, batch_size):
        with RewardRunner([spec], batch_size=batch_size) as runner:
            return [s.total for s in runner.score(images, prompts, columns)]

    together = totals(pictures, 32)
    assert None not in together
    assert totals(pictures, 1) == pytest.approx(together, rel=1e-4)
    assert totals(pictures[::-1], 2) == pytest.approx(together[::-1], rel=1e-4)
    for picture, pixels in zip(pictures, before, strict=True):
        assert np.array_equal(np.asarray(picture), pixels)


def test_the_example_scores_warm_colors_higher():
    colors = [(255, 0, 0), (128, 128, 128), (0, 0, 255), (255, 128, 127)]
    pictures = [Image.new("RGB", (8, 8), color) for color in colors]
    spec = RewardSpec(f"{EXAMPLE}/warmth.py:warmth", args={"target": 1.0})
    with RewardRunner([spec]) as runner:
        scored = runner.score(pictures, [""] * 4)
    # 1 - |mean red - mean blue - 1|
    assert [s.parts["warmth"] for s in scored] == pytest.approx([1.0, 0.0, -1.0, 128 / 255])


def test_the_examples_recipe_is_valid_and_its_rewards_run():
    from recipes import load_recipe
    from recipes.locate import located

    loaded = load_recipe(EXAMPLE / "recipe.yaml")
    functions = located(loaded.recipe, loaded.files).rewards.functions
    specs = [RewardSpec(f.use, f.weight, f.args, f.timeout_s) for f in functions]
    assert [trial.problems for trial in try_rewards(specs, [RECORD])] == [(), ()]
