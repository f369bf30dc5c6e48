"""Schedules in the style of Optax: functions from the training step to the drop rate."""

from jdropout.schedules._buckets import buckets as buckets
from jdropout.schedules._pieces import early as early
from jdropout.schedules._pieces import join as join
from jdropout.schedules._pieces import late as late
from jdropout.schedules._pieces import piecewise as piecewise
from jdropout.schedules._steps import Schedule as Schedule
from jdropout.schedules._transitions import constant as constant
from jdropout.schedules._transitions import cosine as cosine
from jdropout.schedules._transitions import curriculum as curriculum
from jdropout.schedules._transitions import linear as linear
from jdropout.schedules._transitions import warmup as warmup

__all__ = [
    "Schedule",
    "buckets",
    "constant",
    "cosine",
    "curriculum",
    "early",
    "join",
    "late",
    "linear",
    "piecewise",
    "warmup",
]
