"""The only room that makes one TrainConfig from another: train.py's loop gets the finished one.

A config is completed from a checkpoint, `epochs` become steps, and a warmup is shortened to fit. `minutes` choose the
start, shape, dropout and decay for this text on this machine, and move the last step when the machine's pace changes;
their rule was fitted on texts of 60 KB to 1.5 MB: "One dial" in bench/LOG.md.
"""

import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from configurator import values_of, written
from robopoet.errors import CheckpointError, ConfigError, is_out_of_memory, warn
from robopoet.files import convert
from robopoet.machine import Machine
from robopoet.text.dataset import Meta, find_dataset, read_meta
from robopoet.training.log import Log, Meter
from robopoet.training.run import Progress, Run, Start
from robopoet.training.schedule import SAVE_S, Clock, evaluation_interval, steps_within
from robopoet.weights import bases
from robopoet.weights.header import NANOGPT_ARGS, read_header, read_run

Config = TypeVar("Config", bound=Any)  # train.TrainConfig, which a room may not import
Trial = tuple[Callable[[int], Any], Callable[[int], Any]]  # a step of training, a batch of an evaluation
SHAPE = tuple(key for key in NANOGPT_ARGS if key not in ("vocab_size", "dropout"))
SHAPE += ("positions", "norm", "mlp", "n_kv_head")
OWN = ("out_dir", "init_from", "eval_only", "split")  # keys that no checkpoint decides
SIZES = ("n_layer", "n_head", "n_embd")
LADDER = ((2, 3, 192), (3, 3, 192), (4, 4, 256), (6, 6, 384), (8, 8, 512), (12, 12, 768))
SMALLER = ((1, 2, 128), (1, 1, 64))  # where the first gets too few steps, as on a busy machine
TOKENS_A_WEIGHT, REREAD_A_WEIGHT = 1.5, 0.5  # for each of the blocks: read in the time; of a text, in all its passes
STEPS_AN_EPOCH = 40  # at least, from scratch: fewer rows a step if need be
DROPOUT = ((2, 0.0), (4, 0.1), (16, 0.2), (math.inf, 0.3))  # up to so many passes
FORGETS = 0.7  # passes within which the embeddings' weight decay forgets
EVALUATING = 0.05  # share of training's seconds, at most; beside busy programs the last takes 15 times as long
SPARE = 0.5  # share of the time that the steps leave, for evaluations, if that is more
SAMPLED = 2048  # ids of a sampled softmax on a CPU, if the vocabulary has at least twice as many
WORTH = 0.8  # a smaller step must take at most this share of the larger one's time
TRIAL_S, LONG_S = 2.0, 6.0  # seconds of a measurement, and of a step that is measured once
CHOSEN = ("init_from", *SHAPE, "dropout", "batch_size", "sampled_softmax", "optimizer", "learning_rate")
CHOSEN += ("muon_learning_rate", "weight_decay", "muon_weight_decay")
CHOSEN += ("max_iters", "warmup_iters", "eval_interval", "eval_iters", "patience")


class Recipe(NamedTuple):
    """What a run of minutes takes by what it starts from.

    epochs: passes after which a text teaches nothing more. context: the most tokens of a row. cpu_rows, gpu_rows: the
    most rows of a step. least, enough: a run has at least the first number of steps; below the second a smaller model,
    or fewer or shorter rows, learn more. keys: of the config. is_regularised: whether dropout by the passes, and a
    sampled softmax, gain; what never learned with dropout can't do with it. evaluations: about so many, as each saves a
    large model (0: as many as of any run).
    """

    epochs: int
    context: int
    cpu_rows: int
    gpu_rows: int
    least: int
    enough: int
    keys: dict[str, Any]
    is_regularised: bool = True
    evaluations: int = 0


FROM_NOTHING = Recipe(24, 256, 4, 32, 10, 40, {"positions": "rotary", "block_size": 256})
FROM_OURS = Recipe(3, 256, 8, 32, 10, 40, {"learning_rate": 3e-3, "muon_learning_rate": 0.01})
# others' models are large, a step may take a minute, and the first one gains; they can use a long context
FROM_OTHERS = Recipe(1, 1024, 1, 1, 3, 20, {"optimizer": "adafactor"}, is_regularised=False, evaluations=4)


