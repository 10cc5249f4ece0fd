"""What the commands call, and other people's code too."""

from onecard.api.comparing import compare
from onecard.api.examining import examine
from onecard.api.exporting import export
from onecard.api.planning import alternatives, plan, prepare
from onecard.api.replaying import replay
from onecard.api.reporting import monitor, write_report
from onecard.api.running import resume, train, verify
from onecard.api.talking import open_chat, serve
from onecard.api.trying import bench, find_lr, keep_result
from onecard.api.using import evaluate, generate, is_chat_model
from onecard.spec.load import load_recipe

__all__ = [
    "alternatives",
    "bench",
    "compare",
    "evaluate",
    "examine",
    "export",
    "find_lr",
    "generate",
    "is_chat_model",
    "keep_result",
    "load_recipe",
    "monitor",
    "open_chat",
    "plan",
    "prepare",
    "replay",
    "resume",
    "serve",
    "train",
    "verify",
    "write_report",
]
