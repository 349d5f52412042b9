"""The adapters of a running engine: those of a bank, of which none is dropped while an answer needs it."""

import dataclasses

from jlora.errors import UnknownNameError, UserError, first_few, number_of
from jlora.lora import Bank
from jlora.types import Params


class NoPlace(UserError):
    """There is no place for an adapter until another one leaves."""


@dataclasses.dataclass(eq=False)
class Held:
    """An adapter in a place of the bank.

    Attributes:
        number: the place.
        key: tells it from others that have or had its name.
        users: how many requests need it.
        gone: whether it was removed or replaced, and is only there for them.
    """

    name: str
    number: int
    key: str
    users: int = 0
    gone: bool = False


class Shelf:
    """Adapters by name, in a bank whose places are fixed.

    One that is replaced or removed keeps its place until the requests that came before have their answers.

    Attributes:
        bank: the bank, or None if there is only a base.
    """

    def __init__(self, bank: Bank | None) -> None:
        self.bank = bank
        self._held = {name: Held(name, bank.number(name), name) for name in _names(bank)}
        self._going: list[Held] = []
        self._count = 0

    @property
    def names(self) -> list[str]:
        return list(self._held)

    def get(self, name: str | None) -> Held | None:
        """The adapter of this name; None is the base.

        Raises:
            UnknownNameError: there is none.
        """
        if name is None:
            return None
        if name not in self._held:
            there = f"there are {first_few(self._held, 8)}" if self._held else "there is none"
            raise UnknownNameError(f"no adapter is called {name!r}; {there}")
        return self._held[name]

    def place(self, held: Held | None) -> int:
        """The number of the adapter in the bank."""
        if held is not None:
            return held.number
        return 0 if self.bank is None else self.bank.number(None)

    def warm(self) -> None:
        """Compiles what puts an adapter into a place, if one is free."""
        if self.bank is not None and None in self.bank.names:
            self.bank = self.bank.clear(self.bank.names.index(None), donate=True)

    def require_place(self, name: str) -> None:
        """Raises NoPlace if an adapter of this name cannot be put before another one leaves."""
        old = self._held.get(name)
        if self.bank is None or None in self.bank.names or (old is not None and not old.users):
            return
        waits = f", {len(self._going)} as soon as answers are complete" if self._going else ""
        raise NoPlace(f"{number_of(len(self.bank.names), 'place')}, none of them free{waits}: remove one first")

    def put(self, name: str, adapter: Params) -> None:
        """Adds an adapter, in place of any of this name.

        Raises:
            UserError: it does not fit; all is as before.
            NoPlace: another has to leave first.
        """
        if self.bank is None:
            raise UserError("adapters cannot be added: the engine was started with a base alone")
        self.require_place(name)
        bank, old = self.bank, self._held.get(name)
        self._count += 1
        if old is not None:
            bank = _renamed(bank, old, _leaving(old, self._count))
        self.bank = bank.add(name, adapter, donate=True)
        if old is not None:
            self._leave(old)
        self._held[name] = Held(name, self.bank.number(name), f"{name}\n{self._count}")

    def remove(self, name: str) -> None:
        """Removes an adapter.

        Raises:
            UnknownNameError: there is none of this name.
        """
        held = self.get(name)
        self._count += 1
        self.bank = _renamed(self.bank, held, _leaving(held, self._count))
        self._leave(held)
        del self._held[name]

    def take(self, held: Held | None) -> None:
        """Notes that a request needs the adapter."""
        if held is not None:
            held.users += 1

    def give_back(self, held: Held | None) -> None:
        """Notes that one request less needs it."""
        if held is not None:
            held.users -= 1
            if held.gone and not held.users:
                self._going.remove(held)
                self.bank = _renamed(self.bank, held, None)

    def _leave(self, held: Held) -> None:
        held.gone = True
        if held.users:
            self._going.append(held)


def _names(bank: Bank | None) -> list[str]:
    return [name for name in bank.names if name is not None] if bank else []


def _leaving(held: Held, count: int) -> str | None:
    """What the bank calls an adapter that leaves: nothing, or, while it is in use, a name that nobody asks for."""
    return f"{held.name}\n{count}" if held.users else None


def _renamed(bank: Bank, held: Held, name: str | None) -> Bank:
    """The bank with another name for an adapter; None frees its place, where it stays until another comes."""
    names = (*bank.names[: held.number], name, *bank.names[held.number + 1 :])
    return dataclasses.replace(bank, names=names)
