"""What GET /metrics tells, in Prometheus' text format: counters and histograms, all changed in the event loop."""

import bisect
import itertools
from collections import Counter
from collections.abc import Iterator

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # bounds of buckets
REQUEST_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """How many values lie at or below each bound, and the sum of all."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def samples(self) -> Iterator[tuple[str, float]]:
        """Each sample: what follows the metric's name, and its value."""
        *below, total = itertools.accumulate(self.counts)
        for bound, count in zip((*self.bounds, "+Inf"), (*below, total), strict=True):
            yield f'_bucket{{le="{bound}"}}', count
        yield from (("_sum", self.sum), ("_count", total))


class Tally:
    """What a server has answered since it started. requests: by route (none: refused before it was found) and status.

    first_token_s, request_s: from a request's arrival to its first token, and to the end of a whole answer.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.prompt_tokens = self.generated_tokens = 0
        self.first_token_s, self.request_s = Histogram(FIRST_TOKEN_S), Histogram(REQUEST_S)

    def text(self, **gauges: tuple[float, str]) -> bytes:
        """The page; gauges: name -> value now, and what it is."""
        requests = [(f'{{route="{route}",status="{status}"}}', n) for (route, status), n in self.requests.items()]
        families = [
            ("requests_total", "counter", "Requests that were answered, by route and HTTP status.", requests),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", [("", self.prompt_tokens)]),
            ("generated_tokens_total", "counter", "Tokens that were generated.", [("", self.generated_tokens)]),
            *((name, "gauge", said, [("", value)]) for name, (value, said) in gauges.items()),
            ("first_token_seconds", "histogram", "From a request to its first token.", self.first_token_s.samples()),
            ("request_seconds", "histogram", "From a request to the end of its answer.", self.request_s.samples()),
        ]
        lines: list[str] = []
        for name, kind, said, samples in families:
            lines += [f"# HELP robopoet_{name} {said}", f"# TYPE robopoet_{name} {kind}"]
            lines += [f"robopoet_{name}{end} {value}" for end, value in samples]
        return "\n".join([*lines, ""]).encode()
