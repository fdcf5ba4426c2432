"""The study of a search: trials in a SQLite file that survives a kill, is resumed, and takes several processes.

Every trial's values are a function of the seed, the trial's number, and the trials before it: samplers are made again,
with a seed of their own, for each trial. So a search that was killed and resumed has the same trials as one that was
not, if one process works at it. A trial that a dead process left unfinished keeps its number and values and is
evaluated again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import xxhash

from eval.search.places import OpenPlace, Value
from eval.search.space import Space
from merge.errors import OutputError, UsageError
from merge.needs import need

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

SAMPLERS = ("tpe", "cmaes", "nsga2", "random", "grid")
FILE = "study.sqlite"
NAME = "search"
_STARTUP = 8  # trials at random before a model of the values is fitted
_POPULATION = 16
_MOST_POINTS = 100_000
_WAIT = 60.0  # seconds for another process to finish writing
NOTES, VIOLATION, BASELINE = "notes", "violation", "baseline"  # what is stored with a trial
Point = Mapping[str, Value]


class StudyFile:
    """The study in a directory, and this process's place among those that work at it; a context manager."""

    def __init__(
        self, folder: Path, space: Space, sampler: str, seed: int, n_objectives: int, grid: Sequence[Point] = ()
    ) -> None:
        """
        Args:
            sampler: one of SAMPLERS.
            grid: the points of the sampler "grid", in order.

        Raises:
            UsageError: optuna is not installed, or the file is no study.
        """
        need("a search", "search", "optuna", "cmaes")
        self.folder, self._space, self._sampler, self._seed, self._grid = folder, space, sampler, seed, grid
        self._lock = filelock.FileLock(folder / "study.lock")
        self.study = _opened(folder / FILE, n_objectives, self._lock)
        self._stack = contextlib.ExitStack()
        self.worker = -1

    def __enter__(self) -> StudyFile:
        with self._lock:
            for number in range(1000):
                if (lock := self._alive(number)) is not None:
                    self.worker = number
                    self._stack.callback(lock.release)
                    return self
        raise OutputError(f"{self.folder}: too many processes work at this search.")

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _alive(self, worker: int) -> filelock.BaseFileLock | None:
        """The worker's lock, now held, if no process has it."""
        lock = filelock.FileLock(self.folder / f"worker-{worker}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return None
        return lock

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def shared(self, key: str, make: Callable[[], Any]) -> Any:
        """What all processes of the study share under a key: made by the first that needs it."""
        with self._lock:
            known = self.study.user_attrs
            if key not in known:
                self.study.set_user_attr(key, json.loads(json.dumps(make())))
            return self.study.user_attrs[key]

    def claim(self, about: Mapping[str, object]) -> None:
        """Raises UsageError if the study is one of something else."""
        mine = json.loads(json.dumps(about))
        known = self.shared("search", lambda: mine)
        for key, value in mine.items():
            if known.get(key) != value:
                raise UsageError(
                    f"{self.folder}: holds a search with another {key}; nothing was changed. Choose another --out, "
                    "or --force to begin again."
                )

    def add(self, name: str, point: Point, values: Sequence[float], notes: Mapping[str, object]) -> None:
        """Adds a baseline as a trial whose result is known."""
        from optuna.trial import create_trial

        distributions = {place.name: place.distribution() for place in self._space.active(point)}
        self.study.add_trial(
            create_trial(
                params=dict(point),
                distributions=distributions,
                values=list(values),
                user_attrs={NOTES: dict(notes), BASELINE: name},
            )
        )

    def next(self, most: int | None) -> tuple[Trial, dict[str, Value]] | None:
        """A trial to evaluate, with its values; None when there are `most` of them, or the grid is done."""
        with self._lock:
            trial = self._left() or self._new(most)
            return None if trial is None else (trial, self._values(trial))

    def _left(self) -> Trial | None:
        """A trial that a process left unfinished which is no more."""
        from optuna.trial import Trial, TrialState

        for found in self.trials:
            if found.state != TrialState.RUNNING:
                continue
            owner = int(found.user_attrs.get("worker", self.worker))
            lock = None if owner == self.worker else self._alive(owner)
            if owner == self.worker or lock is not None:
                if lock is not None:
                    lock.release()
                self.study.sampler = self._made(found.number)
                trial = Trial(self.study, found._trial_id)
                trial.set_user_attr("worker", self.worker)
                return trial
        return None

    def _new(self, most: int | None) -> Trial | None:
        trials = self.trials
        asked = sum(BASELINE not in trial.user_attrs for trial in trials)
        if (most is not None and asked >= most) or (self._sampler == "grid" and asked >= len(self._grid)):
            return None
        self.study.sampler = self._made(len(trials), asked)
        trial = self.study.ask()
        trial.set_user_attr("worker", self.worker)
        return trial

    def _values(self, trial: Trial) -> dict[str, Value]:
        place = sum(BASELINE not in other.user_attrs for other in self.trials[: trial.number])
        trial.relative_params  # noqa: B018  # sampled now, by the trial's own seed

        def suggest(at: OpenPlace) -> Value:
            self.study.sampler = self._made(trial.number, place, at.name)
            return _suggested(trial, at)

        return self._space.ask(suggest)

    def _made(self, number: int, place: int = 0, name: str = "") -> BaseSampler:
        seed = xxhash.xxh32_intdigest(f"{self._seed}:{number}:{name}".encode())
        point = self._grid[place] if self._sampler == "grid" else {}
        return _sampler(self._sampler, seed, point)

    def tell(self, trial: Trial, values: Sequence[float] | None, notes: Mapping[str, object]) -> None:
        """The result of a trial; None: it was stopped early, with what was reported, or could not be made."""
        from optuna.trial import TrialState

        trial.set_user_attr(NOTES, dict(notes))  # one entry: each is a transaction
        with self._lock:
            self.study.sampler = self._made(trial.number)
            if values is None:
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                self.study.tell(trial, list(values))

    def importance(self) -> dict[str, float]:
        """The importance of the places that all trials have, by PED-ANOVA; {} where it cannot be computed."""
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        if len(self.study.directions) > 1:
            return {}
        try:
            with _quiet():
                return dict(get_param_importances(self.study, evaluator=PedAnovaImportanceEvaluator()))
        except (ValueError, RuntimeError):  # too few trials
            return {}

    def others_at_work(self) -> bool:
        """Whether another process still evaluates a trial."""
        from optuna.trial import TrialState

        with self._lock:
            for trial in self.trials:
                owner = int(trial.user_attrs.get("worker", self.worker))
                if trial.state == TrialState.RUNNING and owner != self.worker:
                    lock = self._alive(owner)
                    if lock is None:
                        return True
                    lock.release()
        return False


def _opened(path: Path, n_objectives: int, lock: filelock.BaseFileLock) -> Study:
    import optuna
    from sqlalchemy import event

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with lock, _quiet():
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": _WAIT}}
            )

            @event.listens_for(storage.engine, "connect")
            def connected(connection: Any, record: object) -> None:
                # A kill loses nothing; only a power cut may lose the last trials.
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")

            storage.engine.dispose()
            return optuna.create_study(
                storage=storage, study_name=NAME, directions=["maximize"] * n_objectives, load_if_exists=True
            )
    except Exception as error:  # sqlalchemy, alembic and sqlite raise what they like
        raise UsageError(f"{path}: cannot be used as a study ({str(error).splitlines()[0]}). Move it away.") from error


