"""The judge against a real HTTP server in this process that answers as it is told."""

import asyncio
import base64
import io
import json
import re

import pytest
from judge_server import Server
from PIL import Image

from common.errors import RewardError
from rewards import load_reward
from rewards.judge_client import Judge, parse_object
from rewards.runner import RewardRunner, RewardSpec


@pytest.fixture
def server():
    running = Server()
    yield running
    running.shutdown()
    running.server_close()


def picture(red):
    return Image.new("RGB", (8, 8), (red, 0, 0))


def judged(server, count=1, **options):
    return asyncio.run(asking(server, count, **options))


def asking(server, count=1, **options):
    function = load_reward("vlm_judge", base_url=server.url, model="judge-7b", **options)
    images = [picture(i) for i in range(count)]
    return function(images, [f"prompt {i}" for i in range(count)])


def test_the_score_is_the_answer_over_the_maximum(server):
    [score] = judged(server)
    assert (score.value, score.reason) == (pytest.approx(0.7), "nearly")
    [sent] = server.requests
    assert (sent["model"], sent["temperature"]) == ("judge-7b", 0.0)
    assert sent["response_format"] == {"type": "json_object"}
    text, image = sent["messages"][0]["content"]
    assert "prompt 0" in text["text"]
    assert "from 0 to 10" in text["text"]
    head, data = image["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) == (0, 0, 0)


def test_a_question_and_a_scale_of_ones_own(server):
    server.say = lambda number: (200, '{"score": 3}')
    [score] = judged(server, question='Rate {prompt} 1-{max_score} as {{"score": n}}', max_score=5)
    assert score.value == pytest.approx(0.6)
    [sent] = server.requests
    assert sent["messages"][0]["content"][0]["text"] == 'Rate prompt 0 1-5 as {"score": n}'


def test_passing_failures_are_repeated(server):
    server.say = lambda number: (429, "slow down") if number < 3 else (200, '{"score": 10}')
    [score] = judged(server)
    assert score.value == 1.0
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("say", "requests", "words"),
    [
        (lambda number: (429, "slow down"), 2, "slow down"),
        (lambda number: (400, "no such model"), 1, "no such model"),
        (lambda number: (200, "I like it."), 2, "no JSON object.*I like it"),
        (lambda number: (200, '{"score": "high"}'), 1, "no number.*high"),
        (lambda number: (200, '{"score": 11}'), 1, "11 is not in 0 to 10"),
        (lambda number: (200, '{"score": NaN}'), 1, "no number"),
        (lambda number: (200, f'{{"score": 1{"0" * 400}}}'), 1, "10000.* is not in 0 to 10"),
        (lambda number: (200, '{"a": ' * 200_000 + "}"), 2, "no JSON object"),
        (lambda number: (200, '{"rating": 3}'), 1, "no number.*None"),
    ],
)
def test_what_cannot_be_scored_is_none_with_the_reason(server, say, requests, words):
    server.say = say
    [score] = judged(server, retries=1)
    assert score.value is None
    assert re.search(words, score.reason), score.reason
    assert len(server.requests) == requests


def test_one_failure_spoils_no_other_picture(server):
    server.say = lambda number: (200, '{"score": 5}')
    runner = RewardRunner(
        [RewardSpec("vlm_judge", args={"base_url": server.url, "model": "m", "retries": 0})]
    )
    with runner:
        scored = runner.score([picture(1), picture(2)], ["a", "b"])
        assert [s.total for s in scored] == [0.5, 0.5]
        server.say = lambda number: (200, "no") if number == 3 else (200, '{"score": 5}')
        scored = runner.score([picture(3), picture(4)], ["c", "d"])
        assert sorted(s.total is None for s in scored) == [False, True]


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("text/html", "<html>Bad gateway</html>", "no answer of a judge: '<html>Bad"),
        ("application/json", "<html>Bad gateway</html>", "did not answer"),
        ("application/json", "{}", "no JSON object"),
        ("application/json", '{"choices": [{"message": null}]}', "no JSON object"),
        ("application/json", '{"choices": [{"message": "x"}]}', "no answer of a judge"),
        ("application/json", '{"choices": [{"message": {"content": 3}}]}', "no answer of a judge"),
    ],
)
def test_a_reply_of_another_form_costs_only_its_own_picture(server, kind, body, words):
    server.whole = lambda number: (kind, body.encode()) if number == 2 else None
    scores = judged(server, 3, retries=0, concurrency=1)
    assert [score.value is None for score in scores] == [False, True, False]
    assert re.search(words, scores[1].reason), scores[1].reason


def test_tokens_that_are_not_told_are_not_counted(server):
    message = {"content": '{"score": 5}', "role": "assistant"}
    usage = {"prompt_tokens": None, "completion_tokens": None}
    reply = json.dumps({"choices": [{"message": message}], "usage": usage})
    server.whole = lambda number: ("application/json", reply.encode())
    [score] = judged(server)
    assert score.value == 0.5
    assert score.details["cost"]["input_tokens"] == 0


