"""The engine: one thread that owns the model and steps all texts together; a text joins or leaves between two steps."""

import asyncio
import copy
import queue
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from robopoet.text.tokenizer import END
from robopoet.writing.decode import Row, Rows, prompt_logprobs
from robopoet.writing.healing import Prompt
from robopoet.writing.passage import Passage, Settings
from robopoet.writing.poet import Poet
from robopoet.writing.sampler import SampledText, Sampler, blended

FAILED = "the server failed to generate this text"
TELL_S = 0.01  # between two calls of the event loop, which take the interpreter from the thread that steps
TURN = 32  # tokens that a text gains before it may be paused for a request that has no rows


class Scored(NamedTuple):
    """A token with its log-probability, nats (None: nothing stands before it), and the likeliest ones' beside it.

    cut: how many bytes at the beginning of each are the prompt's, and given.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    cut: int = 0


class Gain(NamedTuple):
    """What a choice gains at a step. finish: "stop", "length", or "" if it goes on. error: of a text that failed.

    is_prompt: whether these tokens are the prompt's.
    """

    choice: "Choice"
    text: str = ""
    tokens: tuple[Scored, ...] = ()
    finish: str = ""
    error: str = ""
    is_prompt: bool = False


@dataclass
class Bias:
    """What is added to the logits of a text, (V,) float32: OpenAI's penalties lower those of the ids that it holds."""

    logits: torch.Tensor
    presence: float
    frequency: float

    def take(self, ids: Sequence[int]) -> None:
        """Lower the last of the text's ids."""
        is_new = ids.index(ids[-1]) == len(ids) - 1
        self.logits[ids[-1]] -= self.frequency + self.presence * is_new


@dataclass(eq=False)
class Choice:
    """A text to generate, and where its gains go.

    prompt: the same for all that share it. number: of its random stream. max_tokens: 0 only scores the prompt. top: how
    many of the likeliest tokens are told beside each (None: no log-probabilities). scores_prompt: tell the prompt's
    too. gain: called in the event loop. also_ends: an id that stands for <|endoftext|>. bias: added to its logits.
    cancelled: nobody waits for it any more. request: its first text. paused: its rows while the engine lacks them.
    turn_start: the tokens it had when it last got its rows.
    """

    prompt: Prompt
    settings: Settings
    number: int
    max_tokens: int
    top: int | None
    scores_prompt: bool
    gain: Callable[[Gain], None]
    also_ends: int | None = None
    bias: Bias | None = None
    cancelled: bool = False
    tags: list[int | None] = field(default_factory=lambda: [None])
    weights: torch.Tensor = field(init=False, repr=False)  # each style's share of the blend, (S,)
    rows: list[Row] = field(default_factory=list)  # one for each style
    passage: Passage = field(init=False, repr=False)
    sampled: SampledText = field(init=False, repr=False)
    request: "Choice" = field(init=False, repr=False)
    paused: list[Row] = field(default_factory=list)
    turn_start: int = 0

    @property
    def gained(self) -> int:
        """Its tokens since it last got its rows."""
        return len(self.passage.ids) - self.turn_start


