"""Which switches of the course make a training fit a GPU: `plan`."""

from .result import Plan, Rung
from .search import plan
from .subject import ModelSubject, RunSubject
from .switches import SWITCHES, Switch

__all__ = ["SWITCHES", "ModelSubject", "Plan", "RunSubject", "Rung", "Switch", "plan"]
