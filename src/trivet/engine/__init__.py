"""Generation: the module that trains, run with caches over a batch of requests."""

from trivet.engine.chat_model import EngineModel
from trivet.engine.engine import PREFIX_BYTES, Engine, Stats
from trivet.engine.request import Request

__all__ = ["PREFIX_BYTES", "Engine", "EngineModel", "Request", "Stats"]