class Engine(threading.Thread):
    """Generates what it is given, max_rows rows at a time; start() it, submit(), and in the end stop().

    Each request has an equal share of the rows, and of those that others leave free. Texts beyond their request's share
    are paused for one that has less; where there are more requests than rows, they take turns.
    """

    def __init__(self, poet: Poet, max_rows: int):
        super().__init__(name="engine", daemon=True)
        self.poet = poet
        self.loop: asyncio.AbstractEventLoop | None = None
        self.rows = Rows(poet.model, max_rows)
        self.inbox: queue.SimpleQueue[list[Choice] | None] = queue.SimpleQueue()
        self.waiting: dict[Choice, deque[Choice]] = {}  # a request's first text -> its texts without rows
        self.running: list[Choice] = []
        self.gains: list[Gain] = []
        self.told, self.is_urgent = 0.0, False  # when gains were last told; whether a text has begun or ended since
        self.sampler: Sampler | None = None  # samples for all that run; made again when one joins or leaves
        self.stopping = False

    @property
    def waiting_requests(self) -> int:
        """Requests that have texts without rows."""
        return self.inbox.qsize() + len(self.waiting)

    def submit(self, choices: list[Choice]) -> None:
        """Queue these texts; called in the event loop."""
        self.loop = asyncio.get_running_loop()
        for choice in choices:
            blend = self.poet.blend_of(choice.settings.style)
            choice.tags = list(blend) or [None]
            choice.weights = torch.tensor(list(blend.values()) or [1.0], device=self.poet.machine.device)
        self.inbox.put(choices)

    def cancel(self, choices: list[Choice]) -> None:
        """Free the rows of these texts before the next step."""
        for choice in choices:
            choice.cancelled = True

    def stop(self) -> None:
        """End the thread after the step that runs."""
        self.stopping = True
        self.inbox.put(None)
        self.join()

    # -----------------------------------------------------------------------------------------------------------------
    # the thread

    @torch.inference_mode()
    def run(self) -> None:
        """Step until stop() is called. No exception ends it: the texts that it hit are told that they failed."""
        while not self.stopping:
            try:
                self._receive()
                self._admit()
                if self.running:
                    self._step()
            except Exception:
                traceback.print_exc()
                for choice in list(self.running):
                    self._fail(choice)
            self._tell()

    def _receive(self) -> None:
        """Take what was submitted, waiting for it if there is nothing to do, and drop what was cancelled."""
        idle = not self.running and not self.waiting
        while idle or not self.inbox.empty():
            choices, idle = self.inbox.get() or [], False
            for choice in choices:
                choice.request = choices[0]
                self.waiting.setdefault(choices[0], deque()).append(choice)
        for choice in [choice for choice in self.running if choice.cancelled]:
            self._leave(choice)

    def _admit(self) -> None:
        """Give rows to texts of the request that has the fewest; at most one prompt is read, for all that share it."""
        self.waiting = {request: texts for request, texts in self.waiting.items() if not request.cancelled}
        if not self.waiting:
            return
        held = Counter[Choice]()  # each request's rows
        for choice in self.running:
            held[choice.request] += len(choice.rows)
        request = min(self.waiting, key=held.__getitem__)
        share = max(1, self.rows.max_rows // len(held.keys() | self.waiting.keys()))
        texts, first = self.waiting[request], None
        while texts and self._make_room(texts[0], held, share):
            choice = texts[0]
            if first and not choice.paused and (choice.prompt is not first.prompt or not first.rows):
                break
            self.running.append(texts.popleft())
            self.sampler = None
            try:
                if choice.paused:
                    self._resume(choice)
                else:
                    self._start(choice, first)
                    first = first or choice
            except Exception:
                traceback.print_exc()
                self._fail(choice)
            held[request] += len(choice.rows)
            if held[request] >= share and len(self.waiting) > 1:
                break
        if not texts:
            del self.waiting[request]

    def _make_room(self, choice: Choice, held: Counter[Choice], share: int) -> bool:
        """Whether a text has room, once others are paused: those beyond their share, or that have had their turn."""
        while self.rows.free < len(choice.tags):
            ours, others = held[choice.request], [c for c in self.running if c.request is not choice.request]
            over = [c for c in others if ours < share <= held[c.request] - len(c.rows)]
            late = [c for c in others if not ours and c.gained >= TURN]
            if not (over or late):
                return False
            victim = max(over or late, key=lambda c: (held[c.request], c.gained))
            held[victim.request] -= len(victim.rows)
            self._pause(victim)
        return True

    def _pause(self, choice: Choice) -> None:
        """Take a text's rows from it; among requests without any, its own is now the last."""
        for row in choice.rows:
            self.rows.pause(row)
        choice.paused = choice.rows
        choice.rows = []
        self._leave(choice)
        texts = self.waiting.pop(choice.request, deque())
        texts.appendleft(choice)
        self.waiting[choice.request] = texts

    def _resume(self, choice: Choice) -> None:
        """Give a paused text its rows again."""
        for row in choice.paused:
            self.rows.resume(row)
        choice.rows, choice.turn_start = choice.paused, len(choice.passage.ids)
        choice.paused = []

    def _start(self, choice: Choice, twin: Choice | None) -> None:
        """Give a choice its rows: copies of its twin's, which has read the same prompt, or new ones."""
        settings, number, prompt = choice.settings, choice.number, choice.prompt
        choice.passage = Passage(self.poet.tokenizer, settings, prompt.text, number, prompt.rest)
        tag = choice.tags[0]
        ids = prompt.read if tag is None else [tag, *prompt.read]
        shares = zip(choice.tags, choice.weights.tolist(), strict=True)
        blend = {tag: share for tag, share in shares if tag is not None}
        rest = copy.copy(twin.sampled.rest) if twin else self.poet.rest(prompt, blend)
        copied = self.poet.copied(settings, prompt.before)
        choice.sampled = SampledText(settings, number, ids, choice.weights.tolist(), copied, rest)
        hidden: list[torch.Tensor] = []
        if twin and not choice.scores_prompt:
            choice.rows = [self.rows.copy(row) for row in twin.rows]
        else:
            for tag, window in zip(choice.tags, self.poet.windows(prompt, blend), strict=True):
                read = window[bool(blend) :]
                row, states = self.rows.add(prompt.ids if choice.scores_prompt else read, tag)
                hidden.append(states)
                if choice.scores_prompt and read != prompt.ids and choice.max_tokens:  # scored, then read
                    self.rows.drop(row)
                    row, _ = self.rows.add(read, tag)
                choice.rows.append(row)
        if choice.scores_prompt:
            self.gains.append(Gain(choice, tokens=self._score_prompt(choice, hidden), is_prompt=True))
        if not choice.max_tokens:
            self._leave(choice)
            self.gains.append(Gain(choice, finish="length"))

    def _score_prompt(self, choice: Choice, hidden: list[torch.Tensor]) -> tuple[Scored, ...]:
        """Each of the prompt's tokens; the first one has no log-probability unless a style's tag stands before it."""
        ids = choice.prompt.ids
        scored = [Scored(ids[0])] if choice.tags == [None] else list[Scored]()
        for logprobs in prompt_logprobs(self.poet.model, hidden, choice.weights):
            for row, id in zip(logprobs, ids[len(scored) :], strict=False):
                scored.append(_scored(row, id, choice.top))
        return tuple(scored)

    def _step(self) -> None:
        """One token for each text that runs."""
        logits = self.rows.step()
        if self.sampler is None:
            self.running.sort(key=lambda choice: choice.rows[0].place)
            self.sampler = self.poet.sampler([choice.sampled for choice in self.running])
        sampler, by_place = self.sampler, list(self.running)
        # the model's own log-probabilities, of tokens too that the sampler will forbid in place
        told = [choice for choice in by_place if choice.top is not None]
        own = [blended(logits[[row.place for row in choice.rows]], choice.weights) for choice in told]
        logprobs = dict(zip(told, torch.cat(own).log_softmax(-1), strict=True)) if told else {}
        logprobs |= {choice: choice.sampled.rest.told(logprobs[choice]) for choice in told if choice.sampled.rest}
        cuts = [len(choice.sampled.rest or b"") for choice in by_place]  # sampling a token takes from the rest
        logits = self._shifted(logits)
        if len(by_place) < len(logits):  # some are blends
            logits = logits[[row.place for choice in by_place for row in choice.rows]]
        sampler(logits)
        for choice, id, cut in zip(by_place, sampler.ids.tolist(), cuts, strict=True):
            try:
                if choice.sampled.is_stuck:
                    self.gains.append(Gain(choice, choice.passage.get_stuck(), finish="stop"))
                    self._leave(choice)
                else:
                    token = _scored(logprobs[choice], id, choice.top, cut) if choice in logprobs else Scored(id)
                    self._push(choice, token)
            except Exception:
                traceback.print_exc()
                self._fail(choice)

    def _shifted(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of all rows, (rows, V), with what texts have beside the model's: a second end, and a bias."""
        asking = [choice for choice in self.running if choice.also_ends is not None or choice.bias]
        if asking:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        for choice in asking:
            places = [row.place for row in choice.rows]
            if choice.also_ends is not None:
                end = self.poet.tokenizer.specials[END]
                logits[places, end] = torch.logaddexp(logits[places, end], logits[places, choice.also_ends])
            if choice.bias:
                logits[places] += choice.bias.logits
        return logits

    def _push(self, choice: Choice, token: Scored) -> None:
        """Append a token to a text; it leaves if that was its last."""
        passage, before = choice.passage, choice.passage.n_new
        text, finish = passage.push(token.id), ""
        is_new = passage.n_new > before
        if choice.bias and is_new:
            choice.bias.take(passage.ids[passage.n_healing :])
        if passage.done:
            finish = "stop"
        elif passage.n_new == choice.max_tokens:
            text, finish = text + passage.finish(), "length"
        if is_new:
            self.gains.append(Gain(choice, text, (token,), finish))
            self.is_urgent |= passage.n_new == 1
        if finish:
            self._leave(choice)
        else:
            for row in choice.rows:
                self.rows.push(row, token.id)

    def _leave(self, choice: Choice) -> None:
        """Free a choice's rows."""
        self.sampler, self.is_urgent = None, True
        self.running = [other for other in self.running if other is not choice]
        for row in choice.rows:
            self.rows.drop(row)
        choice.rows = []

    def _fail(self, choice: Choice) -> None:
        self._leave(choice)
        self.gains.append(Gain(choice, error=FAILED))

    def _tell(self) -> None:
        """Hand what was gained to the event loop, all in one call: soon, and at once if a text begins or ends."""
        now = time.monotonic()
        if not (self.is_urgent or now - self.told > TELL_S):
            return
        gains, self.gains, self.told, self.is_urgent = self.gains, list[Gain](), now, False
        if gains and self.loop and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(_deliver, gains)


def _deliver(gains: list[Gain]) -> None:
    for gain in gains:
        gain.choice.gain(gain)


def _scored(logprobs: torch.Tensor, id: int, top: int | None, cut: int = 0) -> Scored:
    """A token with its log-probability in logprobs, (V,), and those of the `top` likeliest that are possible."""
    likeliest = logprobs.topk(top or 0)
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return Scored(id, logprobs[id].item(), tuple(pair for pair in pairs if pair[1] > -torch.inf), cut)
