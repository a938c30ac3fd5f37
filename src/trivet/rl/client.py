"""JSON over HTTP, tried again where that may help: what a server of episodes and a judge are asked with.

Tried again: no answer, a connection that breaks, 429, 5xx. Not: what the server refuses (other 4xx), an answer that is no
JSON. A key is read from the environment when a client is made, goes into one header and into no message of ours.
(pip install 'trivet[remote]')
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, Self

from trivet.config import UserError

WAITS = (0.5, 2.0, 8.0, 0.0)  # seconds after each try that failed
CONNECT = 10.0  # seconds


class Failed(Exception):
    """The server could not answer this request; another one it may."""


class TimedOut(Failed, TimeoutError):
    """It was asked as often as it may be, and the last time it took too long."""


class Client:
    """One server. To be opened (`async with`) inside the event loop that uses it.

    name: what it is in the settings, for messages. seconds: that one answer may take, all of it.
    """

    def __init__(self, name: str, url: str, key: str | None, seconds: float, connections: int) -> None:
        try:
            import httpx2
        except ImportError:
            raise UserError(f"{name} needs httpx2: pip install 'trivet[remote]'") from None
        self.http, self.url, self.seconds, self.connections = httpx2, url.rstrip("/"), seconds, connections
        self.failed = 0  # requests, each of which was tried again
        if key is not None and not os.environ.get(key):
            raise UserError(f"{name}.key: there is no environment variable {key!r}.")
        self._key = "" if key is None else os.environ[key]

    async def __aenter__(self) -> Self:
        self.client = self.http.AsyncClient(
            base_url=self.url, headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            limits=self.http.Limits(max_connections=self.connections),
            timeout=self.http.Timeout(self.seconds, connect=CONNECT, pool=None),
        )  # fmt: skip
        self.room = asyncio.Semaphore(self.connections)  # who waits for a connection is not on the clock
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()

    async def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer's JSON, None where it has none. Raises UserError for what it refuses, Failed for what failed."""
        slow = False
        for wait in WAITS:
            try:
                async with self.room, asyncio.timeout(self.seconds):
                    answer = await self.client.request(method, path, json=body)
            except (self.http.HTTPError, TimeoutError) as e:
                slow = isinstance(e, TimeoutError | self.http.TimeoutException)
                failed = f"no answer in {self.seconds:g} s" if slow else f"{type(e).__name__}: {e}"
            else:
                if answer.status_code < 500 and answer.status_code != 429:
                    break
                slow, failed = False, f"{answer.status_code}: {self._shown(answer.text)}"
            self.failed += 1
            await asyncio.sleep(wait)
        else:
            raise (TimedOut if slow else Failed)(f"{self.url}{path}: {failed}")
        if answer.status_code >= 400:
            raise UserError(f"{self.url}{path} refused: {answer.status_code}: {self._shown(answer.text)}")
        try:
            return answer.json() if answer.content else None
        except ValueError:
            raise UserError(f"{self.url}{path}: the answer is no JSON: {self._shown(answer.text)}") from None

    def _shown(self, text: str) -> str:
        """The beginning of what a server said, for a message; some say the key back."""
        return (text.replace(self._key, "***") if self._key else text)[:300]
