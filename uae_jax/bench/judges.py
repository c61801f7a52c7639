"""Vision-language judges behind any OpenAI-compatible endpoint: asked at once, retried, cached, never told who is who.

A key is read from the environment when a request is sent, and is written nowhere.
"""

import hashlib
import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from uae_jax import storage
from uae_jax.errors import UserError

LONGEST_WAIT = 60.0  # seconds between two attempts


class Judge(NamedTuple):
    """An endpoint and a model behind it."""

    name: str
    url: str  # up to /v1, as OpenAI's clients take it
    model: str
    key: str = "OPENAI_API_KEY"  # the environment variable that holds the key; an unset one sends none
    price_in: float = 0.0  # dollars for a million tokens, for the estimate
    price_out: float = 0.0


class Limits(NamedTuple):
    """How patiently judges are asked."""

    concurrency: int = 4  # requests at once
    attempts: int = 5  # of one request
    timeout: float = 120.0  # seconds of one attempt
    backoff: float = 1.0  # seconds before the second attempt; doubled each time


def parse_judge(text: str) -> Judge:
    """Reads NAME=URL,model=MODEL[,key=ENVIRONMENT_VARIABLE][,price_in=X][,price_out=X].

    Raises:
      UserError: it reads otherwise.
    """
    first, *rest = text.split(",")
    name, _, url = first.partition("=")
    fields = dict(part.partition("=")[::2] for part in rest)
    usage = "use NAME=URL,model=MODEL[,key=ENVIRONMENT_VARIABLE][,price_in=DOLLARS][,price_out=DOLLARS]"
    if not name or not url.startswith(("http://", "https://")) or not fields.get("model"):
        raise UserError(f"--judge: {text!r} is no judge: {usage}")
    unknown = set(fields) - {"model", "key", "price_in", "price_out"}
    if unknown:
        raise UserError(f"--judge: {name} has unknown fields {', '.join(sorted(unknown))}: {usage}")
    try:
        prices = {field: float(fields[field]) for field in ("price_in", "price_out") if field in fields}
    except ValueError:
        raise UserError(f"--judge: a price of {name} is no number: {usage}") from None
    return Judge(name, url.rstrip("/"), fields["model"], fields.get("key", "OPENAI_API_KEY"), **prices)


class Request(NamedTuple):
    """One question to one judge."""

    judge: Judge
    messages: list[dict[str, Any]]

    @property
    def digest(self) -> str:
        """Under which the answer is cached."""
        asked = json.dumps([self.judge.url, self.judge.model, self.messages], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Transient(Exception):
    """Worth another attempt: its `reason`, and after how many seconds the server wants it."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


_OPENER = urllib.request.build_opener(_NoRedirects)


def _send(request: Request, timeout: float) -> str:
    judge = request.judge
    headers = {"Content-Type": "application/json"}
    key = os.environ.get(judge.key)
    if key:
        headers["Authorization"] = f"Bearer {key}"
    body = json.dumps({"model": judge.model, "messages": request.messages}).encode()
    call = urllib.request.Request(f"{judge.url}/chat/completions", body, headers)
    try:
        with _OPENER.open(call, timeout=timeout) as response:
            content = json.loads(response.read())["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 429 or error.code >= 500:
            after = error.headers.get("Retry-After", "")
            raise _Transient(f"HTTP {error.code}", float(after) if after.isdigit() else None) from None
        # Its body may quote the key: only the status is told.
        raise UserError(
            f"judge {judge.name}: HTTP {error.code} from {judge.url}: check the address, the model "
            f"{judge.model!r}, and the key in the environment variable {judge.key}"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Transient(type(error).__name__) from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise _Transient("a response that is no chat completion") from None
    if not isinstance(content, str):
        raise _Transient("a response without text")
    return content


def _patiently(request: Request, limits: Limits, stop: threading.Event) -> tuple[str | None, str]:
    """The answer, or None and why there is none."""
    reason = "stopped"
    for attempt in range(limits.attempts):
        if stop.is_set():
            return None, reason
        try:
            return _send(request, limits.timeout), ""
        except _Transient as error:
            reason = str(error)
            wait = limits.backoff * 2**attempt * random.uniform(0.5, 1.0) if error.wait is None else error.wait
            if attempt + 1 < limits.attempts:
                stop.wait(min(wait, LONGEST_WAIT))
    return None, f"{reason}, {limits.attempts} times"


def read_cache(path: Path) -> dict[str, str]:
    """Answers by digest; a line that was cut off when a run was killed is left out."""
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            found[entry["digest"]] = entry["answer"]
        except (ValueError, KeyError, TypeError):
            continue
    return found


def ask(
    requests: Iterable[Request], cache: Path, limits: Limits, progress: Callable[[int, int], None] = lambda i, n: None
) -> tuple[dict[str, str], dict[str, str]]:
    """Answers of judges by digest, and why others have none.

    Answers are appended to `cache` as they come; what is found there is not asked again.

    Raises:
      UserError: an endpoint refuses a request for a reason that waiting does not cure, or the cache cannot be written.
    """
    unique = {request.digest: request for request in requests}
    answers = {k: v for k, v in read_cache(cache).items() if k in unique}
    left = {digest: request for digest, request in unique.items() if digest not in answers}
    failures: dict[str, str] = {}
    lock, stop = threading.Lock(), threading.Event()
    with storage.storage_errors(cache):
        cache.parent.mkdir(parents=True, exist_ok=True)
        torn = cache.exists() and not cache.read_bytes().endswith(b"\n")
        with open(cache, "a") as file, ThreadPoolExecutor(limits.concurrency) as pool:
            file.write("\n" if torn else "")

            def one(item: tuple[str, Request]) -> None:
                digest, request = item
                answer, reason = _patiently(request, limits, stop)
                with lock:
                    if answer is None:
                        failures[digest] = reason
                    else:
                        answers[digest] = answer
                        file.write(json.dumps({"digest": digest, "answer": answer}) + "\n")
                        file.flush()
                    progress(len(answers) + len(failures), len(unique))

            futures = [pool.submit(one, item) for item in left.items()]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                stop.set()
                for future in futures:
                    future.cancel()
                raise
    return answers, failures


def estimate(requests: Iterable[Request], image_tokens: int, answer_tokens: int, cache: Path) -> dict[str, Any]:
    """What is still to be asked, by judge: requests, tokens (about four characters each), dollars at its prices."""
    known: Mapping[str, str] = read_cache(cache)
    found: dict[str, dict[str, float]] = {}
    for request in {r.digest: r for r in requests if r.digest not in known}.values():
        entry = found.setdefault(request.judge.name, {"requests": 0, "tokens_in": 0, "tokens_out": 0, "dollars": 0.0})
        parts = [part for message in request.messages for part in message["content"]]
        text = sum(len(part["text"]) for part in parts if part["type"] == "text")
        tokens = text // 4 + image_tokens * sum(part["type"] == "image_url" for part in parts)
        entry["requests"] += 1
        entry["tokens_in"] += tokens
        entry["tokens_out"] += answer_tokens
        entry["dollars"] += (tokens * request.judge.price_in + answer_tokens * request.judge.price_out) / 1e6
    return found
