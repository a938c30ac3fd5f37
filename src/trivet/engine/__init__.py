"""Generation: the module that trains, run with caches over a batch of requests."""

from trivet.engine.chat_model import EngineModel
from trivet.engine.engine import PREFIX_BYTES, Engine
from trivet.engine.request import Request
from trivet.engine.stats import Stats

__all__ = ["PREFIX_BYTES", "Engine", "EngineModel", "Request", "Stats"]
