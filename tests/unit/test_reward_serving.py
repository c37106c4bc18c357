"""A reward behind HTTP, and its client: over a real socket where the network is the point."""

import contextlib
import functools
import io
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import msgpack
import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from cli.main import main
from common.errors import RewardError
from common.images import open_image
from rewards import Score, load_reward, reward
from rewards.runner import RewardRunner, RewardSpec
from rewards.serving import Limits, build_app

TYPE = {"Content-Type": "application/msgpack"}


@reward(name="s_red")
def s_red(images, prompts, tag=None):
    return [
        Score(i.getpixel((0, 0))[0] / 255, p, {"size": list(i.size), "tag": tag and tag[0]})
        for i, p in zip(images, prompts, strict=True)
    ]


def picture(level=255, form="PNG", width=6):
    stream = io.BytesIO()
    Image.new("RGB", (width, 4), (level, 0, 0)).save(stream, form, lossless=True)
    return stream.getvalue()


def job(images, **changes):
    entry = {
        "images": images,
        "prompts": ["p"] * len(images),
        "columns": {"tag": ["t"] * len(images)},
    }
    return msgpack.packb(entry | changes)


@pytest.fixture
def client():
    with RewardRunner([RewardSpec("s_red")]) as runner:
        app = build_app(runner, limits=Limits(body_bytes=20_000, images=4, pixels=99))
        with TestClient(app, base_url="http://127.0.0.1:8765") as client:
            yield client


def test_png_and_webp_are_scored_and_a_bad_picture_costs_only_its_own_score(client):
    images = [picture(255), b"GIF89a", picture(0), picture(51, "WEBP")]
    answer = client.post("/score", content=job(images), headers=TYPE)
    assert answer.headers["content-type"] == "application/msgpack"
    reply = msgpack.unpackb(answer.content)
    assert reply["reward"] == "s_red"
    assert [s["value"] for s in reply["scores"]] == [1.0, None, 0.0, 0.2]
    assert "not a whole" in reply["scores"][1]["reason"]
    assert reply["scores"][0] == {
        "value": 1.0, "reason": "p", "details": {"size": [6, 4], "tag": "t"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "status", "word"),
    [
        (b"", 400, "msgpack"),
        (b"\xc1", 400, "msgpack"),
        (b"\x92\x01", 400, "msgpack"),
        (job([], more=1), 400, "more"),
        (b"\xdf\xff\xff\xff\xff", 400, "msgpack"),  # a map said to have 4 billion entries
        (msgpack.packb([1]), 400, "the request"),
        (job(["text"]), 400, "images.0"),
        (job([b""], prompts=[3]), 400, "prompts.0"),
        (job([b""], prompts=[]), 400, "length"),
        (job([b""], columns={"tag": []}), 400, "length"),
        (job([b""], columns={"tag": "x"}), 400, "columns.tag"),
        (job([b""], columns=[]), 400, "columns"),
        (job([b""] * 5), 413, "4 are allowed"),
        (job([bytes(20_000)]), 413, "20000 bytes"),
        (job([picture(), picture(width=19)]), 413, "99 pixels"),
    ],
)
def test_wrong_requests_are_refused(client, content, status, word):
    answer = client.post("/score", content=content, headers=TYPE)
    assert answer.status_code == status
    assert word in answer.json()["error"]
    assert client.get("/health").status_code == 200


def test_a_body_without_a_length_is_cut_at_the_limit(client):
    sent = []

    def endless():
        for _ in range(1000):
            sent.append(1)
            yield bytes(1000)

    assert client.post("/score", content=endless(), headers=TYPE).status_code == 413


def test_web_pages_cannot_ask(client):
    content = job([picture()])
    assert client.post("/score", content=content).status_code == 415
    assert (
        client.post("/score", content=content, headers={"Content-Type": "text/plain"}).status_code
        == 415
    )
    assert (
        client.post("/score", content=content, headers=TYPE | {"Host": "evil.example"}).status_code
        == 400
    )
    assert client.get("/score").status_code == 405


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8765", 200), ("localhost", 200), ("[::1]:8765", 200), ("127.0.0.2:1", 200),
        ("192.168.1.2", 400), ("[::2]:8765", 400), ("localhost.evil.example", 400), ("[::1", 400),
        ("", 400),
    ],
)  # fmt: skip
def test_without_a_token_only_this_machine_is_answered(client, host, status):
    assert client.get("/health", headers={"Host": host}).status_code == status


