"""Generation: the module that trains, run with caches over a batch of requests."""

from trivet.engine.chat_model import EngineModel
from trivet.engine.engine import Engine, Stats
from trivet.engine.request import Request

__all__ = ["Engine", "EngineModel", "Request", "Stats"]