def _change(cfg: Config, **values: Any) -> Config:
    """`cfg` with other `values`, which do not count as given: the only place where a config changes."""
    return dataclasses.replace(cfg, **values)


def _choose(cfg: Config, **values: Any) -> Config:
    """`cfg` with `values` for the keys that were not given."""
    return _change(cfg, **{key: value for key, value in values.items() if key not in cfg.given})


def _differing(cfg: Config) -> dict[str, Any]:
    """The keys whose values differ from their defaults, as YAML has them."""
    defaults = values_of(type(cfg)())
    return {key: written(value) for key, value in values_of(cfg).items() if value != defaults[key]}


def from_base(cfg: Config) -> Config:
    """`cfg`; a run of minutes starts from the model that the dataset was prepared for, or from the base model.

    The base model must read the dataset, and not have been trained on it.
    """
    if not cfg.minutes or cfg.eval_only or "init_from" in cfg.given:
        return cfg
    meta = read_meta(find_dataset(cfg.dataset))
    if meta.start:
        return _change(cfg, init_from=meta.start)
    if content := bases.load_base():
        try:
            Start(content, bases.BASE, False).check_fit(cfg.dataset, cfg.optimizer, meta)
        except CheckpointError:
            return cfg
        if content.get("text_sha256") != meta.text_sha256:
            return _change(cfg, init_from=str(bases.BASE))
    return cfg


def complete(cfg: Config, start: Start) -> Config:
    """`cfg` with the keys that were not given taken from the checkpoint.

    A resumed run and an evaluation take every key, a new run the model's shape, and if that is not ours rates and
    rows. Raises CheckpointError if a given key contradicts that shape; only a new run may shorten block_size.
    """
    if start.content is None:
        cfg = _change(cfg, init_from="scratch")  # auto found nothing
        if problems := cfg.problems():
            raise ConfigError("\n  ".join(problems))
        return cfg
    if start.resumes and not cfg.eval_only:
        read_run(start.content, start.path)  # raises if there is none
    given = cfg.given | _differing(cfg).keys()
    shape = read_header(start.content, start.path).shape
    taken = {key: shape[key] for key in SHAPE}
    if (cfg.n_kv_head or shape["n_head"]) == (shape["n_kv_head"] or shape["n_head"]):
        given -= {"n_kv_head"}  # auto and n_head mean the same
    if not start.is_ours:  # it may have learnt without dropout
        taken["dropout"] = shape["dropout"]
    problems = []
    for key in given.intersection(SHAPE):
        may_shorten = key == "block_size" and not start.resumes and cfg.block_size < taken[key]
        if getattr(cfg, key) != taken[key] and not may_shorten:
            theirs, ours = written(taken[key]), written(getattr(cfg, key))
            problems.append(f"{key}: the checkpoint has {theirs}, the config {ours}; leave it out")
    if problems:
        raise CheckpointError(f"{start.path}: " + "\n  ".join(problems))
    if not (start.resumes or cfg.eval_only or start.is_ours):
        taken |= _gentle(
            cfg, cfg.block_size if "block_size" in given else min(shape["block_size"], FROM_OTHERS.context)
        )
    if (start.resumes or cfg.eval_only) and start.is_ours:
        saved = convert(start.config, type(cfg), start.path, CheckpointError, "its config is damaged")
        taken = values_of(saved) | taken
        if cfg.eval_only:
            del taken["eval_iters"]  # the full split, however much of it the run read
        if "max_iters" in given:
            taken |= {"epochs": 0.0, "minutes": 0.0, "plans": ()}  # they would override it
    begun = {"init_from", "minutes"} if start.resumes and not cfg.eval_only else set()  # stay as the run began
    cfg = _change(cfg, **{key: value for key, value in taken.items() if key in begun or key not in given | {*OWN}})
    if problems := cfg.problems():
        raise CheckpointError(f"{start.path}: " + "; ".join(problems))
    return cfg