def test_columns_cannot_change_the_settings_of_a_reward():
    @reward(name="s_option")
    def with_option(images, *, weight=1.0):
        return [weight] * len(images)

    with RewardRunner([RewardSpec("s_option")]) as runner:
        app = build_app(runner)
        with TestClient(app, base_url="http://127.0.0.1:8765") as client:
            content = job([picture()], columns={"weight": [5.0]})
            reply = msgpack.unpackb(client.post("/score", content=content, headers=TYPE).content)
    assert reply["scores"][0]["value"] == 1.0


# --- pictures among the columns ------------------------------------------------------------------


EDIT = {"add": [{"class": "circle", "count": 1}], "tag": "edit"}


@pytest.fixture
def editing():
    with RewardRunner([RewardSpec("consistency", args={"measures": ["pixels"]})]) as runner:
        app = build_app(runner, limits=Limits(pixels=99))
        with TestClient(app, base_url="http://127.0.0.1:8765") as client:
            yield client


@pytest.mark.parametrize(
    ("source", "status", "word"),
    [
        (msgpack.ExtType(1, picture()), 200, ""),
        ("/etc/passwd", 400, "columns.source: a server opens no paths"),
        (b"/etc/passwd", 400, "columns.source: a server opens no paths"),
        (["/etc/passwd"], 400, "columns.source: a server opens no paths"),
        ({"a": "/etc/passwd"}, 400, "columns.source: a server opens no paths"),
        (msgpack.ExtType(1, b"GIF89a"), 400, "not a whole"),
        (msgpack.ExtType(1, picture(width=19)), 413, "99 pixels"),
        (msgpack.ExtType(2, picture()), 400, "type 2"),
    ],
)
def test_a_source_is_sent_and_never_opened_on_the_server(editing, source, status, word):
    content = job([picture()], columns={"source": [source], "metadata": [EDIT]})
    answer = editing.post("/score", content=content, headers=TYPE)
    assert answer.status_code == status
    if status == 200:
        [score] = msgpack.unpackb(answer.content)["scores"]
        assert score["value"] == 0.0  # a copy of the source
    else:
        assert word in answer.json()["error"]


def test_a_server_that_asks_other_servers_opens_no_paths_either():
    spec = RewardSpec("remote", args={"servers": ["http://127.0.0.1:1"], "pictures": ["mask"]})
    content = job([picture()], columns={"mask": ["/etc/passwd"]})
    with RewardRunner([spec]) as runner:
        client = TestClient(build_app(runner), base_url="http://127.0.0.1:8765")
        answer = client.post("/score", content=content, headers=TYPE)
    assert answer.status_code == 400
    assert "columns.mask: a server opens no paths" in answer.json()["error"]


def test_the_client_sends_the_sources_of_edits(serve, tmp_path):
    Image.new("RGB", (6, 4), (0, 0, 0)).save(tmp_path / "a.png")
    columns = {
        "source": [str(tmp_path / "a.png"), Image.new("RGB", (6, 4))],
        "metadata": [EDIT] * 2,
    }
    address = serve("consistency", measures=["pixels"])
    scored = remote_scores(2, columns=columns, servers=[address], pictures=["source"])
    assert [one.total for one in scored] == [0.0, 0.0]
    [one, other] = remote_scores(2, columns=columns, servers=[address])
    assert "opens no paths" in one.reasons["remote"]
    assert other.total == 0.0
    [one] = remote_scores(1, servers=[address], pictures=["source"])
    assert "lack the column `source`" in one.reasons["remote"]


def test_a_server_that_is_something_else_does_not_end_the_call(serve):
    address = serve("s_red")
    scored = remote_scores(2, batch_size=1, servers=[f"{address}/wrong", address])
    assert [one.total for one in scored] == [0.0, pytest.approx(1 / 255)]


@pytest.mark.parametrize("number", [10**20, -(10**20)])
def test_integers_over_64_bits_travel_as_text(number):
    @reward(name="s_details")
    def with_details(images):
        return [Score(0.5, "as asked", {"n": [number]})] * len(images)

    with RewardRunner([RewardSpec("s_details")]) as runner:
        client = TestClient(build_app(runner), base_url="http://127.0.0.1:8765")
        answer = client.post("/score", content=job([picture()]), headers=TYPE)
    assert msgpack.unpackb(answer.content)["scores"] == [
        {"value": 0.5, "reason": "as asked", "details": {"n": [f"{number}"]}}
    ]


