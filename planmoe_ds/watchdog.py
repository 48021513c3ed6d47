"""Nobody waits for ever: where every rank is, who is gone, and one reason that ends all ranks' waits.

Every rank has one thread that talks to the others through the job's own key-value store, about once a second: it says
where its rank is, that it lives, and looks for a reason to stop that another rank wrote. Only while its rank waits does
it look at the others: a rank that is waiting in the same exchange for something else, that ended its program, or that
has not been heard of for a while is a reason. A store behind a dead link never answers and never fails either: so a
second thread looks at the clock alone, and nothing that the training threads ask of the store takes longer than
ANSWER_SECONDS.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch.distributed as dist

from planmoe_ds.backend import Comm, Exchange
from planmoe_ds.errors import PlanMoEError, PlanMoEMismatchError
from planmoe_ds.notices import Notices, Position
from planmoe_ds.stopping import Reason, end_waits

PERIOD_SECONDS = 0.5  # at least; stretched so that the store never gets more than MAX_CALLS_PER_SECOND
MAX_CALLS_PER_SECOND = 4000
SILENCE_SECONDS = 20.0  # without a sign of life a rank that others wait for counts as gone
ANSWER_SECONDS = 5.0  # that a training thread waits for the store
KEPT_STEPS = 24
NO_NUMBER = 1 << 62  # of an exchange that is being started
_MOST_STORE_FAILURES = 3

_Answer = TypeVar("_Answer")


def _lost_a_peer(error: BaseException) -> bool:
    """Whether NCCL says so (ncclRemoteError): not which one."""
    return isinstance(error, RuntimeError) and "remote process exited" in str(error)


_START = Position(-1, -1, "the start", 0.0, waits=False)


class _Awake:
    """Seconds in which others could be heard: a pause of the whole machine is at most `longest` of silence."""

    def __init__(self, longest: float) -> None:
        self.seconds, self._longest, self._looked = 0.0, longest, time.monotonic()

    def look(self) -> float:
        """Now; at most `longest` after the last look."""
        now = time.monotonic()
        self.seconds += min(now - self._looked, self._longest)
        self._looked = now
        return self.seconds


class Watchdog:
    """One rank's view of all others; collective to make, since it names the round of this job's store.

    timeout_seconds: bound of every wait.
    """

    def __init__(self, comms: Sequence[Comm], members: Mapping[int, Sequence[int]], timeout_seconds: float) -> None:
        """comms: all of this rank; members: the global ranks of its groups, by their numbers."""
        self._monitor = _Monitor(comms, members, timeout_seconds)
        self._monitor.start()
        weakref.finalize(self, self._monitor.stop)

    @contextlib.contextmanager
    def waiting(self, group: int, number: int, what: str, on_device: Exchange | None = None) -> Iterator[None]:
        """Be waiting in exchange `number` of `group`; what goes wrong inside becomes the reason for all ranks.

        on_device: the exchange, where an accelerator goes on waiting when the host no longer does.
        """
        monitor = self._monitor
        monitor.move(Position(group, number, what, time.time(), waits=True))
        try:
            yield
            self.check()
            if on_device is None and number != NO_NUMBER:
                monitor.has_passed(group, number)
        except RuntimeError as error:
            if _lost_a_peer(error):
                with contextlib.suppress(PlanMoEError):
                    self.check_for_silence()
            raise monitor.explain(error, what).error() from error
        finally:
            monitor.move(monitor.position._replace(since=time.time(), waits=False), on_device)

    @contextlib.contextmanager
    def reporting(self, group: int, where: str) -> Iterator[None]:
        """Tell all ranks why this one leaves, if an error leaves; `group` is whose exchanges it starts."""
        try:
            yield
        except BaseException as error:
            if _lost_a_peer(error):
                with self.waiting(group, NO_NUMBER, where):
                    raise
            self._monitor.publish(error, where)
            raise

    def check(self) -> None:
        """Raise the reason to stop, if there is one."""
        if self._monitor.reason is not None:
            raise self._monitor.reason.error()

    def check_for_silence(self) -> None:
        """Inside waiting(): check() for as long as it takes to find out that a rank is silent."""
        end = time.monotonic() + SILENCE_SECONDS + 4 * PERIOD_SECONDS
        while time.monotonic() < end:
            self.check()
            time.sleep(PERIOD_SECONDS / 10)


class _Monitor(threading.Thread):
    """The thread that talks to the store; holds no reference to the Watchdog, so that it ends with it."""

    def __init__(self, comms: Sequence[Comm], members: Mapping[int, Sequence[int]], timeout_seconds: float) -> None:
        super().__init__(name="planmoe-watchdog", daemon=True)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.position = _START
        self.reason: Reason | None = None
        self._comms = [weakref.ref(comm) for comm in comms]
        self._members = {number: tuple(ranks) for number, ranks in members.items()}
        self._timeout = timeout_seconds
        self._on_device: tuple[Position, Exchange] | None = None
        self._passed: dict[int, int] = {}  # by group, the last exchange that this rank got past; not on accelerators
        self._told = False  # the reason is in the store
        self._history: deque[Position] = deque(maxlen=KEPT_STEPS)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._notices = Notices(self.rank)
        self._num_heard = 0  # answers of the store
        self._pulses: dict[int, tuple[bytes, float]] = {}
        self._period = max(PERIOD_SECONDS, 3 * self.world_size / MAX_CALLS_PER_SECOND)
        self._awake = self._count_awake()

    def _count_awake(self) -> _Awake:
        return _Awake(max(2 * self._period, SILENCE_SECONDS / 4))

    def move(self, position: Position, on_device: Exchange | None = None) -> None:
        """Be somewhere else, with the device perhaps still in an exchange; cheap."""
        self.position = position
        if on_device is not None:
            self._on_device = position, on_device
        if position.waits:
            self._history.append(position)

    def has_passed(self, group: int, number: int) -> None:
        """Nobody waits for this rank in that exchange any more, even if it ends."""
        self._passed[group] = number

    def _place_of_wait(self) -> Position:
        """Where this rank is, or its device while the host does not wait."""
        place = self.position
        if place.waits or self._on_device is None:
            return place
        begun, exchange = self._on_device
        return place if exchange.passed else begun._replace(waits=True)

    def stop(self) -> None:
        """End the threads; the one that talks to the store says that this rank ended."""
        self._stopping.set()
        if threading.current_thread() is not self:
            self.join(timeout=ANSWER_SECONDS)

    def explain(self, error: RuntimeError, what: str) -> Reason:
        """The reason why a wait failed: one that is known, or else this error, which all ranks then learn."""
        if self.reason is None:
            time.sleep(self._period)  # a rank that is gone takes its neighbours along: who was first?
            self._ask(self._read_reason, None)
        if self.reason is None:
            kind = "mismatch" if isinstance(error, PlanMoEMismatchError) else "error"
            where = self._ask(self._where_all_are, "the job's store does not answer")
            self._give_in_time(Reason(self.rank, kind, f"rank {self.rank} stopped in {what}: {error}\n{where}"))
        assert self.reason is not None
        return self.reason

    def publish(self, error: BaseException, where: str) -> None:
        """Let all ranks stop because of an error of this one's own."""
        if self.reason is None and not isinstance(error, GeneratorExit):
            kind = "mismatch" if isinstance(error, PlanMoEMismatchError) else "error"
            text = (
                str(error)
                if kind == "mismatch"
                else f"rank {self.rank} stopped in {where}: {type(error).__name__}: {error}"
            )
            self._give_in_time(Reason(self.rank, kind, text))

    def _ask(self, question: Callable[[], _Answer], otherwise: _Answer) -> _Answer:
        """The answer of something that asks the store, or `otherwise` when it fails or does not answer."""
        answers = [otherwise]

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(question())

        thread = threading.Thread(target=ask, name="planmoe-ask", daemon=True)
        with contextlib.suppress(RuntimeError):  # the interpreter is about to end
            thread.start()
            thread.join(timeout=ANSWER_SECONDS)
        return answers[-1]

    def _give_in_time(self, reason: Reason) -> None:
        self._ask(lambda: self._give(reason), None)
        self._stop_all(reason)  # unless _give did, with this reason or an earlier one

    def run(self) -> None:
        """Until stop()."""
        threading.Thread(target=self._watch_the_clock, name="planmoe-clock", daemon=True).start()
        failures = 0
        while failures < _MOST_STORE_FAILURES and not self._stopping.wait(self._period):
            failures = 0 if self._look_safely() else failures + 1
        if failures and self._place_of_wait().waits:
            text = f"rank {self.rank} lost the job's store: the process that serves it, rank 0 or the launcher, is gone"
            self._stop_all(Reason(self.rank, "error", text))
        if self._stopping.is_set():
            with contextlib.suppress(RuntimeError):
                self._notices.tell_end(self._passed)

    def _watch_the_clock(self) -> None:
        """Stop a rank that waits while the store does not answer."""
        awake, num_heard, since = self._count_awake(), self._num_heard, 0.0
        while self.reason is None and not self._stopping.wait(self._period):
            place, now = self._place_of_wait(), awake.look()
            if self._num_heard != num_heard:
                num_heard, since = self._num_heard, now
            if place.waits and now - since > SILENCE_SECONDS + self._period:
                text = (
                    f"rank {self.rank} {place.describe()}; the job's store, where ranks say that they live, "
                    f"has not answered for {SILENCE_SECONDS:g} s: the link to it is cut, or the process that serves "
                    "it, rank 0 or the launcher, hangs"
                )
                self._stop_all(Reason(self.rank, "error", text))

    def _look_safely(self) -> bool:
        """False when the store fails, or holds what no rank of this version wrote."""
        try:
            self._look()
        except (RuntimeError, ValueError, TypeError):
            return False
        self._num_heard += 1
        return True

    def _look(self) -> None:
        self._awake.look()
        if self.reason is None:
            self._read_reason()
        elif not self._told:  # found while the store did not answer
            self._give(self.reason)
        position = self._place_of_wait()
        self._notices.tell(position)
        if self.reason is None and position.waits and time.time() - position.since > self._period:
            found = self._suspect(position)
            if found is not None and self._place_of_wait() == position:
                self._give(found)

    def _read_reason(self) -> None:
        with contextlib.suppress(RuntimeError):
            reason = self._notices.reason()
            if reason is not None:
                self._stop_all(reason)

    def _suspect(self, mine: Position) -> Reason | None:
        """What is wrong with a rank that this one waits for."""
        for peer in self._members.get(mine.group, ()):
            if peer == self.rank:
                continue
            theirs = self._notices.position(peer)
            is_here = theirs is not None and theirs.waits and (theirs.group, theirs.number) == (mine.group, mine.number)
            if is_here and theirs is not None and theirs.what != mine.what and mine.number != NO_NUMBER:
                text = (
                    f"ranks are in different places of one exchange: rank {self.rank} {mine.describe()}; rank "
                    f"{peer} {theirs.describe()}. Every rank must run the same layers in the same order"
                )
                return Reason(self.rank, "mismatch", text)
            is_silent = self._is_silent(peer)
            passed = self._notices.passed_before_end(peer, mine.group) if is_silent or not is_here else None
            if passed is not None:
                if passed >= mine.number:
                    continue
                if not self._may_be_behind(mine):
                    return self._missing(mine, peer, "ended its program")
            if is_silent:
                return self._missing(mine, peer, f"has not been heard of for {SILENCE_SECONDS:g} s: it died or hangs")
        if time.time() - mine.since > self._timeout + 2 * self._period:
            text = (
                f"rank {self.rank} {mine.describe()}, longer than the {self._timeout:g} s of timeout_seconds or the job"
            )
            return Reason(self.rank, "error", f"{text}\n{self._where_all_are()}")
        return None

    def _may_be_behind(self, mine: Position) -> bool:
        """This rank's device has much to do before it gets to what its peer is done with."""
        return not self.position.waits and time.time() - mine.since < SILENCE_SECONDS

    def _missing(self, mine: Position, peer: int, how: str) -> Reason:
        theirs = self._notices.position(peer)
        last = "" if theirs is None else f"; it {theirs._replace(waits=False).describe()}"
        text = f"rank {peer} {how}, but rank {self.rank} {mine.describe()}{last}"
        return Reason(self.rank, "error", f"{text}\n{self._where_all_are()}")

    def _is_silent(self, peer: int) -> bool:
        pulse, now = self._notices.pulse(peer), self._awake.seconds
        seen, since = self._pulses.get(peer, (None, now))
        if pulse != seen:
            since = now
        self._pulses[peer] = (pulse, since)
        return now - since > SILENCE_SECONDS

    def _where_all_are(self) -> str:
        """A line per rank of this rank's groups."""
        ranks = sorted({rank for ranks in self._members.values() for rank in ranks})
        return self._notices.where_all_are(ranks, self.position)

    def _give(self, reason: Reason) -> None:
        """Make this the reason for all ranks, unless another one came first."""
        with contextlib.suppress(RuntimeError):
            reason = self._notices.give(reason)
            self._told = True
        self._stop_all(reason)

    def _stop_all(self, reason: Reason) -> None:
        with self._lock:
            if self.reason is not None:
                return
            self.reason = reason
        comms = [comm for comm in (comm() for comm in self._comms) if comm is not None]
        end_waits(comms, self.rank, reason, [step.what for step in self._history])