def _gentle(cfg: Config, block_size: int) -> dict[str, Any]:
    """Rows and rates for others' models, which learn much in few steps; those for a new model would undo it."""
    optimizer = cfg.optimizer if "optimizer" in cfg.given else "adamw" if cfg.shard else FROM_OTHERS.keys["optimizer"]
    rates: dict[str, Any] = {} if optimizer == "adafactor" else {"learning_rate": 3e-4, "muon_learning_rate": 6e-3}
    rows = max(FROM_OTHERS.context // block_size, 1)
    return rates | {"optimizer": optimizer, "block_size": block_size, "batch_size": rows}


def finish(cfg: Config, windows_per_epoch: int) -> Config:
    """`cfg` with the max_iters that `epochs` asks for, a warmup that fits into the decay, and an eval_interval."""
    steps = cfg.max_iters
    if cfg.epochs and not cfg.minutes:
        steps = math.ceil(cfg.epochs * windows_per_epoch / cfg.rows_per_step)
    last, warmup = cfg.lr_decay_iters or steps, cfg.warmup_iters
    if warmup > last:
        warmup = last // 10
        if "warmup_iters" in cfg.given:
            warn(f"warmup_iters: {cfg.warmup_iters} steps don't fit into {last}; the warmup takes {warmup}")
    interval = cfg.eval_interval or evaluation_interval(steps)
    return _change(cfg, max_iters=steps, warmup_iters=warmup, eval_interval=interval)


def keep(cfg: Config, run: Run) -> None:
    """Save `cfg` in the run's checkpoints from here on, and in config.yaml the keys that differ from their defaults.

    block_size is always there, as it may shorten that of init_from; minutes and epochs are not if they have chosen.
    """
    kept = _differing(cfg) | {"block_size": cfg.block_size}
    if kept.pop("minutes", 0):
        kept.pop("epochs", 0)
    run.keep_config(values_of(cfg), kept, kept | (chosen(cfg) if cfg.minutes else {}))


def describe_start(cfg: Config, start: Start, progress: Progress) -> list[str]:
    """What a run prints first: what a resumed one has changed, or as YAML, what a new one of minutes has chosen."""
    if not start.resumes:
        return describe_choice(cfg) if cfg.minutes else []
    lines = [f"resuming from {start.path}, step {progress.iter_num}"]
    saved = start.config
    found = {key: value for key, value in values_of(cfg).items() if key not in OWN and saved.get(key, value) != value}
    if found:
        changed = ", ".join(f"{key} {written(saved[key])} -> {written(value)}" for key, value in found.items())
        lines.append(f"changed since the checkpoint: {changed}")
    if progress.iter_num >= cfg.max_iters:
        larger = "--epochs" if cfg.epochs and not cfg.minutes else "--max_iters"
        lines.append(f"finished: step {progress.iter_num} of max_iters {cfg.max_iters}; a larger {larger} trains on")
    return lines


def describe_choice(cfg: Config) -> list[str]:
    """The keys that were chosen for a new run of so many minutes, as YAML."""
    return [f"# chosen for {cfg.minutes:g} minutes", *(f"{key}: {value}" for key, value in chosen(cfg).items())]


def chosen(cfg: Config) -> dict[str, Any]:
    """What a run of minutes has for the keys that were not given."""
    # what train.py chooses by itself is told as what it is
    values = values_of(cfg) | {"learning_rate": cfg.peak_lr, "muon_weight_decay": cfg.matrix_decay}
    return {key: values[key] for key in CHOSEN if key not in cfg.given}


def less_memory(cfg: Config) -> str:
    """What to change in `cfg`, for which a GPU has too little memory."""
    rows, micros = cfg.batch_size, cfg.gradient_accumulation_steps
    ways: list[str] = []
    if rows % 2 == 0:
        halved = f"--batch_size={rows // 2} --gradient_accumulation_steps={2 * micros}"
        ways.append(f"{halved} (now {rows} and {micros}; the same losses)")
    if not cfg.recompute:
        ways.append("--recompute=true (the same losses in a third more time)")
    ways.append(f"a block_size below {cfg.block_size}")
    return f"the GPU has too little memory; take {', or '.join(ways)}"


# ---------------------------------------------------------------------------------------------------------------------
# a run of minutes


def fit_minutes(cfg: Config, start: Start, meta: Meta, clock: Clock, trial: Callable[[Config], Trial]) -> Config:
    """`cfg`; a new run of minutes gets what was not given chosen for the time that is left.

    It takes less time if the text teaches nothing more. trial: makes what is timed on this machine. epochs becomes the
    most that the run may read when it plans again, or 0 if max_iters was given. Raises ConfigError if time or memory is
    too small for the fewest steps of the smallest choice.
    """
    if not cfg.minutes or start.resumes:
        return cfg
    machine, tokens = clock.machine, meta.splits["train"].tokens
    on_cpu = machine.device.type == "cpu"
    recipe = FROM_NOTHING if start.content is None else FROM_OURS if start.is_ours else FROM_OTHERS
    cfg = _choose(cfg, **recipe.keys)
    cfg = _choose(cfg, block_size=max(2, min(cfg.block_size, recipe.context, meta.splits["val"].tokens - 1)))
    epochs = cfg.epochs or recipe.epochs
    rows, most = recipe.cpu_rows if on_cpu else recipe.gpu_rows, epochs * tokens
    if start.content is None:
        rows = max(min(rows, tokens // (STEPS_AN_EPOCH * cfg.block_size)), 1)
    cfg = _choose(cfg, batch_size=rows, patience=6)
    samples = on_cpu and recipe.is_regularised and meta.vocab_size >= 2 * SAMPLED
    cfg = _choose(cfg, sampled_softmax=SAMPLED if samples else 0)
    seconds = functools.cache(functools.partial(_seconds, trial, machine))
    ways: list[dict[str, int]] = []
    if start.content is None and not cfg.given.intersection(SIZES):
        cfg = _climb(cfg, most, clock, seconds)
        ways = _shapes(cfg, SMALLER)
    ways += [{"batch_size": rows >> halvings} for halvings in range(1, rows.bit_length())]
    ways += [{"block_size": size} for size in (512, 256) if size < cfg.block_size]
    while ways and clock.left_s / seconds(cfg)[0] < min(_last(cfg, most), recipe.enough):
        smaller = _choose(cfg, **ways.pop(0))
        if seconds(smaller)[0] > WORTH * seconds(cfg)[0]:  # what takes the time is something else
            break
        cfg = smaller
    step_s, batch_s = seconds(cfg)
    cfg = _fill(cfg, meta, step_s, batch_s, most, recipe, clock)
    if start.content is None and cfg.optimizer == "muon":
        cfg = _choose(cfg, muon_weight_decay=cfg.weight_decay, weight_decay=_decay(cfg, tokens))
    passes = cfg.max_iters * cfg.tokens_per_step / tokens
    if recipe.is_regularised:
        cfg = _choose(cfg, dropout=next(share for limit, share in DROPOUT if passes <= limit))
    return _change(cfg, epochs=0.0 if "max_iters" in cfg.given else epochs)


def replan(cfg: Config, clock: Clock, progress: Progress, meter: Meter, log: Log, run: Run) -> Config:
    """`cfg` for the next step: if the clock moves the last one, with a fitting eval_interval unless that was given.

    A new plan is on the disk before it takes effect.
    """
    step = progress.iter_num
    if (last := clock.last_step(cfg.schedule, progress, meter)) == cfg.max_iters:
        return cfg
    if step > clock.known:  # else it is there already
        log.write({"kind": "plan", "iter": step, "max_iters": last, "step_s": clock.step_s, "left_s": clock.left_s})
    log.print(f"step {step:>6}  planned anew: {last} steps in all, not {cfg.max_iters}")
    plans = (*cfg.plans, f"{step}:{cfg.max_iters}:{cfg.eval_interval}")
    cfg = _change(cfg, plans=plans, max_iters=last, eval_interval=clock.interval(last, cfg.schedule))
    keep(cfg, run)
    return cfg


def _decay(cfg: Config, tokens: int) -> float:
    """The weight decay with which what one pass taught is gone after about FORGETS more, or cfg's if that is more.

    A weight decays by learning rate times weight decay in a step: Wang and Aitchison 2024, arXiv:2405.13698.
    """
    steps = FORGETS * tokens / cfg.tokens_per_step
    return max(float(f"{1 / (cfg.peak_lr * steps):.2g}"), cfg.weight_decay)


def _seconds(trial: Callable[[Config], Trial], machine: Machine, cfg: Config) -> list[float]:
    """Seconds of a step, and of a batch of an evaluation; infinite if they don't fit into the memory.

    The least of up to five, as other programs only add to it. Nothing is compiled: the run does that, once.
    """
    gc.collect()  # an earlier trial's model may hold itself
    least = []
    try:
        for work in trial(_change(cfg, compile="false")):
            found: list[float] = []
            for spent in (LONG_S, LONG_S, TRIAL_S, TRIAL_S, TRIAL_S):
                if sum(found) < spent:
                    begin = time.perf_counter()
                    work(len(found))
                    machine.synchronize()
                    found.append(time.perf_counter() - begin)
            least.append(min(found))
    except RuntimeError as e:
        if is_out_of_memory(e):
            return [math.inf, math.inf]
        raise
    return least


def _shapes(cfg: Config, ladder: tuple[tuple[int, ...], ...]) -> list[dict[str, int]]:
    """The shapes of a ladder whose heads can share n_kv_head heads of keys and values."""
    return [dict(zip(SIZES, shape, strict=True)) for shape in ladder if shape[1] % (cfg.n_kv_head or 1) == 0]


def _climb(cfg: Config, most: float, clock: Clock, seconds: Callable[[Config], list[float]]) -> Config:
    """`cfg` with the largest shape of the LADDER that the text, the time left and the memory can train."""
    chosen, step_s = cfg, 0.0

    def reads_enough(weights: int) -> bool:
        read = clock.left_s / step_s * cfg.tokens_per_step
        return read >= min(TOKENS_A_WEIGHT * weights, most / 2)

    for shape in _shapes(cfg, LADDER):
        tried = _change(cfg, **shape)
        weights = 12 * tried.n_layer * tried.n_embd**2
        if chosen is not cfg and (most < REREAD_A_WEIGHT * weights or not reads_enough(weights)):
            break  # the larger shape is slower still
        step_s, _ = seconds(tried)
        if chosen is not cfg and not reads_enough(weights):
            break
        chosen = tried
    return chosen


def _last(cfg: Config, most: float) -> int:
    """The last step that was given, or that reads the last of at `most` so many tokens."""
    return cfg.max_iters if "max_iters" in cfg.given else math.ceil(most / cfg.tokens_per_step)


def _fill(cfg: Config, meta: Meta, step_s: float, batch_s: float, most: float, recipe: Recipe, clock: Clock) -> Config:
    """`cfg` with the steps, as many as the recipe's least, and the batches of an evaluation, that fit into the time."""
    last = _last(cfg, most)
    steps = last if "max_iters" in cfg.given else min(last, int(clock.left_s / step_s))
    if math.isinf(step_s):
        raise ConfigError(less_memory(cfg))
    if steps < min(last, recipe.least):
        raise ConfigError(f"minutes: {cfg.minutes:g} are too few, a step takes {step_s:.1f} s here; give more")

    def interval(steps: int) -> int:
        few = max(steps // recipe.evaluations, 1) if recipe.evaluations else None
        return cfg.eval_interval or few or evaluation_interval(steps)

    batches = math.ceil(meta.splits["val"].tokens / (cfg.batch_size * cfg.block_size))
    apart = min(interval(steps), steps)
    spare_s = (clock.left_s - steps * step_s) * apart / steps  # for each evaluation, if the text ends before the time
    fits = max(int(max(EVALUATING * apart * step_s, SPARE * spare_s) / batch_s), 1)
    clock.pause = (min(batches, fits) * batch_s + SAVE_S) / step_s
    within = steps_within(clock.left_s / step_s, clock.pause, interval)
    steps = last if "max_iters" in cfg.given else min(last, within)
    warmup = max(min(cfg.warmup_iters, steps // 5), 1)
    if recipe.evaluations:
        cfg = _choose(cfg, eval_interval=interval(steps))
    return _choose(cfg, max_iters=steps, warmup_iters=warmup, eval_iters=fits if fits < batches else 0)
