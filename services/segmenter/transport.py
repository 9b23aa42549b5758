"""kombu's Redis transport, but a queue entry that is no Celery message goes to the dead letters instead of ending the worker.

kombu 5.7 decodes entries inside the event loop and lets what goes wrong there end the process.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from queue import Empty
from typing import Any

from kombu.transport import redis as kombu_redis

Bury = Callable[[str, str], None]
"""(payload, error) -> None: takes an entry that cannot be read."""


def tolerant_transport(bury: Bury) -> type[kombu_redis.Transport]:
    """A Redis transport class whose unreadable entries go to `bury`."""

    class Channel(kombu_redis.Channel):
        def _brpop_read(self, **options: Any) -> bool:
            try:
                return bool(super()._brpop_read(**options))  # type: ignore[no-untyped-call]
            except json.JSONDecodeError as error:
                bury(error.doc, f"unreadable: not JSON: {error.msg}")
            except UnicodeDecodeError as error:
                bury(repr(error.object[:500]), "unreadable: not UTF-8")
            raise Empty

    class Transport(kombu_redis.Transport):
        def _deliver(self, message: Any, queue: str) -> None:
            if problem := envelope_problem(message):
                bury(json.dumps(message), f"unreadable: {problem}")
            else:
                super()._deliver(message, queue)  # type: ignore[no-untyped-call]

    Transport.Channel = Channel
    return Transport


def envelope_problem(message: Any) -> str | None:
    """What makes `message` no Celery envelope, or None if it is one."""
    if not isinstance(message, dict):
        return "the envelope must be an object"
    properties = message.get("properties")
    if not isinstance(message.get("body"), str) or not isinstance(message.get("headers"), dict):
        return "the envelope needs body (text) and headers (object)"
    if not isinstance(properties, dict) or not isinstance(properties.get("delivery_info"), dict):
        return "the envelope needs properties.delivery_info (objects)"
    if not isinstance(properties.get("delivery_tag"), str):
        return "the envelope needs properties.delivery_tag (text)"
    if message.get("content-type") != "application/json" or message.get("content-encoding") not in ("utf-8", "UTF-8", None):
        return f"content must be application/json in utf-8, got {str(message.get('content-type'))[:80]!r}"
    try:
        text = base64.b64decode(message["body"]) if properties.get("body_encoding") == "base64" else message["body"]
        body = json.loads(text)
    except ValueError:
        return "the body is not JSON"
    # Celery's protocol 2: arguments, keyword arguments, callbacks.
    if not isinstance(body, list) or [type(part) for part in body] != [list, dict, dict]:
        return "the body must be [list, object, object]"
    if not all(isinstance(message["headers"].get(name), str) for name in ("task", "id")):
        return "headers need task and id (text)"
    return None
