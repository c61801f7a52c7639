"""Caption duels against a local server that stands in for judges, faults included."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from uae_jax import evaluate
from uae_jax.bench import caption_duel, judges
from uae_jax.errors import UserError

QUICK = judges.Limits(concurrency=4, attempts=3, timeout=3.0, backoff=0.01)


class Stub:
    """A server whose `behaviour(model, prompt, how often asked before)` gives an answer, a status, or None: silence."""

    def __init__(self, behaviour):
        self.behaviour, self.requests, self.keys = behaviour, [], []
        self.active = self.most = 0
        self.over = threading.Event()
        seen, lock, stub = Counter(), threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                image, text = body["messages"][0]["content"]
                assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
                with lock:
                    stub.active += 1
                    stub.most = max(stub.most, stub.active)
                    stub.requests.append((body["model"], text["text"]))
                    stub.keys.append(self.headers.get("Authorization"))
                    before = seen[json.dumps(body)]
                    seen[json.dumps(body)] += 1
                found = stub.behaviour(body["model"], text["text"], before)
                with lock:
                    stub.active -= 1
                if found is None:
                    stub.over.wait(20)
                    return
                status, reply = (found, b"{}") if isinstance(found, int) else (200, found)
                if isinstance(reply, str):
                    reply = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                self.end_headers()
                self.wfile.write(reply)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def stub():
    started = []

    def start(behaviour):
        started.append(Stub(behaviour))
        return started[-1]

    yield start
    for server in started:
        server.over.set()
        server.server.shutdown()
        server.server.server_close()


@pytest.fixture
def world(tmp_path):
    """Six pictures; captions "good ..." against "bad ..."."""
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    for name in ("good", "bad"):
        lines = [json.dumps({"file_name": f"{i}.png", "text": f"{name} caption {i}"}) for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def captions_of(prompt):
    """Description A and B of a prompt."""
    a = prompt.split("Description A:\n")[1].split("\n")[0]
    return a, prompt.split("Description B:\n")[1].split("\n")[0]


def fair(model, prompt, before):
    """Prefers the good caption in either place."""
    return json.dumps({"verdict": "A" if captions_of(prompt)[0].startswith("good") else "B"})


def run(world, stub, models=("m",), limits=QUICK, **changes):
    panel = [judges.Judge(model, stub.url, model, "TEST_JUDGE_KEY") for model in models]
    return caption_duel.run(world, world / "good.jsonl", world / "bad.jsonl", panel, world / "out", limits, **changes)


def test_a_fair_judge_is_asked_in_both_orders(world, stub):
    server = stub(fair)
    result = run(world, server)
    found = result["by_judge"]["m"]
    assert found["win"] == 6 and found["win_rate"]["mean"] == 100 and found["n"] == 6
    orders = Counter(captions_of(prompt)[0].split()[0] for _, prompt in server.requests)
    assert orders == {"good": 6, "bad": 6}
    assert json.loads((world / "out/caption_duel.json").read_text()) == result
    assert "| m | 100.0 | 100.0 to 100.0 | 6 | 0 |" in (world / "out/caption_duel.md").read_text()


def test_verdicts_that_count_apart(world, stub):
    def behaviour(model, prompt, before):
        i = int(captions_of(prompt)[0].split()[-1])
        if model == "other":
            return fair(model, prompt, before) if i else '{"verdict": "A"}'
        return [
            fair(model, prompt, before),
            json.dumps({"verdict": "B" if captions_of(prompt)[0].startswith("good") else "A"}),  # a loss
            '{"verdict": "A"}',  # whatever stands first
            '```json\n{"verdict": "tie"}\n```',
            "I prefer A.",
            fair(model, prompt, before),
        ][i]

    result = run(world, stub(behaviour), ("m", "other"))
    found = result["by_judge"]["m"]
    assert [found[k] for k in caption_duel.OUTCOMES] == [2, 1, 1, 1, 1, 0]
    assert found["n"] == 3 and found["win_rate"]["mean"] == pytest.approx(200 / 3)
    assert found["win_rate"]["low"] < 200 / 3 < found["win_rate"]["high"]
    assert result["average"] == pytest.approx((200 / 3 + 100) / 2)
    # Both decide 1 and 5, alike on 5 alone.
    assert result["agreement"] == {"m, other": {"share": 0.5, "n": 2}}


def test_faults_are_retried_and_what_stays_broken_is_counted(world, stub):
    def behaviour(model, prompt, before):
        i = int(captions_of(prompt)[0].split()[-1])
        if i == 5:
            return 503
        if before == 0:
            return {0: 500, 1: 429, 2: None, 3: b"garbage", 4: b'{"choices": []}'}[i]
        return fair(model, prompt, before)

    server = stub(behaviour)
    result = run(world, server)
    found = result["by_judge"]["m"]
    assert found["win"] == 5 and found["failed"] == 1 and result["failures"] == ["HTTP 503, 3 times"]
    assert len(server.requests) == 5 * 2 * 2 + 2 * 3


def test_a_second_run_asks_only_what_is_missing(world, stub):
    run(world, stub(lambda model, prompt, before: 500 if prompt.count("caption 3") else fair(model, prompt, before)))
    cache = world / "out/caption_duel_answers.jsonl"
    cache.write_text(cache.read_text() + '{"digest": "cut o')  # killed in the middle of a line
    first = judges.read_cache(cache)
    assert len(first) == 10

    def ask(server):
        panel = [judges.Judge("m", server.url, "m", "TEST_JUDGE_KEY")]
        return [judges.Request(panel[0], [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,"}},
            {"type": "text", "text": f"Description A:\ngood {i}\nDescription B:\nbad {i}\n"},
        ]}]) for i in range(3)]  # fmt: skip

    server = stub(fair)
    judges.ask(ask(server)[:2], cache, QUICK)
    answers, failures = judges.ask(ask(server), cache, QUICK)
    assert len(server.requests) == 3 and len(answers) == 3 and not failures
    assert len(judges.read_cache(cache)) == 13


def test_keys_come_from_the_environment_and_stay_there(world, stub, monkeypatch, capsys):
    monkeypatch.setenv("TEST_JUDGE_KEY", "sk-secret")
    server = stub(fair)
    run(world, server)
    assert set(server.keys) == {"Bearer sk-secret"}
    for status in (401, 302):
        with pytest.raises(UserError, match=f"HTTP {status}.*TEST_JUDGE_KEY") as caught:
            run(world, stub(lambda *_, status=status: status))
        assert "secret" not in str(caught.value)
    seen = capsys.readouterr()
    written = "".join(p.read_text(errors="replace") for p in (world / "out").iterdir())
    assert "secret" not in seen.out + seen.err + written


def test_never_more_at_once_than_allowed(world, stub):
    def slow(model, prompt, before):
        time.sleep(0.02)
        return fair(model, prompt, before)

    server = stub(slow)
    run(world, server, limits=QUICK._replace(concurrency=2))
    assert server.most == 2


def test_estimate_and_dry_run(world, stub, capsys):
    server = stub(fair)
    text = f"dear={server.url}/,model=m,key=TEST_JUDGE_KEY,price_in=10,price_out=100"
    where = [f"--sources={world}", f"--captions={world}/good.jsonl", f"--against={world}/bad.jsonl"]
    evaluate.main(["evaluate", "caption_duel", *where, f"--judge={text}", f"--out={world}/out", "--dry_run"])
    assert not server.requests and "dear: 12 requests" in capsys.readouterr().err
    judge = judges.parse_judge(text)
    assert judge == judges.Judge("dear", server.url, "m", "TEST_JUDGE_KEY", 10.0, 100.0)
    found = caption_duel.run(
        world, world / "good.jsonl", world / "bad.jsonl", [judge], world / "out", QUICK, dry_run=True
    )["estimate"]["dear"]
    assert found["requests"] == 12 and found["tokens_out"] == 12 * caption_duel.ANSWER_TOKENS
    assert found["dollars"] == pytest.approx((found["tokens_in"] * 10 + found["tokens_out"] * 100) / 1e6)


@pytest.mark.parametrize(
    "answer, expected",
    [
        ('{"verdict": "A"}', "A"),
        (' {"verdict":"tie"}\n', "tie"),
        ('{"verdict": "C"}', None),
        ('{"verdict": "A", "why": "it is"}', None),
        ('["A"]', None),
        ('{"verdict": ["A"]}', None),
        ("A", None),
    ],
)
def test_strict_verdicts(answer, expected):
    assert caption_duel.verdict(answer) == expected


def test_bad_input(world, stub):
    server = stub(fair)
    (world / "0.png").write_bytes(b"broken")
    (world / "bad.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n{"file_name": "9.png", "text": "y"}\n')
    with pytest.raises(UserError, match="no readable picture"):
        run(world, server)
    for text, message in (("{", "line 1: expected"), ('{"file_name": 1, "text": "x"}', "must be strings")):
        (world / "bad.jsonl").write_text(text)
        with pytest.raises(UserError, match=message):
            run(world, server)
    for text in (
        "m",
        "m=ftp://x,model=y",
        "m=http://x",
        "m=http://x,model=y,secret=z",
        "m=http://x,model=y,price_in=q",
    ):
        with pytest.raises(UserError, match="--judge"):
            judges.parse_judge(text)
