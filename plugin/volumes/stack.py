"""A list of layers, lowest first, taken up and down as one."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from plugin import events
from plugin.errors import EbiError, unavailable
from plugin.host import dm
from plugin.volumes import imagemap
from plugin.volumes.layers import Layer, ensure, is_right

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stack:
    """The devices of one volume; the last layer is the one that is used."""

    layers: Sequence[Layer]

    @property
    def top(self) -> str:
        """The mapper that is mounted or published."""
        return self.layers[-1].name

    def is_right(self) -> bool:
        """Whether every layer is there, over the right devices."""
        mappers = [dm.find(layer.name) for layer in self.layers]
        return all(is_right(layer, mapper) for layer, mapper in zip(self.layers, mappers, strict=True))

    @contextmanager
    def built(self) -> Iterator[None]:
        """Every layer there and right. Should this or the block fail, what was made here is taken away again."""
        made: list[str] = []
        try:
            self._clear()
            self._resume()
            for layer in self.layers:
                if ensure(layer):
                    made.append(layer.name)
            yield
        except BaseException:
            try:
                take_down(made[::-1])
            except EbiError as error:  # the first failure is the one to tell
                log.warning("%s", error)
            raise

    def _clear(self) -> None:
        """Remove the layers above one that is absent or wrong, and the wrong one: they stand on nothing."""
        for index, layer in enumerate(self.layers):
            if not is_right(layer, dm.find(layer.name)):
                above = [other.name for other in reversed(self.layers[index:]) if dm.find(other.name)]
                if above:
                    log.warning("removing %s: what it stood on is gone", ", ".join(above))
                    take_down(above)
                return

    def _resume(self) -> None:
        """Go on where a resize was cut short, from below upwards."""
        present = [mapper for layer in self.layers if (mapper := dm.find(layer.name))]
        if any(mapper.suspended for mapper in present):
            for mapper in present:
                dm.resume(mapper.name)

    def grow(self, capacity: int) -> None:
        """Have every layer take the present size of what is below it, down to up, under running I/O.

        Raises UNAVAILABLE when the top device has not reached `capacity` bytes afterwards.
        """
        mapper = dm.find(self.top)
        if mapper and mapper.size >= capacity > 0 and not mapper.suspended:
            return
        for layer in self.layers:
            layer.grow()
        mapper = dm.find(self.top)
        if mapper is None or mapper.size < capacity:
            raise unavailable(
                f"the device {self.top} has {mapper.size if mapper else 0} bytes, not {capacity}",
                "has the device under it grown?",
            )


def take_down(names: Sequence[str]) -> None:
    """Remove the mappers `names`, uppermost first, and images that nothing stands on. Raises PRECONDITION on use."""
    with events.step("unmap"):
        for name in names:
            dm.remove(name)
        imagemap.release_idle()
