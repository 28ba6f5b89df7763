"""Who of several processes may have how much in flight: the one book of a router that is several processes.

The parent keeps it. It lends each process slots of each worker; within what it has been lent a process
decides alone, so that a request costs no message and no lock. It guarantees:
- what is lent of a worker is never more than its limit, and what is lent in all never more than `cap`, but
  for what was lent before a limit was lowered: then nothing is lent until enough has come back;
- what a process holds is written down before it learns of it and until it has said that it gave it up, or is
  dead: `leave` gives back exactly that, whatever it was doing;
- nothing lies idle while somebody wants it: as soon as there is not enough, every process is given a share,
  hands back at once what it does not use, and what is above its share as its requests end;
- shares are fair (nobody gets more by asking for more, what one does not want goes to the others), and where
  there are fewer slots than processes that want one, they take turns.

Pure: no clock, no sockets. Source of the shares: max-min fairness, Bertsekas and Gallager, "Data Networks",
section 6.5.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

PLENTY: Final = 1 << 40
"""Slots that a process is lent of a worker without a limit: more than it can use."""
TOTAL: Final = 0
"""In place of a worker's number: all of them together."""
RESERVE: Final = 2
"""What nobody wants is lent in advance, to each process one part in RESERVE times their number of it, so that
few requests have to ask."""


class Lend(msgspec.Struct, tag=True, frozen=True):
    """To a process: so many slots more of a worker."""

    worker: int
    count: int


class Share(msgspec.Struct, tag=True, frozen=True):
    """To a process: others want slots of this worker (TOTAL: of any). It hands back what is idle now and as
    soon as something is, and begins nothing above `slots`. None: there is enough for all."""

    worker: int
    slots: int | None


class Claim(msgspec.Struct, tag=True, frozen=True):
    """From a process: it gives back `returned` slots of a worker, and could use `wants` in all."""

    worker: int
    returned: int
    wants: int


Word = Lend | Share


class _Account:
    """One process and one worker, or all workers."""

    __slots__ = ("held", "share", "wants")

    def __init__(self) -> None:
        self.held = self.wants = 0
        self.share: int | None = None


