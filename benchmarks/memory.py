"""How much memory a call holds at its worst: exact, from the allocator's own events."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's chatter

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes of tensors on the CPU that ``function`` has allocated and not freed at once, its result included.

    What was there before does not count, nor do views of it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = function()
    del result
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    changes.sort(key=lambda event: event["ts"])
    held = peak = 0
    for event in changes:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