def test_health_and_metrics(client):
    assert client.get("/health").json() == {"status": "ok", "reward": "s_red"}
    client.post("/score", content=job([picture(), b"x"]), headers=TYPE)
    client.post("/score", content=b"", headers=TYPE)
    text = client.get("/metrics").text
    for line in (
        'atelier_reward_images_total{outcome="scored"} 1.0',
        'atelier_reward_images_total{outcome="failed"} 1.0',
        'atelier_reward_requests_total{status="200"} 1.0',
        'atelier_reward_requests_total{status="400"} 1.0',
        "atelier_reward_scoring_seconds_count 1.0",
    ):
        assert line in text


def test_pictures_of_waiting_requests_are_not_opened_yet(monkeypatch, serve):
    opened, called, release = [], threading.Event(), threading.Event()

    @reward(name="s_held")
    def held(images):
        called.set()
        release.wait(60)
        return [0.5] * len(images)

    counted = lambda *x: opened.append(x) or open_image(*x)  # noqa: E731
    monkeypatch.setattr("rewards.serving.open_image", counted)
    address = serve("s_held")
    ask = functools.partial(
        httpx.post, f"{address}/score", content=job([picture()]), headers=TYPE, timeout=60
    )
    with ThreadPoolExecutor(3) as clients:
        replies = [clients.submit(ask) for _ in range(3)]
        assert called.wait(60)
        while "waiting_requests 3.0" not in httpx.get(f"{address}/metrics").text:
            time.sleep(0.01)
        time.sleep(0.2)
        seen = len(opened)
        release.set()
    assert seen == 1
    assert [reply.result().status_code for reply in replies] == [200] * 3


def test_a_token_is_asked_for_everywhere_but_at_health():
    runner = RewardRunner([RewardSpec("s_red")])
    with runner, TestClient(build_app(runner, "secret")) as client:
        content = job([picture()])
        for wrong in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
            assert client.post("/score", content=content, headers=TYPE | wrong).status_code == 401
            assert client.get("/metrics", headers=wrong).status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert client.post("/score", content=content, headers=TYPE | right).status_code == 200
        assert client.get("/metrics", headers=right).status_code == 200
        assert client.get("/health").status_code == 200


# --- the client ----------------------------------------------------------------------------------


@pytest.fixture
def serve():
    """Serve a reward on a free port of loopback; return its address."""
    servers = []

    def start(name, token=None, **args):
        runner = RewardRunner([RewardSpec(name, args=args)])
        server = uvicorn.Server(
            uvicorn.Config(build_app(runner, token), log_level="error", lifespan="off")
        )
        listening = socket.create_server(("127.0.0.1", 0))  # nobody else can take its port
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        servers.append((server, thread, runner))
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for server, thread, runner in servers:
        server.should_exit = True
        thread.join(10)
        runner.close()


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def remote_scores(count, batch_size=32, columns=None, **args):
    images = [Image.new("RGB", (6, 4), (i, 0, 0)) for i in range(count)]
    with RewardRunner([RewardSpec("remote", args=args, timeout_s=100)], batch_size) as runner:
        return runner.score(images, [f"p{i}" for i in range(count)], columns)


def test_the_client_brings_scores_reasons_details_and_columns(serve, tmp_path):
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    address = serve("s_red", token="s3cret")
    scored = remote_scores(
        3, columns={"tag": [{"a": 1, 2: 3}] * 3}, servers=[address], token_file=str(token)
    )
    assert [s.parts["remote"] for s in scored] == [0, 1 / 255, 2 / 255]
    assert scored[2].reasons == {"remote": "p2"}
    assert scored[2].details == {"remote": {"size": [6, 4], "tag": {"a": 1, "2": 3}}}
    token.write_text("other")
    [one] = remote_scores(1, servers=[address], token_file=str(token))
    assert one.total is None
    assert "401" in one.reasons["remote"]


def test_batches_spread_over_the_servers_and_a_dead_one_is_passed_over(serve):
    seen = {"s_one": 0, "s_two": 0}

    def counting(name):
        @reward(name=name)
        def count(images):
            seen[name] += len(images)
            time.sleep(0.1)
            return [1.0] * len(images)

        return serve(name)

    servers = [free_address(), counting("s_one"), counting("s_two")]
    scored = remote_scores(8, batch_size=2, servers=servers)
    assert [s.parts["remote"] for s in scored] == [1.0] * 8
    assert sum(seen.values()) == 8
    assert min(seen.values()) >= 2


@pytest.mark.parametrize("held", [1, 2])
def test_under_load_no_score_is_lost(serve, monkeypatch, held):
    # 4.2 s of scoring, more than the pauses between rounds; a server that holds 1 answers 503.
    monkeypatch.setattr("rewards.serving._WAITING_REQUESTS", held)

    @reward(name="s_slow")
    def slow(images):
        time.sleep(0.15)
        return [1.0] * len(images)

    scored = remote_scores(28, batch_size=1, servers=[serve("s_slow")])
    assert [s.parts["remote"] for s in scored] == [1.0] * 28