def test_a_cache_that_cannot_be_written_costs_no_answer(server, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    scores = judged(server, 2, cache=str(tmp_path / "file"))
    assert [score.value for score in scores] == [pytest.approx(0.7)] * 2
    assert len([r for r in caplog.records if "cannot be kept" in r.message]) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_broken_cached_answer_is_asked_for_again(server, tmp_path, content):
    judged(server, cache=str(tmp_path))
    [file] = tmp_path.glob("*/*.json")
    file.write_bytes(content)
    [score] = judged(server, cache=str(tmp_path))
    assert score.value == pytest.approx(0.7)
    assert len(server.requests) == 2
    assert json.loads(file.read_text()) == {"score": 7, "reason": "nearly"}


def test_one_price_for_two_kinds_of_tokens_is_refused():
    with pytest.raises(RewardError, match=r"usd_per_million is 5.*price of input and of output"):
        Judge("http://127.0.0.1:1/v1", "m", usd_per_million=5)


def test_answers_are_cached(server, tmp_path):
    options = {"cache": str(tmp_path / "cache"), "usd_per_million": [2.0, 8.0]}

    async def twice():
        return await asking(server, 3, **options), await asking(server, 4, **options)

    first, second = asyncio.run(twice())
    assert len(server.requests) == 4
    # 3 requests of 1000 and 50 tokens at 2 and 8 USD a million
    assert first[0].details["cost"]["usd"] == pytest.approx(3 * (0.002 + 0.0004))
    assert [s.value for s in second] == [pytest.approx(0.7)] * 4
    cost = second[0].details["cost"]
    assert (cost["requests"], cost["from_cache"], cost["input_tokens"]) == (4, 3, 4000)
    judged(server, 1, **options, temperature=0.5)  # another question to the cache
    assert len(server.requests) == 5


def test_the_budget_is_kept(server):
    # One request costs 0.001 USD: the second exceeds the budget, the third is not made.
    scores = judged(server, 4, concurrency=1, usd_per_million=[1.0, 0.0], budget_usd=0.0015)
    assert [s.value is None for s in scores] == [False, False, True, True]
    assert "budget" in scores[2].reason
    assert len(server.requests) == 2


def test_requests_are_under_way_together_but_not_too_many(server):
    server.together, server.pause = 4, 0.05  # the pause: time for one too many to come
    judged(server, 12, concurrency=4)
    assert server.most_under_way == 4


def runner_of(server, **options):
    args = {"base_url": server.url, "model": "m", "retries": 0} | options
    return RewardRunner([RewardSpec("vlm_judge", args=args)], batch_size=2)


def test_all_calls_of_a_run_share_the_limit_of_requests_under_way(server):
    server.together, server.pause = 3, 0.05
    with runner_of(server, concurrency=3) as runner:
        runner.score([picture(i) for i in range(12)], ["p"] * 12)  # six calls at once
    assert server.most_under_way == 3


def test_a_budget_is_for_a_run_and_not_for_a_call_or_a_process(server):
    # A request costs 0.001 USD.
    options = {"concurrency": 1, "usd_per_million": [1.0, 0.0], "budget_usd": 0.0045}
    for _ in range(2):
        server.requests.clear()
        with runner_of(server, **options) as runner:
            scored = [runner.score([picture(i)] * 3, ["p"] * 3) for i in range(4)]
        assert len(server.requests) == 5
        assert sum(one.total is not None for batch in scored for one in batch) == 5


def test_a_limit_of_no_request_is_refused(server):
    with pytest.raises(RewardError, match="concurrency is 0"):
        judged(server, concurrency=0)


def test_the_key_comes_from_the_named_variable(server, monkeypatch):
    with pytest.raises(RewardError, match="MY_JUDGE_KEY is not set"):
        judged(server, api_key_env="MY_JUDGE_KEY")
    monkeypatch.setenv("MY_JUDGE_KEY", "abc")
    judged(server, api_key_env="MY_JUDGE_KEY")
    assert server.keys == ["Bearer abc"]
    monkeypatch.setenv("OPENAI_API_KEY", "not for this server")
    judged(server)
    assert server.keys[1] == "Bearer none"


def test_a_server_that_is_not_there(server):
    server.shutdown()
    server.server_close()
    [score] = judged(server, retries=0)
    assert score.value is None
    assert "did not answer" in score.reason


def test_a_question_without_the_prompt_is_refused(server):
    with pytest.raises(RewardError, match=r"no \{prompt\}"):
        judged(server, question="Is it nice?")
    with pytest.raises(RewardError, match="braces"):
        judged(server, question='{prompt} {"score": 1}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ('Sure: {"a": {"b": 2}} as asked', {"a": {"b": 2}}),
        ("[1]", None),
        ('{"a": 1', None),
        ("", None),
    ],
)
def test_parse_object(text, expected):
    assert parse_object(text) == expected