class Ledger:
    """`words` collects what is to be said to whom; whoever calls a method passes it on, in order."""

    def __init__(self, cap: int | None = None) -> None:
        self.cap = cap
        self.words: list[tuple[int, Word]] = []
        self._limits: dict[int, int | None] = {}
        self._books: dict[int, dict[int, _Account]] = {}
        """By process, then by worker."""
        self._served: dict[int, int] = {}
        """By process: the number of the last loan it was given."""
        self._loans = 0

    def held(self, process: int, worker: int = TOTAL) -> int:
        return self._books[process][worker].held

    def lent(self, worker: int = TOTAL) -> int:
        """To all processes."""
        return sum(book[worker].held for book in self._books.values())

    # -- what happens -----------------------------------------------------------------------------

    def join(self, process: int) -> None:
        self._books[process] = {worker: _Account() for worker in (TOTAL, *self._limits)}
        self._served[process] = 0
        self._settle(self._limits)

    def leave(self, process: int) -> None:
        """It is dead: what it held is free."""
        del self._books[process], self._served[process]
        self._settle(self._limits)

    def add(self, worker: int, limit: int | None) -> None:
        self._limits[worker] = limit
        for book in self._books.values():
            book[worker] = _Account()
        self._settle([worker])

    def limit(self, worker: int, limit: int | None) -> None:
        """Another limit; 0 for a worker that is leaving."""
        self._limits[worker] = limit
        self._settle([worker])

    def bound(self, cap: int | None) -> None:
        """Another cap."""
        self.cap = cap
        self._settle(self._limits)

    def drop(self, worker: int) -> None:
        """It has left, and nothing is in flight on it in any process."""
        del self._limits[worker]
        for book in self._books.values():
            account = book.pop(worker)
            book[TOTAL].held -= account.held
            book[TOTAL].wants -= account.wants
        self._settle(self._limits)

    def claim(self, process: int, claim: Claim) -> None:
        book = self._books[process]
        account = book.get(claim.worker)
        if account is None:
            return  # said before it heard that the worker has left
        assert 0 <= claim.returned <= account.held, "a process gave back what it did not hold"
        account.held -= claim.returned
        book[TOTAL].held -= claim.returned
        book[TOTAL].wants += claim.wants - account.wants
        account.wants = claim.wants
        self._settle([claim.worker] if self.cap is None else self._limits)

    # -- deciding ---------------------------------------------------------------------------------

    def _settle(self, workers: Iterable[int]) -> None:
        """Lends what can be lent of these workers, and says what each may use of them."""
        workers = list(workers)
        self._tell(TOTAL, raised=True)
        for worker in workers:
            self._tell(worker, raised=True)  # first, so that what is lent now may be used
            self._lend(worker)
        for worker in (TOTAL, *workers):
            self._tell(worker, raised=False)

    def _tell(self, worker: int, *, raised: bool) -> None:
        """The shares that have changed; `raised`: only those that are larger now."""
        for process, share in self._shares(worker).items():
            account = self._books[process][worker]
            before = account.share
            if share == before or (raised and share is not None and (before is None or share < before)):
                continue
            account.share = share
            self.words.append((process, Share(worker, share)))

    def _shares(self, worker: int) -> dict[int, int | None]:
        """What each process may use; None while there is enough for all."""
        limit = self.cap if worker == TOTAL else self._limits[worker]
        accounts = {process: book[worker] for process, book in self._books.items()}
        if limit is None or sum(self._needs(process, worker) for process in accounts) <= limit:
            return dict.fromkeys(accounts)
        wants = {process: self._wants(process, worker) for process in accounts}
        wanted = sum(wants.values())
        if wanted <= limit:  # there is enough, but in the wrong hands
            spare = (limit - wanted) // len(accounts)
            return {process: want + spare for process, want in wants.items()}
        return dict(self._fair(limit, accounts, wants))

    def _wants(self, process: int, worker: int) -> int:
        """What it wants, as far as its share of all slots allows."""
        account, total = self._books[process][worker], self._books[process][TOTAL]
        if worker == TOTAL or total.share is None:
            return account.wants
        return min(account.wants, account.held + max(0, total.share - total.held))

    def _needs(self, process: int, worker: int) -> int:
        """Slots it would hold if it got what it wants and gave nothing back."""
        book = self._books[process]
        if worker != TOTAL:
            return max(book[worker].wants, book[worker].held)
        return sum(max(book[number].wants, book[number].held) for number in self._limits)

    def _fair(self, limit: int, accounts: dict[int, _Account], wants: dict[int, int]) -> dict[int, int]:
        shares, left = {}, limit
        order = sorted(accounts, key=lambda process: wants[process])
        while order and wants[order[0]] <= left // len(order):
            process = order.pop(0)
            shares[process] = wants[process]
            left -= shares[process]
        if not order:
            return shares
        each, over = divmod(left, len(order))
        if each:  # those who have more keep it
            order.sort(key=lambda process: -accounts[process].held)
        else:  # there is not one for everybody: whoever has been without for longest is next
            order.sort(key=lambda process: self._served[process])
        for place, process in enumerate(order):
            shares[process] = each + (place < over)
        return shares

    def _lend(self, worker: int) -> None:
        total = self._room(TOTAL)
        room = min(self._room(worker), total)
        for process in sorted(self._books, key=lambda process: self._served[process]):
            account = self._books[process][worker]
            count = min(room, account.wants - account.held, *self._allowed(process, worker))
            if count > 0:
                self._grant(process, worker, count)
                room -= count
        parts = RESERVE * len(self._books)
        ahead = min(room, total // len(self._limits)) // parts if parts else 0
        for process, book in self._books.items():
            account = book[worker]
            if account.share is None is book[TOTAL].share and account.held < PLENTY:
                count = PLENTY if room >= PLENTY else min(ahead, account.wants + ahead - account.held)
                if count > 0:
                    self._grant(process, worker, count)

    def _allowed(self, process: int, worker: int) -> list[int]:
        accounts = [self._books[process][number] for number in (worker, TOTAL)]
        return [account.share - account.held for account in accounts if account.share is not None]

    def _room(self, worker: int) -> int:
        limit = self.cap if worker == TOTAL else self._limits[worker]
        return PLENTY * (len(self._books) + 1) if limit is None else limit - self.lent(worker)

    def _grant(self, process: int, worker: int, count: int) -> None:
        book = self._books[process]
        book[worker].held += count
        book[TOTAL].held += count
        self._loans += 1
        self._served[process] = self._loans
        self.words.append((process, Lend(worker, count)))