def test_a_server_that_stays_busy_is_given_up(serve, monkeypatch):
    monkeypatch.setattr("rewards.serving._WAITING_REQUESTS", 0)
    started = time.monotonic()
    [one] = remote_scores(1, servers=[serve("s_red")], server_timeout_s=0.5)
    assert time.monotonic() - started < 25
    assert "503" in one.reasons["remote"]


def test_without_a_server_there_is_a_reason(serve):
    address = free_address()
    started = time.monotonic()
    [one] = remote_scores(1, servers=[address])
    assert time.monotonic() - started < 25
    assert one.total is None
    assert address in one.reasons["remote"]
    assert "ConnectError" in one.reasons["remote"]


ODD_ANSWERS = {
    "html": b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",
    "half": b"HTTP/1.1 200 OK\r\nContent-Length: 600\r\n\r\nhalf",
    "no http": b"SSH-2.0-OpenSSH_9.6\r\n",
    "too few": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n" + msgpack.packb({"scores": []}),
    "nothing": b"",
}


@pytest.mark.parametrize("answer", [*ODD_ANSWERS, "a drop at a time"])
def test_a_server_that_answers_with_something_else_is_passed_over(serve, answer):
    def odd(connection):
        with connection, contextlib.suppress(OSError):  # the client hangs up
            connection.recv(100_000)
            if answer in ODD_ANSWERS:
                connection.sendall(ODD_ANSWERS[answer])
                return
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 600\r\n\r\n")
            for _ in range(600):
                time.sleep(0.1)
                connection.sendall(b"x")

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=odd, args=listening.accept()[:1], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        servers = [f"http://127.0.0.1:{listening.getsockname()[1]}", serve("s_red")]
        scored = remote_scores(3, batch_size=1, servers=servers, server_timeout_s=0.5)
        listening.shutdown(socket.SHUT_RDWR)
    assert [one.total for one in scored] == [0, 1 / 255, 2 / 255]


def test_a_server_that_speaks_something_else_is_named(serve, monkeypatch):
    async def post(self, url, **_):
        return httpx.Response(200, content=b"<html>", request=httpx.Request("POST", url))

    monkeypatch.setattr(httpx.AsyncClient, "post", post)
    [one] = remote_scores(1, servers=["http://127.0.0.1:1"])
    assert "did not answer with scores" in one.reasons["remote"]


def test_one_server_written_as_a_text_is_named():
    [one] = remote_scores(1, servers="http://127.0.0.1:1")
    assert "servers is a text. Fix: write a list, [http://127.0.0.1:1]" in one.reasons["remote"]


@pytest.mark.parametrize("content", [b"", b"\n", "schlüssel".encode(), b"\xff"])
def test_a_file_without_a_token_is_refused(tmp_path, content):
    from rewards.remote import read_token

    (tmp_path / "token").write_bytes(content)
    with pytest.raises(RewardError, match="token"):
        read_token(tmp_path / "token")


def test_remote_needs_servers():
    with pytest.raises(RewardError, match="servers"):
        load_reward("remote")([], [])


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "example.org", "::"])
def test_no_open_service_without_a_token(host, capsys):
    assert main(["serve-reward", "s_red", "--host", host]) == 2
    assert "--token-file" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_command_serves_with_arguments(host, monkeypatch, capsys, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def half(images, scale=1.0): return [scale / 2] * len(images)\n"
    )
    answers = []

    def run(server, sockets):
        assert sockets[0].getsockname()[:2] == (host, port)
        name = f"[{host}]" if ":" in host else host
        with TestClient(server.config.app, base_url=f"http://{name}:{port}") as client:
            answer = client.post("/score", content=job([picture()]), headers=TYPE)
            answers.append(msgpack.unpackb(answer.content)["scores"][0]["value"])

    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.chdir(tmp_path)
    port = int(free_address().rpartition(":")[2])
    command = ["serve-reward", "mine.py:half", "--arg", "scale=3", "--host", host]
    assert main([*command, "--port", str(port)]) == 0
    assert answers == [1.5]
    assert f"{host}" in capsys.readouterr().out
    assert main(["serve-reward", "mine.py:half", "--arg", "scale"]) == 2


def test_a_port_in_use_is_told_before_anything_is_served(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve-reward", "s_red", "--port", str(port)]) == 2
    told = capsys.readouterr()
    assert f"127.0.0.1:{port}" in told.err
    assert "--port" in told.err
    assert "serving" not in told.out