def grid_of(space: Space, points: int) -> list[Point]:
    """Every combination of `points` values of each number and all choices; places that do not count are left out."""
    found: list[Point] = []
    for methods in space.combinations():
        chosen = [place for place in space.active(methods) if place.name not in methods]
        if math.prod(len(place.points(points)) for place in chosen) > _MOST_POINTS:
            raise UsageError(f"--sampler grid: more than {_MOST_POINTS:,} points. Give fewer --points.")
        names = [place.name for place in chosen]
        every = itertools.product(*(place.points(points) for place in chosen))
        found += [methods | dict(zip(names, values, strict=True)) for values in every]
    return found


def _suggested(trial: Trial, place: OpenPlace) -> Value:
    if place.kind == "choice":
        found: Value = trial.suggest_categorical(place.name, place.choices)
        return found
    if place.kind == "int":
        step = 1 if place.step is None else int(place.step)
        return trial.suggest_int(place.name, int(place.low), int(place.high), step=step, log=place.log)
    return trial.suggest_float(place.name, place.low, place.high, step=place.step, log=place.log)


def _sampler(kind: str, seed: int, point: Point) -> BaseSampler:
    from optuna import samplers

    with _quiet():
        if kind == "tpe":
            return samplers.TPESampler(
                n_startup_trials=_STARTUP, seed=seed, multivariate=True, group=True, constraints_func=_constraints
            )
        if kind == "cmaes":
            return samplers.CmaEsSampler(seed=seed, consider_pruned_trials=True, warn_independent_sampling=False)
        if kind == "nsga2":
            return samplers.NSGAIISampler(population_size=_POPULATION, seed=seed, constraints_func=_constraints)
        if kind == "grid":
            return samplers.PartialFixedSampler(dict(point), samplers.RandomSampler(seed))
        return samplers.RandomSampler(seed)


def _constraints(trial: FrozenTrial) -> tuple[float, ...]:
    return (float(trial.user_attrs.get(NOTES, {}).get(VIOLATION, 0.0)),)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without optuna's notes that a part of it is new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
